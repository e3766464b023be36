"""The command line."""

import os
import sys
from pathlib import Path as FilePath
from typing import Annotated, Any, NamedTuple

import typer

from diffdistill import __version__
from diffdistill.checkpoint_commands import gather, import_edm, join
from diffdistill.faults import guarded, this_rank
from diffdistill.image_commands import export, sample
from diffdistill.terminal import Console

app = typer.Typer(
    help="One-step image generators, distilled from diffusion models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()

Config = Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged one, as in dmd2/digits.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value, as often as you like.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run's folder.")]
FromCheckpoint = Annotated[
    str | None, typer.Option("--checkpoint", help="With --resume: this checkpoint, as in step-00000500.")
]
AllowChanges = Annotated[
    bool, typer.Option("--allow-changes", help="With --resume: although settings have changed, which are shown.")
]
Sweeps = Annotated[
    list[str] | None,
    typer.Option("--sweep", help="key=value,value,...: train every combination and compare them; may be given again."),
]
Run = Annotated[str, typer.Argument(help="A run's folder, or one of its checkpoints.")]
Judged = Annotated[
    list[str],
    typer.Argument(
        help="Runs, checkpoints, diffusers folders, folders or zips of images, .npz files; or: compare A B."
    ),
]
ProtocolName = Annotated[
    str | None, typer.Option(help="A name, or a YAML file; default: digits-pixels, for what makes digits.")
]
GuidancePolicy = Annotated[
    str, typer.Option(help="w of D_u + w (D_c - D_u), 1 is none; or a policy, as {name: adaptive, scale: 2}.")
]


@app.command()
@guarded
def demo(
    run: Annotated[str | None, typer.Option(help="Where to write; default runs/demo, or runs/demo-fast.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of training.", min=0)] = 0,
    fast: Annotated[bool, typer.Option("--fast", help="A few steps only: does everything work here?")] = False,
) -> None:
    """Train a digits teacher, distil it to one step with DMD2, print the table and write the pictures.

    Example: diffdistill demo
    """
    from diffdistill.demo import run_demo

    run_demo(FilePath(run or ("runs/demo-fast" if fast else "runs/demo")), seed=seed, is_fast=fast, console=console)


@app.command()
@guarded
def pretrain(
    config: Config,
    overrides: Overrides = None,
    resume: Resume = False,
    checkpoint: FromCheckpoint = None,
    allow_changes: AllowChanges = False,
) -> None:
    """Train a diffusion model, to be the teacher.

    Example: diffdistill pretrain pretrain/digits run=runs/teacher train.steps=500
    """
    _train(config, overrides, _Start(resume, checkpoint, allow_changes), only="pretrain")


@app.command()
@guarded
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Resume = False,
    checkpoint: FromCheckpoint = None,
    allow_changes: AllowChanges = False,
    sweep: Sweeps = None,
) -> None:
    """Distil a teacher by the method that the config names.

    Example: diffdistill train dmd2/digits teacher=runs/teacher method.guidance=1.5

    Example: diffdistill train dmd2/digits run=runs/gan --sweep gan_weight=0.01,0.03,0.1
    """
    if sweep:
        _sweep(config, overrides, sweep, resume=resume, checkpoint=checkpoint)
        return
    _train(config, overrides, _Start(resume, checkpoint, allow_changes), only=None)


class _Start(NamedTuple):
    """The options that say where a run begins."""

    resume: bool
    checkpoint: str | None
    allow_changes: bool


def _train(config: str, overrides: list[str] | None, start: _Start, *, only: str | None) -> None:
    from diffdistill.config import find_config, load_config
    from diffdistill.schema import UserError
    from diffdistill.within_memory import run_within_memory

    parsed = load_config(find_config(config), overrides or ())
    if only and parsed.method.name != only:
        raise UserError(f"{config}: method.name = {parsed.method.name!r}; use `diffdistill train` for it")
    for option in ("checkpoint", "allow_changes"):
        if getattr(start, option) and not start.resume:
            raise UserError(f"--{option.replace('_', '-')}: goes with --resume")
    done = run_within_memory(parsed, resume=start.checkpoint or start.resume, may_differ=start.allow_changes)
    if this_rank() == 0:
        console.print(f"done: {done}", highlight=False, soft_wrap=True)


