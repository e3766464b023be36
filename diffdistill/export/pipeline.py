"""The pipeline of an exported folder, which is a copy of this file. It imports torch and diffusers only."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


class DistilledPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Images from noise, in the few steps and without the guidance that the model was distilled for."""

    model_cpu_offload_seq = "model"

    def __init__(self, model: ModelMixin) -> None:
        super().__init__()
        self.register_modules(model=model)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int] | torch.Tensor | None = None,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Make one image for each class, or `batch_size` images.

        class_labels: default all classes in turn; a class-conditional model's "no class" is the number of its classes.
        num_inference_steps, guidance_scale: default those that the model was made for.
        latents: the noise to begin with, [B, *image_shape] of N(0, 1).
        output_type: "pil"; "np" and "pt" in [0, 1]; "latent" in [-1, 1], not clipped.
        Raises ValueError on numbers of images that contradict each other, and on an unknown class.
        """
        labels = self._labels(class_labels, batch_size, latents)
        shape = (len(labels), *self.model.image_shape)

        def normal() -> torch.Tensor:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)

        noise = normal() if latents is None else latents.to(self._execution_device)
        if noise.shape != shape:
            raise ValueError(f"latents: {tuple(noise.shape)} should be {shape}")
        images = self.model(
            noise,
            labels if self.model.num_classes else None,
            guidance_scale=guidance_scale,
            num_steps=num_inference_steps,
            fresh_noise=lambda step: normal(),
        )
        made = VaeImageProcessor(do_resize=False).postprocess(images, output_type=output_type)
        return ImagePipelineOutput(images=made) if return_dict else (made,)

    def _labels(
        self, class_labels: int | list[int] | torch.Tensor | None, batch_size: int | None, latents: torch.Tensor | None
    ) -> torch.Tensor:
        """A class for each image, [B]; zeros for a model without classes."""
        classes, device = self.model.num_classes, self._execution_device
        if class_labels is None:
            count = len(latents) if latents is not None else batch_size or 1
            return torch.arange(count, device=device) % max(classes, 1)
        labels = torch.as_tensor(class_labels, dtype=torch.int64, device=device).reshape(-1)
        if not classes:
            raise ValueError("class_labels: this model has no classes")
        if bool(((labels < 0) | (labels > classes)).any()):
            raise ValueError(f"class_labels: {labels.tolist()} must be among 0 to {classes - 1}, or {classes} for none")
        return labels.expand(batch_size) if batch_size and len(labels) == 1 else labels
