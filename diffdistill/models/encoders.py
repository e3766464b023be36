"""Prompts and images through text encoders and VAEs: once, into the cache, before any network is in memory."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Protocol

import torch

from diffdistill.data.classes import class_names_of
from diffdistill.data.shards import MakeRows, Shard, build_table, files_key, table_key
from diffdistill.data.source import ImageSource, LatentImages
from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.prompt_table import PromptTable
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.models.prompt_storage import ALL, PromptsConfig, Streamed, check_room, first_rows, pack, unpack
from diffdistill.models.sentence_encoder import SentenceEncoder
from diffdistill.models.spec import ModelSpec
from diffdistill.models.teachers import Pipeline, pipeline_of
from diffdistill.models.teachers.image_size import size_files
from diffdistill.models.teachers.pipeline import INDEX
from diffdistill.models.teachers.text_encoders import EncoderDtype
from diffdistill.settings.schema import UserError

VERSION = 1  # of the tables; another one makes other keys


TEXT_BATCH = 32


TEXT_SHARD = 4096


LATENT_BATCH = 8


LATENT_SHARD = 4096


LATENT_SEED = 0


class PromptEncoder(Protocol):
    """What turns prompts into conditions; `load` brings it into memory."""

    @property
    def files(self) -> Sequence[FilePath]: ...
    @property
    def halves(self) -> Sequence[str]:
        """What computes in half precision, and in which; of everything in float32 empty."""

    def load(self, device: torch.device | str, *, stays: bool = True) -> Any:
        """stays: whether all of it is on the device until it is let go; else it is for `encode_all` alone."""

    def encode(self, loaded: Any, prompts: Sequence[str]) -> Cond: ...
    def encode_empty(self, loaded: Any) -> Cond: ...
    def encode_all(self, loaded: Any, batches: Sequence[Sequence[str]], *, has_empty: bool = False) -> list[Cond]:
        """Batches of prompts, and behind them the empty one, on the CPU."""


@dataclass(frozen=True)
class PipelineEncoder:
    """The text encoders of a diffusers pipeline."""

    pipeline: Pipeline
    dtype: EncoderDtype = "published"

    @property
    def files(self) -> list[FilePath]:
        """The encoders', and what says which there are and how large images are, which some conditions tell."""
        folder, family = self.pipeline.folder, self.pipeline.family
        about = (folder / INDEX, self.pipeline.part(family.network) / "config.json", folder / "vae" / "config.json")
        parts = filter(self.pipeline.class_of, family.text_parts)
        own = [file for part in parts for file in files_of(folder / part)]
        return [*filter(FilePath.is_file, about), *size_files(folder), *own]

    @property
    def halves(self) -> list[str]:
        dtypes = self.pipeline.encoder_dtypes(self.dtype)
        return [f"{part} {dtype}" for part, dtype in dtypes.items() if dtype != torch.float32]

    def load(self, device: torch.device | str, *, stays: bool = True) -> Any:
        return self.pipeline.load_encoder(device, dtype=self.dtype, stays=stays)

    def encode(self, loaded: Any, prompts: Sequence[str]) -> Cond:
        return self.pipeline.encode(loaded, prompts)

    def encode_empty(self, loaded: Any) -> Cond:
        return self.pipeline.encode_empty(loaded)

    def encode_all(self, loaded: Any, batches: Sequence[Sequence[str]], *, has_empty: bool = False) -> list[Cond]:
        return self.pipeline.encode_all(loaded, batches, has_empty=has_empty)


def encoder_of(spec: ModelSpec, dtype: EncoderDtype = "published") -> PromptEncoder | None:
    """What a model's prompts are encoded by: its pipeline's encoders, or its own; None if it takes no text.

    dtype: of the pipeline's.
    """
    if spec.text_encoder is not None:
        return SentenceEncoder(spec.text_encoder)
    pipeline = pipeline_of(spec)
    return PipelineEncoder(pipeline, dtype) if pipeline and pipeline.family.takes_text else None


