"""What stands around a network: the text encoder before it, and the VAE behind it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.data.cache import cache_folder
from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.guidance.policies import Guidance
from diffdistill.diffusion.prompt_table import PromptTable
from diffdistill.diffusion.sampling import FreshNoise, Sampler
from diffdistill.eval.records.hashes import hash_weights
from diffdistill.models.encoders import PromptEncoder, encode_prompts, encoder_key, encoder_of
from diffdistill.models.spec import ModelSpec
from diffdistill.models.teachers import Pipeline, pipeline_of
from diffdistill.settings.schema import UserError


@dataclass(frozen=True)
class EncoderAndVAE:
    """captions: how many; 0 where there are none.  encode: some of them by number [B].  pipeline: whose VAE is `vae`;
    None where the network makes pixels.  modules: all of it, by part.  sha256: of each part's weights or files."""

    captions: int = 0
    encode: Callable[[Tensor], Cond] | None = None
    pipeline: Pipeline | None = None
    vae: nn.Module | None = None
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)

    def image_shape(self, made: tuple[int, ...]) -> tuple[int, ...]:
        """[C, H, W] of the images.  made: of what the network makes."""
        return (3, *self.pipeline.image_size) if self.pipeline and self.vae is not None else made

    def images(self, made: Tensor) -> Tensor:
        """What the network made as images in [-1, 1], [B, C, H, W]."""
        return self.pipeline.family.to_images(self.vae, made) if self.pipeline and self.vae is not None else made


@dataclass(frozen=True)
class WholeSampler:
    """A sampler with all that a user waits for: its captions are encoded first, and it ends in images."""

    sampler: Sampler
    around: EncoderAndVAE

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
        if self.around.encode is not None:
            cond = self.around.encode(torch.arange(len(noise)) % self.around.captions)
        return self.around.images(self.sampler(denoiser, noise, cond, guidance=guidance, fresh_noise=fresh_noise))


def open_around(
    spec: ModelSpec,
    denoiser: Denoiser,
    captions: Sequence[str] | None,
    device: torch.device,
    *,
    origin: str,
    keeps_encoder: bool = True,
) -> EncoderAndVAE | None:
    """What a model needs beside its network; None if that makes pixels, without text.

    denoiser: is told what "no caption" is, for guidance.  captions: None where the protocol has none.
    keeps_encoder: captions are encoded when they are asked for, so that any number of them needs no room; False encodes
    them now, into the cache, and lets the encoder go.
    Raises UserError if it takes text and there are no captions, and where its parts are not there any more.
    """
    encoder = encoder_of(spec)
    if encoder is not None and captions is None:
        raise UserError(f"{origin}: takes captions; choose a protocol with captions (coco2014-fid30k, or your own)")
    pipeline = pipeline_of(spec)
    vae = pipeline.load_vae().to(device) if pipeline and pipeline.has_vae else None
    if encoder is None and vae is None:
        return None
    modules = {"vae": vae} if vae is not None else {}
    hashes = {name: hash_weights(module) for name, module in modules.items()}
    if encoder is None or captions is None:
        return EncoderAndVAE(0, None, pipeline, vae, modules, hashes)
    hashes["text_encoder"] = encoder_key(encoder, cache_folder(None))
    if not keeps_encoder:
        table = encode_prompts(encoder, captions, root=cache_folder(None), device=device)
        denoiser.run_with(conditions=denoiser.conditions or table)
        return EncoderAndVAE(len(captions), lambda index: table.rows(index.to(device)), pipeline, vae, modules, hashes)
    loaded = encoder.load(device)
    denoiser.run_with(conditions=denoiser.conditions or PromptTable([], encoder.encode_empty(loaded)))
    modules |= {f"text_encoder{number or ''}": part for number, part in enumerate(_networks(loaded))}
    return EncoderAndVAE(len(captions), _live(encoder, loaded, captions), pipeline, vae, modules, hashes)


def _live(encoder: PromptEncoder, loaded: Any, captions: Sequence[str]) -> Callable[[Tensor], Cond]:
    return lambda index: encoder.encode(loaded, [captions[number] for number in index.tolist()])


def _networks(loaded: Any) -> list[nn.Module]:
    """Those of a diffusers pipeline, or of a tuple."""
    parts = loaded if isinstance(loaded, tuple) else loaded.components.values()
    return [part for part in parts if isinstance(part, nn.Module)]
