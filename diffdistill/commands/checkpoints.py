"""The commands that make checkpoints of others: `join`, `merge`, `gather`, `import-edm` and `import-sit`."""

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
    runs: Annotated[list[str], typer.Argument(help="The students' runs or checkpoints, by their numbers.")],
    out: Annotated[str, typer.Option(help="The folder that stands for all of them.")],
) -> None:
    """Make one model of students that share the classes: OUT will hold router.json, which names them.

    Example: diffdistill join runs/msd/student_index=0 runs/msd/student_index=1 --out runs/msd
    """
    from diffdistill.models.load import join_students

    made = join_students(out, runs)
    console.print(f"{made}: {len(runs)} student{'s' * (len(runs) > 1)}", highlight=False, soft_wrap=True)
    say_next(("sample", out, "--out", f"{out}/samples.png"), ("eval", out), ("export", out, "--out", exported(out)))


@guarded
def merge(
    runs: Annotated[list[str], typer.Argument(help="Runs or checkpoints of one architecture, of one start.")],
    out: Annotated[str, typer.Option(help="The run's folder to write.")],
    weight: Annotated[
        list[float] | None,
        typer.Option(
            help="Of the second of two runs, default 0.5; or one for each run, in order, which sum to 1.",
            min=-MAX_NUMBER,
            max=MAX_NUMBER,
        ),
    ] = None,
    player: Annotated[
        list[str] | None, typer.Option(help="Other weights for one player: fake=0, or generator=0.2,0.3,0.5.")
    ] = None,
) -> None:
    """Mix the weights of runs linearly, averages included. What it is made of stands in the checkpoint.

    Example: diffdistill merge runs/quality runs/diversity --weight 0.3 --out runs/between
    """
    from diffdistill.models.merge import merge_runs, read_weights
    from diffdistill.settings.terminal import say

    by_player = dict(read_weights(text) for text in player or ())
    made = merge_runs(runs, FilePath(out), tuple(weight or ([0.5] if len(runs) == 2 else [])), by_player)
    if not made.has_one_start:
        say("merge: the runs did not start at the same teacher; weights between them may be no model at all")
    left = f"; left out: {', '.join(made.left_out)}" if made.left_out else ""
    console.print(f"{made.folder}: {', '.join(made.players)}{left}", highlight=False, soft_wrap=True)
    say_next(("sample", out, "--out", f"{out}/samples.png"), ("eval", out), ("export", out, "--out", exported(out)))


@guarded
def gather(
    run: Annotated[str, typer.Argument(help="A run's folder, or one of its checkpoints.")],
    out: Annotated[str, typer.Option(help="The folder to write it to, under checkpoints/.")],
) -> None:
    """Gather a sharded checkpoint (speed.shard), a file of each process, into one file.

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
    file: Annotated[str, typer.Argument(help="EDM's .pkl: CIFAR-10, FFHQ, AFHQv2 or ImageNet-64.")],
    out: Annotated[str, typer.Option(help="The run's folder to write, a teacher for `train`.")],
) -> None:
    """Convert a checkpoint of EDM into safetensors. The pickle is read as data: nothing in it is run.

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
