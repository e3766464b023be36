"""Networks of diffusers' classes as `Network`s: what all families share."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor, nn

from diffdistill.attention import reaching
from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Features, Network, Taps
from diffdistill.networks.taps import Tapped, fastgen_transformer
from diffdistill.settings.registry import NameOf, from_above
from diffdistill.settings.schema import Fraction, schema

FamilyName = Annotated[str, NameOf("FAMILIES")]


@schema
class DiffusersConfig:
    """The network of a diffusers pipeline.  options: its class's own arguments, as in the network's config.json."""

    name: Literal["diffusers"] = "diffusers"
    family: FamilyName
    options: dict[str, Any]

    def build(self, image_shape: tuple[int, int, int], num_classes: int, class_dropout: Fraction) -> "DiffusersNetwork":
        """A new network for latents, or images, [C, H, W]. Raises UserError on options that its class refuses."""
        family = from_above("find_family")(self.family)
        return family.build(self.options, image_shape, num_classes, class_dropout)


class DiffusersNetwork(Network):
    """A diffusers model as a `Network`. By default the tap is the output of the model's `middle`."""

    cuts_text: ClassVar[bool] = False
    """Whether a call sees as many tokens as the longest prompt of its batch: its shapes change from call to call."""

    def __init__(
        self,
        model: nn.Module,
        *,
        accepts: frozenset[str],
        num_classes: int = 0,
        has_null_condition: bool,
        resolution_multiple: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.accepts = accepts
        self.num_classes = num_classes
        self.has_null_condition = has_null_condition
        self.resolution_multiple = resolution_multiple

    def __call__(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """`forward`; the model's attention is torch's, and goes through ours where that may make a difference."""
        with reaching(x, time_input):
            output: Tensor = super().__call__(x, time_input, cond)
        return output

    @property
    def channels(self) -> int:
        """Of the images or latents."""
        return int(self.model.config.in_channels)  # type: ignore[union-attr, arg-type]

    @abstractmethod
    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, C, H, W]; time_input: [B], the path's.  Returns [B, C, H, W]."""

    def require(self, cond: Cond) -> None:
        """Raise ValueError unless all that the network takes is there."""
        missing = self.accepts - cond.parts().keys()
        if missing:
            raise ValueError(f"this network needs {', '.join(sorted(missing))}; encode prompts, or set `conditions`")

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The model's blocks in the order of its calls, the middle among them."""

    @property
    def closed_blocks(self) -> list[nn.Module]:
        """Those whose weights the model needs during their own calls alone: all."""
        return self.blocks

    @property
    @abstractmethod
    def middle(self) -> nn.Module:
        """The block whose output is tapped where no taps are named."""

    @property
    def fastgen_taps(self) -> tuple[int, ...]:
        """The numbers of the blocks that FastGen's list for the model names."""
        return fastgen_transformer(len(self.blocks))

    @property
    def attention_blocks(self) -> list[nn.Module]:
        """The blocks with attention, in the order of the model's modules."""
        return [part for part in self.model.modules() if type(part).__name__.endswith("TransformerBlock")]

    @property
    def embedders(self) -> list[nn.Module]:
        """The modules whose outputs [B, width] are together what the model is told of time, and of what it adds to
        it; at least one, and the first always called."""
        return [next(part for part in self.model.modules() if type(part).__name__ == "TimestepEmbedding")]

    @property
    def time_layer(self) -> nn.Module | None:
        """The last layer of the embedder that is always called, where that is diffusers' own and all blocks'."""
        return next((part.linear_2 for part in self.embedders[0].modules() if hasattr(part, "linear_2")), None)  # type: ignore[return-value]

    @property
    def last_layer(self) -> nn.Module | None:
        """The layer that makes the output, where what comes behind it is done to each sample by itself."""
        names = ("proj_out_2", "proj_out", "conv_out")
        return next((layer for name in names if isinstance(layer := getattr(self.model, name, None), nn.Module)), None)

    def read_tap(self, output: Any, x: Tensor, cond: Cond) -> Tensor:
        """A block's output for input x [B, C, H, W] as a map [B, C', h, w]; of several outputs the first.

        cond: what the network was given.
        """
        tapped: Tensor = output[0] if isinstance(output, tuple) else output
        return tapped

    def features(self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None) -> Features:
        """The middle's output, or the taps; what comes after them does not run."""
        with self._tapped(taps, stops=True) as tapped, suppress(_StopForwardError):
            self(x, time_input, cond)
        return tapped.features(lambda output: self.read_tap(output, x, cond))

    def forward_with_features(
        self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None
    ) -> tuple[Tensor, Features]:
        """Output and `features` from one pass."""
        with self._tapped(taps, stops=False) as tapped:
            output = self(x, time_input, cond)
        return output, tapped.features(lambda output: self.read_tap(output, x, cond))

    @contextmanager
    def _tapped(self, taps: Taps | None, *, stops: bool) -> Iterator[Tapped]:
        blocks = self.blocks
        places = {id(module): name for name, module in self.model.named_modules()} if taps else {}
        names = [places[id(block)] for block in blocks] if taps else []
        tapped = Tapped(taps, names, blocks.index(self.middle), self.fastgen_taps)

        def tap(number: int) -> Callable[..., None]:
            def keep(_: nn.Module, __: Any, output: Any) -> None:
                tapped.seen(number, output)
                if stops and number == tapped.count - 1:
                    raise _StopForwardError

            return keep

        with ExitStack() as stack:
            for number in set(tapped.numbers):
                stack.enter_context(_uncompiled(blocks[number]))
                stack.callback(blocks[number].register_forward_hook(tap(number)).remove)
            yield tapped


class DiffusersTransformer(DiffusersNetwork):
    """A model with `transformer_blocks` on patches of the image; the tap is the middle one's tokens."""

    @property
    def patch(self) -> int:
        """Sides of what becomes one token."""
        return int(self.model.config.patch_size)  # type: ignore[union-attr, arg-type]

    @property
    def blocks(self) -> list[nn.Module]:
        blocks = self.model.transformer_blocks
        assert isinstance(blocks, nn.ModuleList)
        return list(blocks)

    @property
    def middle(self) -> nn.Module:
        return self.blocks[len(self.blocks) // 2]

    def read_tap(self, output: Any, x: Tensor, cond: Cond) -> Tensor:
        """Tokens [B, N, C'], row by row, as a map; of several outputs the one whose tokens are the image's."""
        rows, columns = x.shape[2] // self.patch, x.shape[3] // self.patch
        outputs = [part for part in (output if isinstance(output, tuple) else (output,)) if part is not None]
        own = [part for part in outputs if part.shape[1] == rows * columns]
        tokens = own[-1] if own else self.image_tokens(outputs[-1], rows * columns, cond)
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))

    def image_tokens(self, tokens: Tensor, count: int, cond: Cond) -> Tensor:
        """The image's tokens [B, count, C'] among those of a text and an image; here the text's come first."""
        return tokens[:, -count:]


class DiffusersUNetBlocks(DiffusersNetwork):
    """A model with `down_blocks`, `mid_block` and `up_blocks`; the tap is the bottleneck."""

    @property
    def blocks(self) -> list[nn.Module]:
        down, up = self.model.down_blocks, self.model.up_blocks
        assert isinstance(down, nn.ModuleList)
        assert isinstance(up, nn.ModuleList)
        return [*down, self.middle, *up]

    @property
    def middle(self) -> nn.Module:
        block = self.model.mid_block
        assert isinstance(block, nn.Module)
        return block

    @property
    def fastgen_taps(self) -> tuple[int, ...]:
        return (self.blocks.index(self.middle),)


class _StopForwardError(Exception):
    """Leaves a forward pass early."""


@contextmanager
def _uncompiled(block: nn.Module) -> Iterator[None]:
    """Let a block run as it was before `Module.compile`: compiled code does not see hooks that come and go."""
    compiled = block._compiled_call_impl
    block._compiled_call_impl = None
    try:
        yield
    finally:
        block._compiled_call_impl = compiled
