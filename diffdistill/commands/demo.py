"""The demo: a digits teacher, its one-step student, the table and the pictures."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath

from diffdistill.data.pictures import save_grid, save_rows
from diffdistill.diffusion.guidance.check import check_guidance
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.eval.evaluation.digits import Row, bootstrap_floor, evaluate, gaussian_baseline, print_table
from diffdistill.exported.image_generators import open_image_generator, timed_images
from diffdistill.inference.draw import sample_images
from diffdistill.inference.image_generator import SampleRequest
from diffdistill.models.load import load_model
from diffdistill.settings.links import refuse_links
from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import Console
from diffdistill.storage.atomic import write_text_atomically
from diffdistill.training.config import find_config, load_config
from diffdistill.training.trainer import Trainer

FAST = ("train.steps=40", "train.checkpoint_every=20", "train.preview_every=40", "train.log_every=10")
FAST_STUDENT = ("method.regression_pairs=64",)


def run_demo(folder: FilePath, *, seed: int, is_fast: bool, console: Console) -> list[Row]:
    """Teacher, student, table. Resumes an earlier demo in the same folder.

    folder: gets `teacher`, `student`, table.json, teacher.png and student.png.  Returns the table's rows.
    """
    began = time.perf_counter()
    refuse_links(folder)
    common = [f"train.seed={seed}", *(FAST if is_fast else ())]
    teacher, student = folder / "teacher", folder / "student"
    console.print(f"1/3 teacher of 8 x 8 digits: {teacher}", highlight=False)
    _train("pretrain/digits", teacher, common)
    console.print(f"2/3 one-step student by DMD: {student}", highlight=False)
    _train("dmd2/digits-dmd", student, [f"teacher={teacher}", *common, *(FAST_STUDENT if is_fast else ())])
    console.print("3/3 evaluation: 1,800 samples each, against the training split", highlight=False)
    init_ratio = _few_steps(str(student)).init_ratio
    rows = [
        bootstrap_floor(seed=0),
        gaussian_baseline(seed=0),
        evaluate_run(str(teacher), name="teacher"),
        evaluate_run(str(teacher), name="teacher, one step", sampler=FewSteps(init_ratio=init_ratio)),
        evaluate_run(str(student), name="DMD student, one step"),
    ]
    show_table(rows, console, folder / "table.json")
    for name in ("teacher", "student"):
        save_grid(folder / f"{name}.png", sample_images(load_model(folder / name), count=100), columns=10)
    save_comparison(folder / "comparison.png", {"teacher": folder / "teacher", "student": folder / "student"})
    console.print(
        f"{folder}: wrote comparison.png (teacher and student from the same noise), teacher.png, student.png and "
        f"table.json; {time.perf_counter() - began:.0f} s in total",
        highlight=False,
        soft_wrap=True,
    )
    return rows


def _train(name: str, run: FilePath, settings: Sequence[str]) -> None:
    """Train a packaged config; goes on where it was stopped. Raises UserError where the folder holds another run."""
    config, file = load_config(find_config(name), [f"run={run}", *settings]), run / "config.yaml"
    if file.is_file():
        before = load_config(file, [])
        was, now = [(c.method, c.optimizers, c.ema, c.train.seed, c.train.steps) for c in (before, config)]
        if was != now:
            raise UserError(f"{run}: holds a run of another config than this demo's; remove it, or give another --run")
    Trainer(config, resume=True).run()


def save_comparison(file: FilePath, places: Mapping[str, FilePath]) -> None:
    """A row of ten digits per model, by name, from the same noise, with its NFE and the time per image."""
    rows = {}
    for name, place in places.items():
        imager = open_image_generator(str(place), SampleRequest())
        images, seconds = timed_images(imager, 100, batch=10)
        milliseconds = f"{1000 * seconds:.{1 if seconds < 0.01 else 0}f} ms"
        rows[f"{name}\n{imager.num_evaluations} NFE\n{milliseconds}"] = images[:10]
    save_rows(file, rows, titles=[str(digit) for digit in range(10)], min_side=72)


def evaluate_run(
    place: str, *, name: str | None = None, sampler: FewSteps | None = None, seed: int = 0, guidance: float = 1.0
) -> Row:
    """A row of the table for what is on disk.  sampler: default the run's own.  Raises UserError if it is no digits
    model, or on guidance that it does not know."""
    model = load_model(place)
    if model.spec.image_shape != (1, 8, 8) or model.spec.num_classes != 10:
        raise UserError(f"{place}: the protocol digits-pixels is for 1 x 8 x 8 images of 10 classes")
    check_guidance(model.denoiser, "--guidance", guidance)
    return evaluate(model.denoiser, sampler or model.spec.sampler, name=name or place, guidance=guidance, seed=seed)


def show_table(rows: Sequence[Row], console: Console, file: FilePath | None) -> None:
    """Print the rows, and write them as a JSON list where `file` says. Raises UserError if it cannot be written."""
    print_table(rows, console)
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, json.dumps([row.to_dict() for row in rows], indent=1) + "\n")
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from None


def _few_steps(place: str) -> FewSteps:
    sampler = load_model(place).spec.sampler
    assert isinstance(sampler, FewSteps)
    return sampler
