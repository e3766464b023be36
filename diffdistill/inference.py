"""Sampling from what is on disk."""

import time
from dataclasses import dataclass
from pathlib import Path as FilePath

import torch
from torch import Tensor

from diffdistill.checkpoint import is_disk_full
from diffdistill.draws import Draws
from diffdistill.guidance import Guidance
from diffdistill.model import TrainedModel, load_model
from diffdistill.negative import with_negative_prompt
from diffdistill.preview import save_grid
from diffdistill.schema import UserError

NO_CLASS = "none: it is unconditional"


@dataclass(frozen=True)
class SampledGrid:
    """file: the PNG.  ms_per_image: wall time of generation."""

    file: FilePath
    num_evaluations: int
    ms_per_image: float


def sample_grid(
    place: str,
    file: FilePath,
    *,
    count: int,
    label: int | None = None,
    seed: int = 0,
    guidance: Guidance = 1.0,
    ema: str | None = None,
    negative_prompt: str | None = None,
    negative_scale: float | None = None,
) -> SampledGrid:
    """Sample `count` images from a run or checkpoint and write a grid.

    label: one class for all, or None for all in turn.  ema: the name of one of the run's `more_emas`.
    negative_prompt, negative_scale: what cross-attention steers away from, and how much; None for the run's own.
    Raises UserError on a class, a guidance or an average that it does not know.
    """
    model = with_negative_prompt(load_model(place, ema=ema), negative_prompt, negative_scale)
    begin = time.perf_counter()
    images = sample_images(model, count=count, label=label, seed=seed, guidance=guidance)
    milliseconds = (time.perf_counter() - begin) * 1000 / count
    try:
        save_grid(file, images, columns=min(10, count))
    except (OSError, ValueError) as error:
        if is_disk_full(error):
            raise
        raise UserError(f"--out {file}: cannot be written: {error}") from None
    return SampledGrid(file, model.spec.sampler.num_evaluations, milliseconds)


@torch.no_grad()
def sample_images(
    model: TrainedModel,
    *,
    count: int,
    label: int | None = None,
    seed: int = 0,
    guidance: Guidance = 1.0,
    batch: int = 256,
) -> Tensor:
    """[count, C, H, W] in [-1, 1]. Image i depends on (seed, i) and its class alone, not on the batch size."""
    num_classes = model.spec.num_classes
    classes = model.spec.classes or tuple(range(num_classes))
    if label is not None and label not in classes:
        several = ", ".join(map(str, classes)) if model.spec.classes else f"0 to {num_classes - 1}"
        raise UserError(f"--label {label}: unknown class; the model knows {several if classes else NO_CLASS}")
    if guidance != 1 and not model.denoiser.net.knows_unconditional:
        raise UserError(f"--guidance {guidance}: the model was trained without class dropout; use 1")
    known = torch.tensor(classes or (0,))
    made = []
    for first in range(0, count, batch):
        index = torch.arange(first, min(first + batch, count))
        rng = Draws(seed, 0, index)
        chosen = known[index % len(known)] if label is None else torch.full_like(index, label)
        made.append(
            model.spec.sampler(
                model.denoiser,
                rng.normal("noise", model.spec.image_shape),
                model.denoiser.class_cond(chosen),
                guidance=guidance,
                fresh_noise=rng.fresh_noise(model.spec.image_shape),
            )
        )
    return torch.cat(made)
