"""The model of an exported folder: students behind diffusers' interface. `bundle` copies this file's classes."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import Path
from diffdistill.diffusion.prompt_table import PromptTable
from diffdistill.diffusion.router import RoutedDenoiser
from diffdistill.diffusion.sampling import FreshNoise, Sampler
from diffdistill.diffusion.steps import with_steps
from diffdistill.models.sentence_encoder import embed
from diffdistill.models.teachers.family import Family
from diffdistill.models.teachers.installed import diffusers_class


@dataclass(frozen=True)
class Source:
    """The pipeline of diffusers that a network came from: how prompts go in, and how images come out.

    pipeline: its class.  settings: what it is told beside its parts.  image_size: height and width in pixels.
    options: of the network, from its config.json.
    """

    family: Family
    pipeline: str
    settings: Mapping[str, Any]
    image_size: tuple[int, int]
    options: Mapping[str, Any]

    @property
    def takes_text(self) -> bool:
        return self.family.takes_text

    @torch.no_grad()
    def encode(self, parts: Mapping[str, Any], prompts: Sequence[str]) -> PromptTable:
        """Prompts by number.  parts: text encoders, tokenizers and the scheduler, by name."""
        kind = diffusers_class(self.pipeline)
        taken = {name: given for name, given in inspect.signature(kind.__init__).parameters.items() if name != "self"}
        known = {name: value for name, value in {**self.settings, **parts}.items() if name in taken}
        missing = {name: None for name, given in taken.items() if given.default is given.empty and name not in known}
        encoder = kind(**known, **missing)
        encoded = self.family.encode(encoder, prompts, self.image_size, self.options)
        return PromptTable([encoded], self.family.encode_empty(encoder, self.image_size, self.options))

    @torch.no_grad()
    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], about in [-1, 1]."""
        return self.family.to_images(vae, latents.to(vae.dtype))


class Sentences:
    """How prompts go into a network of our own."""

    takes_text = True

    def encode(self, parts: Mapping[str, Any], prompts: Sequence[str]) -> PromptTable:
        """Prompts by number.  parts: `tokenizer` and `text_encoder`."""
        shards = [
            Cond(pooled_text=embed(parts["tokenizer"], parts["text_encoder"], asked)) for asked in (prompts, [""])
        ]
        return PromptTable(shards[:1], shards[1])


class ExportedModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Students and how they make images. A folder's own `Model` says which, as attributes of the class.

    guidance_scale: what is used where none is given.  class_names: of the classes, by number, where they are known.
    classes: that it was trained on, where those are not all.
    """

    config_name = "config.json"
    image_shape: tuple[int, ...]
    num_classes: int
    num_students = 1
    make_denoiser: Callable[[], Denoiser]
    sampler: Sampler
    router: Any = None
    source: Source | Sentences | None = None

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        guidance_scale: float = 1.0,
        class_names: Sequence[str] = (),
        classes: Sequence[int] = (),
    ) -> None:
        super().__init__()
        make = type(self).make_denoiser
        self.students = nn.ModuleList(make() for _ in range(self.num_students))

    @property
    def takes_text(self) -> bool:
        """Whether it is told what to draw by prompts."""
        return self.source is not None and self.source.takes_text

    def sampler_for(self, num_steps: int | None) -> Sampler:
        """The model's own, or with another number of NFE. Raises ValueError if it cannot take so many."""
        path: Path = self.students[0].path  # type: ignore[assignment]
        return self.sampler if num_steps is None else with_steps(self.sampler, path, num_steps)

    @torch.no_grad()
    def forward(
        self,
        noise: Tensor,
        class_labels: Tensor | None = None,
        *,
        conditions: PromptTable | None = None,
        guidance_scale: float | None = None,
        num_steps: int | None = None,
        fresh_noise: FreshNoise | None = None,
    ) -> Tensor:
        """Images in [-1, 1], or latents, [B, *image_shape], from unit noise of that shape.

        class_labels: [B] int64, classes, or the prompts' numbers in `conditions`.  num_steps: default what it was
        trained for.  fresh_noise: for steps after the first.
        """
        denoiser = self._denoiser(conditions)
        sampler = self.sampler_for(num_steps)
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        cond = denoiser.resolve(denoiser.class_cond(class_labels))  # type: ignore[arg-type]
        return sampler(denoiser, noise, cond, guidance=scale, fresh_noise=fresh_noise)

    def _denoiser(self, conditions: PromptTable | None) -> Denoiser:
        """All students as one."""
        half = None if self.dtype == torch.float32 else self.dtype
        for student in self.students:
            student.run_with(conditions=conditions, autocast=half)  # type: ignore[operator]
        if self.router is None:
            return self.students[0]  # type: ignore[return-value]
        return RoutedDenoiser(list(self.students), self.router)  # type: ignore[arg-type]
