"""The README.md of an exported folder: how to call it, how it was made, what it scores, under whose licence."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import yaml

from diffdistill.checkpoint import STATE, write_text_atomically
from diffdistill.inference import sample_images
from diffdistill.model import TrainedModel
from diffdistill.preview import save_grid
from diffdistill.schema import UserError

PICTURE = "samples.png"
PICTURED = 20


@dataclass(frozen=True)
class CardFacts:
    """place: what was exported.  pipeline: diffusers' class, None for code of its own.  call: its arguments.
    teacher: the folder of the teacher's pipeline, whose card may name a licence."""

    place: str
    model: TrainedModel
    pipeline: str | None
    call: Mapping[str, Any]
    teacher: FilePath | None


def write_card(folder: FilePath, facts: CardFacts, *, licence: str | None, records: FilePath | None) -> None:
    """Write README.md, and a picture of samples where the network makes pixels without a prompt.

    licence: of the teacher; default what its card says.  records: a JSONL file of `diffdistill eval`, for the scores.
    """
    config = read_config(facts.model)
    has_picture = _draw(facts.model, folder / PICTURE)
    about: dict[str, Any] = {
        "license": licence or teacher_licence(facts.teacher),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image" if _takes_text(facts) else "unconditional-image-generation",
        "tags": ["diffusion", "distillation", *([config["method"]["name"]] if config else [])],
        "base_model": facts.model.spec.pipeline,
        "model-index": model_index_of(facts.place, records) if records else None,
    }
    front = yaml.safe_dump({name: value for name, value in about.items() if value is not None}, sort_keys=False)
    parts = [
        f"---\n{front}---\n\n# {folder.resolve().name}",
        _summary(facts, config),
        "## How to call it",
        _usage(facts),
    ]
    if has_picture:
        parts.append(f"![Samples]({PICTURE})")
    if config:
        recipe = yaml.safe_dump(config, sort_keys=False)
        parts += ["## Recipe", f"```yaml\n{recipe}```"]
    parts += ["## Licence", _licence_note(about["license"])]
    write_text_atomically(folder / "README.md", "\n\n".join(parts) + "\n")


def read_config(model: TrainedModel) -> dict[str, Any]:
    """The run's config, from its checkpoint; empty for a model that is of no single run."""
    file = model.source / STATE
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["config"] if file.exists() else {}
    return found


def teacher_licence(folder: FilePath | None) -> str | None:
    """What the card of the teacher's pipeline names as its licence."""
    file = folder / "README.md" if folder else None
    if file is None or not file.is_file():
        return None
    _, separator, rest = file.read_text(encoding="utf-8", errors="replace").partition("---\n")
    try:
        front = yaml.safe_load(rest.partition("\n---")[0]) if separator else None
    except yaml.YAMLError:
        return None
    found = front.get("license") if isinstance(front, dict) else None
    return found if isinstance(found, str) else None


def model_index_of(place: str, records: FilePath) -> list[dict[str, Any]]:
    """The `model-index` of what was measured of this place. Raises UserError if nothing was."""
    from diffdistill.eval.board_files import model_index
    from diffdistill.eval.leaderboard import read_board

    board = read_board([records])
    found = [
        (group, entry)
        for group in board.measured
        for entry in group.entries
        if any(found.record.model and found.record.model.source == place for found in entry.sources)
    ]
    if not found:
        raise UserError(f"--records {records}: has no record of {place}")
    return [model_index(found[0][1].name, found)]


def _summary(facts: CardFacts, config: Mapping[str, Any]) -> str:
    spec, count = facts.model.spec, facts.model.spec.sampler.num_evaluations
    how = f" by `{config['method']['name']}`" if config else ""
    teacher = f", from `{config['teacher']}`" if config and config.get("teacher") else ""
    shape = " x ".join(map(str, spec.image_shape))
    calls = "one call" if count == 1 else f"{count} calls"
    return f"Distilled with diffdistill{how}{teacher}: {shape} samples in {calls} of the network."


def _usage(facts: CardFacts) -> str:
    """The exact call."""
    kind = facts.pipeline or "DiffusionPipeline"
    arguments: dict[str, Any] = {"prompt": "a red square"} if _takes_text(facts) else {}
    if facts.model.spec.num_classes:
        arguments = {"class_labels": [facts.model.spec.classes[0] if facts.model.spec.classes else 0]}
    shown = ", ".join(f"{name}={value!r}" for name, value in {**arguments, **facts.call}.items())
    trust = "" if facts.pipeline else ", trust_remote_code=True"
    code = f'from diffusers import {kind}\n\npipe = {kind}.from_pretrained("."{trust})\nimage = pipe({shown}).images[0]'
    steps = facts.call.get("timesteps") or facts.call.get("sigmas")
    note = f"It was trained for these steps, {steps}, and without guidance." if steps else ""
    own = "Its steps, and no guidance, are the defaults." if not facts.pipeline else note
    return f"```python\n{code}\n```" + (f"\n\n{own}" if own else "")


def _licence_note(licence: str | None) -> str:
    if licence is None:
        return "The teacher's card names no licence. Its terms hold for this student as well: look them up."
    return f"The teacher's, `{licence}`, holds for this student as well."


def _takes_text(facts: CardFacts) -> bool:
    return "text" in facts.model.denoiser.net.accepts  # type: ignore[operator]


def _draw(model: TrainedModel, file: FilePath) -> bool:
    """Whether samples were drawn: latents and points are no pictures."""
    shape = model.spec.image_shape
    if len(shape) != 3 or shape[0] not in (1, 3) or "text" in model.denoiser.net.accepts:  # type: ignore[operator]
        return False
    save_grid(file, sample_images(model, count=PICTURED), columns=10)
    return True
