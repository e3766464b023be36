"""A folder for a Hugging Face Space: an exported student, its teacher where that was trained here, and a page to play
with. It runs without this package: app.py is a copy of `space_app`."""

import json
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path as FilePath
from typing import Any

import yaml

from diffdistill.export import space_app
from diffdistill.export.card import read_state
from diffdistill.export.record import RECORD, guidance_of, read_record
from diffdistill.export.run import Exported, ExportOptions, building_place, export
from diffdistill.export.usage import has_code, makes_pictures, takes_text
from diffdistill.export.verify import ExportError
from diffdistill.models.load import load_model
from diffdistill.models.places import find_again
from diffdistill.models.spec import TrainedModel
from diffdistill.models.teachers import is_pipeline
from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import say
from diffdistill.storage.atomic import write_text_atomically

FACTS = "space.json"
GRADIO = "6.31.0"
"""That the page was tested with."""
NEEDED = ("torch", "diffusers", "accelerate", "safetensors")
STUDENT, TEACHER = "student", "teacher"
PAGE = ("app.py", "requirements.txt", "README.md")


def export_space(place: str, folder: FilePath, options: ExportOptions) -> Exported:
    """Write the export of `place` into `folder`/student, the teacher's beside it, and what makes a Space of them.

    Raises UserError if the folder holds something else, on kinds that are no whole pipelines, and as `export`.
    """
    if options.kind in ("lora", "kohya"):
        raise UserError(f"--space: needs a complete pipeline, not --kind {options.kind}")
    if options.push:
        raise UserError(
            "--push: uploads a model and not a Space; leave it out, the Space's README.md says how to push it"
        )
    if folder.is_dir() and any(folder.iterdir()) and not _is_ours(folder):
        raise UserError(f"--space {folder}: holds something other than a Space of diffdistill; name a new folder")
    model = load_model(place, ema=options.ema)
    if not makes_pictures(model):
        raise UserError(f"--space: {place} does not sample images")
    made = export(place, folder / STUDENT, options)
    teacher = _export_teacher(model, folder / TEACHER, is_verified=options.is_verified)
    if not teacher and (folder / TEACHER / RECORD).is_file():
        shutil.rmtree(folder / TEACHER)  # of an export before
    models = [_facts(folder / name, name) for name in ((TEACHER, STUDENT) if teacher else (STUDENT,))]
    if teacher and (models[0]["takes_steps"] or "guidance_scale" in models[0]["call"]):
        models[0]["call"] = models[0]["call"] | {"guidance_scale": guidance_of(read_state(model)["config"]["method"])}
    labels = list(model.spec.classes or range(model.spec.num_classes))
    names = model.spec.class_names
    told = {
        "takes_text": takes_text(model),
        "labels": labels,
        "classes": [names[label] if names else str(label) for label in labels],
        "models": models,
    }
    write_text_atomically(folder / "app.py", FilePath(space_app.__file__).read_text(encoding="utf-8"))
    write_text_atomically(folder / "requirements.txt", _requirements(takes_text=takes_text(model)))
    write_text_atomically(folder / "README.md", _card(folder.resolve().name, made.folder, has_teacher=bool(teacher)))
    write_text_atomically(folder / FACTS, json.dumps(told, indent=1) + "\n")
    return made


def _is_ours(folder: FilePath) -> bool:
    """Whether it holds a Space of ours, or what one leaves that was broken off: then its facts are not yet there."""
    if (folder / FACTS).is_file():
        return True
    names = {one.name for one in folder.iterdir()}
    shown = {name for name in names if not name.startswith(".")}
    begun = (folder / STUDENT / RECORD).is_file() or (not shown and building_place(folder / STUDENT).name in names)
    return begun and shown <= {STUDENT, TEACHER, *PAGE}


def _export_teacher(model: TrainedModel, folder: FilePath, *, is_verified: bool) -> Exported | None:
    """A teacher that was trained by us; one of the hub is too large to be copied, and has licences of its own."""
    state = read_state(model)
    if not isinstance(state.get("teacher"), str) or is_pipeline(state["teacher"]):
        return None
    found = find_again("teacher", model.source, state)
    if found.place is None:
        say(f"the Space shows the student alone: no teacher at {', '.join(found.looked)}")
        return None
    try:
        return export(found.place, folder, ExportOptions(is_verified=is_verified))
    except (UserError, ExportError) as error:
        say(f"the Space shows the student alone: {error}")
        return None


def _facts(folder: FilePath, name: str) -> dict[str, Any]:
    record = read_record(folder)
    assert record is not None
    return {
        "name": name,
        "folder": folder.name,
        "is_teacher": name == TEACHER,
        "pipeline": record.pipeline,
        "absent": list(record.absent),
        "call": record.call,
        "has_code": has_code(record),
        "takes_steps": record.kind == "self-contained",
        "num_evaluations": record.sampler.num_evaluations,
    }


def _requirements(*, takes_text: bool) -> str:
    """The versions of this machine, which verified the folder."""
    needed = (*NEEDED, *(("transformers", "sentencepiece") if takes_text else ()))
    return "".join(f"{name}{_pin(name)}\n" for name in needed)


def _pin(name: str) -> str:
    try:
        return f"=={version(name).partition('+')[0]}"
    except PackageNotFoundError:
        return ""


def _card(name: str, student: FilePath, *, has_teacher: bool) -> str:
    """README.md, with the front matter that makes a Space of a repository."""
    card = (student / "README.md").read_text(encoding="utf-8").split("---\n", 2)[1]
    licence = {key: value for key, value in yaml.safe_load(card).items() if key.startswith("license")}
    front = {
        "title": name,
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "app_file": "app.py",
        "pinned": False,
        **licence,
    }
    shown = "the student beside its teacher, from the same noise" if has_teacher else "the student"
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {name}\n\nA page that draws with {shown}. "
        f"`student/README.md` says how it was made and how to call it.\n\n"
        "To try it here: `pip install -r requirements.txt gradio`, then `python app.py`. To publish it: create a Space "
        "with the SDK gradio on huggingface.co, and push this folder to it.\n"
    )
