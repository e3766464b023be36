"""The blocks of diffusers' models, changed from outside for the length of a call: by hooks, for they are not ours."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffdistill.networks.diffusers_model import DiffusersNetwork

QUERIES = ("to_q", "to_qkv_mlp_proj")  # where attention, and what is beside it, reads the tokens


class Embedding:
    """What the model last made of time, and of what it adds to it: [B, width]. Watched while a block asks for it."""

    def __init__(self, network: DiffusersNetwork) -> None:
        self.modules = network.embedders
        self.width = _width(self.modules[0])
        self._seen: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._watchers = 0

    def watch(self) -> None:
        """Begin; once for every `release`."""
        self._watchers += 1
        if self._watchers == 1:
            self._handles = [module.register_forward_hook(self._see(i)) for i, module in enumerate(self.modules)]

    def release(self) -> None:
        """End; what was seen is let go with the last."""
        self._watchers -= 1
        if self._watchers == 0:
            for handle in self._handles:
                handle.remove()
            self._seen.clear()

    def value(self) -> Tensor:
        """The sum over the modules, of those that were called."""
        first, *others = self._seen.values()
        return sum(others, first)

    def _see(self, number: int) -> Callable[..., None]:
        def see(_: nn.Module, __: Any, output: Tensor) -> None:
            self._seen[number] = output if output.ndim == 2 else output.mean(1)  # of Chroma's, one for each use

        return see


class HookedBlock:
    """A block with attention as `networks.guided` knows blocks. `around` may change its output, not its inputs: it is
    called with a call that returns the output, nothing, and the embedding.

    Not for recomputed activations: a hook that is gone by the backward pass is missed there, and torch says so.
    """

    heads = 1  # so many at least: it has attention

    def __init__(self, block: nn.Module, embedding: Embedding) -> None:
        self.block, self.embedding = block, embedding
        query: Any = next(getattr(part, name) for part in block.modules() for name in QUERIES if hasattr(part, name))
        self.channels = int(query.in_features)
        self.embedding_width = embedding.width
        self._handle: RemovableHandle | None = None
        self._around: Callable[..., Tensor] | None = None

    @property
    def around(self) -> Callable[..., Tensor] | None:
        return self._around

    @around.setter
    def around(self, change: Callable[..., Tensor] | None) -> None:
        if self._handle is not None:
            self._handle.remove()
            self.embedding.release()
        self._around, self._handle = change, None
        if change is not None:
            self.embedding.watch()
            self._handle = self.block.register_forward_hook(self._change)

    def _change(self, _: nn.Module, __: Any, output: Any) -> Any:
        """Of several outputs the last is the image's."""
        assert self._around is not None
        *others, own = output if isinstance(output, tuple) else (output,)
        changed = self._around(lambda *_: own, None, self.embedding.value())
        return (*others, changed) if isinstance(output, tuple) else changed


def hooked_blocks(network: DiffusersNetwork) -> list[HookedBlock]:
    """The network's blocks with attention, in the order of its modules."""
    embedding = Embedding(network)
    return [HookedBlock(block, embedding) for block in network.attention_blocks]


def _width(module: nn.Module) -> int:
    """Channels that an embedder gives: its first `TimestepEmbedding`'s, where it holds some."""
    layers = [part for part in module.modules() if isinstance(part, nn.Linear)]
    last = next((part.linear_2 for part in module.modules() if hasattr(part, "linear_2")), layers[-1])
    return int(last.out_features)  # type: ignore[union-attr, arg-type]
