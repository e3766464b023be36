"""The README.md of an exported folder: how to call it, how it was made, what it scores, under whose licence."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
import yaml

from diffdistill.data.classes import told_classes
from diffdistill.data.pictures import save_grid
from diffdistill.export.comfyui import WORKFLOW
from diffdistill.export.habits import Habits, show_habits
from diffdistill.export.record import ExportRecord
from diffdistill.export.usage import PROMPTS, makes_pictures, takes_text, usage_code
from diffdistill.inference.image_generator import ModelImageGenerator, SampleRequest
from diffdistill.models.encoders import encoder_of
from diffdistill.models.load import find_checkpoint, first_student
from diffdistill.models.spec import TrainedModel
from diffdistill.models.teachers import is_pipeline, open_pipeline, pipeline_of
from diffdistill.models.teachers.compose import tell_made_of
from diffdistill.models.teachers.hub import is_hub_name
from diffdistill.models.teachers.pipeline import read_json
from diffdistill.settings.limits import MAX_TEXT
from diffdistill.settings.reading import read_bytes
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import parse_yaml
from diffdistill.storage.atomic import write_text_atomically
from diffdistill.storage.checkpoint import STATE

PICTURE = "samples.png"
PICTURED = {False: 20, True: 4}
"""Images of the picture, without a VAE and with one."""
Scores = Callable[[str], list[dict[str, Any]]]
"""The `model-index` of what was measured of a place. Raises UserError if nothing was."""
LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class CardFacts:
    """place: what was exported.  config: of its run.  licence: the teacher's, default what its card says.
    scores: gives the `model-index` of what was measured of a place.  habits: of pipelines of diffusers' classes."""

    place: str
    model: TrainedModel
    record: ExportRecord
    config: Mapping[str, Any]
    licence: str | None = None
    scores: Scores | None = None
    habits: Habits | None = None


def write_card(folder: FilePath, facts: CardFacts, *, name: str, place: str, difference: float | None) -> None:
    """Write README.md and, where there are images, a picture of samples.

    place: code for where the folder will be, or its name on the hub.  difference: what `verify` found.
    Raises UserError if nothing was measured of this model.
    """
    licence = {"license": facts.licence} if facts.licence else teacher_licence(facts.model.spec.pipeline)
    front = yaml.safe_dump(_metadata(facts, licence), sort_keys=False)
    parts = [f"---\n{front}---\n\n# {name}", _summary(facts), "## How to call it", _usage(facts, place)]
    if draw_samples(facts.model, folder / PICTURE):
        parts.append(f"![Samples]({PICTURE})")
    if (folder / WORKFLOW).is_file():
        parts.append(
            f"For ComfyUI: `{WORKFLOW}` is a workflow in the format of its API, for the file of factors in "
            "`models/loras` and the base model's checkpoint, whose name is to be put in."
        )
    if difference is not None:
        parts.append(f"Loaded in a process without diffdistill, it made the run's own images {how_near(difference)}.")
    if facts.model.spec.class_names:
        parts += ["## Classes", _classes(facts)]
    if facts.config:
        shown = {name: value for name, value in facts.config.items() if name != "run"}
        recipe = yaml.safe_dump(shown | {"teacher": _shown_teacher(shown.get("teacher"))}, sort_keys=False)
        parts += ["## Recipe", f"```yaml\n{recipe}```"]
    parts += ["## Licence", _licence_note(facts, licence.get("license"))]
    write_text_atomically(folder / "README.md", "\n\n".join(parts) + "\n")


def read_state(model: TrainedModel) -> dict[str, Any]:
    """A run's checkpoint's: its config, its teacher; of several students' runs the first's; empty for other models."""
    place = first_student(model.source)
    file = (place if place == model.source else find_checkpoint(place)) / STATE
    return read_json(file) if file.exists() else {}


def teacher_licence(pipeline: str | None) -> dict[str, str]:
    """What the card of the teacher's pipeline says of its licence."""
    return licence_in(open_pipeline(pipeline).folder) if pipeline else {}


def licence_in(folder: FilePath) -> dict[str, str]:
    """What a folder's card says of its licence; nothing where there is no card."""
    file = folder / "README.md"
    if not file.is_file():
        return {}
    try:
        text = read_bytes(file, limit=MAX_TEXT).decode("utf-8", errors="replace")
    except OSError:
        return {}
    _, separator, rest = text.partition("---\n")
    try:
        front = parse_yaml(rest.partition("\n---")[0], origin=str(file)) if separator else None
    except UserError:
        return {}
    found = front if isinstance(front, dict) else {}
    return {key: found[key] for key in LICENCE_KEYS if isinstance(found.get(key), str)}


def draw_samples(model: TrainedModel, file: FilePath) -> bool:
    """Whether samples were drawn: points are no pictures."""
    if not makes_pictures(model):
        return False
    source = pipeline_of(model.spec)
    has_vae = source is not None and source.has_vae
    imager = ModelImageGenerator(model, SampleRequest(prompts=PROMPTS if encoder_of(model.spec) else ()))
    images = torch.cat([imager(index) for index in torch.arange(PICTURED[has_vae]).split(4)])
    save_grid(file, images, columns=min(10, len(images)))
    return True


