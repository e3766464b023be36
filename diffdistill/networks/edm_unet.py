"""EDM's three U-Nets: DDPM++ and NCSN++ (CIFAR-10, 56 million parameters) and ADM (ImageNet-64, 296 million).

Built from the descriptions in Karras et al. 2022, arXiv:2206.00364, appendix F and table 7; Song et al. 2021,
arXiv:2011.13456 (DDPM++, NCSN++); Dhariwal & Nichol 2021, arXiv:2105.05233 (ADM). Every tensor has its counterpart, of
the same shape and layout, in EDM's published networks: `EDMUNet.edm_names`.
"""

import math
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Features, Network, Taps
from diffdistill.networks.edm_blocks import (
    ADMEmbedding,
    Block,
    BlockPlan,
    DDPMPPEmbedding,
    NCSNPPEmbedding,
    ResidualInput,
    Variant,
    group_norm,
)
from diffdistill.networks.taps import Tapped, fastgen_encoder
from diffdistill.settings.limits import MAX_BLOCKS
from diffdistill.settings.numbers import Blocks, Resolution, Width, WidthByFour
from diffdistill.settings.schema import Fraction, UserError, schema

Sides = Annotated[tuple[Resolution, ...], Field(max_length=MAX_BLOCKS)]
Widths = Annotated[tuple[Blocks, ...], Field(min_length=1, max_length=MAX_BLOCKS)]

EMBEDDING_NAMES = {
    "embed.label": "map_label",
    "embed.augmentation": "map_augment",
    "embed.first": "map_layer0",
    "embed.second": "map_layer1",
    "embed": "map_noise",
}
BLOCK_NAMES = {
    "norm_in": "norm0",
    "conv_in": "conv0",
    "modulate": "affine",
    "norm_mid": "norm1",
    "conv_out": "conv1",
    "shortcut": "skip",
    "norm_attention": "norm2",
    "qkv": "qkv",
    "project": "proj",
}
"""Our module -> EDM's."""
LEAF_NAMES = {"frequencies": "freqs"}


@schema
class DDPMPP:
    """DDPM++ with EDM's settings for CIFAR-10.

    channels: of the finest resolution, times one of `multipliers` each, the finest first; attention_resolutions:
    heights in pixels; augment_dim: 9 to take EDM's augmentation labels.
    """

    name: Literal["ddpmpp"] = "ddpmpp"
    channels: WidthByFour = 128
    multipliers: Widths = (2, 2, 2)
    blocks: Blocks = 4
    attention_resolutions: Sides = (16,)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.13
    augment_dim: Literal[0, 9] = 0

    @classmethod
    def cifar10(cls) -> "DDPMPP":
        """As the published network: 55,733,891 parameters on 32 x 32 x 3, 55,735,299 with ten classes."""
        return cls(augment_dim=9)

    @property
    def variant(self) -> Variant:
        return Variant(
            embed=DDPMPPEmbedding,
            initialise=_initialise_ddpmpp,
            heads=lambda channels: 1,
            attends_late=True,
            is_scaled=False,
            skip_scale=math.sqrt(0.5),
            has_resampled_projection=True,
            eps=1e-6,
            output_names=("dec.{0}x{0}_aux_norm", "dec.{0}x{0}_aux_conv"),
        )

    def build(self, image_shape: tuple[int, int, int], num_classes: int, class_dropout: Fraction) -> "EDMUNet":
        """The network for images [C, H, W]. Raises UserError if sides or attention do not fit."""
        return EDMUNet(self, image_shape, num_classes, has_null_condition=num_classes > 0 and class_dropout > 0)


@schema
class NCSNPP:
    """NCSN++ with EDM's settings for CIFAR-10; the fields of `DDPMPP`.

    Unlike that: time at random frequencies, a longer filter to resample, and the image given to each resolution.
    """

    name: Literal["ncsnpp"] = "ncsnpp"
    channels: WidthByFour = 128
    multipliers: Widths = (2, 2, 2)
    blocks: Blocks = 4
    attention_resolutions: Sides = (16,)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.13
    augment_dim: Literal[0, 9] = 0

    @property
    def variant(self) -> Variant:
        shared = DDPMPP().variant
        return replace(shared, embed=NCSNPPEmbedding, taps=(1, 3, 3, 1), has_residual_input=True)

    def build(self, image_shape: tuple[int, int, int], num_classes: int, class_dropout: Fraction) -> "EDMUNet":
        """The network for images [C, H, W]. Raises UserError if sides or attention do not fit."""
        return EDMUNet(self, image_shape, num_classes, has_null_condition=num_classes > 0 and class_dropout > 0)


