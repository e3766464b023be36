"""The command line."""

import os
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from diffdistill import __version__
from diffdistill.commands import options as opt
from diffdistill.commands.benchmark import benchmark
from diffdistill.commands.checkpoints import gather, import_edm, import_sit, join, merge
from diffdistill.commands.evaluation import evaluate, leaderboard, reference, report
from diffdistill.commands.exit_codes import guarded
from diffdistill.commands.images import export, sample
from diffdistill.commands.init import init
from diffdistill.commands.next_steps import TYPED, after_training, exported, launched, say_next
from diffdistill.commands.play import play
from diffdistill.settings.launcher import this_rank
from diffdistill.settings.limits import MAX_GIB, MAX_INTEGER, MAX_PROCESSES
from diffdistill.settings.terminal import Console

if TYPE_CHECKING:
    from diffdistill.training.plan import Plan


class Verbs(TyperGroup):
    """The verbs. What was typed is kept, for the command that goes on from a stop."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        TYPED[:] = args
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=Verbs,
    help="One-step image generators, distilled from diffusion models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()

START, TRAIN, USE, EVALUATE, CONVERT = "Get started", "Train", "Sample and export", "Evaluate", "Merge and convert"
"""The groups of verbs in --help."""


@app.command(rich_help_panel=START)
@guarded
def demo(
    run: Annotated[str | None, typer.Option(help="Folder to write to; default: runs/demo, or runs/demo-fast.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed of training.", min=0, max=MAX_INTEGER)] = 0,
    fast: Annotated[bool, typer.Option("--fast", help="A few steps only, to test the installation.")] = False,
) -> None:
    """Train a teacher of 8 x 8 digits, distil it to one step with DMD, and evaluate both.

    Example: diffdistill demo
    """
    from diffdistill.commands.demo import run_demo

    folder = FilePath(run or ("runs/demo-fast" if fast else "runs/demo"))
    run_demo(folder, seed=seed, is_fast=fast, console=console)
    teacher, student = f"{folder}/teacher", f"{folder}/student"
    say_next(
        ("sample", student, "--teacher", "--out", f"{folder}/samples.png"),
        ("report", student),
        ("export", student, "--out", exported(student)),
        ("train", "sid/digits", f"teacher={teacher}", f"run={folder}/sid"),
    )


app.command(rich_help_panel=START)(init)


@app.command(rich_help_panel=TRAIN)
@guarded
def pretrain(
    config: opt.Config,
    overrides: opt.Overrides = None,
    resume: opt.Resume = False,
    checkpoint: opt.FromCheckpoint = None,
    allow_changes: opt.AllowChanges = False,
    trust_code: opt.TrustFeatures = False,
) -> None:
    """Train a diffusion model on your data, as a teacher.

    Example: diffdistill pretrain pretrain/digits run=runs/teacher train.steps=500
    """
    _train(config, overrides, _Start(resume, checkpoint, allow_changes, trust_code), only="pretrain")


@app.command(rich_help_panel=TRAIN)
@guarded
def train(
    config: opt.Config,
    overrides: opt.Overrides = None,
    resume: opt.Resume = False,
    checkpoint: opt.FromCheckpoint = None,
    allow_changes: opt.AllowChanges = False,
    trust_code: opt.TrustFeatures = False,
    sweep: opt.Sweeps = None,
) -> None:
    """Distil a teacher into a student, with the method of the config.

    Example: diffdistill train dmd2/digits teacher=runs/teacher method.guidance=1.5

    Example: diffdistill train dmd2/digits run=runs/gan --sweep gan_weight=0.01,0.03,0.1
    """
    if sweep:
        _sweep(config, overrides, sweep, resume=resume, checkpoint=checkpoint, trusts_code=trust_code)
        return
    _train(config, overrides, _Start(resume, checkpoint, allow_changes, trust_code), only=None)


class _Start(NamedTuple):
    """The options of how a run starts, and what code it may run."""

    resume: bool
    checkpoint: str | None
    allow_changes: bool
    trusts_code: bool


def _train(config: str, overrides: list[str] | None, start: _Start, *, only: str | None) -> None:
    from diffdistill.settings.schema import UserError
    from diffdistill.training.config import find_config, load_config
    from diffdistill.training.memory.oom_retry import run_with_oom_retry

    parsed = load_config(find_config(config), overrides or ())
    if only and parsed.method.name != only:
        raise UserError(f"{config}: method.name = {parsed.method.name!r}; use `diffdistill train` for it")
    for option in ("checkpoint", "allow_changes"):
        if getattr(start, option) and not start.resume:
            raise UserError(f"--{option.replace('_', '-')}: goes with --resume")
    exportable: list[bool] = []
    done = run_with_oom_retry(
        parsed,
        resume=start.checkpoint or start.resume,
        allow_changes=start.allow_changes,
        trusts_code=start.trusts_code,
        look=lambda plan: exportable.append(_can_be_exported(plan)),
    )
    if this_rank() == 0:
        console.print(f"done: {done}", highlight=False, soft_wrap=True)
    method, teacher = parsed.method.name, parsed.teacher if isinstance(parsed.teacher, str) else None
    after_training(parsed.run, method, teacher, config=config, can_export=False not in exportable)


def _can_be_exported(plan: "Plan") -> bool:
    """Whether `export` can write the student. A warning before the first step, where it cannot."""
    from diffdistill.export.exportable import export_kind_of
    from diffdistill.settings.terminal import say

    found = export_kind_of(plan.spec)
    if found.kind is None and this_rank() == 0:
        say(f"`diffdistill export` cannot export this student: {found.note}")
    return found.kind is not None


def _sweep(
    config: str,
    overrides: list[str] | None,
    sweep: list[str],
    *,
    resume: bool,
    checkpoint: str | None,
    trusts_code: bool,
) -> None:
    from diffdistill.commands.sweep import run_sweep
    from diffdistill.settings.schema import UserError
    from diffdistill.training.config import find_config, load_config

    if checkpoint:
        raise UserError("--checkpoint: names a step of one run; resume a sweep with --resume alone")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--sweep: trains one run after another in one process; start it without a launcher")
    done = run_sweep(
        find_config(config), overrides or (), sweep, resume=resume, console=console, trusts_code=trusts_code
    )
    best = min(done, key=lambda outcome: outcome.scores.get("fd_pixels", float("inf")))
    run = str(FilePath(load_config(find_config(config), overrides or ()).run) / best.name)
    say_next(("report", run), ("export", run, "--out", exported(run)))


app.command(rich_help_panel=USE)(sample)
app.command(rich_help_panel=USE)(export)
app.command(rich_help_panel=USE)(play)
app.command(rich_help_panel=EVALUATE)(benchmark)


@app.command(rich_help_panel=TRAIN)
@guarded
def students(
    config: opt.Config,
    overrides: opt.Overrides = None,
    processes_each: Annotated[
        int, typer.Option(help="Processes per student (distributed training).", min=1, max=MAX_PROCESSES)
    ] = 1,
    max_restarts: Annotated[int, typer.Option(help="Restarts of a student that fails.", min=0, max=MAX_PROCESSES)] = 3,
    resume: opt.Resume = False,
    trust_code: opt.TrustFeatures = False,
) -> None:
    """Train all students of an MSD config in parallel, each in its own processes; one may fail without the others.

    Example: diffdistill students msd/digits teacher=runs/teacher run=runs/msd --processes-each 2
    """
    from diffdistill.training.config import find_config
    from diffdistill.training.students import train_students

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    runs = train_students(
        find_config(config),
        overrides or (),
        processes_each=processes_each,
        max_restarts=max_restarts,
        resume=resume,
        trusts_code=trust_code,
        say=say,
    )
    say_next(("join", *runs, "--out", runs[0].parent))


app.command(rich_help_panel=CONVERT)(join)
app.command(rich_help_panel=CONVERT)(merge)
app.command(rich_help_panel=CONVERT)(gather)
app.command(name="import-edm", rich_help_panel=CONVERT)(import_edm)
app.command(name="import-sit", rich_help_panel=CONVERT)(import_sit)
app.command(name="eval", rich_help_panel=EVALUATE)(evaluate)
app.command(rich_help_panel=EVALUATE)(reference)
app.command(rich_help_panel=EVALUATE)(leaderboard)
app.command(rich_help_panel=EVALUATE)(report)


@app.command(rich_help_panel=START)
@guarded
def configs() -> None:
    """List the packaged configs, by method.

    Example: diffdistill configs
    """
    from diffdistill.training.config import packaged_configs

    names: dict[str, list[str]] = {}
    for name in packaged_configs():
        method, _, config = name.partition("/")
        names.setdefault(method, []).append(config)
    for method, found in names.items():
        console.print(f"{method}/: {', '.join(found)}")
    say_next(("doctor", "dmd2/digits"), ("pretrain", "pretrain/digits", "run=runs/teacher"))


@app.command(rich_help_panel=START)
@guarded
def methods() -> None:
    """List the methods: their papers, which players they update and how often, and whether they need images.

    Example: diffdistill methods
    """
    from diffdistill.commands.methods import print_methods

    print_methods(console)
    say_next(("configs",))


@app.command(rich_help_panel=START)
@guarded
def doctor(
    config: Annotated[
        str | None, typer.Argument(help="Config to predict memory and time for; default: check the machine.")
    ] = None,
    overrides: opt.Overrides = None,
    folder: Annotated[str, typer.Option(help="Folder for runs.")] = "runs",
    memory: Annotated[
        float | None, typer.Option(help="Memory to fit into, in GiB; default: this device's.", min=0, max=MAX_GIB)
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="Number of processes (GPUs) of the run; default: one.", min=1, max=MAX_PROCESSES)
    ] = None,
    trust_code: opt.TrustFeatures = False,
) -> None:
    """Check this machine (versions, GPU, folders, disk), or predict a config's memory and time. Exit code 1 on a fault.

    With a config, it trains on one micro-batch to measure the time of a step, and lists the settings that save memory
    if the run does not fit. Nothing is written. With --processes it predicts what each of
    them needs.

    Example: diffdistill doctor

    Example: diffdistill doctor pretrain/digits train.global_batch_size=512 --memory 24

    Example: diffdistill doctor dmd2/digits teacher=runs/teacher speed.shard=all --processes 8
    """
    from diffdistill.commands.doctor import examine, show
    from diffdistill.settings.schema import UserError

    after: tuple[str, ...] = ("demo",)
    if config is None:
        for name, value in (("--memory", memory), ("--processes", processes)):
            if value is not None:
                raise UserError(f"{name}: needs a config; give one")
        findings = examine(FilePath(folder))
    else:
        from diffdistill.commands.doctor_config import examine_config
        from diffdistill.training.config import find_config, load_config

        parsed = load_config(find_config(config), overrides or ())
        findings = list(examine_config(parsed, memory, processes=processes, trusts_code=trust_code))
        verb = "pretrain" if parsed.method.name == "pretrain" else "train"
        after = (verb, config, *(overrides or ()))
    if not show(findings, console):
        raise typer.Exit(1)
    if processes is not None and processes > 1:
        say_next(also=(launched(processes, after),))
    else:
        say_next(after)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        console.print(f"diffdistill {__version__}", highlight=False)
        raise typer.Exit


def main() -> None:
    """The console command."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    app()
