"""The like-for-like table on digits: methods from one teacher, at about the same CPU-seconds, three seeds each.

    python scripts/leaderboard.py train          # runs/board; what is there already is kept; hours of CPU
    python scripts/leaderboard.py train --times 10 --seeds 1    # another table: each row at ten times its steps
    python scripts/leaderboard.py table          # results/digits.jsonl into the docs' table and picture

A record's `train_cpu_seconds` is of one process with one thread and counts what a method prepares: pairs, trajectories,
a recorded path. The teacher's own training is not in it.
"""

import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated

import numpy as np
import torch
import typer
from one_thread import train_alone
from PIL import Image

from diffdistill.data.pictures import save_rows
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.eval.evaluation.command import run_eval
from diffdistill.eval.evaluation.setup import EvalOptions
from diffdistill.eval.images.places import seconds_until
from diffdistill.eval.metrics.endpoints import endpoint_error
from diffdistill.eval.protocols.packaged import DIGITS_TEST_PIXELS
from diffdistill.eval.records.record import Cost, Record, append_record, read_records
from diffdistill.inference.draw import sample_images
from diffdistill.models.load import find_checkpoint, join_students, load_model
from diffdistill.settings.terminal import Console
from diffdistill.training.config import find_config, load_config

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "results" / "digits.jsonl"
STRIPS = ROOT / "results" / "strips"  # samples of each row of the first table, seed 0
PAGE = ROOT / "docs" / "digits-board.md"
PICTURE = ROOT / "docs" / "images" / "digits-board.png"
MARKS = ("<!-- digits board -->", "<!-- end of the digits board -->")
UNSEEN = "test split"  # of another record of a longer row, by digits-test-pixels
SCALES = (1.5, 3.0)  # at which AGD's end points are compared with guidance's
SHORT = "short"  # the name of a longer run's second average
IN_PICTURE, COLUMNS, SHOWN = "U-Net", 30, 10

U_NET: tuple[str, ...] = ()
MLP = ("model.network={name: mlp, width: 256, blocks: 3}", "train.steps=1500")


@dataclass(frozen=True)
class Entry:
    """A row. config: packaged; overrides: of it; students: the overrides of each, where several make one model.

    second: the name of a row by the run's other average.
    """

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    students: tuple[str, ...] = ()
    second: str | None = None

    @property
    def slug(self) -> str:
        return _slug(self.name)


BOARD = (
    Entry("DMD2", "dmd2/digits", ("train.steps=700", "method.gan_features=fake")),
    Entry("SiD", "sid/digits"),
    Entry("SIM", "sim/digits"),
    Entry("f-distill (JS)", "f_distill/digits"),
    Entry("DisBack", "disback/digits"),
    Entry("Hyper-SD, 1 step", "hyper_sd/digits"),
    Entry("Hyper-SD, 4 steps", "hyper_sd/digits-4"),
    Entry("BOOT", "boot/digits"),
    Entry("MSD, 1 student", "msd/digits", ("method.num_students=1",)),
    Entry("MSD, 2 students", "msd/digits", (), ("method.student_index=0", "method.student_index=1")),
    Entry("AGD, 18 steps", "agd/digits"),
    Entry("regression on pairs", "regression/digits"),
    Entry("TDM, 4 steps", "tdm/digits"),
    Entry("consistency (iCD)", "consistency/digits"),
    Entry("consistency (ECT)", "consistency/digits-ect"),
    Entry("RF++", "rectified_flow/digits"),
    Entry("sCM", "scm/digits"),
    Entry("MeanFlow", "mean_flow/digits"),
    Entry("rCM", "rcm/digits"),
    Entry("FreeFlow", "free_flow/digits"),
    Entry("pi-Flow", "pi_flow/digits"),
    Entry("Uni-Instruct (forward KL)", "uni_instruct/digits"),
    Entry("Uni-Instruct (reverse KL)", "uni_instruct/digits", ("method.divergence=rkl",)),
)
# At the rates of the U-Net's rows an MLP's fake score can blow up.
_HALF, _FAKE, _REST = "optimizers.generator.lr=3e-4", "optimizers.fake.lr=5e-4", "optimizers.default.lr=5e-4"
# About four times the usual norms: without this bound SiD blew up at one seed of three (FD 3.47) at half the rates.
_CLIPPED = ("optimizers.fake.clip_norm=100", "optimizers.generator.clip_norm=2000")
FOR_MLP = {
    "DMD2": ("train.steps=2800", _HALF, _REST),
    "SiD": ("train.steps=2500", _HALF, _FAKE, *_CLIPPED),
    "SIM": ("train.steps=2500", _HALF, _FAKE),
    "f-distill (JS)": ("train.steps=2400", _HALF, _REST),
    "regression on pairs": ("train.steps=4000",),
}