@schema
class ADM:
    """ADM with EDM's settings for ImageNet-64; the fields of `DDPMPP`, and the channels of an attention head."""

    name: Literal["adm"] = "adm"
    channels: WidthByFour = 192
    multipliers: Widths = (1, 2, 3, 4)
    blocks: Blocks = 3
    attention_resolutions: Sides = (32, 16, 8)
    head_channels: Width = 64
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.10
    augment_dim: Literal[0, 9] = 0

    @classmethod
    def imagenet64(cls) -> "ADM":
        """As the published network: 295,899,267 parameters on 64 x 64 x 3 with 1000 classes."""
        return cls()

    @property
    def variant(self) -> Variant:
        return Variant(
            embed=ADMEmbedding,
            initialise=_initialise_adm,
            heads=self._heads,
            attends_late=False,
            is_scaled=True,
            skip_scale=1.0,
            has_resampled_projection=False,
            eps=1e-5,
            output_names=("out_norm", "out_conv"),
        )

    def build(self, image_shape: tuple[int, int, int], num_classes: int, class_dropout: Fraction) -> "EDMUNet":
        """The network for images [C, H, W]. Raises UserError if sides, heads or attention do not fit."""
        return EDMUNet(self, image_shape, num_classes, has_null_condition=num_classes > 0 and class_dropout > 0)

    def _heads(self, channels: int) -> int:
        if channels % self.head_channels:
            raise UserError(f"network.head_channels = {self.head_channels}: must divide the {channels} channels")
        return channels // self.head_channels


EDMConfig = DDPMPP | NCSNPP | ADM


class EDMUNet(Network):
    """DDPM++, NCSN++ or ADM on [B, C, H, W] with a tap at the encoder's last output."""

    def __init__(
        self, config: EDMConfig, image_shape: tuple[int, int, int], num_classes: int, *, has_null_condition: bool
    ) -> None:
        super().__init__()
        given = {"label": num_classes > 0, "augmentation": config.augment_dim > 0}
        self.accepts = frozenset(part for part, is_taken in given.items() if is_taken)
        self.num_classes = num_classes
        self.has_null_condition = has_null_condition
        self.resolution_multiple = 2 ** (len(config.multipliers) - 1)
        _check_sides(config, image_shape)
        variant, width = config.variant, 4 * config.channels
        encoder = plan_encoder(config, image_shape[1])
        decoder = plan_decoder(config, image_shape[1], encoder)
        self.embed = variant.embed(config.channels, num_classes, config.augment_dim)
        self.input = nn.Conv2d(image_shape[0], config.channels, 3, padding=1)
        self.encoder = nn.ModuleList(Block(plan, variant, width, config.dropout) for plan in encoder)
        self.decoder = nn.ModuleList(Block(plan, variant, width, config.dropout) for plan in decoder)
        downs = {i: plan for i, plan in enumerate(encoder) if plan.resample} if variant.has_residual_input else {}
        inputs = [image_shape[0], *(plan.channels for plan in downs.values())]
        self.residual_inputs = nn.ModuleDict(
            {
                str(i): ResidualInput(channels_in, plan.channels, variant.taps)
                for (i, plan), channels_in in zip(downs.items(), inputs, strict=False)
            }
        )
        each_resolution = fastgen_encoder([plan.resample == "down" for plan in encoder])
        self.fastgen_taps = each_resolution[-1:] if isinstance(config, ADM) else each_resolution
        last = decoder[-1].channels
        self.output = nn.Sequential(
            group_norm(last, variant.eps), nn.SiLU(), nn.Conv2d(last, image_shape[0], 3, padding=1)
        )
        self._edm_modules = {
            "input": f"enc.{image_shape[1]}x{image_shape[1]}_conv",
            "output.0": variant.output_names[0].format(image_shape[1]),
            "output.2": variant.output_names[1].format(image_shape[1]),
            **EMBEDDING_NAMES,
            **{f"residual_inputs.{i}": f"enc.{plan.name[:-4]}aux_residual" for i, plan in downs.items()},
            **{f"encoder.{i}": f"enc.{plan.name}" for i, plan in enumerate(encoder)},
            **{f"decoder.{i}": f"dec.{plan.name}" for i, plan in enumerate(decoder)},
        }
        variant.initialise(self)

    @property
    def time_layer(self) -> nn.Module:
        """The last layer of what it makes of time, before the non-linearity."""
        layer = self.embed.second
        assert isinstance(layer, nn.Module)
        return layer

    @property
    def last_layer(self) -> nn.Module:
        """The layer that makes the output."""
        return self.output[-1]

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, C, H, W]; time_input: [B].  Returns [B, C, H, W]."""
        return self.forward_with_features(x, time_input, cond)[0]

    def features(self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None) -> Features:
        """The encoder's last output, [B, C', H / 2^k, W / 2^k], or the taps; the rest does not run."""
        tapped = self._tapped(taps)
        self._run(x, self.embed(time_input, cond), tapped, tapped.count)
        return tapped.features()

    def forward_with_features(
        self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None
    ) -> tuple[Tensor, Features]:
        """Output and `features` from one pass."""
        tapped = self._tapped(taps)
        h = self._run(x, self.embed(time_input, cond), tapped, len(self.encoder) + len(self.decoder))
        return self.output(h), tapped.features()

    def edm_names(self) -> dict[str, str]:
        """Our name of every tensor -> its name in EDM's `EDMPrecond.model`.

        EDM's files also hold `resample_filter`, constants without a counterpart here.
        """
        names = {}
        for own in self.state_dict():
            module, leaf = own.rsplit(".", 1)
            block, _, part = module.rpartition(".")
            known = self._edm_modules.get(module) or f"{self._edm_modules[block]}.{BLOCK_NAMES[part]}"
            names[own] = f"{known}.{LEAF_NAMES.get(leaf, leaf)}"
        return names

    def _tapped(self, taps: Taps | None) -> Tapped:
        names = [f"{part}.{i}" for part in ("encoder", "decoder") for i in range(len(getattr(self, part)))]
        return Tapped(taps, names, len(self.encoder) - 1, self.fastgen_taps)

    def _run(self, x: Tensor, embedding: Tensor, tapped: Tapped, count: int) -> Tensor:
        """The output of the last of the first `count` blocks, encoder and decoder counted together."""
        skips = [self.input(x)]
        for number, block in enumerate(self.encoder[:count]):
            h = block(skips[-1], embedding)
            if str(number) in self.residual_inputs:
                h = x = (h + self.residual_inputs[str(number)](x)) * math.sqrt(0.5)
            skips.append(tapped.seen(number, h))
        h = skips[-1]
        for number, block in enumerate(self.decoder[: max(0, count - len(self.encoder))], len(self.encoder)):
            if block.takes_skip:
                h = torch.cat([h, skips.pop()], 1)
            h = tapped.seen(number, block(h, embedding))
        return h


def plan_encoder(config: EDMConfig, height: int) -> list[BlockPlan]:
    """The encoder's blocks behind its first convolution, the finest first."""
    plans: list[BlockPlan] = []
    current = config.channels
    for level, multiplier in enumerate(config.multipliers):
        side, channels = height >> level, config.channels * multiplier
        if level:
            plans.append(BlockPlan(f"{side}x{side}_down", current, current, "down"))
        heads = config.variant.heads(channels) if side in config.attention_resolutions else 0
        for i in range(config.blocks):
            plans.append(BlockPlan(f"{side}x{side}_block{i}", current, channels, heads=heads))
            current = channels
    return plans


