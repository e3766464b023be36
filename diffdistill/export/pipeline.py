"""The pipeline of an exported folder, which is a copy of this file. It imports torch and diffusers only."""

from __future__ import annotations

from typing import Any
from unicodedata import normalize

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


class DistilledPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Images from noise, in the few steps and without the guidance that the model was distilled for.

    A VAE and text encoders are there where the teacher had some.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->model->vae"
    _optional_components = (
        *("vae", "scheduler", "tokenizer", "tokenizer_2", "tokenizer_3"),
        *("text_encoder", "text_encoder_2", "text_encoder_3"),
    )

    def __init__(
        self,
        model: ModelMixin,
        vae: Any = None,
        scheduler: Any = None,
        tokenizer: Any = None,
        tokenizer_2: Any = None,
        tokenizer_3: Any = None,
        text_encoder: Any = None,
        text_encoder_2: Any = None,
        text_encoder_3: Any = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            model=model,
            vae=vae,
            scheduler=scheduler,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            tokenizer_3=tokenizer_3,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            text_encoder_3=text_encoder_3,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: int | str | list[int | str] | torch.Tensor | None = None,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Make one image for each prompt or class, or `batch_size` images of one of them.

        class_labels: by number or name; default all classes that it was trained on in turn; a class-conditional model's
        "no class" is the number of its classes.
        num_inference_steps, guidance_scale: default those that the model was made for. A scale of 0 is none, as 1 is.
        latents: the noise to begin with, [B, *image_shape] of N(0, 1).
        output_type: "pil"; "np" and "pt" in [0, 1]; "latent": what the network makes, not clipped.
        Raises ValueError on numbers of images that contradict each other, an unknown class, and a missing prompt.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        conditions, labels = self._conditions(prompts), self._labels(prompts, class_labels, batch_size, latents)
        shape = (len(labels), *self.model.image_shape)

        def normal() -> torch.Tensor:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)

        noise = normal() if latents is None else latents.to(self._execution_device, torch.float32)
        if noise.shape != shape:
            raise ValueError(f"latents: {tuple(noise.shape)} should be {shape}")
        made = self.model(
            noise,
            labels if self.model.num_classes or conditions else None,
            conditions=conditions,
            guidance_scale=1.0 if guidance_scale == 0 else guidance_scale,
            num_steps=num_inference_steps,
            fresh_noise=lambda step: normal(),
        )
        if self.vae is not None and output_type != "latent":
            made = self.model.source.decode(self.vae, made)
        images = VaeImageProcessor(do_resize=False).postprocess(made.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _conditions(self, prompts: list[str] | None) -> Any:
        """The prompts, encoded; nothing for a model that takes none."""
        if not self.model.takes_text:
            if prompts is not None:
                raise ValueError("prompt: this model takes none")
            return None
        if not prompts:
            raise ValueError("prompt: is needed")
        return self.model.source.encode(self.components, prompts)

    def _labels(
        self,
        prompts: list[str] | None,
        class_labels: int | str | list[int | str] | torch.Tensor | None,
        batch_size: int | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """A class, or a prompt's number, for each image, [B]; zeros for a model without."""
        known, device = len(prompts) if prompts else self.model.num_classes, self._execution_device
        if class_labels is None:
            count = batch_size or (len(latents) if latents is not None else len(prompts or [""]))
            number = torch.arange(count, device=device)
            classes = [] if prompts else list(self.model.config.get("classes", []))
            return torch.tensor(classes, device=device)[number % len(classes)] if classes else number % max(known, 1)
        if isinstance(class_labels, (str, list, tuple)):
            class_labels = self._numbers([class_labels] if isinstance(class_labels, str) else class_labels)
        labels = torch.as_tensor(class_labels, dtype=torch.int64, device=device).reshape(-1)
        if prompts or not known:
            raise ValueError("class_labels: this model has no classes")
        if bool(((labels < 0) | (labels > known)).any()):
            raise ValueError(f"class_labels: {labels.tolist()} must be among 0 to {known - 1}, or {known} for none")
        return labels.expand(batch_size) if batch_size and len(labels) == 1 else labels

    def _numbers(self, class_labels: Any) -> list[Any]:
        """Classes by number; text is a class's name, compared in Unicode's composed form."""
        names = [normalize("NFC", name) for name in self.model.config.get("class_names", [])]
        for label in class_labels:
            if isinstance(label, str) and names.count(normalize("NFC", label)) != 1:
                raise ValueError(f"class_labels: {label!r} is not the name of exactly one class of {names[:20]}")
        return [names.index(normalize("NFC", one)) if isinstance(one, str) else one for one in class_labels]