# Of the rows at some times the cost: those that do not go on from the board's.
FOR_LONGER = {
    "DMD2": ("train.steps=840",),  # what 700 steps with the GAN on the fake score's features cost
    "f-distill (JS)": ("method.gan_features=teacher",),  # those of the fake score draw a longer run off the teacher
    "AGD, 18 steps": ("optimizers.adapted.clip_norm=0.01",),  # a long run at this rate can diverge without it
}
# A second row of the same runs by an average whose half-life is so many times the board's: it keeps more recall.
SHORTER = {"SiD": 4}
STORED = ("pairs", "trajectories")  # what a method makes before training

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()
_lock = threading.Lock()  # evaluations run one at a time, in this process


@app.command()
def train(
    folder: Annotated[Path, typer.Option(help="Where the runs are.")] = ROOT / "runs" / "board",
    seeds: Annotated[int, typer.Option(help="Seeds 0 .. n - 1 of the students.", min=1)] = 3,
    workers: Annotated[int, typer.Option(help="Runs at a time, one thread each.", min=1)] = 2,
    only: Annotated[list[str] | None, typer.Option(help="A row's name; may be given again.")] = None,
    mlp: Annotated[bool, typer.Option("--mlp", help="The second table: a residual MLP as the teacher.")] = False,
    times: Annotated[int, typer.Option(help="So many times the steps: a table of its own, of the U-Net.", min=1)] = 1,
) -> None:
    """Train every row's students from one teacher, measure them, and add their records to results/digits.jsonl."""
    torch.set_num_threads(1)
    folder = folder / ("mlp" if mlp else "unet")
    teacher = folder / "teacher"
    if not list(teacher.glob("checkpoints/step-*")):
        _train(Entry("teacher", "pretrain/digits", MLP if mlp else U_NET), teacher, ())
    if mlp and times > 1:
        raise typer.BadParameter("goes with the U-Net alone", param_hint="--times")
    family = longer_family(times) if times > 1 else "MLP" if mlp else IN_PICTURE
    _measure(f"teacher, {family}", teacher, 0)
    _keep_strip(f"teacher, {family}", teacher, 0)
    rows = [e for e in BOARD if not only or e.name in only]
    if mlp:
        rows = [replace(e, overrides=FOR_MLP[e.name]) for e in rows if e.name in FOR_MLP]
    if times > 1:
        rows, folder = [longer(e, times) for e in rows], folder.with_name(f"unet-{times}")
    jobs = [(entry, seed) for seed in range(seeds) for entry in rows]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda job: _row(job[0], job[1], folder, family, teacher), jobs))


@app.command()
def table() -> None:
    """Write the table of the records into its page, and one picture of samples."""
    records = read_records(RECORDS)
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    parts = [before, MARKS[0], "\n\n", *_tables(records), *_draw(records), "\n", MARKS[1], after]
    PAGE.write_text("".join(parts), encoding="utf-8")
    console.print(f"{PAGE.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)} are written")


def longer(entry: Entry, times: int) -> Entry:
    """The same at so many times its steps, to whose end its rates fall, with an average over the same share of them.

    So many times the pairs or trajectories, too, where a method stores some: else a student learns them by heart.
    """
    overrides = FOR_LONGER.get(entry.name, entry.overrides)
    config = load_config(find_config(entry.config), overrides)
    longer = [f"train.steps={times * config.train.steps}"]
    longer += [f"ema.halflife_images={times * config.ema.halflife_images:g}"] if config.ema else []
    second = None
    if entry.name in SHORTER and config.ema:
        halflife = SHORTER[entry.name] * config.ema.halflife_images
        longer.append(f"more_emas={{{SHORT}: {{halflife_images: {halflife:g}, ramp: {config.ema.ramp:g}}}}}")
        second = f"{entry.name}, EMA half-life {halflife:,.0f} images"
    stored = {name: getattr(config.method, name, None) for name in STORED}
    longer += [f"method.{name}={times * count}" for name, count in stored.items() if count]
    return replace(entry, overrides=(*overrides, *longer), second=second)


