"""The commands that evaluate models and runs: `eval`, `reference`, `leaderboard` and `report`."""

from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated

import typer

from diffdistill.commands import options as opt
from diffdistill.commands.exit_codes import guarded
from diffdistill.commands.next_steps import as_run, exported, say_next
from diffdistill.settings.terminal import Console

if TYPE_CHECKING:
    from diffdistill.eval.evaluation.setup import EvalOptions

console = Console()


@guarded
def evaluate(
    models: opt.Evaluated,
    protocol: opt.Protocol = None,
    against: opt.Against = None,
    repeats: opt.Repeats = None,
    seed: opt.FirstSeed = 0,
    guidance: opt.GuidancePolicy = "1",
    sampler: opt.SamplerText = None,
    ema: opt.Ema = None,
    name: opt.RecordName = None,
    batch: opt.EvalBatch = 256,
    device: opt.Device = "auto",
    weights: opt.Weights = None,
    reference: opt.References = None,
    captions: opt.Captions = None,
    features: opt.Features = None,
    records: opt.RecordsFile = None,
    grid: opt.Grid = False,
    save_images: opt.SaveImages = None,
    efficiency: opt.Efficiency = False,
    trust_code: opt.TrustEvaluated = False,
    out: opt.TableOut = None,
    replicates: opt.Replicates = None,
    confidence: opt.Confidence = 0.95,
) -> None:
    """Evaluate models or images under a protocol; or compare two models on the same noise, with confidence intervals.

    Run an interrupted command again to resume it. `torchrun -m diffdistill eval` distributes the work.

    Example: diffdistill eval runs/demo/teacher runs/demo/student --out table.json

    Example: diffdistill eval runs/demo/student --against runs/demo/teacher

    Example: diffdistill eval compare runs/demo/teacher runs/demo/student --replicates 50
    """
    from diffdistill.eval.evaluation.setup import EvalOptions

    is_compared = models[0] == "compare"
    _check(models, is_compared, against, replicates)
    options = EvalOptions(
        protocol=protocol,
        against=against,
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
        trusts_code=trust_code,
        out=out,
        replicates=replicates or (200 if is_compared else 50),
        confidence=confidence,
    )
    if is_compared:
        _compare(models[1], models[2], options)
    else:
        _evaluate(models, options)


def _check(models: list[str], is_compared: bool, against: str | None, replicates: int | None) -> None:
    """Raise UserError for words that do not go together."""
    from diffdistill.settings.schema import UserError

    if is_compared and against is not None:
        raise UserError("--against: goes with eval, not with eval compare")
    if is_compared and len(models) != 3:
        raise UserError(f"eval compare: takes two models, not {len(models) - 1}")
    if replicates is not None and not is_compared and against is None:
        raise UserError(f"--replicates {replicates}: goes with eval compare and with --against")


def _evaluate(models: list[str], options: "EvalOptions") -> None:
    from diffdistill.eval.evaluation.command import run_eval

    run_eval(models, options, console)
    records = options.records
    say_next(
        *(("report", model) for model in models[:1] if as_run(model)),
        ("leaderboard", records, "--out", str(FilePath(records).with_suffix("")))
        if records
        else ("eval", *models, *_given(options, options.against), "--records", "runs/records.jsonl"),
    )


def _compare(model: str, other: str, options: "EvalOptions") -> None:
    from diffdistill.eval.evaluation.command import run_compare

    run_compare((model, other), options, console)
    say_next(("eval", model, "--against", other, *_given(options, None)))


def _given(options: "EvalOptions", against: str | None) -> tuple[str, ...]:
    """Options as they were given."""
    pairs = (("--against", against), ("--protocol", options.protocol))
    words = tuple(word for name, value in pairs if value for word in (name, value))
    return (*words, "--trust-code") if options.trusts_code else words


@guarded
def reference(
    images: Annotated[
        str, typer.Argument(help='Real images: a folder, a zip, a .npz, or "{name: cifar10, root: data}".')
    ],
    protocol: Annotated[str, typer.Option(help="Name or YAML file of the protocol.")],
    weights: opt.Weights = None,
    out: Annotated[str | None, typer.Option(help="Folder to write to; default: where `eval` looks.")] = None,
    batch: opt.Batch = 64,
    trust_code: opt.TrustFeatures = False,
) -> None:
    """Compute the reference statistics of real images for a protocol, one file per feature extractor.

    Example: diffdistill reference "{name: cifar10, root: data}" --protocol cifar10-efficientnet-lite0
    """
    from diffdistill.eval.evaluation.real import write_references

    files = write_references(
        images,
        protocol,
        weights=weights or (),
        folder=FilePath(out) if out else None,
        batch_size=batch,
        trusts_code=trust_code,
        console=console,
    )
    for file in files:
        console.print(str(file), highlight=False, soft_wrap=True, markup=False)
    say_next(("eval", "RUN", "--protocol", protocol))


@guarded
def leaderboard(
    records: Annotated[list[str], typer.Argument(help="Records (JSONL), as `diffdistill eval` writes them.")],
    out: Annotated[str, typer.Option(help="Folder to write to.")],
    title: Annotated[str | None, typer.Option(help="Title of the page; default: its protocols.")] = None,
    published: Annotated[
        bool | None,
        typer.Option(
            "--published/--no-published",
            help="Show published results too; default: unless all records are of your own images.",
        ),
    ] = None,
) -> None:
    """Rank models measured under the same protocol: HTML, Markdown, CSV, and metadata for model cards.

    Example: diffdistill leaderboard runs/records.jsonl --out runs/leaderboard
    """
    from rich.text import Text

    from diffdistill.eval.board.files import write_leaderboard

    def say(message: str) -> None:
        Console(stderr=True).print(Text.assemble(("warning:", "yellow"), f" {message}"), soft_wrap=True)

    page, *others = write_leaderboard(records, FilePath(out), title=title, with_reported=published, say=say)
    console.print(
        f"{page}, and {len(others)} more files in the same folder", highlight=False, soft_wrap=True, markup=False
    )
    say_next(also=(f"open {page} in a browser",))


@guarded
def report(
    run: Annotated[str, typer.Argument(help="Folder of the run.")],
    out: Annotated[str | None, typer.Option(help="HTML file to write; default: report.html in the folder.")] = None,
) -> None:
    """Write an HTML page of one run: settings, curves, health, previews, scores.

    Example: diffdistill report runs/demo/student
    """
    from diffdistill.eval.board.report import write_report

    file = write_report(FilePath(run), FilePath(out) if out else None)
    console.print(str(file), highlight=False, soft_wrap=True, markup=False)
    say_next(("export", run, "--out", exported(run)), also=(f"open {file} in a browser",))
