"""What a run is fed with: images or latents by number, and encoded prompts. Text encoders and the VAE come first, work
once, into the cache, and leave memory before the networks come.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Protocol

import torch

from diffdistill.data import AnyData
from diffdistill.data import cache as kept
from diffdistill.data.captions import Captioned
from diffdistill.data.shards import MakeRows, Shard, build_table, files_key, table_key
from diffdistill.data.source import ImageSource, LatentImages, MappedImages, NoImages
from diffdistill.data.text import SentenceEncoder
from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.conditions import Conditions
from diffdistill.diffusion.draws import Draws
from diffdistill.models.model import ModelSpec
from diffdistill.models.teachers import Pipeline, pipeline_of
from diffdistill.models.teachers.pipeline import INDEX
from diffdistill.settings.schema import UserError
from diffdistill.training.config import RunConfig

VERSION = 1  # of the tables; another one makes other keys
TEXT_BATCH, TEXT_SHARD = 32, 4096
LATENT_BATCH, LATENT_SHARD = 8, 4096
LATENT_SEED = 0
CAPTIONED = "prompts, captioned_images, webdataset, or huggingface with caption_column"


@dataclass(frozen=True)
class Inputs:
    """source: images or latents, of no rows where the method needs none.  conditions: the prompts by number, which
    `source.labels` are; None where nothing takes any. The source's key is of both.  notes: what of `data` was left out
    or changed."""

    source: ImageSource
    conditions: Conditions | None = None
    notes: tuple[str, ...] = ()


class PromptEncoder(Protocol):
    """What turns prompts into conditions; `load` brings it into memory."""

    @property
    def files(self) -> Sequence[FilePath]: ...
    def load(self, device: torch.device | str) -> Any: ...
    def encode(self, loaded: Any, prompts: Sequence[str]) -> Cond: ...
    def encode_empty(self, loaded: Any) -> Cond: ...


@dataclass(frozen=True)
class PipelineEncoder:
    """The text encoders of a diffusers pipeline."""

    pipeline: Pipeline

    @property
    def files(self) -> list[FilePath]:
        """The encoders', and what says which there are and how large images are, which some conditions tell."""
        folder, family = self.pipeline.folder, self.pipeline.family
        about = (folder / INDEX, folder / family.network / "config.json", folder / "vae" / "config.json")
        parts = filter(self.pipeline.class_of, family.text_parts)
        return [*filter(FilePath.is_file, about), *(file for part in parts for file in files_of(folder / part))]

    def load(self, device: torch.device | str) -> Any:
        return self.pipeline.load_encoder(device)

    def encode(self, loaded: Any, prompts: Sequence[str]) -> Cond:
        return self.pipeline.encode(loaded, prompts)

    def encode_empty(self, loaded: Any) -> Cond:
        return self.pipeline.encode_empty(loaded)


def encoder_of(spec: ModelSpec) -> PromptEncoder | None:
    """What a model's prompts are encoded by: its pipeline's encoders, or its own; None if it takes no text."""
    if spec.text_encoder is not None:
        return SentenceEncoder(spec.text_encoder)
    pipeline = pipeline_of(spec)
    return PipelineEncoder(pipeline) if pipeline and pipeline.family.takes_text else None


def check_inputs(config: RunConfig, teacher: ModelSpec | None) -> None:
    """Raise UserError if the method or the model needs images or prompts that `data` does not have.

    Nothing is read for it but the descriptions.
    """
    data, name = config.data, config.method.name
    has_prompts = isinstance(data, Captioned) and data.has_captions
    has_images = not isinstance(data, Captioned) or data.has_images
    takes_text = _encoder(config, teacher) is not None
    if config.method.needs_images and not has_images:
        raise UserError(f"data: {name} needs real images, with these settings; {data.name} has prompts alone")
    if takes_text and not has_prompts:
        raise UserError(f"data: the model takes prompts, and {data.name} has none; choose {CAPTIONED}")
    if not takes_text and not has_images:
        raise UserError(f"data: {data.name} has prompts alone, and the model takes none")
    if config.text_encoder is not None and teacher is not None:
        raise UserError("text_encoder: is the teacher's; leave it out")
    width = getattr(config.model.network, "text_width", 0) if config.model else 0
    if config.text_encoder is not None and width != SentenceEncoder(config.text_encoder).width:
        own = SentenceEncoder(config.text_encoder).width
        raise UserError(f"model.network.text_width = {width}: text_encoder gives {own} numbers")
    if width and not takes_text:
        raise UserError(f"model.network.text_width = {width}: needs a text_encoder")
    if config.method.needs_images:
        _check_size(data, teacher)


def open_inputs(config: RunConfig, teacher: ModelSpec | None, device: torch.device) -> Inputs:
    """Everything that a run is fed with, from the cache, computed now where it is not there.

    Raises UserError as `check_inputs`, and for data that cannot be read.
    """
    check_inputs(config, teacher)
    data, encoder, needs_images = config.data, _encoder(config, teacher), config.method.needs_images
    root = kept.cache_folder(getattr(data, "cache", None))
    if encoder is None:
        if not needs_images and teacher is not None and _vae_of(teacher):
            return Inputs(NoImages(teacher.image_shape, device))
        loaded = _without_captions(data)
        return Inputs(_prepared(loaded, teacher, root, device), notes=getattr(loaded, "notes", ()))
    assert isinstance(data, Captioned)
    captions = data.captions()
    conditions = encode_prompts(encoder, captions.different, root=root, device=device)
    if not needs_images:
        assert teacher is not None
        for note in captions.notes:
            kept.warn(note)
        return Inputs(NoImages(teacher.image_shape, device, key=conditions.key), conditions, captions.notes)
    images = captions.images(data.sizing, data.cache)
    images.key = table_key(images.key, conditions.key)
    return Inputs(_prepared(images, teacher, root, device), conditions, images.notes)