def encode_prompts(
    encoder: PromptEncoder,
    prompts: Sequence[str],
    *,
    root: FilePath,
    device: torch.device | str = "cpu",
    config: PromptsConfig = ALL,
) -> PromptTable:
    """Prompts by number, from the cache; the encoder is in memory only while some are missing. Or as `config` says.

    Raises UserError, also where the disk has no room for the cache.
    """
    key = table_key("prompts", VERSION, type(encoder).__name__, encoder_key(encoder, root), list(prompts))
    if config.encode == "streaming":
        return _streamed(encoder, prompts, key=key, device=device)
    if config.is_packed:
        key = table_key(key, config.dtype, config.tokens)

    def start() -> MakeRows:
        loaded = encoder.load(device, stays=False)
        check_room(lambda sample: encoder.encode_all(loaded, [sample])[0], prompts, config, root / key)

        def make(first: int, last: int) -> Shard:
            """The row behind the last prompt is the empty one."""
            places = range(first, min(last, len(prompts)), TEXT_BATCH)
            batches = [prompts[place : min(place + TEXT_BATCH, last)] for place in places]
            parts = encoder.encode_all(loaded, batches, has_empty=last > len(prompts))
            rows = {name: torch.cat([part.parts()[name] for part in parts]) for name in parts[0].parts()}
            return pack(rows, config)

        return make

    title = f"encoding {len(prompts):,} prompts"
    shards = build_table(
        root, key, len(prompts) + 1, rows_per_shard=TEXT_SHARD, start=start, title=title, about={"kind": "prompts"}
    )
    _let_go()
    *whole, last = (unpack(shard, config) for shard in shards)
    count = len(prompts) % TEXT_SHARD
    empty = Cond(**{name: part[torch.tensor([count])] for name, part in last.items()})
    rest = [first_rows(last, count)] if count else []
    return PromptTable([*whole, *rest], empty, key=key, texts=prompts)


def encoder_key(encoder: PromptEncoder, root: FilePath) -> str:
    """Of its files and, where that is less than float32, of what they compute in.  root: of the cache."""
    files, halves = files_key(encoder.files, root=root), list(encoder.halves)
    return table_key(files, halves) if halves else files


def _streamed(encoder: PromptEncoder, prompts: Sequence[str], *, key: str, device: torch.device | str) -> PromptTable:
    """Nothing is kept on disk; the encoder stays. The key is that of the cache, whose numbers these are."""
    loaded = encoder.load(device)
    take = Streamed(lambda some: encoder.encode(loaded, some), prompts, at_once=TEXT_BATCH)
    return PromptTable.on_demand(take, encoder.encode_empty(loaded), key=key, texts=prompts)


def encode_images(pipeline: Pipeline, images: ImageSource, *, root: FilePath, device: torch.device) -> LatentImages:
    """Images [3, H, W] as the latents of a pipeline's VAE, from the cache: one sample each of the VAE's posterior, by
    noise of the image's number. The VAE is in memory only while some are missing. Raises UserError.
    """
    weights = files_key(files_of(pipeline.folder / "vae"), root=root)
    factor, (_, height, width) = pipeline.vae_factor, images.image_shape
    shape = (pipeline.spec.image_shape[0], height // factor, width // factor)
    key = table_key("latents", VERSION, pipeline.family.name, weights, images.key, shape)

    def start() -> MakeRows:
        vae = pipeline.load_vae().to(device)

        @torch.no_grad()
        def make(first: int, last: int) -> Shard:
            parts = []
            for place in range(first, last, LATENT_BATCH):
                index = torch.arange(place, min(place + LATENT_BATCH, last))
                eps = StepRandom(LATENT_SEED, 0, index).normal("latents", shape).to(device)
                parts.append(pipeline.family.to_latents(vae, images.rows(index).to(device), eps).cpu())
            return {"latents": torch.cat(parts)}

        return make

    title = f"encoding {len(images):,} images"
    shards = build_table(
        root, key, len(images), rows_per_shard=LATENT_SHARD, start=start, title=title, about={"kind": "latents"}
    )
    _let_go()
    latents = [shard["latents"] for shard in shards]
    return LatentImages(
        latents,
        images.labels,
        key=key,
        num_classes=images.num_classes,
        class_names=class_names_of(images),
        device=device,
    )


class PixelDecoder:
    """A pipeline's VAE, for a gradient from pixels to latents; copies of a denoiser share it."""

    def __init__(self, pipeline: Pipeline, device: torch.device) -> None:
        self._family, self.vae = pipeline.family, pipeline.load_vae().to(device)

    def __deepcopy__(self, memo: object) -> "PixelDecoder":
        return self

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """[B, C, h, w] as the network makes them to images [B, 3, H, W], about in [-1, 1]."""
        return self._family.to_images(self.vae, latents)


def files_of(folder: FilePath) -> list[FilePath]:
    """A folder's files, in order. Raises UserError if it is not there."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    return sorted(file for file in folder.iterdir() if file.is_file())


def _let_go() -> None:
    """Give back what encoders held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
