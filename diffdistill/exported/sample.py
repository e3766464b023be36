"""`diffdistill sample`: a grid of images, next to the teacher's on request."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path as FilePath

from torch import Tensor

from diffdistill.data.pictures import save_grid, save_panels
from diffdistill.diffusion.guidance.policies import Guidance
from diffdistill.export.record import guidance_of, read_record
from diffdistill.exported.first_steps import Estimates, as_model, estimates_along, with_first_steps
from diffdistill.exported.image_generators import (
    CodeImageGenerator,
    open_image_generator,
    open_teacher,
    timed_images,
)
from diffdistill.exported.teleported import with_teleport
from diffdistill.inference.image_generator import ImageGenerator, ModelImageGenerator, SampleRequest
from diffdistill.models.load import find_checkpoint, first_student
from diffdistill.models.places import find_again
from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import say
from diffdistill.storage.atomic import is_disk_full
from diffdistill.storage.checkpoint import read_state


@dataclass(frozen=True)
class SampleOptions:
    """count: of images; default: one per prompt, or 100.  columns: of the grid.
    teacher_from: path of the teacher, if it was moved.
    teacher_guidance, teacher_steps: default: what the student was distilled with, and the teacher's own NFE.
    teleport: the ratio above which steps are skipped, see `with_teleport`.
    first_steps: the student's first steps that the teacher makes."""

    asked: SampleRequest
    out: FilePath
    count: int | None = None
    batch: int = 16
    columns: int | None = None
    has_teacher: bool = False
    teacher_from: str | None = None
    teacher_guidance: Guidance | None = None
    teacher_steps: int | None = None
    first_steps: int = 0
    teleport: float | None = None


@dataclass(frozen=True)
class Sampled:
    """name: student, teacher, or nothing.  seconds: per image, noise to pixels.  guidance: None: the model's own.
    classes: of the images in turn, where they have names."""

    name: str
    num_evaluations: int
    seconds: float
    images: Tensor
    guidance: Guidance | None = None
    classes: str = ""

    @property
    def caption(self) -> str:
        scale = "" if self.guidance in (None, 1) else f", w = {self.guidance}"
        return f"{self.name}{': ' * bool(self.name)}{self.num_evaluations} NFE{scale}, {1000 * self.seconds:.1f} ms"


def run_sample(place: str, options: SampleOptions) -> list[Sampled]:
    """Sample, and write the picture. Raises UserError on what the model does not know."""
    asked = options.asked
    student = open_image_generator(place, asked)
    if options.teleport is not None:
        student = with_teleport(as_model(student, "--teleport"), options.teleport)
    count = options.count or (len(asked.prompts) if asked.prompts else 100)
    made = []
    if options.has_teacher or options.first_steps:
        teacher, guidance = _teacher(place, options)
    if options.has_teacher:
        made.append(_draw("teacher", teacher, count, options.batch, guidance))
    if options.has_teacher or not options.first_steps:
        name = "student" if options.has_teacher else ""
        made.append(_draw(name, student, count, options.batch, asked.guidance))
    if steps := options.first_steps:
        mixed = with_first_steps(as_model(student, "--first-steps"), as_model(teacher, "--first-steps"), steps)
        first = "first step" if steps == 1 else f"first {steps} steps"
        made.append(_draw(f"{first} by the teacher", mixed, count, options.batch, asked.guidance))
    _save({one.caption: one.images for one in made}, options, _columns(options, count))
    return made


def run_estimates(place: str, options: SampleOptions) -> list[Estimates]:
    """x0 as student and teacher predict it at every step of 8 images or `count`, as a picture: a row per image, a
    column per step. Raises UserError on what the model does not know."""
    if options.teleport is not None:
        raise UserError("--teleport: skips steps, which --estimates shows; use one of the two")
    student = as_model(open_image_generator(place, options.asked), "--estimates")
    teacher = as_model(_teacher(place, options)[0], "--estimates")
    walker = with_first_steps(student, teacher, options.first_steps) if options.first_steps else student
    both, count = {"student": student, "teacher": teacher}, options.count or len(options.asked.prompts) or 8
    made = estimates_along(walker, both, states="student", count=count, batch=options.batch)
    if options.has_teacher:
        made += estimates_along(teacher, both, states="teacher", count=count, batch=options.batch)
    columns = {one.caption: len(one.ratios) for one in made}
    _save({one.caption: one.images.flatten(0, 1) for one in made}, options, columns)
    return made


def _teacher(place: str, options: SampleOptions) -> tuple[ImageGenerator, Guidance]:
    """The teacher of a place, and its guidance."""
    origin, own = teacher_of(place, now=options.teacher_from)
    guidance = own if options.teacher_guidance is None else options.teacher_guidance
    asked = replace(
        options.asked,
        guidance=guidance,
        num_steps=options.teacher_steps,
        ema=None,
        style=None,
        negative_prompt=None,
        negative_scale=None,
    )
    named = [place, *([options.teacher_from] if options.teacher_from else [])]
    return open_teacher(origin, asked, named).generator(asked), guidance


def teacher_of(place: str, *, now: str | None = None) -> tuple[str, float]:
    """The place of what a student was distilled from, and the guidance scale of its method, 1 where it is no number.

    now: where the teacher is, if not where the student says.  Raises UserError if there is none.
    """
    record = read_record(FilePath(place))
    if record is not None:
        if record.teacher is None and now is None:
            raise UserError(f"--teacher: {place} does not say what it was distilled from")
        return now or str(record.teacher), record.teacher_guidance
    folder = first_student(FilePath(place))
    if not folder.is_dir():
        raise UserError(f"--teacher: {place} is a diffusers pipeline, not a student")
    checkpoint = find_checkpoint(folder)
    state = read_state(checkpoint)
    if not state.get("teacher"):
        raise UserError(f"--teacher: {place} has none; it was trained from images")
    found = find_again("teacher", checkpoint, state, given=now)
    if found.place is None:
        listed = ", ".join(found.looked)
        raise UserError(f"--teacher: no such folder (looked for {listed}); pass its path: --teacher-from FOLDER")
    if found.is_same is False:
        say(f"--teacher: {found.place} holds other weights than the student was distilled from")
    return found.place, guidance_of(state["config"]["method"])


def _draw(name: str, imager: ImageGenerator, count: int, batch: int, guidance: Guidance | None) -> Sampled:
    images, seconds = timed_images(imager, count, batch)
    classes = imager.told_classes if isinstance(imager, ModelImageGenerator | CodeImageGenerator) else ""
    return Sampled(name, imager.num_evaluations, seconds, images, guidance, classes)


def _columns(options: SampleOptions, count: int) -> int:
    prompts = len(options.asked.prompts)
    return options.columns or min(prompts if 1 < prompts < 10 else 10, count)


def _save(panels: Mapping[str, Tensor], options: SampleOptions, columns: int | Mapping[str, int]) -> None:
    """One grid, or captioned ones side by side."""
    try:
        if len(panels) == 1 and isinstance(columns, int):
            save_grid(options.out, next(iter(panels.values())), columns=columns)
        else:
            save_panels(options.out, panels, columns=columns)
    except (OSError, ValueError) as error:
        if is_disk_full(error):
            raise
        raise UserError(f"--out {options.out}: cannot be written: {error}") from None