def encode_prompts(
    encoder: PromptEncoder, prompts: Sequence[str], *, root: FilePath, device: torch.device | str = "cpu"
) -> Conditions:
    """Prompts by number, from the cache; the encoder is in memory only while some are missing. Raises UserError."""
    key = table_key("prompts", VERSION, type(encoder).__name__, files_key(encoder.files, root=root), list(prompts))

    def start() -> MakeRows:
        loaded = encoder.load(device)

        def make(first: int, last: int) -> Shard:
            """The row behind the last prompt is the empty one."""
            places = range(first, min(last, len(prompts)), TEXT_BATCH)
            parts = [encoder.encode(loaded, prompts[place : min(place + TEXT_BATCH, last)]) for place in places]
            if last > len(prompts):
                parts.append(encoder.encode_empty(loaded))
            return {name: torch.cat([part.parts()[name].cpu() for part in parts]) for name in parts[0].parts()}

        return make

    title = f"encoding {len(prompts):,} prompts"
    shards = build_table(
        root, key, len(prompts) + 1, rows_per_shard=TEXT_SHARD, start=start, title=title, about={"kind": "prompts"}
    )
    _let_go()
    *whole, last = (Cond(**shard) for shard in shards)
    rest = last[:-1]
    return Conditions([*whole, rest] if len(prompts) % TEXT_SHARD else whole, last[-1:], key=key)


def encode_images(pipeline: Pipeline, images: ImageSource, *, root: FilePath, device: torch.device) -> LatentImages:
    """Images [3, H, W] as the latents of a pipeline's VAE, from the cache: one sample each of the VAE's posterior, by
    noise of the image's number. The VAE is in memory only while some are missing. Raises UserError.
    """
    weights = files_key(files_of(pipeline.folder / "vae"), root=root)
    shape = pipeline.spec.image_shape
    key = table_key("latents", VERSION, pipeline.family.name, weights, images.key, shape)

    def start() -> MakeRows:
        vae = pipeline.load_vae().to(device)

        @torch.no_grad()
        def make(first: int, last: int) -> Shard:
            parts = []
            for place in range(first, last, LATENT_BATCH):
                index = torch.arange(place, min(place + LATENT_BATCH, last))
                eps = Draws(LATENT_SEED, 0, index).normal("latents", shape).to(device)
                parts.append(pipeline.family.to_latents(vae, images.rows(index).to(device), eps).cpu())
            return {"latents": torch.cat(parts)}

        return make

    title = f"encoding {len(images):,} images"
    shards = build_table(
        root, key, len(images), rows_per_shard=LATENT_SHARD, start=start, title=title, about={"kind": "latents"}
    )
    _let_go()
    latents = [shard["latents"] for shard in shards]
    return LatentImages(latents, images.labels, key=key, num_classes=images.num_classes, device=device)


def files_of(folder: FilePath) -> list[FilePath]:
    """A folder's files, in order. Raises UserError if it is not there."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    return sorted(file for file in folder.iterdir() if file.is_file())


def _encoder(config: RunConfig, teacher: ModelSpec | None) -> PromptEncoder | None:
    if teacher is not None:
        return encoder_of(teacher)
    return SentenceEncoder(config.text_encoder) if config.text_encoder is not None else None


def _vae_of(spec: ModelSpec) -> Pipeline | None:
    """The pipeline of a model of latents."""
    pipeline = pipeline_of(spec)
    return pipeline if pipeline and pipeline.has_vae else None


def _check_size(data: object, teacher: ModelSpec | None) -> None:
    pipeline, side = _vae_of(teacher) if teacher else None, getattr(data, "resolution", None)
    if pipeline and side and (side, side) != pipeline.image_size:
        height, width = pipeline.image_size
        raise UserError(f"data.resolution = {side}: the teacher was made for images of {width} x {height}")


def _prepared(images: ImageSource, teacher: ModelSpec | None, root: FilePath, device: torch.device) -> ImageSource:
    """Images on the device; for a model of latents, their latents."""
    pipeline = _vae_of(teacher) if teacher else None
    if pipeline is None:
        return images.to(device)
    if images.image_shape != (3, *pipeline.image_size):
        height, width = pipeline.image_size
        raise UserError(
            f"data: images are {list(images.image_shape)}, but the teacher's are [3, {height}, {width}]; set "
            f"data.resolution"
        )
    return encode_images(pipeline, images, root=root, device=device)


def _without_captions(data: AnyData) -> ImageSource:
    """The images for a model that takes no prompts: their captions are no classes."""
    images = data.load()
    if isinstance(data, Captioned) and data.has_captions:
        assert isinstance(images, MappedImages)
        kept.warn(f"data: the captions of {data.name} are not used: the model takes no prompts")
        return MappedImages(images.images, None, key=images.key, num_classes=0, notes=images.notes)
    return images


def _let_go() -> None:
    """Give back what encoders held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
