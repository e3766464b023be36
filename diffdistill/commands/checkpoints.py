"""The commands that make a checkpoint from others: `join`, `merge`, `gather`, `import-edm` and `import-sit`."""

from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated

import typer

from diffdistill.commands.exit_codes import guarded
from diffdistill.commands.next_steps import exported, say_next
from diffdistill.settings.limits import MAX_NUMBER
from diffdistill.settings.terminal import Console

if TYPE_CHECKING:
    from diffdistill.models.spec import TrainedModel

MAX_HEADS = 1024

console = Console()


@guarded
def join(
    runs: Annotated[
        list[str], typer.Argument(help="Runs or checkpoints of the students, in the order of student_index.")
    ],
    out: Annotated[str, typer.Option(help="Folder of the joined model.")],
) -> None:
    """Join the students of an MSD run, each of which has its own classes, into one model: OUT/router.json.

    Example: diffdistill join runs/msd/student_index=0 runs/msd/student_index=1 --out runs/msd
    """
    from diffdistill.models.load import join_students

    made = join_students(out, runs)
    console.print(f"{made}: {len(runs)} student{'s' * (len(runs) > 1)}", highlight=False, soft_wrap=True)
    say_next(("sample", out, "--out", f"{out}/samples.png"), ("eval", out), ("export", out, "--out", exported(out)))


@guarded
def merge(
    runs: Annotated[
        list[str], typer.Argument(help="Runs or checkpoints of one architecture that started from the same weights.")
    ],
    out: Annotated[str, typer.Option(help="Folder of the merged run.")],
    weight: Annotated[
        list[float] | None,
        typer.Option(
            help="Weight of the second of two runs, default 0.5; or one weight per run, in order, of sum 1.",
            min=-MAX_NUMBER,
            max=MAX_NUMBER,
        ),
    ] = None,
    player: Annotated[
        list[str] | None,
        typer.Option(help="Weights of one player, where they differ: fake=0, or generator=0.2,0.3,0.5."),
    ] = None,
) -> None:
    """Merge runs: a linear combination of their weights, EMAs included, recorded in the checkpoint.

    Example: diffdistill merge runs/quality runs/diversity --weight 0.3 --out runs/between
    """
    from diffdistill.models.merge import merge_runs, read_weights
    from diffdistill.settings.terminal import say

    by_player = dict(read_weights(text) for text in player or ())
    made = merge_runs(runs, FilePath(out), tuple(weight or ([0.5] if len(runs) == 2 else [])), by_player)
    if not made.has_one_start:
        say("merge: the runs did not start from the same teacher; the merged weights may not work")
    left = f"; left out: {', '.join(made.left_out)}" if made.left_out else ""
    console.print(f"{made.folder}: {', '.join(made.players)}{left}", highlight=False, soft_wrap=True)
    say_next(("sample", out, "--out", f"{out}/samples.png"), ("eval", out), ("export", out, "--out", exported(out)))


@guarded
def gather(
    run: Annotated[str, typer.Argument(help="Folder of a run, or one of its checkpoints.")],
    out: Annotated[str, typer.Option(help="Folder of the run to write; it goes under checkpoints/.")],
) -> None:
    """Gather a sharded checkpoint (speed.shard), which has one file per process, into a single file.

    Example: diffdistill gather runs/dmd2 --out runs/dmd2-whole
    """
    from diffdistill.models.load import find_checkpoint
    from diffdistill.settings.schema import UserError
    from diffdistill.storage.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint

    source, folder = find_checkpoint(FilePath(run)), FilePath(out) / "checkpoints"
    if list_checkpoints(folder):
        raise UserError(f"--out {out}: holds checkpoints already; name another folder")
    made = save_checkpoint(folder, load_checkpoint(source), keep=1)
    console.print(f"{made}: {len(list(made.glob('*.safetensors')))} files", highlight=False, soft_wrap=True)
    say_next(("sample", out, "--out", f"{out}/samples.png"), ("export", out, "--out", exported(out)))


@guarded
def import_edm(
    file: Annotated[str, typer.Argument(help="EDM's .pkl file: CIFAR-10, FFHQ, AFHQv2 or ImageNet-64.")],
    out: Annotated[str, typer.Option(help="Folder of the run to write, a teacher for `train`.")],
) -> None:
    """Convert an EDM checkpoint to safetensors. The pickle is parsed as data; no code in it runs.

    Example: diffdistill import-edm edm-cifar10-32x32-cond-vp.pkl --out runs/teacher
    """
    from diffdistill.models.teachers.edm_checkpoint import import_edm as convert

    _say_imported(convert(FilePath(file), FilePath(out)), out)


@guarded
def import_sit(
    file: Annotated[str, typer.Argument(help="SiT's or REPA's .pt, of a published size.")],
    out: Annotated[str, typer.Option(help="The run's folder to write, a teacher for `train`.")],
    pipeline: Annotated[
        str | None,
        typer.Option(
            help="A diffusers pipeline with the VAE of its latents: facebook/DiT-XL-2-256@refs/pr/1, or a folder."
        ),
    ] = None,
    noise_at: Annotated[
        int | None,
        typer.Option(help="The time of pure noise, 0 (SiT) or 1 (REPA), where the file does not say.", min=0, max=1),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(help="Of attention, where the width is none of the published.", min=1, max=MAX_HEADS),
    ] = None,
) -> None:
    """Convert a checkpoint of SiT or REPA into safetensors. Nothing in it is run.

    Example: diffdistill import-sit last.pt --out runs/sit256 --pipeline facebook/DiT-XL-2-256@refs/pr/1
    """
    from diffdistill.models.teachers.sit_checkpoint import SiTOptions
    from diffdistill.models.teachers.sit_checkpoint import import_sit as convert

    options = SiTOptions(heads=heads, noise_at=noise_at, pipeline=pipeline)
    _say_imported(convert(FilePath(file), FilePath(out), options), out)


def _say_imported(made: "TrainedModel", out: str) -> None:
    """What was converted, and what comes next."""
    network, shape = made.spec.model.network.name, " x ".join(map(str, made.spec.image_shape))
    classes = f"{made.spec.num_classes} classes" if made.spec.num_classes else "no classes"
    console.print(f"{made.source}: {network}, {shape}, {classes}", highlight=False, soft_wrap=True)
    student = f"{out.rstrip('/')}-student"
    say_next(("sample", out, "--out", f"{out}/samples.png"), ("train", "CONFIG", f"teacher={out}", f"run={student}"))
