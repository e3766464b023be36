"""What stands around a network of diffusers: the text encoders before it, and the VAE behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.conditions import Conditions
from diffdistill.denoiser import NO_COND, Cond, Denoiser
from diffdistill.eval.hashes import hash_weights
from diffdistill.families import Pipeline, open_pipeline
from diffdistill.guidance import Guidance
from diffdistill.sampling import FreshNoise, Sampler
from diffdistill.schema import UserError


@dataclass(frozen=True)
class Around:
    """encoder: diffusers' own pipeline with the text encoders alone; None where there are no captions.  vae: None where
    the network makes pixels.  captions: one an image."""

    pipeline: Pipeline
    vae: nn.Module | None
    encoder: Any
    captions: Sequence[str]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """[C, H, W] of the images."""
        return (3, *self.pipeline.image_size) if self.vae is not None else self.pipeline.spec.image_shape

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What runs beside the network, by part."""
        found = {} if self.vae is None else {"vae": self.vae}
        for name in self.pipeline.family.text_parts if self.encoder is not None else ():
            part = getattr(self.encoder, name, None)
            if isinstance(part, nn.Module):
                found[name] = part
        return found

    def cond(self, index: Tensor) -> Cond:
        """The captions of the images `index` [B], encoded now: all of them at once would not fit into memory."""
        prompts = [self.captions[number] for number in index.tolist()]
        found: Cond = self.pipeline.encode(self.encoder, prompts)
        return found

    def images(self, made: Tensor) -> Tensor:
        """What the network made as images in [-1, 1], [B, C, H, W]."""
        return made if self.vae is None else self.pipeline.family.to_images(self.vae, made)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each part's weights."""
        return {name: hash_weights(module) for name, module in self.modules.items()}


@dataclass(frozen=True)
class WholeSampler:
    """A sampler with all that a user waits for: its captions are encoded first, and it ends in images."""

    sampler: Sampler
    around: Around

    @property
    def num_evaluations(self) -> int:
        return self.sampler.num_evaluations

    def __call__(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        cond: Cond = NO_COND,
        *,
        guidance: Guidance = 1.0,
        fresh_noise: FreshNoise | None = None,
    ) -> Tensor:
        """cond: not looked at where there are captions."""
        if self.around.encoder is not None:
            cond = self.around.cond(torch.arange(len(noise)) % len(self.around.captions))
        return self.around.images(self.sampler(denoiser, noise, cond, guidance=guidance, fresh_noise=fresh_noise))


def open_around(
    place: str, denoiser: Denoiser, captions: Sequence[str] | None, device: torch.device, *, origin: str
) -> Around | None:
    """What the pipeline at `place` has around its network; None if that is pixels and classes.

    denoiser: is told what "no caption" is, for guidance.  captions: None where the protocol has none.
    Raises UserError if the network takes text and there are no captions, or the other way round, and where the
    pipeline is not there any more.
    """
    pipeline = open_pipeline(place)
    takes_text = pipeline.family.takes_text
    if takes_text and captions is None:
        raise UserError(f"{origin}: takes captions; name a protocol that has some (coco2014-fid30k, or your own)")
    if captions is None and pipeline.class_of("vae") is None:
        return None
    encoder = None
    if takes_text:
        encoder = pipeline.load_encoder(device)
        if denoiser.conditions is None:
            denoiser.conditions = Conditions([], pipeline.encode_empty(encoder))
    vae = pipeline.load_vae().to(device) if pipeline.class_of("vae") else None
    return Around(pipeline, vae, encoder, captions or ())
