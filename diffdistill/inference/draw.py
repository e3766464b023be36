"""Sampling from models: classes, or prompts by number."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffdistill.diffusion.guidance.check import check_guidance
from diffdistill.diffusion.guidance.policies import Guidance
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.models.spec import TrainedModel
from diffdistill.settings.schema import UserError

NO_CLASS = "none: it is unconditional"


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
    check_labels(() if label is None else (label,), classes, num_classes)
    known = torch.tensor(classes or (0,))
    made = []
    for first in range(0, count, batch):
        index = torch.arange(first, min(first + batch, count))
        chosen = known[index % len(known)] if label is None else torch.full_like(index, label)
        made.append(sample_rows(model, StepRandom(seed, 0, index), chosen, guidance=guidance))
    return torch.cat(made)


@torch.no_grad()
def sample_rows(model: TrainedModel, rng: StepRandom, labels: Tensor, *, guidance: Guidance) -> Tensor:
    """One image for each of the numbers of `rng`, [B, C, H, W].

    labels: classes, or numbers of encoded prompts, [B].  Raises UserError on guidance that the model does not know.
    """
    shape = model.spec.image_shape
    check_guidance(model.denoiser, "--guidance", guidance)
    return model.spec.sampler(
        model.denoiser,
        rng.normal("noise", shape),
        model.denoiser.class_cond(labels),
        guidance=guidance,
        fresh_noise=rng.fresh_noise(shape),
    )


def check_labels(labels: Sequence[int], classes: Sequence[int], num_classes: int) -> None:
    """Raise UserError on a class that is not among these."""
    for label in labels:
        if label not in classes:
            is_all = len(classes) == num_classes
            several = f"0 to {num_classes - 1}" if is_all else ", ".join(map(str, classes))
            raise UserError(f"--label {label}: unknown class; the model knows {several if classes else NO_CLASS}")
