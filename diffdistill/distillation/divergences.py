"""f-divergences between two laws p and q, as weights on the matching of their scores by the density ratio r = p/q.

The gradient of E_q f(r) is that of reverse KL with each sample weighted by h(r) = f''(r) r^2.  Xu et al. 2025,
arXiv:2502.15681, theorem 1.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.distillation.losses import widen

Divergence = Literal["rkl", "kl", "js", "sf", "sh", "jf", "neyman", "pearson"]
"""Reverse KL, forward KL, Jensen-Shannon, softened reverse KL, squared Hellinger, Jeffreys, and two chi-squared."""

WEIGHTS: Mapping[Divergence, Callable[[Tensor], Tensor]] = {
    "rkl": torch.ones_like,
    "kl": lambda r: r,
    "js": lambda r: r / (r + 1),
    "sf": lambda r: 1 / (r + 1),
    "sh": lambda r: r.sqrt() / 4,
    "jf": lambda r: r + 1,
    "neyman": lambda r: 2 / r,
    "pearson": lambda r: 2 * r**2,
}
"""h(r) of each; `tests/methods/test_f_distill.py` derives them from f."""

MAX_LOGIT = 10.0


@torch.no_grad()
def density_ratio(logits: Tensor, low: float, high: float) -> Tensor:
    """p/q as a discriminator's logits [B] have it, kept between low and high; float32 or wider, no gradient."""
    return widen(logits).clamp(-MAX_LOGIT, MAX_LOGIT).exp().clamp(low, high)


class RatioMeans(nn.Module):
    """The mean ratio of each bin, remembered from step to step; one at the start."""

    values: Tensor

    def __init__(self, num_bins: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.ones(num_bins))


def mean_by_bin(values: Tensor, bins: Tensor, before: Tensor, memory: float) -> Tensor:
    """memory * before + (1 - memory) * the mean of the values in each bin; an empty bin stays as before.

    values: [B]; bins: [B] int64, 0 .. K - 1; before: [K].  Returns [K].
    """
    count = torch.bincount(bins, minlength=len(before))
    total = torch.zeros_like(before).index_add_(0, bins, values)
    mixed = memory * before + (1 - memory) * total / count.clamp_min(1)
    return torch.where(count > 0, mixed, before)
