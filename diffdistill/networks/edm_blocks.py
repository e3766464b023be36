"""What EDM's three U-Nets are made of: one block and three embeddings.

Karras et al. 2022, arXiv:2206.00364, appendix F.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.attention import attention
from diffdistill.diffusion.cond import Cond
from diffdistill.networks.recompute import Recomputable

Resample = Literal["up", "down"] | None


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Where DDPM++, NCSN++ and ADM differ.

    embed: time and condition as one vector.  initialise: the weights at the start.  heads: attention heads for so
    many channels.  attends_late: in the decoder only a resolution's last block has attention.  is_scaled: the
    embedding scales and shifts a block's middle, behind its norm, rather than shifts it before.  skip_scale: times
    each residual sum.  has_resampled_projection: a block that resamples has a 1x1 convolution on its shortcut.
    eps: of the norms.  output_names: EDM's for the last norm and convolution.  taps: of the filter that resamples, in
    each direction.  has_residual_input: each coarser resolution is given the one above it, or the image, once more.
    """

    embed: Callable[[int, int, int], nn.Module]
    initialise: Callable[[nn.Module], None]
    heads: Callable[[int], int]
    attends_late: bool
    is_scaled: bool
    skip_scale: float
    has_resampled_projection: bool
    eps: float
    output_names: tuple[str, str]
    taps: tuple[int, ...] = (1, 1)
    has_residual_input: bool = False


@dataclass(frozen=True)
class BlockPlan:
    """One block. name: EDM's.  heads: 0 without attention.  takes_skip: channels_in counts an encoder's output."""

    name: str
    channels_in: int
    channels: int
    resample: Resample = None
    heads: int = 0
    takes_skip: bool = False


