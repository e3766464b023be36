"""`init`: from a folder of images to the configs of a teacher and its student, by what can be measured."""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated

import typer

from diffdistill.commands.exit_codes import guarded
from diffdistill.commands.next_steps import say_next
from diffdistill.settings.terminal import Console

if TYPE_CHECKING:
    from diffdistill.commands.doctor import Finding
    from diffdistill.commands.starting_configs import Start
    from diffdistill.training.config import RunConfig

console = Console()
THREADS_BUDGET = 2.0
"""Seconds for each number of threads that is tried."""


@guarded
def init(
    pictures: Annotated[
        str, typer.Argument(help="Folder or zip of images; with a subfolder per class, if they have classes.")
    ],
    out: Annotated[
        str | None,
        typer.Option(help="Folder of the configs and runs; default: runs/ and the name of the images' folder."),
    ] = None,
    resolution: Annotated[
        int | None,
        typer.Option(help="Resolution: 8, 16, 32, 64 or 128; default: by the images and this machine.", min=8, max=128),
    ] = None,
    classes: Annotated[
        bool | None, typer.Option("--classes/--no-classes", help="Whether subfolders are classes; default: detected.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing configs.")] = False,
) -> None:
    """Measure your images and write the configs of a teacher, its one-step student and their evaluation.

    It measures count, sizes, classes, unreadable files and the standard deviation of the pixels, predicts memory and
    time on this machine, and prints the three commands to run. Your images are not changed.

    Example: diffdistill init pictures

    Example: diffdistill init pictures --resolution 32 --out runs/larger
    """
    from torch import cuda

    from diffdistill.commands.doctor import show
    from diffdistill.commands.own_pictures import SIDES, look_at
    from diffdistill.commands.starting_configs import PROTOCOL, STUDENT, TEACHER, Start
    from diffdistill.settings.schema import UserError

    if resolution and resolution not in SIDES:
        raise UserError(f"--resolution {resolution}: choose from {', '.join(map(str, SIDES))}")
    place = FilePath(pictures).expanduser().resolve()
    own = place.name if place.is_dir() else place.stem
    name = re.sub(r"[^a-z0-9]+", "-", own.lower()).strip("-") or "pictures"
    folder = FilePath(out or f"runs/{name}")
    _check_folder(folder, FilePath(pictures), (TEACHER, STUDENT, PROTOCOL), force=force)
    about = look_at(pictures, side=resolution, with_classes=classes)
    show(about.findings(), console)
    start = Start(about, folder.as_posix(), name[:64].strip("-"), has_gpu=cuda.is_available(), num_threads=None)
    start = replace(start, num_threads=_num_threads(start))
    show([*_predict(start)], console)
    _write(start, folder)
    console.print(f"wrote {', '.join(str(folder / file) for file in (TEACHER, STUDENT, PROTOCOL))}", soft_wrap=True)
    say_next(
        ("pretrain", folder / TEACHER),
        ("train", folder / STUDENT),
        ("eval", folder / "teacher", folder / "student", "--protocol", folder / PROTOCOL),
    )


def _check_folder(folder: FilePath, pictures: FilePath, files: tuple[str, ...], *, force: bool) -> None:
    from diffdistill.settings.schema import UserError

    there = [str(folder / file) for file in files if (folder / file).exists()]
    if there and not force:
        raise UserError(f"{there[0]}: exists; overwrite it with --force, or name another folder with --out")
    if folder.resolve().is_relative_to(pictures.expanduser().resolve()):
        raise UserError(
            f"--out {folder}: is inside the folder of images, and previews would be read as data; name another"
        )


def _num_threads(start: "Start") -> int | None:
    """One, where the teacher trains as fast on it; None for as many as torch takes."""
    import torch

    from diffdistill.commands.own_pictures import quietly
    from diffdistill.training.assembly import assemble
    from diffdistill.training.plan import plan
    from diffdistill.training.step_time import measure_step_time

    threads = torch.get_num_threads()
    if start.has_gpu or threads == 1:
        return None
    with quietly():
        assembly = assemble(plan(_parsed(start.teacher()), resume=None))
    several = measure_step_time(assembly, THREADS_BUDGET).step
    try:
        torch.set_num_threads(1)
        one = measure_step_time(assembly, THREADS_BUDGET).step
    finally:
        torch.set_num_threads(threads)
    return 1 if one <= several else None


def _predict(start: "Start") -> Iterator["Finding"]:
    """Memory and time of both runs. The student's teacher is a network that has learnt nothing: it costs the same."""
    from diffdistill.commands.doctor_config import MEMORY, TIME, examine_config
    from diffdistill.commands.own_pictures import quietly
    from diffdistill.models.spec import ModelSpec

    teacher, student = _parsed(start.teacher()), _parsed(start.student())
    assert teacher.model is not None
    source = start.pictures.source
    spec = ModelSpec(
        model=teacher.model,
        image_shape=source.image_shape,
        num_classes=source.num_classes,
        class_dropout=0.1 if source.num_classes else 0.0,
        sampler=teacher.method.teacher_sampler,  # type: ignore[attr-defined]
        class_names=source.class_names,
    )
    for name, config, given in (("teacher", teacher, None), ("student", replace(student, teacher=None), spec.build())):
        with quietly():
            found = [*examine_config(config, teacher=given)]
        for finding in found:
            if finding.topic in (MEMORY, TIME):
                yield replace(finding, topic=f"{name}'s {finding.topic}")


def _parsed(text: str) -> "RunConfig":
    from diffdistill.settings.values import parse_yaml
    from diffdistill.training.config import parse_config

    return parse_config(parse_yaml(text, origin="init"), origin="init")


def _write(start: "Start", folder: FilePath) -> None:
    from diffdistill.commands.starting_configs import PROTOCOL, STUDENT, TEACHER
    from diffdistill.settings.links import refuse_links
    from diffdistill.settings.schema import UserError
    from diffdistill.storage.atomic import write_text_atomically

    refuse_links(folder)
    try:
        os.makedirs(folder, exist_ok=True)
        for file, text in ((TEACHER, start.teacher()), (STUDENT, start.student()), (PROTOCOL, start.protocol())):
            write_text_atomically(folder / file, text)
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"--out {folder}: cannot be written: {error.strerror}") from None
