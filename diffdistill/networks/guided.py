"""Networks that take the guidance scale w as input, around any base network: one evaluation does the work of two.

The blocks of the base are changed for the length of a call (`Recomputable.around`): the base's own code and the names
of its weights stay as they are, and without a w the call is the base's own, bit for bit.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser, Features, Network, Taps
from diffdistill.networks.hooked import HookedBlock
from diffdistill.networks.lora import LoRA
from diffdistill.networks.recompute import Recomputable, recomputable_blocks
from diffdistill.networks.registry import BaseNetwork
from diffdistill.settings.numbers import Width
from diffdistill.settings.schema import Fraction, UserError, schema

Around = Callable[..., Tensor]


class GuidedBase(Network):
    """A base network whose blocks take part in guidance.  part: of Cond, that the blocks are told."""

    part = "guidance_input"

    def __init__(self, base: Network) -> None:
        super().__init__()
        self.base = base
        self.accepts = base.accepts | {self.part}
        self.num_classes = base.num_classes
        self.has_null_condition = base.has_null_condition
        self.resolution_multiple = base.resolution_multiple

    @abstractmethod
    def changes(self, scale: Tensor, cond: Cond) -> Sequence[tuple[Any, Around]]:
        """What is called in the place of which block, or of another thing with `around`.  scale: w [B]."""

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, ...]; time_input: [B].  Returns x's shape."""
        with self._changed(cond, x) as rest:
            output: Tensor = self.base(x, time_input, rest)
        return output

    def features(self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None) -> Features:
        """The base's."""
        with self._changed(cond, x) as rest:
            return self.base.features(x, time_input, rest, taps)

    def forward_with_features(
        self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None
    ) -> tuple[Tensor, Features]:
        """The base's."""
        with self._changed(cond, x) as rest:
            return self.base.forward_with_features(x, time_input, rest, taps)

    def told(self, cond: Cond, like: Tensor) -> Cond:
        """The condition with what is missing in it.  like: x."""
        return cond

    @contextmanager
    def _changed(self, cond: Cond, like: Tensor) -> Iterator[Cond]:
        """The base with its blocks changed; gives the rest of the condition."""
        scale: Tensor | None = getattr(self.told(cond, like), self.part)
        rest = replace(cond, **{self.part: None})
        changes = [] if scale is None else self.changes(scale, rest)
        for block, around in changes:
            block.around = around
        try:
            yield rest
        finally:
            for block, _ in changes:
                block.around = None


class GuidanceEncoding(nn.Module):
    """w [B] as vectors [B, width]: random Fourier features cos(2 pi (f w + phase)), f of N(0, 1), MLP, LayerNorm.

    The released code of AGD feeds some of its adapters 1000 w instead, at which neighbouring w have nothing in common.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width))
        self.register_buffer("phases", torch.rand(width))
        self.layers = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width), nn.LayerNorm(width)
        )

    def forward(self, scale: Tensor) -> Tensor:
        """scale: [B].  Returns [B, width]."""
        turns = scale.to(self.frequencies.dtype)[:, None] * self.frequencies + self.phases
        return self.layers((2 * math.pi * turns).cos())


@schema
class GuidedConfig:
    """Settings of `Guided`.  width: of the encoding of w."""

    name: Literal["guided"] = "guided"
    base: BaseNetwork
    width: Width = 64

    def build(self, image_shape: tuple[int, int, int], num_classes: int, class_dropout: Fraction) -> "Guided":
        """The network for images [C, H, W]. Raises UserError if the base does not fit them, or has no blocks."""
        return Guided(self.base.build(image_shape, num_classes, class_dropout), self.width)


class Guided(GuidedBase):
    """w added to the embedding of time and class that every block is given. Starts as the base, whatever w.

    Meng et al. 2023, arXiv:2210.03142, section 3.1.
    """

    def __init__(self, base: Network, width: int) -> None:
        super().__init__(base)
        self.encode = GuidanceEncoding(width)
        self.project = zeroed(nn.Linear(width, embedding_width(blocks_of(base)[0])))

    def changes(self, scale: Tensor, cond: Cond) -> list[tuple[Recomputable, Around]]:
        added = self.project(self.encode(scale))

        def around(run: Around, x: Tensor, embedding: Tensor) -> Tensor:
            return run(x, embedding + added)

        return [(block, around) for block in blocks_of(self.base)]


def take_weights(student: Denoiser, origin: Denoiser) -> None:
    """Start a guided denoiser from its teacher's weights, under new parts of its own, or from another one's."""
    net, other = student.net, origin.net
    assert isinstance(net, GuidedBase)
    if isinstance(other, GuidedBase):
        net.load_state_dict(other.state_dict())
    elif not isinstance(net.base, LoRA):  # which stands over these weights
        net.base.load_state_dict(other.state_dict())


def blocks_of(base: nn.Module) -> list[Recomputable]:
    """The base's blocks, in the order of its calls. Raises UserError if it is not made of any that can be changed."""
    found = recomputable_blocks(base)
    if not found:
        raise UserError(f"network.base: {type(base).__name__} has no blocks that can take a guidance scale")
    return found


def embedding_width(block: Recomputable | HookedBlock) -> int:
    """Channels of the embedding of time and class that a block is given."""
    if isinstance(block, HookedBlock):
        return block.embedding_width
    modulate: Any = block.modulate  # a linear layer, or peft's around one
    return int(modulate.in_features)


def zeroed(linear: nn.Linear) -> nn.Linear:
    """A layer that starts at exactly nothing."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
