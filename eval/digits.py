"""The protocol `digits-pixels`: how good generated digits are, in pixels, in seconds on a CPU.

A Frechet distance in pixels stands beside precision and recall because classes alone are no bar: a teacher cut to one
step makes readable digits with no variety. No number here is an FID, and none compares with another protocol's.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from diffdistill.data.digits import Digits
from diffdistill.denoiser import Denoiser
from diffdistill.draws import Draws
from diffdistill.eval.distances import frechet_from_features
from diffdistill.eval.neighbours import precision_recall
from diffdistill.sampling import FewSteps, Sampler


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Every choice behind a row. A different choice is a different protocol, with a different name.

    order: labels ascend, images_per_class of each.  noise_step: image i starts from Draws(seed, noise_step, i) under
    `noise_name`; a stochastic sampler's step j adds f"fresh {j}" of the same draws.  nearest_k: the balls of precision
    and recall.  warm_up_batches: generated and thrown away before the clock starts.
    """

    name: str
    num_images: int
    images_per_class: int
    num_classes: int
    image_shape: tuple[int, int, int]
    order: Literal["class-major"]
    noise_step: int
    noise_name: str
    features: Literal["pixels in [-1, 1]"]
    quantisation: Literal["none"]
    covariance: Literal["unbiased"]
    reference: Literal["digits"]
    reference_split: Literal["train"]
    nearest_k: int
    warm_up_batches: int


DIGITS_PIXELS = Protocol(
    name="digits-pixels",
    num_images=1800,
    images_per_class=180,
    num_classes=10,
    image_shape=(1, 8, 8),
    order="class-major",
    noise_step=0,
    noise_name="noise",
    features="pixels in [-1, 1]",
    quantisation="none",
    covariance="unbiased",
    reference="digits",
    reference_split="train",
    nearest_k=3,
    warm_up_batches=1,
)

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
    """Generate the protocol's images, time that, and score them.  name: what the row is called."""
    for index in _batches(batch_size)[: DIGITS_PIXELS.warm_up_batches]:
        _generate(denoiser, sampler, Draws(seed, DIGITS_PIXELS.noise_step, index), guidance)
    start = time.perf_counter()
    images = generate(denoiser, sampler, guidance=guidance, seed=seed, batch_size=batch_size)
    seconds = time.perf_counter() - start
    return _row(name, sampler.num_evaluations, score(images), 1000 * seconds / len(images))


def generate(
    denoiser: Denoiser, sampler: Sampler, *, guidance: float = 1.0, seed: int = 0, batch_size: int = 256
) -> Tensor:
    """The protocol's images, [1800, 1, 8, 8], class-major, on the CPU.

    Each image has its own noise, so batch_size changes them by no more than the network's own rounding.
    """
    draws = [Draws(seed, DIGITS_PIXELS.noise_step, index) for index in _batches(batch_size)]
    return torch.cat([_generate(denoiser, sampler, rng, guidance) for rng in draws])


def score(images: Tensor) -> Scores:
    """Compare images [1800, 1, 8, 8] in [-1, 1] with the training split.

    Raises ValueError for another shape (a Frechet distance depends on the number of samples) and for NaN.
    """
    expected = (DIGITS_PIXELS.num_images, *DIGITS_PIXELS.image_shape)
    if images.shape != expected:
        raise ValueError(f"{DIGITS_PIXELS.name} scores images {list(expected)}, not {list(images.shape)}")
    fake, real = images.cpu().flatten(1), _reference()[0].flatten(1)
    precision, recall = precision_recall(real, fake, k=DIGITS_PIXELS.nearest_k)
    return Scores(frechet_from_features(fake, real), precision, recall)


def bootstrap_floor(seed: int = 0) -> Row:
    """What 1,800 draws with replacement from the training split score, 180 a class: a perfect model's noise floor."""
    images, labels = _reference()
    rng = Draws(seed, DIGITS_PIXELS.noise_step, torch.arange(DIGITS_PIXELS.images_per_class))
    drawn = []
    for label in range(DIGITS_PIXELS.num_classes):
        members = images[labels == label]
        drawn.append(members[rng.integers(f"bootstrap {label}", len(members))])
    return _row("bootstrap floor", 0, score(torch.cat(drawn)), 0.0)


def print_table(rows: Sequence[Row], console: Console) -> None:
    """One line a row. A row without evaluations shows no cost."""
    protocol = DIGITS_PIXELS
    table = Table(title=f"{protocol.name}: {protocol.num_images:,} images against the {protocol.reference_split} split")
    table.add_column("name")
    for column in ("evaluations", "FD pixels", "precision", "recall", "ms / image"):
        table.add_column(column, justify="right")
    for row in rows:
        quality = (f"{value:.3f}" for value in (row.fd_pixels, row.precision, row.recall))
        evaluations, cost = (str(row.num_evaluations), f"{row.ms_per_image:.3f}") if row.num_evaluations else ("-", "-")
        table.add_row(row.name, evaluations, *quality, cost)
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


@torch.no_grad()
def _generate(denoiser: Denoiser, sampler: Sampler, rng: Draws, guidance: float) -> Tensor:
    """The images rng.index, on the CPU: noise is drawn there, so that every device gets the same bits."""
    tensors = chain(denoiser.parameters(), denoiser.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))

    def normal(name: str) -> Tensor:
        return rng.normal(name, DIGITS_PIXELS.image_shape).to(device)

    cond = denoiser.class_cond((rng.index // DIGITS_PIXELS.images_per_class).to(device))
    with _eval_mode(denoiser):
        noise = normal(DIGITS_PIXELS.noise_name)
        images = sampler(denoiser, noise, cond, guidance=guidance, fresh_noise=lambda i: normal(f"fresh {i}"))
    return images.cpu()


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Without dropout, and afterwards every part in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@cache
def _reference() -> tuple[Tensor, Tensor]:
    """Images [1437, 1, 8, 8] and labels [1437] of the training split."""
    return Digits(split=DIGITS_PIXELS.reference_split).tensors()
