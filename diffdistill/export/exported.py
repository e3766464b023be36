"""The model of an exported folder: students behind diffusers' interface. `bundle` copies this file's class."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from diffdistill.denoiser import Denoiser
from diffdistill.router import RoutedDenoiser
from diffdistill.sampling import FreshNoise, Sampler
from diffdistill.steps import with_steps


class ExportedModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Students and how they make images. A folder's own `Model` says which, as attributes of the class.

    guidance_scale: what is used where none is given.
    """

    config_name = "config.json"
    image_shape: tuple[int, ...]
    num_classes: int
    num_students = 1
    make_denoiser: Callable[[], Denoiser]
    sampler: Sampler
    router: Any = None

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, guidance_scale: float = 1.0) -> None:
        super().__init__()
        make = type(self).make_denoiser
        self.students = nn.ModuleList(make() for _ in range(self.num_students))

    @property
    def denoiser(self) -> Denoiser:
        """All students as one."""
        if self.router is None:
            return self.students[0]  # type: ignore[return-value]
        return RoutedDenoiser(list(self.students), self.router)  # type: ignore[arg-type]

    @torch.no_grad()
    def forward(
        self,
        noise: Tensor,
        class_labels: Tensor | None = None,
        *,
        guidance_scale: float | None = None,
        num_steps: int | None = None,
        fresh_noise: FreshNoise | None = None,
    ) -> Tensor:
        """Images in [-1, 1], [B, *image_shape], from unit noise of that shape.

        class_labels: [B] int64.  num_steps: default what it was trained for.  fresh_noise: for steps after the first.
        """
        denoiser = self.denoiser
        sampler = self.sampler if num_steps is None else with_steps(self.sampler, denoiser.path, num_steps)
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        cond = denoiser.class_cond(class_labels)  # type: ignore[arg-type]
        return sampler(denoiser, noise, cond, guidance=scale, fresh_noise=fresh_noise)
