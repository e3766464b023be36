"""The like-for-like table on digits: methods from one teacher, at about the same CPU-seconds, three seeds each.

    python scripts/leaderboard.py train          # runs/board; what is there already is kept; hours of CPU
    python scripts/leaderboard.py train --times 10    # two tables more: each row at ten times its steps
    python scripts/leaderboard.py curves         # seed 0 of each row again, evaluated on its way
    python scripts/leaderboard.py table          # the records into the docs' tables, picture of samples and curves

A record's `train_cpu_seconds` is of one process with one thread and counts what a method prepares: pairs, trajectories,
a recorded path. The teacher's own training is not in it.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from leaderboard_page import (
    COLUMNS,
    DRAWS,
    FIGURES,
    IN_PICTURE,
    NUM_DRAWS,
    RECORDS,
    ROOT,
    STRIPS,
    UNSEEN,
    Point,
    append_points,
    read_points,
    slug,
    strip_of,
    write_page,
)
from one_thread import train_alone
from PIL import Image

from diffdistill.diffusion.step_random import StepRandom
from diffdistill.eval.evaluation.command import run_eval
from diffdistill.eval.evaluation.setup import EvalOptions
from diffdistill.eval.images.places import seconds_until
from diffdistill.eval.metrics.endpoints import endpoint_error
from diffdistill.eval.protocols.packaged import DIGITS_PIXELS, DIGITS_TEST_PIXELS
from diffdistill.eval.records.record import Cost, append_record, read_records
from diffdistill.inference.draw import sample_images
from diffdistill.models.load import find_checkpoint, join_students, load_model
from diffdistill.settings.terminal import Console
from diffdistill.training.config import find_config, load_config

SCALES = (1.5, 3.0)  # at which AGD's end points are compared with guidance's
POINTS = 10  # of a curve
FIRST_DRAW = 1800  # of the other noises, so that no image seed of theirs is the protocol's own
COMMAND = "python scripts/leaderboard.py train"
SHORT = "short"  # the name of a longer run's second average

U_NET: tuple[str, ...] = ()
MLP = ("model.network={name: mlp, width: 256, blocks: 3}", "train.steps=1500")


@dataclass(frozen=True)
class Entry:
    """A row. config: packaged; overrides: of it; students: the overrides of each, where several make one model.

    second: the name of a row by the run's other average.  first: the run of whose student this one's starts.
    """

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    students: tuple[str, ...] = ()
    second: str | None = None
    first: "Entry | None" = None

    @property
    def slug(self) -> str:
        return slug(self.name)


# Four fifths of the pairs and steps of regression's own row.
_WARM = Entry("regression, before another method", "regression/digits", ("method.pairs=3200", "train.steps=480"))
BOARD = (
    Entry("DMD2", "dmd2/digits", ("train.steps=700", "method.gan_features=fake")),
    Entry("DMD, with regression", "dmd2/digits-dmd", ("train.steps=500", "method.regression_pairs=2000")),
    Entry("SiD", "sid/digits"),
    Entry("SIM", "sim/digits"),
    Entry("SIM, from regression", "sim/digits-from-regression", first=_WARM),
    Entry("f-distill (JS)", "f_distill/digits", ("method.gan_features=fake",)),
    Entry("f-distill (JS), from regression", "f_distill/digits-from-regression", first=_WARM),
    Entry("DisBack", "disback/digits", ("method.base.gan_features=fake",)),
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
    "DMD2": ("train.steps=2800", "method.gan_features=fake", _HALF, _REST),
    "SiD": ("train.steps=2500", _HALF, _FAKE, *_CLIPPED),
    "SIM": ("train.steps=2500", _HALF, _FAKE),
    "f-distill (JS)": ("train.steps=2400", "method.gan_features=fake", _HALF, _REST),
    "regression on pairs": ("train.steps=4000",),
}

# Of the rows at some times the cost: those that do not go on from the board's.
FOR_LONGER = {
    "DMD2": ("train.steps=840",),  # what 700 steps with the GAN on the fake score's features cost
    # With the GAN on the teacher's features: those of the fake score pull a longer run away from the teacher.
    "f-distill (JS)": (),
    "DisBack": (),
    "AGD, 18 steps": ("optimizers.adapted.clip_norm=0.01",),  # a long run at this rate can diverge without it
}
# A second row of the same runs by an average whose half-life is so many times the board's: it keeps more recall.
SHORTER = {"SiD": 4}
STORED = ("pairs", "trajectories", "regression_pairs")  # what a method makes before training

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()
_lock = threading.Lock()  # evaluations run one at a time, in this process
_first_lock = threading.Lock()  # rows of one seed may share the run that they start from


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
    _train_teacher(teacher, MLP if mlp else U_NET)
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
def curves(
    folder: Annotated[Path, typer.Option(help="Where the runs are.")] = ROOT / "runs" / "board",
    only: Annotated[list[str] | None, typer.Option(help="A row's name; may be given again.")] = None,
    times: Annotated[int, typer.Option(help="So many times the steps.", min=1)] = 1,
) -> None:
    """Train seed 0 of the U-Net's rows with evaluations on the way, and add those to results/digits-curves.jsonl."""
    torch.set_num_threads(1)
    teacher, family = folder / "unet" / "teacher", longer_family(times) if times > 1 else IN_PICTURE
    _train_teacher(teacher, U_NET)
    known = {point.name for point in read_points()}
    for entry in (e for e in BOARD if not only or e.name in only):
        if entry.students or entry.config.startswith("agd/"):
            continue  # several runs make one model; and without guidance AGD is its teacher
        name = f"{entry.name}, {family}"
        if name not in known:
            row = longer(entry, times) if times > 1 else entry
            place = folder / f"curves-{times}" / f"{row.slug}-0"
            before, given = _train_first(row, 0, place.parent, teacher)
            _train(row, place, [*given, _on_the_way(row)])
            append_points(_points(name, place, before))


