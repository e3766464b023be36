"""diffusers' UNet2DModel as a `Network`."""

from typing import Any, Literal

from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.networks.diffusers_model import DiffusersUNetBlocks
from diffdistill.settings.schema import Fraction, UserError, schema


@schema
class DiffusersUNetConfig:
    """A new `UNet2DModel`: `options` are its own arguments, as in a diffusers config.json."""

    name: Literal["diffusers_unet"] = "diffusers_unet"
    options: dict[str, Any]

    def build(self, image_shape: tuple[int, int, int], num_classes: int, class_dropout: Fraction) -> "DiffusersUNet":
        """The network for images [C, H, W]. Raises UserError on options that diffusers refuses."""
        from diffusers import UNet2DModel

        fixed = {"in_channels": image_shape[0], "out_channels": image_shape[0], "sample_size": image_shape[1]}
        if num_classes:
            fixed["num_class_embeds"] = num_classes + 1
        try:
            model = UNet2DModel(**{**self.options, **fixed})
        except (TypeError, ValueError) as error:
            raise UserError(f"network.options: {error}") from error
        multiple = 2 ** (len(model.config.down_block_types) - 1)
        if any(side % multiple for side in image_shape[1:]):
            raise UserError(f"network.options: image sides must be multiples of {multiple}, not {image_shape[1:]}")
        return DiffusersUNet(model, num_classes, has_null_condition=num_classes > 0 and class_dropout > 0)


class DiffusersUNet(DiffusersUNetBlocks):
    """A `UNet2DModel`. Label `num_classes` ("no class") is its last embedding; the tap is its mid-block's output."""

    def __init__(self, model: nn.Module, num_classes: int = 0, *, has_null_condition: bool = False) -> None:
        super().__init__(
            model,
            accepts=frozenset({"label"} if num_classes else ()),
            num_classes=num_classes,
            has_null_condition=has_null_condition,
            resolution_multiple=2 ** (len(model.config.down_block_types) - 1),  # type: ignore[union-attr, arg-type]
        )

    @property
    def attention_blocks(self) -> list[nn.Module]:
        return [part for part in self.model.modules() if type(part).__name__ == "Attention"]

    @property
    def embedders(self) -> list[nn.Module]:
        found = (self.model.time_embedding, self.model.class_embedding)
        return [part for part in found if isinstance(part, nn.Module)]

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, C, H, W]; time_input: [B] in the schedule's steps.  Returns [B, C, H, W]; learned variances go."""
        output: Tensor = self.model(x, time_input, class_labels=cond.label, return_dict=False)[0]
        return output[:, : x.shape[1]]