def plan_decoder(config: EDMConfig, height: int, encoder: list[BlockPlan]) -> list[BlockPlan]:
    """The decoder's blocks, the coarsest first."""
    plans: list[BlockPlan] = []
    variant = config.variant
    skips = [config.channels, *(plan.channels for plan in encoder)]
    current = skips[-1]
    for level, multiplier in reversed(list(enumerate(config.multipliers))):
        side, channels = height >> level, config.channels * multiplier
        if plans:
            plans.append(BlockPlan(f"{side}x{side}_up", current, current, "up"))
        else:
            plans.append(BlockPlan(f"{side}x{side}_in0", current, current, heads=variant.heads(current)))
            plans.append(BlockPlan(f"{side}x{side}_in1", current, current))
        for i in range(config.blocks + 1):
            is_attending = side in config.attention_resolutions and (i == config.blocks or not variant.attends_late)
            heads = variant.heads(channels) if is_attending else 0
            name = f"{side}x{side}_block{i}"
            plans.append(BlockPlan(name, current + skips.pop(), channels, heads=heads, takes_skip=True))
            current = channels
    return plans


def _check_sides(config: EDMConfig, image_shape: tuple[int, int, int]) -> None:
    multiple = 2 ** (len(config.multipliers) - 1)
    if any(side % multiple for side in image_shape[1:]):
        raise UserError(
            f"network.multipliers: {len(config.multipliers)} resolutions need image sides that are multiples of "
            f"{multiple}; the images are {image_shape[1]} x {image_shape[2]}"
        )
    heights = [image_shape[1] >> level for level in range(len(config.multipliers))]
    absent = sorted(set(config.attention_resolutions) - set(heights))
    if absent:
        raise UserError(f"network.attention_resolutions: {absent[0]} is none of this network's: {heights}")


@torch.no_grad()
def _initialise_ddpmpp(net: nn.Module) -> None:
    """Xavier-uniform weights and no biases; what ends a residual branch starts at almost nothing."""
    gains = {"conv_out": 1e-5, "project": 1e-5, "qkv": math.sqrt(0.2)}
    for name, module in net.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            gain = 1e-5 if name == "output.2" else gains.get(name.rpartition(".")[2], 1.0)
            nn.init.xavier_uniform_(module.weight, gain)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@torch.no_grad()
def _initialise_adm(net: nn.Module) -> None:
    """torch's own start, but labels as N(0, 1); what ends a residual branch, and augmentation, start at nothing."""
    for name, module in net.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            part = name.rpartition(".")[2]
            if name == "output.2" or part in ("conv_out", "project", "augmentation"):
                nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif part == "label":
                nn.init.normal_(module.weight)
