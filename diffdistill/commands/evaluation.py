"""The commands that judge models and runs: `eval`, `reference`, `leaderboard` and `report`."""

from pathlib import Path as FilePath
from typing import Annotated

import typer

from diffdistill.commands.exit_codes import guarded
from diffdistill.commands.next_steps import as_run, exported, say_next
from diffdistill.settings.limits import MAX_BATCH, MAX_COUNT, MAX_LEVELS, MAX_SAMPLING_STEPS
from diffdistill.settings.terminal import Console

console = Console()

Judged = Annotated[
    list[str],
    typer.Argument(
        help="Runs, checkpoints, diffusers folders, folders or zips of images, .npz files; or: compare A B."
    ),
]
TrustCode = Annotated[
    bool, typer.Option("--trust-code", help="Run features that are a program (TorchScript); never in a config.")
]
ProtocolName = Annotated[
    str | None, typer.Option(help="A name, or a YAML file; default: digits-pixels, for what makes digits.")
]
GuidancePolicy = Annotated[
    str, typer.Option(help="w of D_u + w (D_c - D_u), 1 is none; or a policy, as {name: adaptive, scale: 2}.")
]


@guarded
def evaluate(
    places: Judged,
    protocol: ProtocolName = None,
    against: Annotated[
        str | None,
        typer.Option(help="A teacher, or any model: the distance to it, and its floor; or images to compare with."),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(help="Ranges of image seeds; default: the protocol's.", min=1, max=MAX_SAMPLING_STEPS)
    ] = None,
    seed: Annotated[int, typer.Option(help="The first range of image seeds.", min=0, max=MAX_COUNT)] = 0,
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
    trust_code: TrustCode = False,
    out: Annotated[str | None, typer.Option(help="Also write the table's rows to this JSON file.")] = None,
    replicates: Annotated[int, typer.Option(help="Of compare's bootstrap.", min=2, max=MAX_LEVELS)] = 200,
    confidence: Annotated[float, typer.Option(help="Of compare's intervals, and of --against's.", min=0, max=1)] = 0.95,
) -> None:
    """Measure models or images by a protocol; or compare two on the same noise, with intervals.

    An interrupted evaluation resumes when the command is given again. `torchrun -m diffdistill eval` shares the work.

    Example: diffdistill eval runs/demo/teacher runs/demo/student --out table.json

    Example: diffdistill eval runs/demo/student --against runs/demo/teacher

    Example: diffdistill eval compare runs/demo/teacher runs/demo/student --replicates 50
    """
    from diffdistill.eval.evaluation.command import run_compare, run_eval
    from diffdistill.eval.evaluation.setup import EvalOptions
    from diffdistill.settings.schema import UserError

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
        confidence=confidence,
    )
    if places[0] != "compare":
        run_eval(places, options, console)
        say_next(
            *(("report", place) for place in places[:1] if as_run(place)),
            ("leaderboard", records, "--out", str(FilePath(records).with_suffix("")))
            if records
            else ("eval", *places, *_given(against, protocol), "--records", "runs/records.jsonl"),
        )
        return
    if against:
        raise UserError("--against: goes with eval, not with eval compare")
    if len(places) != 3:
        raise UserError(f"eval compare: takes two places, not {len(places) - 1}")
    run_compare((places[1], places[2]), options, console, num_replicates=replicates, confidence=confidence)
    say_next(("eval", places[1], "--against", places[2], *_given(None, protocol)))


def _given(against: str | None, protocol: str | None) -> tuple[str, ...]:
    """Options that were given, to be given again."""
    pairs = (("--against", against), ("--protocol", protocol))
    return tuple(word for name, value in pairs if value for word in (name, value))


@guarded
def reference(
    images: Annotated[
        str, typer.Argument(help='Real images: a folder, a zip, a .npz, or "{name: cifar10, root: data}".')
    ],
    protocol: Annotated[str, typer.Option(help="The protocol that will compare with them: a name, or a YAML file.")],
    weights: Annotated[list[str] | None, typer.Option(help="LABEL=FILE: an extractor's weights.")] = None,
    out: Annotated[str | None, typer.Option(help="The folder to write into; default: where `eval` looks.")] = None,
    batch: Annotated[int, typer.Option(help="Images at a time.", min=1, max=MAX_BATCH)] = 64,
    trust_code: TrustCode = False,
) -> None:
    """Compute the statistics of real images that a protocol compares with, one file for each kind of features.

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
    records: Annotated[list[str], typer.Argument(help="JSONL files of records, as `diffdistill eval` writes them.")],
    out: Annotated[str, typer.Option(help="The folder to write into.")],
    title: Annotated[str | None, typer.Option(help="What the page is called; default: by its protocols.")] = None,
    published: Annotated[
        bool | None,
        typer.Option(
            "--published/--no-published",
            help="Show the published numbers that come along; default: not where all records are of own pictures.",
        ),
    ] = None,
) -> None:
    """Rank what was measured alike: one HTML page, Markdown, CSV, and metadata for model cards.

    Example: diffdistill leaderboard runs/records.jsonl --out runs/leaderboard
    """
    from rich.text import Text

    from diffdistill.eval.board.files import write_leaderboard

    def say(message: str) -> None:
        Console(stderr=True).print(Text.assemble(("warning:", "yellow"), f" {message}"), soft_wrap=True)

    page, *others = write_leaderboard(records, FilePath(out), title=title, with_reported=published, say=say)
    console.print(f"{page}, and {len(others)} more files beside it", highlight=False, soft_wrap=True, markup=False)
    say_next(also=(f"open {page} in a browser",))


@guarded
def report(
    run: Annotated[str, typer.Argument(help="A run's folder.")],
    out: Annotated[str | None, typer.Option(help="The HTML file to write; default: report.html in the folder.")] = None,
) -> None:
    """Show one run on one HTML page: settings, curves, health, previews over time, scores.

    Example: diffdistill report runs/demo/student
    """
    from diffdistill.eval.board.report import write_report

    file = write_report(FilePath(run), FilePath(out) if out else None)
    console.print(str(file), highlight=False, soft_wrap=True, markup=False)
    say_next(("export", run, "--out", exported(run)), also=(f"open {file} in a browser",))