def _sweep(config: str, overrides: list[str] | None, sweep: list[str], *, resume: bool, checkpoint: str | None) -> None:
    from diffdistill.config import find_config
    from diffdistill.schema import UserError
    from diffdistill.sweep import run_sweep

    if checkpoint:
        raise UserError("--checkpoint: names a step of one run; a sweep goes on with --resume alone")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--sweep: trains one run after the other in one process; start it without a launcher")
    run_sweep(find_config(config), overrides or (), sweep, resume=resume, console=console)


app.command()(sample)
app.command()(export)


@app.command()
@guarded
def students(
    config: Config,
    overrides: Overrides = None,
    processes_each: Annotated[int, typer.Option(help="Processes that train one student together.", min=1)] = 1,
    max_restarts: Annotated[int, typer.Option(help="Starts of a student after its first.", min=0)] = 3,
    resume: Resume = False,
) -> None:
    """Train all students of an MSD config at the same time, each in processes of its own; one's failure is its own.

    Example: diffdistill students msd/digits teacher=runs/teacher run=runs/msd --processes-each 2
    """
    from diffdistill.config import find_config
    from diffdistill.students import train_students

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    runs = train_students(
        find_config(config),
        overrides or (),
        processes_each=processes_each,
        max_restarts=max_restarts,
        resume=resume,
        say=say,
    )
    say(f"now: diffdistill join {' '.join(map(str, runs))} --out {runs[0].parent}")


app.command()(join)
app.command()(gather)
app.command(name="import-edm")(import_edm)


