"""What decides a one-step student's quality: a packaged config with one factor changed at a time, on digits.

    python scripts/quality.py screen             # runs/quality and results/quality.jsonl; what is there is kept
    python scripts/quality.py page               # the records into docs/what-decides-quality.md and its curves

A record is one checkpoint: Frechet distances in pixels of 6,000 samples to 6,000 of the teacher's, made from other
noise, and to the training split. Its CPU-seconds are of a process with one thread.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from one_thread import train_alone
from quality_page import write_page
from quality_records import RECORDS, Measured, append, read
from quality_variants import AVERAGES, BASES, LENGTHS, TEACHERS, VARIANTS, Variant, longer
from torch import Tensor

from diffdistill.data.digits import Digits
from diffdistill.eval.evaluation.digits import generate, score
from diffdistill.eval.images.places import seconds_until, weights_sha256
from diffdistill.eval.metrics.distances import frechet_from_features
from diffdistill.eval.records.environment import describe_environment
from diffdistill.inference.draw import sample_images
from diffdistill.models.load import load_model
from diffdistill.models.spec import TrainedModel
from diffdistill.settings.terminal import Console

ROOT = Path(__file__).parents[1]
NUM_SAMPLES = 6000
STUDENTS, TEACHERS_OWN, OTHERS = 0, 1, 2  # seeds of the samples

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()


@app.command()
def screen(
    folder: Annotated[Path, typer.Option(help="Where the runs are.")] = ROOT / "runs" / "quality",
    network: Annotated[Literal["mlp", "unet"], typer.Option(help="The teacher's, and so the students'.")] = "mlp",
    seeds: Annotated[int, typer.Option(help="Seeds 0 .. n - 1 of the students.", min=1)] = 1,
    only: Annotated[
        list[str] | None, typer.Option(help="A variant, as in dmd2-gan-without; may be given again.")
    ] = None,
    times: Annotated[int, typer.Option(help="So many times the usual steps.", min=1)] = 1,
    teacher: Annotated[Path | None, typer.Option(help="A run of the teacher that is there already.")] = None,
    records: Annotated[Path, typer.Option(help="Where the records are added.")] = RECORDS,
) -> None:
    """Train the variants one after another, measure them on their way, and add their records."""
    torch.set_num_threads(1)
    folder = folder / network
    teacher = teacher or folder / "teacher"
    if not list(teacher.glob("checkpoints/step-*")):
        train_alone("pretrain/digits", teacher, TEACHERS[network], name="teacher")
    if not _is_recorded(records, network, "teacher", 0):
        append(records, _measure_teacher(teacher, network))
    chosen = [variant for variant in VARIANTS[network] if not only or variant.slug in only]
    for seed in range(seeds):
        for variant in chosen:
            wanted = longer(variant, times) if times > 1 else variant
            if not _is_recorded(records, network, wanted.slug, seed):
                append(records, *_train_and_measure(wanted, network, folder, teacher, seed))
                console.print(f"{network} {wanted.slug} {seed}: recorded")


@app.command()
def page(records: Annotated[Path, typer.Option(help="The records.")] = RECORDS) -> None:
    """Write the tables of the records into docs/what-decides-quality.md, and the curves beside it."""
    for file in write_page(read(records)):
        console.print(f"{file.relative_to(ROOT)} is written")


def _is_recorded(records: Path, network: str, run: str, seed: int) -> bool:
    return any((record.network, record.run, record.seed) == (network, run, seed) for record in read(records))


def _train_and_measure(variant: Variant, network: str, folder: Path, teacher: Path, seed: int) -> list[Measured]:
    base = BASES[network][variant.method]
    total = 8 * round(base.steps * variant.length / 8)
    averages = "".join(f"'{i}': {{halflife_images: {images}, ramp: 0}}, " for i, images in enumerate(AVERAGES.values()))
    overrides = [
        *base.overrides,
        *variant.overrides,
        f"more_emas={{{averages}}}",
        *(f"train.{name}={value}" for name, value in _lengths(total).items()),
        f"train.seed={seed}",
    ]
    config, run = variant.config or base.config, folder / f"{variant.slug}-{seed}"
    train_alone(config, run, [f"teacher={teacher}", *overrides], name=variant.slug)
    return list(_measure(variant, network, run, teacher, config, overrides, total, seed))


def _lengths(total: int) -> dict[str, int]:
    return {"steps": total, "checkpoint_every": total // 8, "keep_checkpoints": 16, "log_every": total // 8}


def _measure(
    variant: Variant,
    network: str,
    run: Path,
    teacher: Path,
    config: str,
    overrides: list[str],
    total: int,
    seed: int,
) -> Iterator[Measured]:
    """Every length with the run's own average, and the last one with the others and with precision and recall."""
    for length in LENGTHS:
        step = int(total * length)
        is_last = step == total
        for number, average in [(None, ""), *(enumerate(AVERAGES) if is_last else ())]:
            model = load_model(run / "checkpoints" / f"step-{step:08d}", ema=None if number is None else str(number))
            made = _samples(model, STUDENTS)
            quality = score(generate(model.denoiser, model.spec.sampler)) if is_last else None
            yield Measured(
                network=network,
                run=variant.slug,
                method=variant.method,
                factor=variant.factor,
                variant=variant.name,
                average=average,
                config=config,
                overrides=tuple(overrides),
                seed=seed,
                step=step,
                total_steps=total,
                cpu_seconds=seconds_until(run, step, clock="cpu_seconds") or 0.0,
                to_teacher=frechet_from_features(made, _teachers(teacher, TEACHERS_OWN)),
                to_data=frechet_from_features(made, _data()),
                precision=quality.precision if quality else None,
                recall=quality.recall if quality else None,
                fd_pixels=quality.fd_pixels if quality else None,
                commit=_commit(),
            )


def _measure_teacher(teacher: Path, network: str) -> Measured:
    """Its own floor: the distance of two sets of its samples."""
    model, made = load_model(teacher), _teachers(teacher, OTHERS)
    quality, step = score(generate(model.denoiser, model.spec.sampler)), int(model.source.name.removeprefix("step-"))
    return Measured(
        network=network,
        run="teacher",
        method="pretrain",
        factor="base",
        variant="teacher",
        config="pretrain/digits",
        overrides=TEACHERS[network],
        seed=0,
        step=step,
        total_steps=step,
        cpu_seconds=seconds_until(teacher, step, clock="cpu_seconds") or 0.0,
        to_teacher=frechet_from_features(made, _teachers(teacher, TEACHERS_OWN)),
        to_data=frechet_from_features(made, _data()),
        precision=quality.precision,
        recall=quality.recall,
        fd_pixels=quality.fd_pixels,
        commit=_commit(),
    )


@cache
def _teachers(teacher: Path, seed: int) -> Tensor:
    """Its samples, kept beside its checkpoints by the hash of its weights: they take a minute."""
    model = load_model(teacher)
    file = teacher / f"samples-{weights_sha256(model.source)[:12]}-{seed}.npy"
    if not file.exists():
        np.save(file, _samples(model, seed).numpy())
    return torch.from_numpy(np.load(file, allow_pickle=False))


def _samples(model: TrainedModel, seed: int) -> Tensor:
    """[NUM_SAMPLES, pixels], classes in turn."""
    return sample_images(model, count=NUM_SAMPLES, seed=seed).flatten(1)


@cache
def _data() -> Tensor:
    return Digits(split="train").tensors()[0].flatten(1)


@cache
def _commit() -> str | None:
    return describe_environment(torch.device("cpu"), dtype="float32", wall_seconds=0.0).commit


if __name__ == "__main__":
    app()
