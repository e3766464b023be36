"""The protocol `digits-pixels`: how good generated digits are, in pixels, in seconds on a CPU.

A Frechet distance in pixels stands beside precision and recall because classes alone are no bar: a teacher cut to one
step makes readable digits with no variety. No number here is an FID, and none compares with another protocol's.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache

import torch
from rich.table import Table
from torch import Tensor

from diffdistill.data.digits import Digits
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.sampling import FewSteps, Sampler
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.teleport import LowRankGaussian
from diffdistill.diffusion.threads import threads
from diffdistill.eval.images.generate import SampledImages
from diffdistill.eval.metrics.distances import frechet_from_features
from diffdistill.eval.metrics.neighbours import precision_recall
from diffdistill.eval.metrics.settings import PrecisionRecall
from diffdistill.eval.protocols.packaged import DIGITS_PIXELS
from diffdistill.eval.records.record import ModelRecord
from diffdistill.settings.terminal import Console

SHAPE = (1, 8, 8)
NEAREST_K = next(metric.nearest_k for metric in DIGITS_PIXELS.metrics if isinstance(metric, PrecisionRecall))

ONE_STEP = FewSteps(init_ratio=2.5)
"""The baseline: the teacher itself at one evaluation, which is where a student starts."""


@dataclass(frozen=True)
class Scores:
    """fd_pixels: Frechet distance, 0 is best.  precision, recall: 0 .. 1."""

    fd_pixels: float
    precision: float
    recall: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. ms_per_image: wall time of generation, for images made batch_size at a time."""

    name: str
    num_evaluations: int
    fd_pixels: float
    precision: float
    recall: float
    ms_per_image: float

    def to_dict(self) -> dict[str, str | int | float]:
        """The fields by name, ready for JSON."""
        return asdict(self)


def evaluate(
    denoiser: Denoiser,
    sampler: Sampler,
    *,
    name: str = "model",
    guidance: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
) -> Row:
    """Generate the protocol's images, time that after a batch to warm up, and score them.  name: of the row."""
    source = _source(denoiser, sampler, name=name, guidance=guidance, seed=seed)
    source.take(0, _batches(batch_size)[0])
    start = time.perf_counter()
    images = generate(denoiser, sampler, guidance=guidance, seed=seed, batch_size=batch_size)
    seconds = time.perf_counter() - start
    return _row(name, sampler.num_evaluations, score(images), 1000 * seconds / len(images))


def generate(
    denoiser: Denoiser, sampler: Sampler, *, guidance: float = 1.0, seed: int = 0, batch_size: int = 256
) -> Tensor:
    """The protocol's images, [1800, 1, 8, 8], class-major, on the CPU.

    seed: which range of 1,800 image seeds.  Each image has its own noise, so batch_size changes them by no more than
    the network's own rounding.
    """
    source = _source(denoiser, sampler, guidance=guidance, seed=seed)
    return torch.cat([source.take(0, index).cpu() for index in _batches(batch_size)])


def score(images: Tensor) -> Scores:
    """Compare images [1800, 1, 8, 8] in [-1, 1] with the training split.

    Raises ValueError for another shape (a Frechet distance depends on the number of samples) and for NaN.
    """
    expected = (DIGITS_PIXELS.num_images, *SHAPE)
    if images.shape != expected:
        raise ValueError(f"{DIGITS_PIXELS.name} scores images {list(expected)}, not {list(images.shape)}")
    fake, real = images.cpu().flatten(1), _reference()[0].flatten(1)
    with threads(1):  # 64 numbers an image are little work
        precision, recall = precision_recall(real, fake, k=NEAREST_K)
        return Scores(frechet_from_features(fake, real), precision, recall)


def bootstrap_floor(seed: int = 0) -> Row:
    """What 1,800 draws with replacement from the training split score, 180 a class: a perfect model's noise floor."""
    images, labels = _reference()
    num_classes = DIGITS_PIXELS.labels.num_classes
    rng = StepRandom(seed, 0, torch.arange(DIGITS_PIXELS.num_images // num_classes))
    drawn = []
    for label in range(num_classes):
        members = images[labels == label]
        drawn.append(members[rng.integers(f"bootstrap {label}", len(members))])
    return _row("bootstrap floor", 0, score(torch.cat(drawn)), 0.0)


def gaussian_baseline(seed: int = 0) -> Row:
    """What a Gaussian of the training split scores, with a mean for each class and one covariance: what there is to
    gain beyond the first two moments, which are all that a Frechet distance in pixels sees."""
    gaussian = LowRankGaussian.fit(*_reference())
    index = torch.arange(DIGITS_PIXELS.num_images)
    labels = index // (len(index) // DIGITS_PIXELS.labels.num_classes)
    noise = StepRandom(seed, 0, index).normal("gaussian", gaussian.values.shape)
    made = gaussian.sample(noise, labels).float().reshape(len(index), *SHAPE)
    return _row("Gaussian of the data", 0, score(made), 0.0)


def print_table(rows: Sequence[Row], console: Console) -> None:
    """One line per row. A row without NFE shows no cost."""
    table = Table(title=f"{DIGITS_PIXELS.name}: {DIGITS_PIXELS.num_images:,} images against the train split")
    table.add_column("name")
    for column in ("NFE", "FD pixels", "precision", "recall", "ms / image"):
        table.add_column(column, justify="right")
    for row in rows:
        quality = (f"{value:.3f}" for value in (row.fd_pixels, row.precision, row.recall))
        nfe, cost = (str(row.num_evaluations), f"{row.ms_per_image:.3f}") if row.num_evaluations else ("-", "-")
        table.add_row(row.name, nfe, *quality, cost)
    console.print(table)


def _row(name: str, num_evaluations: int, scores: Scores, ms_per_image: float) -> Row:
    return Row(
        name=name,
        num_evaluations=num_evaluations,
        fd_pixels=scores.fd_pixels,
        precision=scores.precision,
        recall=scores.recall,
        ms_per_image=ms_per_image,
    )


def _batches(batch_size: int) -> tuple[Tensor, ...]:
    """The images' numbers, in order."""
    return torch.split(torch.arange(DIGITS_PIXELS.num_images), batch_size)


def _source(
    denoiser: Denoiser, sampler: Sampler, *, name: str = "model", guidance: float = 1.0, seed: int = 0
) -> SampledImages:
    protocol = replace(DIGITS_PIXELS, first_seed=seed * DIGITS_PIXELS.num_images)
    model = ModelRecord(source=name)
    return SampledImages(
        denoiser=denoiser, sampler=sampler, protocol=protocol, image_shape=SHAPE, model=model, guidance=guidance
    )


@cache
def _reference() -> tuple[Tensor, Tensor]:
    """Images [1437, 1, 8, 8] and labels [1437] of the training split."""
    return Digits(split="train").tensors()