def how_near(difference: float) -> str:
    """The greatest difference of two images' values, in words."""
    return f"within {difference:.1g}, in float32" if difference else "exactly"


def _metadata(facts: CardFacts, licence: Mapping[str, str]) -> dict[str, Any]:
    """The front matter that the hub reads."""
    method = facts.config.get("method", {}).get("name")
    about: dict[str, Any] = {
        **licence,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image" if takes_text(facts.model) else "unconditional-image-generation",
        "tags": ["diffusion", "distillation", *([method] if method else []), *(["lora"] if facts.record.base else [])],
        "base_model": _base_model(facts.model),
        "model-index": facts.scores(facts.place) if facts.scores else None,
    }
    return {name: value for name, value in about.items() if value is not None}


def _summary(facts: CardFacts) -> str:
    count, config = facts.model.spec.sampler.num_evaluations, facts.config
    how = f" by `{config['method']['name']}`" if config else ""
    place = config.get("teacher") or facts.record.teacher
    named, base = _named(place if isinstance(place, str) else None), _base_model(facts.model)
    known = f" ({base})" if base and named and base != named.partition("@")[0] else ""
    teacher = f", from `{named}`{known}" if named else f", from {base}" if base else ""
    source = pipeline_of(facts.model.spec)
    if told := source and tell_made_of(source):
        teacher = f", from {told}"
    return f"Distilled with diffdistill{how}{teacher}: {_what(facts.model)} in {count} NFE (network evaluations)."


def _what(model: TrainedModel) -> str:
    """Images, with their height and width in pixels, or points."""
    source, shape = pipeline_of(model.spec), model.spec.image_shape
    if not makes_pictures(model):
        return f"{' x '.join(map(str, shape))} samples"
    height, width = source.image_size if source else shape[1:]
    return f"images of {height} x {width} pixels"


def _base_model(model: TrainedModel) -> str | None:
    """The name on the hub of the pipeline that it came from: that it was fetched by, or that its own folder tells."""
    source = pipeline_of(model.spec)
    told = source.index.get("_name_or_path") if source else None
    names = [source.place.partition("@")[0] if source else None, told]
    return next((name for name in names if isinstance(name, str) and is_hub_name(name)), None)


def _usage(facts: CardFacts, place: str) -> str:
    """The very program that `verify` ran, and what there is to know of it."""
    record = facts.record
    if record.kind == "self-contained":
        note = (
            "Its steps, and no guidance beside what the network is told, are the defaults. The code in `pipeline.py` "
        )
        note += "and `model/` is what trained it, and imports torch and diffusers only."
    else:
        steps = {name: record.call[name] for name in ("timesteps", "sigmas") if name in record.call}
        note = "".join(f"It was trained for these {name}, {list(value)}. " for name, value in steps.items())
        note += "Guidance is off: the student has its teacher's in it."
    habits = f"\n\n{show_habits(facts.habits, _asked(facts))}" if facts.habits else ""
    return f"```python\n{usage_code(facts.model, record, place)}\n```\n\n{note}{habits}"


def _asked(facts: CardFacts) -> str:
    """What its pipeline is always told, as an argument without its value."""
    return "prompt" if takes_text(facts.model) else "class_labels" if facts.model.spec.num_classes else ""


def _classes(facts: CardFacts) -> str:
    """Their names by number, of which a long list is cut."""
    spec = facts.model.spec
    told = told_classes(spec.classes or range(spec.num_classes), spec.class_names)
    by_name = "a name may stand for its number" if facts.record.kind == "self-contained" else "a call takes the numbers"
    return f"`class_labels`: {told}. All are in `diffdistill.json`; {by_name}."


def _licence_note(facts: CardFacts, licence: str | None) -> str:
    source = pipeline_of(facts.model.spec)
    has_checker = source is not None and source.class_of("safety_checker") is not None
    checker = " The teacher's safety checker is not part of this pipeline." if has_checker else ""
    return _terms(facts, licence) + checker


def _terms(facts: CardFacts, licence: str | None) -> str:
    if licence is not None:
        return f"The teacher's, `{licence}`, holds for this student as well."
    if facts.model.spec.pipeline and is_pipeline(facts.model.spec.pipeline):
        return "The teacher's card names no licence. Its terms hold for this student as well: look them up."
    return "The teacher's, which was trained here: that of the images and texts that it was trained on."


def _shown_teacher(teacher: Any) -> Any:
    """The setting, with places as `_named` shows them."""
    if isinstance(teacher, dict):
        return {key: _named(v) if key in ("name", "file", "place") else _shown_teacher(v) for key, v in teacher.items()}
    if isinstance(teacher, (list, tuple)):
        return [_shown_teacher(one) for one in teacher]
    return _named(teacher) if isinstance(teacher, str) and ("/" in teacher or FilePath(teacher).is_dir()) else teacher


def _named(place: str | None) -> str | None:
    """A name on the hub, or the last part of a path."""
    return place if place is None or is_hub_name(place) else FilePath(place).name