class Block(Recomputable):
    """Norm, convolution, time and condition, norm, convolution, attention; each of two sums times `skip_scale`."""

    filter: Tensor

    def __init__(self, plan: BlockPlan, variant: Variant, width: int, dropout: float) -> None:
        super().__init__()
        channels_in, channels = plan.channels_in, plan.channels
        self.channels = channels
        self.resample: Resample = plan.resample
        self.is_box = variant.taps == (1, 1)
        if plan.resample and not self.is_box:
            self.register_buffer("filter", resampling_filter(variant.taps), persistent=False)
        self.takes_skip = plan.takes_skip
        self.heads = plan.heads
        self.is_scaled = variant.is_scaled
        self.skip_scale = variant.skip_scale
        self.dropout = dropout
        self.norm_in, self.norm_mid = group_norm(channels_in, variant.eps), group_norm(channels, variant.eps)
        self.conv_in = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulate = nn.Linear(width, 2 * channels if variant.is_scaled else channels)
        is_projected = channels != channels_in or (plan.resample is not None and variant.has_resampled_projection)
        self.shortcut = nn.Conv2d(channels_in, channels, 1) if is_projected else nn.Identity()
        if plan.heads:
            self.norm_attention = group_norm(channels, variant.eps)
            self.qkv = nn.Conv2d(channels, 3 * channels, 1)
            self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x: [B, C_in, H, W]; embedding: [B, width].  Returns [B, C, H', W']."""
        h = self.conv_in(self._resize(F.silu(self.norm_in(x))))
        h = F.silu(self._condition(h, self.modulate(embedding)[:, :, None, None]))
        h = self.conv_out(F.dropout(h, self.dropout, self.training))
        h = (h + self.shortcut(self._resize(x))) * self.skip_scale
        return self._attend(h) if self.heads else h

    def _condition(self, h: Tensor, modulation: Tensor) -> Tensor:
        if not self.is_scaled:
            return self.norm_mid(h + modulation)
        scale, shift = modulation.chunk(2, 1)
        return torch.addcmul(shift, self.norm_mid(h), scale + 1)

    def _resize(self, x: Tensor) -> Tensor:
        """By the box filter [1, 1]: the mean of four pixels, and each pixel four times; or by a longer one."""
        if self.resample and not self.is_box:
            return self._filtered(x)
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x

    def _filtered(self, x: Tensor) -> Tensor:
        channels, pad = x.shape[1], (self.filter.shape[-1] - 1) // 2
        kernel = self.filter.to(x.dtype).expand(channels, 1, -1, -1)
        if self.resample == "down":
            return F.conv2d(x, kernel, groups=channels, stride=2, padding=pad)
        return F.conv_transpose2d(x, 4 * kernel, groups=channels, stride=2, padding=pad)

    def _attend(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        # EDM's layout: the three of one channel stand next to one another.
        qkv = self.qkv(self.norm_attention(x)).reshape(batch, self.heads, channels // self.heads, 3, height * width)
        q, k, v = qkv.permute(3, 0, 1, 4, 2).unbind(0)
        h = attention(q, k, v).transpose(-1, -2).reshape(batch, channels, height, width)
        return (x + self.project(h)) * self.skip_scale


class ResidualInput(nn.Conv2d):
    """NCSN++: a 3 x 3 convolution, then the filter that halves each side."""

    filter: Tensor

    def __init__(self, channels_in: int, channels: int, taps: tuple[int, ...]) -> None:
        super().__init__(channels_in, channels, 3)
        self.register_buffer("filter", resampling_filter(taps), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C_in, H, W].  Returns [B, C, H / 2, W / 2]."""
        h = F.conv2d(x, self.weight, padding=1 + (self.filter.shape[-1] - 1) // 2)
        kernel = self.filter.to(x.dtype).expand(h.shape[1], 1, -1, -1)
        assert self.bias is not None
        return F.conv2d(h, kernel, self.bias, groups=h.shape[1], stride=2)


class SongEmbedding(nn.Module, ABC):
    """Time, class and augmentation, added up, then two layers. "No class" is a vector of zeros.

    inner: the width of what is added up.
    """

    def __init__(self, inner: int, width: int, num_classes: int, augment_dim: int) -> None:
        super().__init__()
        self.label = nn.Linear(num_classes, inner) if num_classes else None
        self.augmentation = nn.Linear(augment_dim, inner, bias=False) if augment_dim else None
        self.first, self.second = nn.Linear(inner, width), nn.Linear(width, width)

    @abstractmethod
    def angles(self, time_input: Tensor) -> Tensor:
        """[B] -> [B, inner / 2]."""

    def forward(self, time_input: Tensor, cond: Cond) -> Tensor:
        """time_input: [B].  Returns [B, width]."""
        angles = self.angles(time_input)
        h = torch.cat([angles.sin(), angles.cos()], 1)
        if self.label is not None:
            h = h + self.label(_one_hot(cond, self.label.in_features, h) * math.sqrt(self.label.in_features))
        if self.augmentation is not None and cond.augmentation is not None:
            h = h + self.augmentation(cond.augmentation.to(h.dtype))
        return F.silu(self.second(F.silu(self.first(h))))


class DDPMPPEmbedding(SongEmbedding):
    """Time at frequencies from 1 to 1 / 10000, both included."""

    def __init__(self, channels: int, num_classes: int, augment_dim: int) -> None:
        super().__init__(channels, 4 * channels, num_classes, augment_dim)
        self.frequencies = channels // 2

    def angles(self, time_input: Tensor) -> Tensor:
        return _angles(time_input, self.frequencies, steps=self.frequencies - 1)


class NCSNPPEmbedding(SongEmbedding):
    """Time at random frequencies of N(0, 16^2), which are kept with the weights; twice as many."""

    frequencies: Tensor

    def __init__(self, channels: int, num_classes: int, augment_dim: int) -> None:
        super().__init__(2 * channels, 4 * channels, num_classes, augment_dim)
        self.register_buffer("frequencies", 16 * torch.randn(channels))

    def angles(self, time_input: Tensor) -> Tensor:
        return time_input[:, None] * (2 * math.pi * self.frequencies).to(time_input.dtype)


class ADMEmbedding(nn.Module):
    """Time and augmentation through two layers, then the class. "No class" is a vector of zeros."""

    def __init__(self, channels: int, num_classes: int, augment_dim: int) -> None:
        super().__init__()
        self.frequencies = channels // 2
        self.label = nn.Linear(num_classes, 4 * channels, bias=False) if num_classes else None
        self.augmentation = nn.Linear(augment_dim, channels, bias=False) if augment_dim else None
        self.first, self.second = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, 4 * channels)

    def forward(self, time_input: Tensor, cond: Cond) -> Tensor:
        """time_input: [B].  Returns [B, 4 channels]."""
        angles = _angles(time_input, self.frequencies, steps=self.frequencies)
        h = torch.cat([angles.cos(), angles.sin()], 1)
        if self.augmentation is not None and cond.augmentation is not None:
            h = h + self.augmentation(cond.augmentation.to(h.dtype))
        h = self.second(F.silu(self.first(h)))
        if self.label is not None:
            h = h + self.label(_one_hot(cond, self.label.in_features, h))
        return F.silu(h)


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """As many equal groups as there can be, at most 32 and each of at least 4 channels."""
    most = max(1, min(32, channels // 4))
    groups = max(count for count in range(1, most + 1) if channels % count == 0)
    return nn.GroupNorm(groups, channels, eps=eps)


def resampling_filter(taps: tuple[int, ...]) -> Tensor:
    """[n, n]: the outer product of the taps with themselves, of sum 1."""
    line = torch.tensor(taps, dtype=torch.float32)
    return torch.outer(line, line) / line.sum() ** 2


def _angles(time_input: Tensor, count: int, *, steps: int) -> Tensor:
    """[B, count]: time at the frequencies 1, r, r^2 ... with r^steps = 1 / 10000."""
    powers = torch.arange(count, device=time_input.device, dtype=time_input.dtype) / steps
    return time_input[:, None] * (1 / 10000) ** powers


def _one_hot(cond: Cond, num_classes: int, like: Tensor) -> Tensor:
    """[B, num_classes]: zeros for "no class" and where no label is given."""
    if cond.label is None:
        return like.new_zeros(len(like), num_classes)
    return F.one_hot(cond.label, num_classes + 1)[:, :num_classes].to(like.dtype)
