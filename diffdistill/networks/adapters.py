"""Adapters that make a frozen network take the guidance scale w as input.

Jensen & Sadat 2025, arXiv:2503.07274: Adapter Guidance Distillation. Both of its kinds, behind the base's blocks: an
offset, the same at every position, and cross-attention to a few tokens. Not implemented: its gates on MLPs, learned
positions, text tokens.
"""

from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser, Network, device_of, freeze
from diffdistill.networks.diffusers_model import DiffusersNetwork
from diffdistill.networks.guided import (
    Around,
    GuidanceEncoding,
    GuidedBase,
    blocks_of,
    embedding_width,
    zeroed,
)
from diffdistill.networks.hooked import HookedBlock, hooked_blocks
from diffdistill.networks.recompute import Recomputable
from diffdistill.networks.registry import PlainNetwork
from diffdistill.settings.numbers import Width
from diffdistill.settings.reading import check_regular
from diffdistill.settings.schema import Fraction, UserError, field, schema
from diffdistill.storage.atomic import write_tensors
from diffdistill.storage.checkpoint import load_strictly

BASE = "base."
CONFIG = "adapter"


@schema
class AdapterConfig:
    """kind: an offset, or attention to the tokens of w, and of time and class.  width: of the adapters.  heads: of the
    attention.  placement: after the base's blocks with attention, as in the paper, or after all.  proportional:
    their output times w - 1; at w = 1 they are then always the base."""

    kind: Literal["offset", "cross_attention"] = "offset"
    width: Width = 64
    heads: Width = 4
    placement: Literal["attention", "all"] = "attention"
    proportional: bool = False

    def __post_init__(self) -> None:
        if self.kind == "cross_attention" and self.width % self.heads:
            raise ValueError(f"heads = {self.heads} must divide width = {self.width}")


_CONFIGS = TypeAdapter(AdapterConfig)


@schema
class AdaptedConfig:
    """Settings of `Adapted`."""

    name: Literal["adapted"] = "adapted"
    base: PlainNetwork
    adapter: AdapterConfig = field(default_factory=AdapterConfig)

    def build(self, image_shape: tuple[int, int, int], num_classes: int, class_dropout: Fraction) -> "Adapted":
        """The network for images [C, H, W], its base new too.

        Raises UserError if the base does not fit them, or has no blocks of the kind.
        """
        return Adapted(self.adapter, self.base.build(image_shape, num_classes, class_dropout))


class Adapted(GuidedBase):
    """A frozen base with adapters, which alone are trained. Starts as the base, whatever w.

    The adapters share what they are told: w, and the base's embedding of time and class.
    """

    def __init__(self, config: AdapterConfig, base: Network) -> None:
        super().__init__(base)
        freeze(base)
        self.config = config
        blocks = self._blocks()
        self.encode = GuidanceEncoding(config.width)
        self.project = nn.Linear(embedding_width(blocks[0]), config.width)
        self.adapters = nn.ModuleList(
            Offset(config.width, block.channels)
            if config.kind == "offset"
            else CrossAttention(config.width, block.channels, config.heads)
            for block in blocks
        )

    def train(self, mode: bool = True) -> "Adapted":
        """The base stays in eval mode: its dropout is no part of what is fitted."""
        super().train(mode)
        self.base.eval()
        return self

    def changes(self, scale: Tensor, cond: Cond) -> list[tuple[Recomputable | HookedBlock, Around]]:
        code = self.encode(scale)

        def behind(adapter: nn.Module) -> Around:
            def around(run: Around, x: Tensor, embedding: Tensor) -> Tensor:
                h = run(x, embedding)
                change = adapter(_as_tokens(h), torch.stack([code, self.project(embedding)], 1))
                if self.config.proportional:
                    change = change * (scale - 1).to(change.dtype)[:, None, None]
                return h + _as_image(change, h)

            return around

        return [(block, behind(adapter)) for block, adapter in zip(self._blocks(), self.adapters, strict=True)]

    def _blocks(self) -> Sequence[Recomputable | HookedBlock]:
        """The blocks that have an adapter."""
        if isinstance(self.base, DiffusersNetwork):
            return hooked_blocks(self.base)
        found = blocks_of(self.base)
        if self.config.placement == "attention":
            found = [block for block in found if getattr(block, "heads", 0)]
        if not found:
            raise UserError("network.placement: this base has no blocks with attention; use all")
        return found


