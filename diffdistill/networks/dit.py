"""A diffusion transformer.  Peebles & Xie 2023, arXiv:2212.09748: Scalable Diffusion Models with Transformers.

Implemented: patches, fixed sine-cosine positions, adaLN-Zero blocks, time and class embeddings with a row for "no
class". The learned variance is a number of outputs (`learn_sigma`) that is not used: D needs the mean alone.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.attention import attention
from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Features, Network, Taps
from diffdistill.networks.recompute import Recomputable
from diffdistill.networks.taps import Tapped
from diffdistill.settings.numbers import Depth, Resolution, Width, WidthByFour
from diffdistill.settings.schema import Fraction, Positive, UserError, schema

FREQUENCIES = 256  # of the time embedding, sines and cosines together


@schema
class DiTConfig:
    """Settings of `DiT`, by default those of DiT-S/2; the class methods are the paper's table 1.

    patch: its side in pixels.  learn_sigma: twice the outputs, as in the published weights; the second half is unused.
    time_scale: of the number that it is told; 0.001, where that is a thousand times t, is SiT's.
    """

    name: Literal["dit"] = "dit"
    patch: Resolution = 2
    width: WidthByFour = 384
    depth: Depth = 12
    heads: Width = 6
    learn_sigma: bool = False
    time_scale: Positive = 1.0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads} must divide width = {self.width}")

    @classmethod
    def small(cls, patch: int = 2, *, learn_sigma: bool = False) -> "DiTConfig":
        """DiT-S: 33 million parameters."""
        return cls(patch=patch, learn_sigma=learn_sigma)

    @classmethod
    def base(cls, patch: int = 2, *, learn_sigma: bool = False) -> "DiTConfig":
        """DiT-B: 130 million parameters."""
        return cls(patch=patch, width=768, depth=12, heads=12, learn_sigma=learn_sigma)

    @classmethod
    def large(cls, patch: int = 2, *, learn_sigma: bool = False) -> "DiTConfig":
        """DiT-L: 458 million parameters."""
        return cls(patch=patch, width=1024, depth=24, heads=16, learn_sigma=learn_sigma)

    @classmethod
    def extra_large(cls, patch: int = 2, *, learn_sigma: bool = False) -> "DiTConfig":
        """DiT-XL: 675 million parameters."""
        return cls(patch=patch, width=1152, depth=28, heads=16, learn_sigma=learn_sigma)

    def build(self, image_shape: tuple[int, int, int], num_classes: int, class_dropout: Fraction) -> "DiT":
        """The network for images [C, H, W]. Raises UserError if patches do not tile them."""
        if any(side % self.patch for side in image_shape[1:]):
            raise UserError(f"network.patch = {self.patch}: must divide the image sides {image_shape[1:]}")
        return DiT(self, image_shape, num_classes, has_null_condition=num_classes > 0 and class_dropout > 0)


class DiT(Network):
    """A transformer on patches of [B, C, H, W] with a tap behind its middle block."""

    positions: Tensor

    def __init__(
        self, config: DiTConfig, image_shape: tuple[int, int, int], num_classes: int, *, has_null_condition: bool
    ) -> None:
        super().__init__()
        self.accepts = frozenset({"label"} if num_classes else ())
        self.num_classes = num_classes
        self.has_null_condition = has_null_condition
        self.time_scale = config.time_scale
        self.resolution_multiple = self.patch = config.patch
        self.image_channels, height, width = image_shape
        self.grid = (height // config.patch, width // config.patch)
        outputs = self.image_channels * (2 if config.learn_sigma else 1)
        self.input = nn.Conv2d(self.image_channels, config.width, config.patch, stride=config.patch)
        self.register_buffer("positions", sine_positions(self.grid, config.width), persistent=False)
        self.embed_time = nn.Sequential(
            nn.Linear(FREQUENCIES, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )
        self.embed_label = nn.Embedding(num_classes + 1, config.width) if num_classes else None
        self.blocks = nn.ModuleList(DiTBlock(config.width, config.heads) for _ in range(config.depth))
        self.modulate = nn.Linear(config.width, 2 * config.width)
        self.output = nn.Linear(config.width, config.patch**2 * outputs)
        self._initialise()

    @property
    def time_layer(self) -> nn.Module:
        """The last layer of what it makes of time, before the non-linearity."""
        return self.embed_time[-1]

    @property
    def last_layer(self) -> nn.Module:
        """The layer that makes the output."""
        return self.output

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, C, H, W]; time_input: [B].  Returns [B, C, H, W]."""
        return self.forward_with_features(x, time_input, cond)[0]

    def features(self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None) -> Features:
        """The tokens behind the middle block, [B, width, H / patch, W / patch], or the taps; the rest does not run."""
        tapped = self._tapped(taps)
        self._run(x, self._embed(time_input, cond), tapped, tapped.count)
        return tapped.features(self._as_image)

    def forward_with_features(
        self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None
    ) -> tuple[Tensor, Features]:
        """Output and `features` from one pass."""
        tapped, embedding = self._tapped(taps), self._embed(time_input, cond)
        h = self._run(x, embedding, tapped, len(self.blocks))
        shift, scale = self.modulate(embedding)[:, None].chunk(2, 2)
        patches = self.output(_modulated(h, shift, scale))
        return self._unpatch(patches)[:, : self.image_channels], tapped.features(self._as_image)

    def _tapped(self, taps: Taps | None) -> Tapped:
        return Tapped(taps, [f"blocks.{i}" for i in range(len(self.blocks))], (len(self.blocks) - 1) // 2)

    def _run(self, x: Tensor, embedding: Tensor, tapped: Tapped, count: int) -> Tensor:
        """The tokens behind the first `count` blocks."""
        h = self.input(x).flatten(2).transpose(1, 2) + self.positions
        for number, block in enumerate(self.blocks[:count]):
            h = tapped.seen(number, block(h, embedding))
        return h

    def _embed(self, time_input: Tensor, cond: Cond) -> Tensor:
        half = FREQUENCIES // 2
        powers = torch.arange(half, device=time_input.device, dtype=time_input.dtype) / half
        angles = time_input[:, None] * (self.time_scale * (1 / 10000) ** powers)
        embedding = self.embed_time(torch.cat([angles.cos(), angles.sin()], 1))
        if self.embed_label is not None:
            null = torch.full_like(time_input, self.num_classes, dtype=torch.int64)
            embedding = embedding + self.embed_label(null if cond.label is None else cond.label)
        return F.silu(embedding)

    def _as_image(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, self.grid)

    def _unpatch(self, patches: Tensor) -> Tensor:
        """[B, N, patch * patch * C], the channel fastest -> [B, C, H, W]."""
        rows, columns = self.grid
        tiles = patches.reshape(len(patches), rows, columns, self.patch, self.patch, -1)
        return tiles.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _initialise(self) -> None:
        """The paper's section 3.2: every block starts as the identity, and the output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.input.weight.flatten(1))
        assert self.input.bias is not None
        nn.init.zeros_(self.input.bias)
        for layer in (self.embed_time[0], self.embed_time[2], self.embed_label):
            if layer is not None:
                assert isinstance(layer.weight, Tensor)
                nn.init.normal_(layer.weight, std=0.02)
        for linear in (self.modulate, self.output, *(block.modulate for block in self.blocks)):
            assert isinstance(linear, nn.Linear)
            nn.init.zeros_(linear.weight)


class DiTBlock(Recomputable):
    """Attention and MLP, each scaled, shifted and gated by time and class (adaLN-Zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.channels = width
        self.heads = heads
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulate = nn.Linear(width, 6 * width)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """h: [B, N, width]; embedding: [B, width].  Returns h's shape."""
        parts = self.modulate(embedding)[:, None].chunk(6, 2)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        h = h + gate * self._attend(_modulated(h, shift, scale))
        return h + mlp_gate * self.mlp(_modulated(h, mlp_shift, mlp_scale))

    def _attend(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.project(attention(q, k, v).transpose(1, 2).flatten(2))


def _modulated(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift


def sine_positions(grid: tuple[int, int], width: int) -> Tensor:
    """[1, N, width]: half of it for the column, half for the row, each sines, then cosines."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1)[None].float()
