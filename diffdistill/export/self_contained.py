"""A folder that diffusers loads with code of its own: for networks that diffusers does not have."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path as FilePath
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from diffdistill import __version__
from diffdistill.checkpoint import write_text_atomically
from diffdistill.export.bundle import bundle
from diffdistill.model import ModelSpec, TrainedModel
from diffdistill.router import RoutedDenoiser

COMPONENT = "model"
WEIGHTS = "diffusion_pytorch_model.safetensors"
HEADER = f'''"""A distilled model, made by diffdistill {__version__} out of the code that trained it.

It imports torch and diffusers only. Licence of the code: Apache-2.0.
"""

'''
USED = """from diffdistill.denoiser import Denoiser
from diffdistill.export.exported import ExportedModel
"""


def write_self_contained(model: TrainedModel, folder: FilePath, *, guidance_scale: float = 1.0) -> None:
    """Write what `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads.

    guidance_scale: of calls that name none.
    """
    import diffusers

    code = network_code(model)
    # diffusers keeps the code of all local folders in one place, by file name: the same name must be the same code.
    module = f"network_{hashlib.sha256(code.encode()).hexdigest()[:12]}"
    place = folder / COMPONENT
    place.mkdir(parents=True, exist_ok=True)
    for old in place.glob("network_*.py"):
        old.unlink()
    write_text_atomically(place / f"{module}.py", code)
    config = {"_class_name": "Model", "_diffusers_version": diffusers.__version__, "guidance_scale": guidance_scale}
    write_json(place / "config.json", config)
    save_file(_weights(model), place / WEIGHTS, {"format": "pt"})
    template = FilePath(__file__).with_name("pipeline.py").read_text(encoding="utf-8")
    write_text_atomically(folder / "pipeline.py", template)
    index = {
        "_class_name": ["pipeline", "DistilledPipeline"],
        "_diffusers_version": diffusers.__version__,
        COMPONENT: [module, "Model"],
    }
    write_json(folder / "model_index.json", index)


def network_code(model: TrainedModel) -> str:
    """The file that builds the model's network and samples from it."""
    spec, router = model.spec, getattr(model.denoiser, "router", None)
    kinds = {*_kinds(spec.model), *_kinds(spec.sampler), *_kinds(router)}
    lines = sorted(f"from {kind.__module__} import {kind.__name__}" for kind in kinds if kind is not type(spec.model))
    return bundle(HEADER, USED + "\n".join(lines) + "\n\n", _body(spec, router, len(_students(model))))


def _body(spec: ModelSpec, router: Any, num_students: int) -> str:
    """The class that `model_index.json` names. The repr of a setting is the code that makes it."""
    shape, classes, model = spec.image_shape, spec.num_classes, spec.model
    return f'''class Model(ExportedModel):
    """What was exported."""

    image_shape = {shape}
    num_classes = {classes}
    num_students = {num_students}
    sampler = {spec.sampler!r}
    router = {router!r}

    @staticmethod
    def make_denoiser():
        net = {model.network!r}.build({shape}, {classes}, {spec.class_dropout})
        return Denoiser(net, {model.path!r}, {model.predicts!r}, sigma_data={model.sigma_data})
'''


def _kinds(value: object) -> Iterator[type]:
    """The classes of a setting and of all settings in it."""
    if isinstance(value, tuple):
        for item in value:
            yield from _kinds(item)
    elif is_dataclass(value):
        yield type(value)
        for part in fields(value):
            yield from _kinds(getattr(value, part.name))


def _students(model: TrainedModel) -> list[Any]:
    return list(model.denoiser.students) if isinstance(model.denoiser, RoutedDenoiser) else [model.denoiser]


def _weights(model: TrainedModel) -> dict[str, Tensor]:
    return {
        f"students.{number}.{name}": tensor.detach().cpu().contiguous().clone()
        for number, student in enumerate(_students(model))
        for name, tensor in student.state_dict().items()
    }


def write_json(file: FilePath, value: Any) -> None:
    """As diffusers writes its configs."""
    write_text_atomically(file, json.dumps(value, indent=2) + "\n")