class Offset(nn.Module):
    """One vector for all positions: an MLP of the sum of the tokens."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), zeroed(nn.Linear(width, channels))
        )

    def forward(self, h: Tensor, tokens: Tensor) -> Tensor:
        """h: [B, N, channels]; tokens: [B, M, width].  Returns [B, 1, channels]."""
        return self.layers(tokens.sum(1, keepdim=True))


class CrossAttention(nn.Module):
    """Attention of every position to two tokens, each head's softmax being the sigmoid of how far its logits differ.

    Fused attention is slow on a CPU where heads are narrow: with it a training step on digits took three times as long.
    """

    def __init__(self, width: int, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key_value = nn.Linear(channels, width), nn.Linear(width, 2 * width)
        self.project = zeroed(nn.Linear(width, channels))

    def forward(self, h: Tensor, tokens: Tensor) -> Tensor:
        """h: [B, N, channels]; tokens: [B, 2, width].  Returns [B, N, channels]."""
        key, value = (part.unflatten(2, (self.heads, -1)) for part in self.key_value(tokens).chunk(2, 2))
        key = (key[:, 0] - key[:, 1]) * key.shape[-1] ** -0.5  # [B, heads, width / heads]
        toward, rest = value[:, 0] - value[:, 1], self.project(value[:, 1:].flatten(2))
        into, out = self.query.weight.unflatten(0, (self.heads, -1)), self.project.weight.unflatten(1, (self.heads, -1))
        if h.shape[1] == 1:
            gate = (self.query(h[:, 0]).view_as(key) * key).sum(2, keepdim=True).sigmoid()
            return F.linear((gate * toward).flatten(1), self.project.weight)[:, None] + rest
        # Both layers go into the tokens, which are fewer than the positions.
        logits = h @ torch.einsum("bhd,hdc->bch", key, into)
        bias = (key * self.query.bias.view_as(key[0])).sum(2)[:, None]
        return (logits + bias).sigmoid() @ torch.einsum("bhd,chd->bhc", toward, out) + rest


def without_adapters(denoiser: Denoiser) -> Denoiser:
    """The base alone, sharing its weights, for plain guidance and to put other adapters on."""
    return denoiser.with_net(_adapted(denoiser).base)


def save_adapters(denoiser: Denoiser, file: FilePath) -> None:
    """Write what training added to the base, and nothing of the base, as safetensors with its config."""
    net = _adapted(denoiser)
    tensors = {name: t for name, t in net.state_dict().items() if not name.startswith(BASE)}
    write_tensors(file, tensors, {CONFIG: _CONFIGS.dump_json(net.config).decode()})


def attach_adapters(base: Denoiser, file: FilePath) -> Denoiser:
    """Adapters of `save_adapters` on any checkpoint of the base's architecture, which they share and freeze.

    Raises UserError if the file holds no adapters, or they do not fit.
    """
    try:
        check_regular(file)
        with safe_open(file, "pt") as opened:
            config = _CONFIGS.validate_json((opened.metadata() or {})[CONFIG])
    except (OSError, SafetensorError, KeyError, ValidationError) as error:
        raise UserError(f"{file}: not an adapter file: {type(error).__name__}: {error}") from None
    net = Adapted(config, base.net)
    own = {name: t for name, t in net.state_dict().items() if name.startswith(BASE)}
    load_strictly(net, own | load_file(file), origin=str(file))
    device = device_of(base)
    return base.with_net(net.to(device).eval())


def _adapted(denoiser: Denoiser) -> Adapted:
    if not isinstance(denoiser.net, Adapted):
        raise UserError(f"{type(denoiser.net).__name__}: this network has no adapters")
    return denoiser.net


def _as_tokens(h: Tensor) -> Tensor:
    """[B, C], [B, N, C] or [B, C, H, W] as [B, N, C]."""
    if h.ndim == 2:
        return h[:, None]
    return h if h.ndim == 3 else h.flatten(2).transpose(1, 2)


def _as_image(tokens: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_as_tokens`; one token stands for all positions."""
    if like.ndim == 2:
        return tokens[:, 0]
    if like.ndim == 3:
        return tokens
    rows, columns = like.shape[2:] if tokens.shape[1] > 1 else (1, 1)
    return tokens.transpose(1, 2).unflatten(2, (rows, columns))
