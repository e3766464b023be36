"""What families of rectified flows in the manner of Flux share: their network names no size, and their pipeline tells
its scheduler even sigmas and where to begin.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from diffdistill.diffusion.path import AnyPath, Prediction
from diffdistill.models.teachers.family import Family, ImageShape, StepsArgument
from diffdistill.models.teachers.flow import flow_path
from diffdistill.models.teachers.packing import PATCH, unpack
from diffdistill.networks.diffusers_model import DiffusersTransformer

SIDE = 128  # of the pipelines' latents


class FlowFamily(Family):
    """A family's pipeline makes images of 1024 pixels unless it is told a size."""

    network = "transformer"
    steps_argument: ClassVar[StepsArgument] = "sigmas"
    hands_on_generator = False
    names_size = True
    names_sigmas = True
    sets_begin = True
    default_side = SIDE
    is_packed: ClassVar[bool] = False
    """Whether the pipeline holds patches of its latents as tokens, whose channels are the network's `in_channels`."""

    def image_shape(self, options: Mapping[str, Any]) -> ImageShape:
        """Of the pipeline's latents, unless the config has a `sample_size` after all."""
        channels = self.full_options(options)["in_channels"]
        if self.is_packed and isinstance(channels, int):
            channels //= PATCH**2
        return super().image_shape({"sample_size": SIDE, **options, "in_channels": channels})

    def num_tokens(self, options: Mapping[str, Any]) -> int:
        """Of an image, which a dynamic shift depends on."""
        _, height, width = self.image_shape(options)
        return height * width // PATCH**2

    def noise(self, scheduler: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[AnyPath, Prediction]:
        return flow_path(scheduler, self.num_tokens(options)), "flow"

    def later_noise(self, draw: Callable[[tuple[int, ...]], Tensor], shape: tuple[int, ...]) -> Tensor:
        if not self.is_packed:
            return super().later_noise(draw, shape)
        batch, channels, height, width = shape
        rows, columns = height // PATCH, width // PATCH
        return unpack(draw((batch, rows * columns, channels * PATCH**2)), rows, columns)


class PackedTransformer(DiffusersTransformer):
    """A network of tokens that are patches of the latents: blocks of two streams, and then, maybe, of one."""

    def __init__(self, model: nn.Module, *, accepts: frozenset[str], has_null_condition: bool = True) -> None:
        super().__init__(model, accepts=accepts, has_null_condition=has_null_condition, resolution_multiple=PATCH)

    @property
    def channels(self) -> int:
        return super().channels // PATCH**2

    @property
    def patch(self) -> int:
        return PATCH

    @property
    def blocks(self) -> list[nn.Module]:
        return [*super().blocks, *getattr(self.model, "single_transformer_blocks", ())]


class RefinedTransformer(DiffusersTransformer):
    """A network of `layers` for text and image in one stream, behind blocks that refine each by itself. Taps are the
    blocks that see the image.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(
            model, accepts=frozenset({"text", "text_mask"}), has_null_condition=True, resolution_multiple=PATCH
        )

    @property
    def patch(self) -> int:
        return PATCH

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.model.noise_refiner, *self.model.layers]  # type: ignore[misc]

    @property
    def closed_blocks(self) -> list[nn.Module]:
        return [*self.blocks, *self.model.context_refiner]  # type: ignore[misc]

    @property
    def middle(self) -> nn.Module:
        layers: list[nn.Module] = list(self.model.layers)  # type: ignore[arg-type]
        return layers[len(layers) // 2]