def longer_family(times: int) -> str:
    """What its records' names end with."""
    return f"{IN_PICTURE}, {times} times the steps"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _row(entry: Entry, seed: int, folder: Path, family: str, teacher: Path) -> None:
    """Train and measure one student. One that is recorded is trained again only if its samples are missing."""
    place, name = folder / f"{entry.slug}-{seed}", f"{entry.name}, {family}"
    second = f"{entry.second}, {family}" if entry.second else name
    if _is_recorded(name, seed) and _is_recorded(second, seed) and not _misses_strip(name, seed):
        return
    parts = [(option, place / str(i)) for i, option in enumerate(entry.students)] or [("", place)]
    for option, run in parts:
        given = [*filter(None, [option]), f"teacher={teacher}", f"train.seed={seed}"]
        _train(entry, run, given)
    if entry.students:
        join_students(place, [run for _, run in parts])
    with _lock:
        _measure(name, place, seed, parts=[run for _, run in parts], teacher=teacher)
        if entry.second:
            _measure(second, place, seed, teacher=teacher, ema=SHORT)
        _keep_strip(name, place, seed)


def _train(entry: Entry, run: Path, given: Sequence[str]) -> None:
    train_alone(entry.config, run, [*entry.overrides, *given], name=entry.name)


def _measure(
    name: str,
    place: Path,
    seed: int,
    *,
    parts: Sequence[Path] = (),
    teacher: Path | None = None,
    ema: str | None = None,
) -> None:
    is_longer = not name.endswith((f", {IN_PICTURE}", ", MLP"))
    if is_longer and place.exists():
        _append_unseen(name, place, seed, ema)
    if _is_recorded(name, seed):
        return
    against = str(teacher) if is_longer and teacher else None
    options = EvalOptions(names=[name], against=against, ema=ema)  # digits-pixels, of digits
    [record] = run_eval([str(place)], options, console)
    assert record.model is not None
    assert record.environment is not None
    notes = ""
    if teacher is not None and record.method == "agd":
        errors = {scale: _end_points(place, teacher, scale) for scale in SCALES}
        notes = "end points: " + ", ".join(f"{error:.3f} at w = {scale}" for scale, error in errors.items())
    apart = record.against
    if apart is not None and teacher is not None:
        apart = replace(apart, place=f"{teacher.parent.name}/{teacher.name}")
    record = replace(
        record,
        seed=seed,
        method=record.method or "msd",
        cost=_sum(parts) if len(parts) > 1 else record.cost,
        model=replace(record.model, source=f"{place.parent.name}/{place.name}", teacher=None),
        against=apart,
        environment=replace(record.environment, command="python scripts/leaderboard.py train"),
        notes=notes,
    )
    append_record(RECORDS, record)


def _append_unseen(name: str, place: Path, seed: int, ema: str | None) -> None:
    """A record against digits that nothing was trained on."""
    name = f"{name}, {UNSEEN}"
    if not _is_recorded(name, seed):
        options = EvalOptions(names=[name], protocol=DIGITS_TEST_PIXELS.name, ema=ema)
        [record] = run_eval([str(place)], options, console)
        assert record.model is not None
        model = replace(record.model, source=f"{place.parent.name}/{place.name}", teacher=None)
        append_record(RECORDS, replace(record, seed=seed, model=model))


def _sum(runs: Sequence[Path]) -> Cost:
    """What several students took together."""
    specs = [(find_checkpoint(run), run) for run in runs]
    steps = [int(checkpoint.name.removeprefix("step-")) for checkpoint, _ in specs]
    spent = [seconds_until(run, step, clock="cpu_seconds") for (_, run), step in zip(specs, steps, strict=True)]
    return Cost(train_steps=sum(steps), train_cpu_seconds=sum(filter(None, spent)))


def _end_points(place: Path, teacher: Path, scale: float) -> float:
    student, origin = load_model(place), load_model(teacher).denoiser
    rng = StepRandom(77, 0, torch.arange(500))
    noise, cond = rng.normal("noise", student.spec.image_shape), origin.class_cond(rng.index % 10)
    return endpoint_error(student.denoiser, origin, student.spec.sampler, noise, cond, scale=scale)


def _is_recorded(name: str, seed: int) -> bool:
    return RECORDS.exists() and any((record.name, record.seed) == (name, seed) for record in read_records(RECORDS))


