"""What stands in an exported file for the parts of this package that need more than torch and diffusers.

`bundle` puts these in the place of the originals that have their names.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def schema(cls: type) -> type:
    """A frozen, keyword-only dataclass. What it holds was checked when the model was exported."""
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def field(*, default_factory: Callable[[], Any]) -> Any:
    """A dataclass' field with a default that is made anew."""
    return dataclasses.field(default_factory=default_factory)


def validate(cls: type, value: dict[str, Any], *, origin: str) -> Any:
    """The settings of these values, which were checked when the model was exported."""
    return cls(**value)


def register_network(cls: type) -> type:
    """The class: here nothing is found by name."""
    return cls


def register_family(cls: type) -> type:
    """The class: here nothing is found by name."""
    return cls


def turn_off_loading_bars() -> None:
    """Nothing: bars are the caller's."""


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v.  q, k, v: [B, H, N, D]."""
    return F.scaled_dot_product_attention(q, k, v)


def reaching(*inputs: Tensor) -> contextlib.AbstractContextManager[None]:
    """Nothing: here torch's attention is the only one."""
    return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyNetwork:
    """The settings of a network of diffusers' classes, with the one family that it is of.

    `networks.diffusers_model.DiffusersConfig` finds it by name among all.
    """

    family: Any
    options: dict[str, Any]

    def build(self, image_shape: tuple[int, ...], num_classes: int, class_dropout: float) -> Any:
        """A new network."""
        return self.family.build(self.options, image_shape, num_classes, class_dropout)
