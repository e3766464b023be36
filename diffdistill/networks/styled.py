"""A network that is told a style, around any base network: the number of a teacher, or a mixture of several.

A style is a vector added to what the base makes of time, before its non-linearity, so that every block is given it.
One style at a time is a bias of the base's own: `Styled.folded` is a plain network, of the base's own class.
Song et al. 2025 (DMM), arXiv:2504.12364.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Network
from diffdistill.networks.guided import GuidedBase, zeroed
from diffdistill.networks.recompute import parts_of
from diffdistill.networks.registry import BaseNetwork
from diffdistill.settings.limits import MAX_CHOSEN
from diffdistill.settings.numbers import Width
from diffdistill.settings.schema import Fraction, UserError, schema

StyleNames = Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_CHOSEN)]


@schema
class StyledConfig:
    """Settings of `Styled`.  styles: their names, in order.  width: of a style's vector."""

    name: Literal["styled"] = "styled"
    base: BaseNetwork
    styles: StyleNames
    width: Width = 64

    def build(self, image_shape: tuple[int, int, int], num_classes: int, class_dropout: Fraction) -> "Styled":
        """The network for images [C, H, W]. Raises UserError if the base does not fit them, or is told no time."""
        return Styled(self.base.build(image_shape, num_classes, class_dropout), self.styles, self.width)


class Styled(GuidedBase):
    """A vector a style, an MLP, and its output added to the embedding of time. Starts as the base, whatever the style.

    `Cond.style`, [B, styles], weighs the vectors; where none is given they all weigh the same.
    """

    part = "style"

    def __init__(self, base: Network, names: Sequence[str], width: int) -> None:
        super().__init__(base)
        self.names = tuple(names)
        self.styles = nn.Parameter(torch.randn(len(names), width))
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, time_width(base)))
        zeroed(self.layers[-1])  # type: ignore[arg-type]

    def told(self, cond: Cond, like: Tensor) -> Cond:
        if cond.style is not None:
            return cond
        count = len(self.styles)
        return replace(cond, style=torch.full((len(like), count), 1 / count, device=like.device))

    def changes(self, scale: Tensor, cond: Cond) -> list[tuple["Output", Callable[..., Tensor]]]:
        added = self.added(scale)
        return [(Output(time_layer(self.base)), lambda output: output + added.to(output.dtype))]

    def added(self, weights: Tensor) -> Tensor:
        """What styles of these weights [B, styles] add, [B, width of the embedding of time]."""
        made: Tensor = self.layers(weights.to(self.styles.dtype) @ self.styles)
        return made

    @torch.no_grad()
    def folded(self, weights: Tensor) -> Network:
        """The base with one style, of these weights [styles], in its own bias; no LoRA is within."""
        base = deepcopy(self.base)
        layer: Any = time_layer(base)
        added = self.added(weights[None].to(self.styles.device))[0].to(layer.weight.dtype)
        layer.bias = nn.Parameter(added if layer.bias is None else layer.bias + added, requires_grad=False)
        return base


class Output:
    """A layer whose output can be changed from outside, for the length of a call."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._handle: RemovableHandle | None = None

    @property
    def around(self) -> Callable[..., Tensor] | None:
        return None

    @around.setter
    def around(self, change: Callable[..., Tensor] | None) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = change and self.layer.register_forward_hook(lambda _, __, output: change(output))


def time_layer(base: nn.Module) -> nn.Module:
    """The linear layer that ends what a network makes of time. Raises UserError if it has none."""
    found = next((layer for part in parts_of(base) if (layer := getattr(part, "time_layer", None)) is not None), None)
    if found is None:
        raise UserError(f"network.base: {type(base).__name__} has no time embedding that can take a style")
    assert isinstance(found, nn.Module)
    return found


def time_width(base: nn.Module) -> int:
    """Channels that this layer gives."""
    layer: Any = time_layer(base)  # a linear layer, or peft's around one
    return int(layer.out_features)
