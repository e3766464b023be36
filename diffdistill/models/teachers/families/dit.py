"""Class-conditional DiT on latents, with learned variances.  Peebles & Xie 2023, arXiv:2212.09748."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.models.teachers.family import Family
from diffdistill.networks.diffusers_model import DiffusersTransformer


class DiffusersDiT(Family):
    """The variance half of the output is not used. Label `num_classes` is "no class", as in the pipeline."""

    name = "dit"
    pipelines = ("DiTPipeline",)
    network = "transformer"
    network_classes = ("DiTTransformer2DModel", "Transformer2DModel")  # the second: of diffusers before 0.29
    learns_variance = True
    parts: ClassVar = {"vae": ("AutoencoderKL",)}
    class_dropout = 0.1
    steps_argument = "num_inference_steps"
    hands_on_generator = False
    fixed_size = "its pipeline makes images of its network's own size alone"

    def wrap(self, model: nn.Module, num_classes: int, class_dropout: float) -> "DiTNetwork":
        return DiTNetwork(model, num_classes)

    def num_classes(self, options: Mapping[str, Any]) -> int:
        return int(options.get("num_embeds_ada_norm") or 1000)


class DiTNetwork(DiffusersTransformer):
    """`DiTTransformer2DModel`."""

    def __init__(self, model: nn.Module, num_classes: int) -> None:
        super().__init__(
            model,
            accepts=frozenset({"label"}),
            num_classes=num_classes,
            has_null_condition=True,
            resolution_multiple=int(model.config.patch_size),  # type: ignore[union-attr, arg-type]
        )
        for part in model.modules():  # in training mode each block would drop labels of its own, at random
            if hasattr(part, "dropout_prob") and hasattr(part, "embedding_table"):
                part.dropout_prob = 0.0  # type: ignore[assignment]

    @property
    def embedders(self) -> list[nn.Module]:
        """Each block has one of its own; the first's is also the output layer's."""
        return [self.blocks[0].norm1.emb]  # type: ignore[union-attr, list-item]

    @property
    def time_layer(self) -> None:
        """None is all blocks'."""
        return None

    @property
    def closed_blocks(self) -> list[nn.Module]:
        """All but the first, whose embedder the output layer calls."""
        return self.blocks[1:]

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, C, H, W]; time_input: [B] in the schedule's steps.  Returns [B, C, H, W]."""
        label = x.new_full((len(x),), self.num_classes).long() if cond.label is None else cond.label
        output: Tensor = self.model(x, timestep=time_input, class_labels=label, return_dict=False)[0]
        return output[:, : x.shape[1]]