def _tables(records: Sequence[Record]) -> Iterator[str]:
    ends = (re.search(rf", ({IN_PICTURE}, \d+ times the steps)$", record.name) for record in records)
    longer = {found[1] for found in ends if found}
    families = {IN_PICTURE: "a U-Net of 0.3 million weights", "MLP": "a residual MLP"}
    families |= {name: f"the same {name.replace(',', ' as above, at')}" for name in sorted(longer)}
    for family, title in families.items():
        rows = _rows(records, family)
        if not rows:
            continue
        floor = _floor([record for _, found in rows for record in found])
        unseen = dict(_rows(records, f"{family}, {UNSEEN}"))
        yield f"The teacher: {title}.\n\n"
        yield "| | NFE | fd-pixels | precision | recall | CPU-seconds | seeds |"
        yield f" to the teacher (its floor {floor:.3f}) |" if floor else ""
        yield " fd-pixels, test split |\n" if unseen else "\n"
        yield f"|---|---|---|---|---|---|---|{'---|' if floor else ''}{'---|' if unseen else ''}\n"
        for name, found in rows:
            first = found[0]
            nfe = first.sampler.num_evaluations if first.sampler else None
            numbers = [_spread([r.metrics[m].mean for r in found]) for m in ("fd-pixels", "precision", "recall")]
            spent = [r.cost.train_cpu_seconds for r in found if r.cost and r.cost.train_cpu_seconds]
            cost = f"{fmean(spent):.0f}" if spent else ""
            apart = [r.against.metrics["fd-pixels"].student.value for r in found if r.against]
            last = f" {_spread(apart)} |" if floor else ""
            if unseen:
                last += f" {_spread([r.metrics['fd-pixels'].mean for r in unseen.get(name, [])])} |"
            yield f"| {name} | {nfe} | {' | '.join(numbers)} | {cost} | {len(found)} |{last}\n"
        for name, found in rows:
            if notes := [record.notes.removeprefix("end points: ") for record in found if record.notes]:
                yield f"\n{name}, end points from guidance's, seed by seed: {'; '.join(notes)}.\n"
        yield "\n"


def _floor(records: Sequence[Record]) -> float | None:
    """The teacher's own distance to itself, as the first record that has one measured it."""
    return next((r.against.metrics["fd-pixels"].floor.value for r in records if r.against), None)


def _rows(records: Sequence[Record], family: str) -> list[tuple[str, list[Record]]]:
    """Each row's records, best first, the teacher above."""
    rows: dict[str, list[Record]] = {}
    for record in records:
        if record.name.endswith(f", {family}"):
            rows.setdefault(record.name.removesuffix(f", {family}"), []).append(record)
    return sorted(
        rows.items(), key=lambda row: (row[0] != "teacher", fmean(r.metrics["fd-pixels"].mean for r in row[1]))
    )


def _spread(values: Sequence[float]) -> str:
    """The mean, and least and greatest where there are several; nothing of none."""
    if not values:
        return ""
    return f"{fmean(values):.3f}" + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else "")


def _strip(name: str) -> Path:
    return STRIPS / f"{_slug(name)}.png"


def _misses_strip(name: str, seed: int) -> bool:
    return name.endswith(f", {IN_PICTURE}") and seed == 0 and not _strip(name).exists()


def _keep_strip(name: str, place: Path, seed: int) -> None:
    """A row of samples on the same noise as every other model's."""
    if not _misses_strip(name, seed):
        return
    [strip] = torch.cat(list(sample_images(load_model(place), count=COLUMNS)), dim=-1)
    STRIPS.mkdir(exist_ok=True)
    Image.fromarray(((strip.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()).save(_strip(name))


def _draw(records: Sequence[Record]) -> Iterator[str]:
    """Write the picture of the first table's rows, in the table's order; gives its place in the page."""
    names = [f"{row}, {IN_PICTURE}" for row, _ in _rows(records, IN_PICTURE)]
    if missing := [name for name in names if not _strip(name).exists()]:
        console.print(f"no samples of {'; '.join(missing)}: `train` makes them")
    names = [name for name in names if name not in missing]
    save_rows(PICTURE, {name.rpartition(", ")[0]: _images(name) for name in names}, min_side=48)
    yield f"![Samples of the first table's rows, of seed 0 from the same noise]({PICTURE.relative_to(PAGE.parent)})\n"


def _images(name: str) -> torch.Tensor:
    """The first ten of a strip, [10, 1, 8, 8] in [-1, 1]."""
    strip = torch.from_numpy(np.array(Image.open(_strip(name)))).float() / 127.5 - 1
    return strip.reshape(strip.shape[0], COLUMNS, -1).transpose(0, 1)[:SHOWN, None]


if __name__ == "__main__":
    app()
