"""A pipeline of diffusers' own classes with a student for its network: no code of ours is needed to load it."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from diffdistill.export.schedulers import stock_steps
from diffdistill.export.self_contained import write_json
from diffdistill.families import Pipeline, open_pipeline
from diffdistill.families.pipeline import INDEX, read_json
from diffdistill.model import TrainedModel
from diffdistill.networks.diffusers_model import DiffusersNetwork
from diffdistill.schema import UserError

COPIED = (".json", ".txt", ".model", ".safetensors")
"""Endings of files that a pipeline's other parts are made of. Pickles are left behind."""


@dataclass(frozen=True)
class StockFolder:
    """source: the teacher's pipeline.  kind: the class that loads the folder.  call: how it is called."""

    source: Pipeline
    kind: str
    call: Mapping[str, Any]


def write_stock(model: TrainedModel, folder: FilePath) -> StockFolder:
    """Write the teacher's pipeline with the student's network and the scheduler of its steps.

    model: without LoRA.  Raises UserError if diffusers' classes cannot say what the student does.
    """
    net = model.denoiser.net
    if model.spec.pipeline is None or not isinstance(net, DiffusersNetwork):
        raise UserError(f"{model.source}: its network is not one of diffusers' own; use --kind self-contained")
    source = open_pipeline(model.spec.pipeline)
    family = source.family
    if not family.has_stock_pipeline(source.options):
        raise UserError(f"{model.source}: diffusers has no pipeline that gives this network its classes")
    scheduler = read_json(source.folder / "scheduler" / "scheduler_config.json")
    steps = stock_steps(model.denoiser, model.spec.sampler, scheduler, family.steps_argument)
    folder.mkdir(parents=True, exist_ok=True)
    for part in source.folder.iterdir():
        if part.is_dir() and part.name not in (family.network, "scheduler") and part.name in source.index:
            shutil.copytree(part, folder / part.name, dirs_exist_ok=True, ignore=_others)
    net.model.save_pretrained(folder / family.network)  # type: ignore[operator]
    steps.scheduler.save_pretrained(folder / "scheduler")
    kind = family.stock_pipeline or str(source.index["_class_name"])
    parts = {name: value for name, value in source.index.items() if name != "_name_or_path"}
    index = {**parts, "_class_name": kind, "scheduler": ["diffusers", type(steps.scheduler).__name__]}
    write_json(folder / INDEX, index)
    return StockFolder(source, kind, {**steps.call, **family.plain_call})


def _others(folder: str, names: list[str]) -> set[str]:
    """What is not copied."""
    return {name for name in names if (FilePath(folder) / name).is_file() and not name.endswith(COPIED)}