@app.command(name="eval")
@guarded
def evaluate(
    places: Judged,
    protocol: ProtocolName = None,
    repeats: Annotated[int | None, typer.Option(help="Ranges of image seeds; default: the protocol's.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="The first range of image seeds.", min=0)] = 0,
    guidance: GuidancePolicy = "1",
    sampler: Annotated[str | None, typer.Option(help='Default: the model\'s own. As in "{name: ddim}".')] = None,
    ema: Annotated[str | None, typer.Option(help="One of the run's more_emas, by its name; default: `ema`.")] = None,
    name: Annotated[list[str] | None, typer.Option(help="What a record is called; one for each place.")] = None,
    batch: Annotated[int, typer.Option(help="Images at a time.", min=1, max=256)] = 256,
    device: Annotated[str, typer.Option(help="auto or cpu.")] = "auto",
    weights: Annotated[list[str] | None, typer.Option(help="LABEL=FILE: an extractor's weights.")] = None,
    reference: Annotated[list[str] | None, typer.Option(help="LABEL=FILE: the real images' statistics.")] = None,
    captions: Annotated[str | None, typer.Option(help="The protocol's captions, one a line.")] = None,
    features: Annotated[str | None, typer.Option(help="Keep the features in this folder.")] = None,
    records: Annotated[str | None, typer.Option(help="Add a line for each place to this JSONL file.")] = None,
    grid: Annotated[bool, typer.Option("--grid", help="With --records: a PNG of 100 images beside it.")] = False,
    save_images: Annotated[str | None, typer.Option(help="Write every image as a PNG into this folder.")] = None,
    efficiency: Annotated[bool, typer.Option("--efficiency", help="Time each model: latency, memory, ...")] = False,
    out: Annotated[str | None, typer.Option(help="Also write the table's rows to this JSON file.")] = None,
    replicates: Annotated[int, typer.Option(help="Of compare's bootstrap.", min=2)] = 200,
    confidence: Annotated[float, typer.Option(help="Of compare's intervals.")] = 0.95,
) -> None:
    """Measure models or images by a protocol; or compare two on the same noise, with intervals.

    A broken-off evaluation goes on when it is called again. `torchrun -m diffdistill eval` shares the work.

    Example: diffdistill eval runs/demo/teacher runs/demo/student --out table.json

    Example: diffdistill eval compare runs/demo/teacher runs/demo/student --replicates 50
    """
    from diffdistill.eval.command import EvalOptions, run_compare, run_eval
    from diffdistill.schema import UserError

    options = EvalOptions(
        protocol=protocol,
        repeats=repeats,
        seed=seed,
        guidance=guidance,
        sampler=sampler,
        ema=ema,
        names=name or (),
        batch_size=batch,
        device=device,
        weights=weights or (),
        references=reference or (),
        captions=captions,
        features=features,
        records=records,
        grid=grid,
        save_images=save_images,
        efficiency=efficiency,
        out=out,
    )
    if places[0] != "compare":
        run_eval(places, options, console)
        return
    if len(places) != 3:
        raise UserError(f"eval compare: takes two places, not {len(places) - 1}")
    run_compare((places[1], places[2]), options, console, num_replicates=replicates, confidence=confidence)


@app.command()
@guarded
def reference(
    images: Annotated[
        str, typer.Argument(help='Real images: a folder, a zip, a .npz, or "{name: cifar10, root: data}".')
    ],
    protocol: Annotated[str, typer.Option(help="The protocol that will compare with them: a name, or a YAML file.")],
    weights: Annotated[list[str] | None, typer.Option(help="LABEL=FILE: an extractor's weights.")] = None,
    out: Annotated[str | None, typer.Option(help="The folder to write into; default: where `eval` looks.")] = None,
    batch: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 64,
) -> None:
    """Compute the statistics of real images that a protocol compares with, one file for each kind of features.

    Example: diffdistill reference "{name: cifar10, root: data}" --protocol cifar10-efficientnet-lite0
    """
    from diffdistill.eval.real import write_references

    for file in write_references(
        images,
        protocol,
        weights=weights or (),
        folder=FilePath(out) if out else None,
        batch_size=batch,
        console=console,
    ):
        console.print(str(file), highlight=False, soft_wrap=True, markup=False)


@app.command()
@guarded
def leaderboard(
    records: Annotated[list[str], typer.Argument(help="JSONL files of records, as `diffdistill eval` writes them.")],
    out: Annotated[str, typer.Option(help="The folder to write into.")],
    title: Annotated[str, typer.Option(help="What the page is called.")] = "Leaderboard",
    published: Annotated[bool, typer.Option(help="Show the published numbers that come along.")] = True,
) -> None:
    """Rank what was measured alike: one HTML page, Markdown, CSV, and metadata for model cards.

    Example: diffdistill leaderboard runs/records.jsonl --out runs/leaderboard
    """
    from rich.text import Text

    from diffdistill.eval.board_files import write_leaderboard

    def say(message: str) -> None:
        Console(stderr=True).print(Text.assemble(("warning:", "yellow"), f" {message}"), soft_wrap=True)

    page, *others = write_leaderboard(records, FilePath(out), title=title, with_reported=published, say=say)
    console.print(f"{page}, and {len(others)} more files beside it", highlight=False, soft_wrap=True, markup=False)


@app.command()
@guarded
def report(
    run: Annotated[str, typer.Argument(help="A run's folder.")],
    out: Annotated[str | None, typer.Option(help="The HTML file to write; default: report.html in the folder.")] = None,
) -> None:
    """Show one run on one HTML page: settings, curves, health, previews over time, scores.

    Example: diffdistill report runs/demo/student
    """
    from diffdistill.eval.report import write_report

    file = write_report(FilePath(run), FilePath(out) if out else None)
    console.print(str(file), highlight=False, soft_wrap=True, markup=False)


@app.command()
@guarded
def methods() -> None:
    """List the methods, who steps when, and what each needs.

    Example: diffdistill methods
    """
    from rich.table import Table

    from diffdistill.method import registered

    table = Table("method", "what it is", "updates (every n iterations)", "real images")
    for name, kind in registered().items():
        method: Any = kind()
        updates = ", ".join(f"{'+'.join(u.players)} ({u.every})" for u in method.updates)
        title = (sys.modules[kind.__module__].__doc__ or "").strip().split("\n")[0]
        table.add_row(name, title, updates, "yes" if method.needs_images else "no")
    console.print(table)


@app.command()
@guarded
def doctor(
    config: Annotated[
        str | None, typer.Argument(help="A config to be tried out; default: look at the machine.")
    ] = None,
    overrides: Overrides = None,
    folder: Annotated[str, typer.Option(help="Where runs would be written.")] = "runs",
    memory: Annotated[float | None, typer.Option(help="GiB to fit into; default: what there is.", min=0)] = None,
) -> None:
    """Check this machine: versions that match, the GPU, writable folders, free disk. Exits with 1 on a fault.

    With a config: predict its memory, say what to turn on where it does not fit, and take two steps. Writes nothing.

    Example: diffdistill doctor

    Example: diffdistill doctor pretrain/digits train.global_batch_size=512 --memory 24
    """
    from diffdistill.doctor import examine, examine_config, show

    if config is None:
        findings = examine(FilePath(folder))
    else:
        from diffdistill.config import find_config, load_config

        findings = list(examine_config(load_config(find_config(config), overrides or ()), memory))
    if not show(findings, console):
        raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        console.print(f"diffdistill {__version__}", highlight=False)
        raise typer.Exit


def main() -> None:
    """The console command."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    app()
