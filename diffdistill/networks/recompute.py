"""Blocks that keep only their inputs for the backward pass and compute the rest again there, or are changed from
outside.

Chen et al. 2016, arXiv:1604.06174: Training Deep Nets with Sublinear Memory Cost.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Recomputable(nn.Module):
    """A block of a network that can be told to do so: the same numbers and gradients, dropout included.

    channels: of its output.  around: if set, called in the block's place with the block's own call and its inputs, and
    outside of what is recomputed: how `networks.guided` changes the blocks of a network for the length of a call.
    """

    is_recomputed = False
    channels: int
    around: Callable[..., Any] | None = None

    def __call__(self, *inputs: Any) -> Any:
        return self._run(*inputs) if self.around is None else self.around(self._run, *inputs)

    def _run(self, *inputs: Any) -> Any:
        if self.is_recomputed and torch.is_grad_enabled():
            return checkpoint(super().__call__, *inputs, use_reentrant=False)
        return super().__call__(*inputs)


def parts_of(module: nn.Module) -> Iterator[nn.Module]:
    """All modules within one, those included that `networks.lora.LoRA` does not register."""
    for part in module.modules():
        yield part
        tree = getattr(part, "shared_tree", None)
        if isinstance(tree, nn.Module):
            yield from tree.modules()


def recomputable_blocks(module: nn.Module) -> list[Recomputable]:
    """Every block within a module that can be recomputed."""
    return [part for part in parts_of(module) if isinstance(part, Recomputable)]


def set_recompute(module: nn.Module, is_on: bool = True) -> bool:
    """Recompute each block of a network, ours or diffusers'. Returns whether there is any."""
    blocks = recomputable_blocks(module)
    for block in blocks:
        block.is_recomputed = is_on
    models = [part for part in parts_of(module) if getattr(part, "_supports_gradient_checkpointing", False)]
    for model in models:
        (model.enable_gradient_checkpointing if is_on else model.disable_gradient_checkpointing)()  # type: ignore[operator]
    return bool(blocks or models)