@app.command()
def table() -> None:
    """Write the tables of the records into their page, a picture of samples and one of the curves."""
    written, missing = write_page()
    if missing:
        console.print(f"no samples of {'; '.join(missing)}: `train` makes them")
    console.print(", ".join(str(file.relative_to(ROOT)) for file in written))


def _on_the_way(entry: Entry) -> str:
    steps = load_config(find_config(entry.config), entry.overrides).train.steps
    return f"eval={{protocol: {DIGITS_PIXELS.name}, every: {max(steps // POINTS, 1)}}}"


def _points(name: str, place: Path, before: Sequence[Path] = ()) -> list[Point]:
    found, earlier = [], _sum(before).train_cpu_seconds or 0.0
    for record in read_records(place / "eval.jsonl"):
        step = record.cost.train_steps if record.cost else None
        assert step
        fd_pixels, precision, recall = (round(record.metrics[key].mean, 5) for key in FIGURES)
        spent = seconds_until(place, step, clock="cpu_seconds")
        assert spent
        figures = {"fd_pixels": fd_pixels, "precision": precision, "recall": recall}
        found.append(Point(name=name, step=step, cpu_seconds=earlier + spent, **figures))
    return found


def longer(entry: Entry, times: int) -> Entry:
    """The same at so many times its steps, to whose end its rates fall, with an average over the same share of them.

    So many times the pairs or trajectories, too, where a method stores some: else a student learns them by heart.
    """
    overrides = FOR_LONGER.get(entry.name, entry.overrides)
    config = load_config(find_config(entry.config), overrides)
    scaled = [f"train.steps={times * config.train.steps}"]
    scaled += [f"ema.halflife_images={times * config.ema.halflife_images:g}"] if config.ema else []
    second = None
    if entry.name in SHORTER and config.ema:
        halflife = SHORTER[entry.name] * config.ema.halflife_images
        scaled.append(f"more_emas={{{SHORT}: {{halflife_images: {halflife:g}, ramp: {config.ema.ramp:g}}}}}")
        second = f"{entry.name}, EMA half-life {halflife:,.0f} images"
    scaled += [f"method.{name}={times * count}" for name, count in stored(config.method).items()]
    first = longer(entry.first, times) if entry.first else None
    return replace(entry, overrides=(*overrides, *scaled), second=second, first=first)


def stored(method: Any) -> dict[str, int]:
    """How much of what it makes before training, by setting."""
    is_unused = {"regression_pairs": not getattr(method, "regression_weight", None)}
    found = {name: getattr(method, name, None) for name in STORED if not is_unused.get(name)}
    return {name: count for name, count in found.items() if count}


def longer_family(times: int) -> str:
    """What its records' names end with."""
    return f"{IN_PICTURE}, {times} times the steps"


