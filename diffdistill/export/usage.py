"""The code that calls an exported folder: what its card shows, and what `verify` runs."""

from pathlib import Path as FilePath
from typing import Any

from diffdistill.export.lora_files import DIFFUSERS_FILE, KOHYA_FILE
from diffdistill.export.record import ExportRecord, without_home
from diffdistill.models.spec import TrainedModel
from diffdistill.models.teachers import pipeline_of
from diffdistill.models.teachers.hub import is_hub_name
from diffdistill.settings.schema import UserError

PROMPTS = ("a red square", "two dogs")
LATER_SEED = 1  # of torch's own generator, for pipelines that draw their later noise by it


def usage_code(model: TrainedModel, record: ExportRecord, place: str) -> str:
    """A program that loads the folder as `pipe` and makes one `image`.

    place: code for the folder, or its name on the hub.  It runs in any folder. Everything else that stands in it is a
    value's `repr` or a name; raises UserError where a name is none, since `verify` runs the program.
    """
    named = (record.pipeline, record.scheduler or record.pipeline, *record.absent, *record.call)
    if wrong := [name for name in named if not name.isidentifier()]:
        raise UserError(f"export: {wrong[0]!r} is not a valid name; has the teacher's folder changed?")
    lines = [f"place = {place}"]
    if record.base:
        name, _, revision = record.base.partition("@") if is_hub_name(record.base) else (record.base, "", "")
        lines.append(f"base = {repr(name) if is_hub_name(record.base) else folder_code(FilePath(name))}")
        lines += _loading_lora(record, revision)
    else:
        own = f", custom_pipeline={record.own_pipeline!r}" if record.own_pipeline else ""
        trust = ", trust_remote_code=True" if has_code(record) else ""
        lines.append(f"pipe = {_class(record)}.from_pretrained(place{_without(record)}{own}{trust})")
    if draws_by_torch(model, record):
        lines.append(f"torch.manual_seed({LATER_SEED})  # of the noise between its steps")
    lines.append(f"image = pipe({_arguments(model, record)}).images[0]")
    classes = sorted([_class(record), *([record.scheduler] if record.scheduler else [])])
    head = ["from pathlib import Path", ""] if any("Path(" in line for line in lines) else []
    return "\n".join([*head, "import torch", f"from diffusers import {', '.join(classes)}", "", *lines])


def has_code(record: ExportRecord) -> bool:
    """Whether the program runs code out of the folder."""
    return record.kind == "self-contained" or record.own_pipeline is not None


def _class(record: ExportRecord) -> str:
    return "DiffusionPipeline" if record.own_pipeline else record.pipeline


def folder_code(folder: FilePath) -> str:
    """Code for a folder on this machine that does not tell who its user is."""
    shown = without_home(str(folder.resolve()))
    return f"str(Path({shown!r}).expanduser())" if shown.startswith("~/") else repr(shown)


def takes_text(model: TrainedModel) -> bool:
    """Whether it is told what to draw by prompts."""
    return bool({"text", "pooled_text"} & model.denoiser.net.accepts)


def makes_pictures(model: TrainedModel) -> bool:
    """Whether what comes out can be looked at: points cannot."""
    source, shape = pipeline_of(model.spec), model.spec.image_shape
    return (source is not None and source.has_vae) or (len(shape) == 3 and shape[0] in (1, 3))


def asked_of(model: TrainedModel, count: int) -> dict[str, Any]:
    """How a pipeline is asked for so many images, at most 2: by prompts, by classes, or by their number."""
    if takes_text(model):
        return {"prompt": list(PROMPTS[:count])}
    if not model.spec.num_classes:
        return {"batch_size": count}
    classes = model.spec.classes or tuple(range(model.spec.num_classes))
    return {"class_labels": [classes[0], classes[-1]][:count]}  # of different students, where there are several


def draws_by_torch(model: TrainedModel, record: ExportRecord) -> bool:
    """Whether noise between its steps is not of the generator that its pipeline is given."""
    source = pipeline_of(model.spec)
    is_stock = record.kind != "self-contained" and source is not None and not source.family.hands_on_generator
    return is_stock and model.spec.sampler.num_evaluations > 1


def _without(record: ExportRecord) -> str:
    return "".join(f", {name}=None" for name in record.absent)


def _loading_lora(record: ExportRecord, revision: str) -> list[str]:
    """The lines that make `pipe`. Without a dtype transformers would take the one that each part's config names."""
    file = KOHYA_FILE if record.kind == "kohya" else DIFFUSERS_FILE
    pinned = f", revision={revision!r}" if revision else ""
    return [
        f"pipe = {record.pipeline}.from_pretrained(base{pinned}{_without(record)}, torch_dtype=torch.float32)",
        f"pipe.load_lora_weights(place, weight_name={file!r})",
        f'pipe.scheduler = {record.scheduler}.from_pretrained(place, subfolder="scheduler")',
    ]


def _arguments(model: TrainedModel, record: ExportRecord) -> str:
    asked = asked_of(model, 1)
    asked = {"prompt": asked["prompt"][0]} if "prompt" in asked else asked
    call = {} if record.own_pipeline else record.call
    asked |= call | ({} if makes_pictures(model) else {"output_type": "latent"})
    shown = [f"{name}={value!r}" for name, value in asked.items()]
    return ", ".join([*shown, "generator=torch.Generator().manual_seed(0)"])
