"""How a guided denoiser combines its two estimates: a rule that belongs to the model, whoever guides it.

A rule is given the estimates in the form that the network predicts (eps, v, flow; x0 for `edm`), as diffusers'
pipelines do: all but the linear one depend on the form. Under every rule the numbers 1 and 0 ask for one estimate
alone.
"""

from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from diffdistill.settings.schema import Fraction, schema


class GuidanceRule(Protocol):
    def __call__(self, without_cond: Tensor, with_cond: Tensor, scale: float | Tensor) -> Tensor:
        """Both estimates [B, ...] in one form, and w, a number or broadcastable to them.  Returns [B, ...]."""
        ...


@schema
class Linear:
    """u + w (c - u).  Ho & Salimans 2022, arXiv:2207.12598."""

    name: Literal["linear"] = "linear"

    def __call__(self, without_cond: Tensor, with_cond: Tensor, scale: float | Tensor) -> Tensor:
        return without_cond + scale * (with_cond - without_cond)


@schema
class Renormalised:
    """The linear rule, scaled to the norm of the conditional estimate.

    over: the extent of one norm: a "sample"; a "row" of a channel, as diffusers' pipeline of Lumina 2; or a "patch" of
    2 x 2 pixels with all channels, as that of Qwen-Image.  only_shrinks: whether an estimate of a smaller norm stays as
    it is, as in that of LongCat-Image.
    """

    name: Literal["renormalised"] = "renormalised"
    over: Literal["sample", "row", "patch"] = "sample"
    only_shrinks: bool = False

    def __call__(self, without_cond: Tensor, with_cond: Tensor, scale: float | Tensor) -> Tensor:
        """Raises ValueError over patches where a sample is no [C, H, W] with even sides."""
        guided = LINEAR(without_cond, with_cond, scale)
        ratio = _ratio(self._norm(with_cond), self._norm(guided))
        return guided * (ratio.clamp(max=1) if self.only_shrinks else ratio)

    def _norm(self, x: Tensor) -> Tensor:
        if self.over == "row":
            return torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        if self.over == "sample":
            return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
        if x.ndim != 4 or x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"guidance by patches is of [B, C, H, W] with even sides, not of {list(x.shape)}")
        patches = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B, C, H / 2, 2, W / 2, 2]
        norm = torch.linalg.vector_norm(patches, dim=(1, 3, 5), keepdim=True)
        return norm.expand(-1, 1, -1, 2, -1, 2).flatten(4).flatten(2, 3)


@schema
class Rescaled:
    """The linear rule, mixed by `share` with its rescaling to the standard deviation of the conditional estimate.

    share: phi; 0 is the linear rule.  Lin et al. 2023, arXiv:2305.08891, section 3.4, who use 0.7; the
    `guidance_rescale` of diffusers.
    """

    name: Literal["rescaled"] = "rescaled"
    share: Fraction = 0.7

    def __call__(self, without_cond: Tensor, with_cond: Tensor, scale: float | Tensor) -> Tensor:
        guided, dims = LINEAR(without_cond, with_cond, scale), tuple(range(1, with_cond.ndim))
        ratio = _ratio(with_cond.std(dim=dims, keepdim=True), guided.std(dim=dims, keepdim=True))
        return self.share * (guided * ratio) + (1 - self.share) * guided


LINEAR = Linear()

AnyGuidanceRule = Annotated[Linear | Renormalised | Rescaled, Field(discriminator="name")]
"""The rules that a config may name."""


def _ratio(wanted: Tensor, found: Tensor) -> Tensor:
    """wanted / found; `wanted` where there is nothing to scale."""
    return wanted / (found + (found == 0))