def _row(entry: Entry, seed: int, folder: Path, family: str, teacher: Path) -> None:
    """Train and measure one student. One that is recorded is trained again only if its samples are missing."""
    place, name = folder / f"{entry.slug}-{seed}", f"{entry.name}, {family}"
    second = f"{entry.second}, {family}" if entry.second else name
    kinds = [""] if family in (IN_PICTURE, "MLP") else ["", f", {UNSEEN}", f", {DRAWS}"]
    if all(_is_recorded(f"{n}{kind}", seed) for n in (name, second) for kind in kinds) and not _misses_strip(
        name, seed
    ):
        return
    before, given = _train_first(entry, seed, folder, teacher)
    parts = [(option, place / str(i)) for i, option in enumerate(entry.students)] or [("", place)]
    for option, run in parts:
        _train(entry, run, [*filter(None, [option]), *given])
    if entry.students:
        join_students(place, [run for _, run in parts])
    runs = [*before, *(run for _, run in parts)]
    with _lock:
        _measure(name, place, seed, parts=runs, teacher=teacher)
        if entry.second:
            _measure(second, place, seed, parts=runs, teacher=teacher, ema=SHORT)
        _keep_strip(name, place, seed)


def _train_first(entry: Entry, seed: int, folder: Path, teacher: Path) -> tuple[list[Path], list[str]]:
    """Train the run that this row's starts from, if any. Returns that, and what the row's own run is given."""
    given = [f"teacher={teacher}", f"train.seed={seed}"]
    if entry.first is None:
        return [], given
    place = folder / f"{entry.first.slug}-{seed}"
    with _first_lock:
        _train(entry.first, place, given)
    return [place], [*given, f"init={place}"]


def _train_teacher(run: Path, overrides: tuple[str, ...]) -> None:
    if not list(run.glob("checkpoints/step-*")):
        _train(Entry("teacher", "pretrain/digits", overrides), run, ())


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
        unseen = EvalOptions(protocol=DIGITS_TEST_PIXELS.name, ema=ema)
        _append_other(name, place, seed, UNSEEN, unseen, parts)
        _append_other(name, place, seed, DRAWS, EvalOptions(repeats=NUM_DRAWS, seed=FIRST_DRAW, ema=ema), parts)
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
        environment=replace(record.environment, command=COMMAND),
        notes=notes,
    )
    append_record(RECORDS, record)


def _append_other(name: str, place: Path, seed: int, kind: str, options: EvalOptions, parts: Sequence[Path]) -> None:
    """A record beside the row's own: against digits that nothing was trained on, or of other noises."""
    name = f"{name}, {kind}"
    if not _is_recorded(name, seed):
        [record] = run_eval([str(place)], replace(options, names=[name]), console)
        assert record.model is not None
        assert record.environment is not None
        model = replace(record.model, source=f"{place.parent.name}/{place.name}", teacher=None)
        environment = replace(record.environment, command=COMMAND)
        cost = _sum(parts) if len(parts) > 1 else record.cost
        append_record(RECORDS, replace(record, seed=seed, model=model, cost=cost, environment=environment))


def _sum(runs: Sequence[Path]) -> Cost:
    """What several runs took together."""
    specs = [(find_checkpoint(run), run) for run in runs]
    steps = [int(checkpoint.name.removeprefix("step-")) for checkpoint, _ in specs]
    spent = [seconds_until(run, step, clock="cpu_seconds") for (_, run), step in zip(specs, steps, strict=True)]
    assert all(spent)
    return Cost(train_steps=sum(steps), train_cpu_seconds=sum(filter(None, spent)))


def _end_points(place: Path, teacher: Path, scale: float) -> float:
    student, origin = load_model(place), load_model(teacher).denoiser
    rng = StepRandom(77, 0, torch.arange(500))
    noise, cond = rng.normal("noise", student.spec.image_shape), origin.class_cond(rng.index % 10)
    return endpoint_error(student.denoiser, origin, student.spec.sampler, noise, cond, scale=scale)


def _is_recorded(name: str, seed: int) -> bool:
    return RECORDS.exists() and any((record.name, record.seed) == (name, seed) for record in read_records(RECORDS))


def _misses_strip(name: str, seed: int) -> bool:
    return name.endswith(f", {IN_PICTURE}") and seed == 0 and not strip_of(name).exists()


def _keep_strip(name: str, place: Path, seed: int) -> None:
    """A row of samples on the same noise as every other model's."""
    if not _misses_strip(name, seed):
        return
    [strip] = torch.cat(list(sample_images(load_model(place), count=COLUMNS)), dim=-1)
    STRIPS.mkdir(exist_ok=True)
    Image.fromarray(((strip.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()).save(strip_of(name))


if __name__ == "__main__":
    app()
