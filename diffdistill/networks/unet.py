"""A small class-conditional U-Net with EDM's conventions: the digits network, 0.3 million parameters and up.

Blocks, embeddings and scaling follow the description of DDPM++ in Karras et al. 2022, appendix F.6.
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from diffdistill.attention import attention
from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Features, Network, Taps
from diffdistill.networks.recompute import Recomputable
from diffdistill.networks.taps import Tapped, fastgen_encoder
from diffdistill.settings.limits import MAX_BLOCKS, MAX_WIDTH
from diffdistill.settings.numbers import Blocks, Width
from diffdistill.settings.schema import Fraction, UserError, schema


@schema
class UNetConfig:
    """Settings of `UNet`. One entry of `channels` and of `attention` for each resolution, the finest first.

    text_width: width of the pooled text embedding that replaces the class; 0 for none. patch: the network sees squares
    of so many pixels a side as channels, at a quarter of the cost for 2.
    """

    name: Literal["unet"] = "unet"
    channels: Annotated[tuple[Width, ...], Field(min_length=1, max_length=MAX_BLOCKS)] = (32, 64)
    attention: tuple[bool, ...] = (False, True)
    blocks: Blocks = 1
    head_channels: Width = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    text_width: Annotated[int, Field(ge=0, le=MAX_WIDTH)] = 0
    patch: Annotated[int, Field(ge=1, le=8)] = 1

    def __post_init__(self) -> None:
        if len(self.channels) != len(self.attention):
            raise ValueError(
                f"channels and attention need one entry per resolution: {len(self.channels)} and {len(self.attention)}"
            )
        for channels, attends in zip(self.channels, self.attention, strict=True):
            heads = max(1, channels // self.head_channels) if attends else 1
            if channels % 4 or channels % heads:
                shares = (
                    f" and of its {heads} attention heads (head_channels = {self.head_channels})" if attends else ""
                )
                raise ValueError(f"channels: {channels} must be a multiple of 4{shares}")

    def build(self, image_shape: tuple[int, int, int], num_classes: int, class_dropout: Fraction) -> "UNet":
        """The network for images [C, H, W]. Raises UserError if the sides cannot be halved often enough."""
        multiple = self.patch * 2 ** (len(self.channels) - 1)
        if any(side % multiple for side in image_shape[1:]):
            patches = f" of patches of {self.patch} pixels" if self.patch > 1 else ""
            raise UserError(
                f"network.channels: {len(self.channels)} resolutions{patches} need image sides that are multiples of "
                f"{multiple}; the images are {image_shape[1]} x {image_shape[2]}"
            )
        is_conditional = num_classes > 0 or self.text_width > 0
        return UNet(self, image_shape[0], num_classes, has_null_condition=is_conditional and class_dropout > 0)


class UNet(Network):
    """A U-Net on [B, C, H, W] with a tap at the encoder's last output."""

    def __init__(self, config: UNetConfig, image_channels: int, num_classes: int, *, has_null_condition: bool):
        super().__init__()
        given = {"label": num_classes > 0, "pooled_text": config.text_width > 0}
        self.accepts = frozenset(part for part, is_taken in given.items() if is_taken)
        self.num_classes = num_classes
        self.has_null_condition = has_null_condition
        self.patch = config.patch
        self.resolution_multiple = config.patch * 2 ** (len(config.channels) - 1)
        image_channels *= config.patch**2
        width = 4 * config.channels[0]
        self.frequencies = config.channels[0]
        self.embed_time = nn.Sequential(nn.Linear(self.frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_label = nn.Linear(num_classes, width, bias=False) if num_classes else None
        self.embed_text = nn.Linear(config.text_width, width) if config.text_width else None

        def block(channels_in: int, level: int, resample: Literal["up", "down"] | None = None) -> "UNetBlock":
            heads = max(1, config.channels[level] // config.head_channels) if config.attention[level] else 0
            return UNetBlock(
                channels_in,
                config.channels[level],
                width,
                resample=resample,
                heads=heads,
                dropout=config.dropout,
            )

        self.input = nn.Conv2d(image_channels, config.channels[0], 3, padding=1)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        skips = [config.channels[0]]
        for level, channels in enumerate(config.channels):
            if level:
                self.encoder.append(block(skips[-1], level, "down"))
                skips.append(channels)
            for _ in range(config.blocks):
                self.encoder.append(block(skips[-1], level))
                skips.append(channels)
        current = skips[-1]
        for level in reversed(range(len(config.channels))):
            if level < len(config.channels) - 1:
                self.decoder.append(block(current, level, "up"))
                current = config.channels[level]
            for _ in range(config.blocks + 1):
                self.decoder.append(block(current + skips.pop(), level))
                current = config.channels[level]
        self.output = nn.Sequential(
            _norm(current), nn.SiLU(), _zeroed(nn.Conv2d(current, image_channels, 3, padding=1))
        )

    @property
    def time_layer(self) -> nn.Module:
        """The last layer of what it makes of time, before the non-linearity."""
        return self.embed_time[-1]

    @property
    def last_layer(self) -> nn.Module:
        """The layer that makes the output."""
        return self.output[-1]

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, C, H, W]; time_input: [B].  Returns [B, C, H, W]."""
        return self.forward_with_features(x, time_input, cond)[0]

    def features(self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None) -> Features:
        """The encoder's last output, [B, channels[-1], H / m, W / m] of `resolution_multiple` m, or the taps."""
        tapped = self._tapped(taps)
        self._run(x, self._embed(time_input, cond), tapped, tapped.count)
        return tapped.features()

    def forward_with_features(
        self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None
    ) -> tuple[Tensor, Features]:
        """Output and `features` from one pass."""
        tapped = self._tapped(taps)
        h = self._run(x, self._embed(time_input, cond), tapped, len(self.encoder) + len(self.decoder))
        return F.pixel_shuffle(self.output(h), self.patch), tapped.features()

    def _tapped(self, taps: Taps | None) -> Tapped:
        names = [f"{part}.{i}" for part in ("encoder", "decoder") for i in range(len(getattr(self, part)))]
        fastgen = fastgen_encoder([block.resample == "down" for block in self.encoder])
        return Tapped(taps, names, len(self.encoder) - 1, fastgen)

    def _run(self, x: Tensor, embedding: Tensor, tapped: Tapped, count: int) -> Tensor:
        """The output of the last of the first `count` blocks, encoder and decoder counted together."""
        skips = [self.input(F.pixel_unshuffle(x, self.patch))]
        for number, block in enumerate(self.encoder[:count]):
            skips.append(tapped.seen(number, block(skips[-1], embedding)))
        h = skips[-1]
        for number, block in enumerate(self.decoder[: max(0, count - len(self.encoder))], len(self.encoder)):
            if block.resample != "up":
                h = torch.cat([h, skips.pop()], 1)
            h = tapped.seen(number, block(h, embedding))
        return h

    def _embed(self, time_input: Tensor, cond: Cond) -> Tensor:
        half = self.frequencies // 2
        scale = torch.arange(half, device=time_input.device, dtype=time_input.dtype) / max(half - 1, 1)
        angles = time_input[:, None] * (1 / 10000) ** scale
        embedding = self.embed_time(torch.cat([angles.cos(), angles.sin()], 1))
        if self.embed_label is not None and cond.label is not None:
            one_hot = F.one_hot(cond.label, self.num_classes + 1)[:, : self.num_classes]
            embedding = embedding + self.embed_label(one_hot.to(embedding.dtype) * math.sqrt(self.num_classes))
        if self.embed_text is not None:
            if cond.pooled_text is None:
                raise ValueError("this network needs pooled_text; encode prompts, or set `conditions`")
            # Of unit length: times its square root the numbers are of unit size.
            embedding = embedding + self.embed_text(cond.pooled_text * math.sqrt(cond.pooled_text.shape[1]))
        return F.silu(embedding)


class UNetBlock(Recomputable):
    """Norm, convolution, time and class by scale and shift, convolution, attention; residuals times sqrt(1/2)."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        width: int,
        *,
        resample: Literal["up", "down"] | None,
        heads: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.resample = resample
        self.heads = heads
        self.dropout = dropout
        self.norm_in, self.norm_mid = _norm(channels_in), _norm(channels)
        self.conv_in = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.conv_out = _zeroed(nn.Conv2d(channels, channels, 3, padding=1))
        self.modulate = nn.Linear(width, 2 * channels)
        self.shortcut = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()
        if heads:
            self.norm_attention = _norm(channels)
            self.qkv = nn.Conv2d(channels, 3 * channels, 1)
            self.project = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x: [B, C_in, H, W]; embedding: [B, width].  Returns [B, C, H', W']."""
        h = self.conv_in(self._resize(F.silu(self.norm_in(x))))
        scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, 1)
        h = F.silu(torch.addcmul(shift, self.norm_mid(h), scale + 1))
        h = self.conv_out(F.dropout(h, self.dropout, self.training))
        h = (h + self.shortcut(self._resize(x))) * math.sqrt(0.5)
        return self._attend(h) if self.heads else h

    def _resize(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x

    def _attend(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).reshape(batch, 3, self.heads, channels // self.heads, -1)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        h = attention(q, k, v).transpose(-1, -2).reshape(batch, channels, height, width)
        return (x + self.project(h)) * math.sqrt(0.5)


def _norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups of at least 4 channels, a power of two of them."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 4)), channels, eps=1e-6)


def _zeroed(conv: nn.Conv2d) -> nn.Conv2d:
    """Start at (almost) nothing, so that every residual block starts as the identity."""
    nn.init.normal_(conv.weight, std=1e-5)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
