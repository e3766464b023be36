"""What a run is fed with: images or latents by number, and encoded prompts. Text encoders and the VAE come first, work
once, into the cache, and leave memory before the networks come.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath

import torch
from torch import Tensor

from diffdistill.data import AnyData
from diffdistill.data import cache as kept
from diffdistill.data.buckets import BucketedImages, Size, bucket_sizes
from diffdistill.data.captions import Captioned
from diffdistill.data.classes import note_empty, with_teachers_classes
from diffdistill.data.shards import table_key
from diffdistill.data.source import ImageSource, MappedImages, NoImages
from diffdistill.diffusion.prompt_table import PromptTable
from diffdistill.models.encoders import PromptEncoder, encode_images, encode_prompts, encoder_of
from diffdistill.models.sentence_encoder import SentenceEncoder
from diffdistill.models.spec import ModelSpec
from diffdistill.models.teachers import Pipeline, pipeline_of
from diffdistill.models.teachers.image_size import check_size
from diffdistill.settings.numbers import as_size
from diffdistill.settings.schema import UserError
from diffdistill.training.config import RunConfig

CAPTIONED = "prompts, captioned_images, webdataset, or huggingface with caption_column"


@dataclass(frozen=True)
class Inputs:
    """source: images or latents, of no rows where the method needs none.  conditions: the prompts by number, which
    `source.labels` are; None where nothing takes any. The source's key is of both.  notes: what of `data` was left out
    or changed."""

    source: ImageSource
    conditions: PromptTable | None = None
    notes: tuple[str, ...] = ()


def check_inputs(config: RunConfig, teacher: ModelSpec | None) -> None:
    """Raise UserError if the method or the model needs images or prompts that `data` does not have.

    Nothing is read for it but the descriptions.
    """
    data, name = config.data, config.method.name
    has_prompts = isinstance(data, Captioned) and data.has_captions
    has_images = not isinstance(data, Captioned) or data.has_images
    takes_text = _encoder(config, teacher) is not None
    if config.method.needs_images and not has_images:
        raise UserError(f"data: {name} needs real images with these settings; {data.name} has only prompts")
    if takes_text and not has_prompts:
        raise UserError(f"data: the model takes prompts, and {data.name} has none; choose {CAPTIONED}")
    if not takes_text and not has_images:
        raise UserError(f"data: {data.name} has only prompts, and the model takes none")
    if config.text_encoder is not None and teacher is not None:
        raise UserError("text_encoder: is the teacher's; leave it out")
    if config.text_encoder is not None:
        SentenceEncoder(config.text_encoder).refuse_other_embeddings()
    width = getattr(config.model.network, "text_width", 0) if config.model else 0
    if config.text_encoder is not None and width != SentenceEncoder(config.text_encoder).width:
        own = SentenceEncoder(config.text_encoder).width
        raise UserError(f"model.network.text_width = {width}: text_encoder has width {own}")
    if width and not takes_text:
        raise UserError(f"model.network.text_width = {width}: needs a text_encoder")
    if config.method.needs_images:
        _check_size(data, teacher)
    if getattr(data, "buckets", None):
        check_buckets(config, teacher)


def open_inputs(config: RunConfig, teacher: ModelSpec | None, device: torch.device) -> Inputs:
    """Everything that a run is fed with, from the cache, computed now where it is not there.

    Raises UserError as `check_inputs`, and for data that cannot be read.
    """
    check_inputs(config, teacher)
    data, encoder, needs_images = _sized(config.data, teacher), _encoder(config, teacher), config.method.needs_images
    root = kept.cache_folder(getattr(data, "cache", None))
    if encoder is None:
        if not needs_images and teacher is not None and _vae_of(teacher):
            return Inputs(NoImages(teacher.image_shape, device))
        loaded = _without_captions(data)
        notes: tuple[str, ...] = getattr(loaded, "notes", ())
        if needs_images:
            loaded, more = _with_classes(loaded, teacher)
            notes = (*notes, *more)
        return Inputs(_prepared(loaded, teacher, root, device), notes=notes)
    assert isinstance(data, Captioned)
    captions = data.captions()
    conditions = encode_prompts(encoder, captions.different, root=root, device=device, config=config.prompts)
    if not needs_images:
        assert teacher is not None
        for note in captions.notes:
            kept.warn(note)
        return Inputs(NoImages(teacher.image_shape, device, key=conditions.key), conditions, captions.notes)
    images: MappedImages | BucketedImages
    if sizes := check_buckets(config, teacher):
        assert teacher is not None
        pipeline = _vae_of(teacher)
        assert pipeline is not None
        images = captions.bucketed(pipeline.image_size, sizes, 3, data.cache)
        conditions.sizes = _told_sizes(pipeline, sizes)
    else:
        images = captions.images(data.sizing, data.cache)
    images.key = table_key(images.key, conditions.key)
    return Inputs(_prepared(images, teacher, root, device), conditions, images.notes)


def _encoder(config: RunConfig, teacher: ModelSpec | None) -> PromptEncoder | None:
    if teacher is not None:
        return encoder_of(teacher, config.prompts.encoder_dtype)
    return SentenceEncoder(config.text_encoder) if config.text_encoder is not None else None


def _vae_of(spec: ModelSpec) -> Pipeline | None:
    """The pipeline of a model of latents."""
    pipeline = pipeline_of(spec)
    return pipeline if pipeline and pipeline.has_vae else None


def _check_size(data: object, teacher: ModelSpec | None) -> None:
    pipeline, sides = _vae_of(teacher) if teacher else None, getattr(data, "resolution", None)
    if pipeline and sides and as_size(sides) != pipeline.image_size:
        shown = sides if isinstance(sides, int) else list(sides)
        height, width = pipeline.image_size
        raise UserError(
            f"data.resolution = {shown}: the teacher was made for images of [{height}, {width}], height and width; "
            "leave it out, or set teacher.resolution"
        )


def check_buckets(config: RunConfig, teacher: ModelSpec | None) -> tuple[Size, ...]:
    """The sizes in pixels of `data.buckets`; none without them.

    Raises UserError where the method, a setting of `speed` or the teacher takes images of one size alone.
    """
    buckets, method = getattr(config.data, "buckets", None), config.method
    if buckets is None:
        return ()
    pipeline = _vae_of(teacher) if teacher else None
    faults = {
        f"{method.name} sees no images, with these settings; say teacher.resolution": not method.needs_images,
        "goes with a teacher that is a pipeline with prompts and a VAE": not (pipeline and pipeline.family.takes_text),
        f"{method.name}: {method.one_shape}": method.one_shape is not None,
        "speed.compile compiles a network for each shape anew; leave one out": config.speed.compile is not None,
    }
    for fault, is_so in faults.items():
        if is_so:
            raise UserError(f"data.buckets: {fault}")
    assert pipeline is not None
    sizes = bucket_sizes(pipeline.image_size, buckets)
    for size in sizes:
        try:
            check_size(pipeline.family, pipeline.options, size, pixels=pipeline.vae_factor, origin=pipeline.place)
        except UserError as error:
            raise UserError(f"data.buckets: step = {buckets.step}: {error}") from None
    return sizes


def _told_sizes(pipeline: Pipeline, sizes: Sequence[Size]) -> dict[tuple[int, ...], Tensor]:
    """What the network is told of the size, by height and width of the latents."""
    factor, options = pipeline.vae_factor, pipeline.options
    told = {(size[0] // factor, size[1] // factor): pipeline.family.told_size(size, options) for size in sizes}
    return {sides: size for sides, size in told.items() if size is not None}


def _sized(data: AnyData, teacher: ModelSpec | None) -> AnyData:
    """Images of the size that the teacher is told, where `data` says none."""
    pipeline = pipeline_of(teacher) if teacher else None
    size = pipeline.asked_size if pipeline else None
    if size is None or getattr(data, "resolution", 0) is not None:
        return data
    return replace(data, resolution=size[0] if size[0] == size[1] else size)  # type: ignore[type-var]


def _prepared(images: ImageSource, teacher: ModelSpec | None, root: FilePath, device: torch.device) -> ImageSource:
    """Images on the device; for a model of latents, their latents."""
    pipeline = _vae_of(teacher) if teacher else None
    if pipeline is None:
        return images.to(device)
    if isinstance(images, BucketedImages):
        assert teacher is not None
        parts = [encode_images(pipeline, part, root=root, device=device) for part in images.parts]
        latents = BucketedImages(parts, teacher.image_shape, notes=images.notes)
        latents.key = table_key(images.key, latents.key)
        return latents
    if images.image_shape != (3, *pipeline.image_size):
        height, width = pipeline.image_size
        raise UserError(
            f"data: images are {list(images.image_shape)}, but the teacher's are [3, {height}, {width}]; set "
            f"data.resolution"
        )
    return encode_images(pipeline, images, root=root, device=device)


def _with_classes(images: ImageSource, teacher: ModelSpec | None) -> tuple[ImageSource, tuple[str, ...]]:
    """Images with the teacher's numbers of their classes, and notes, which are said."""
    notes: tuple[str, ...] = ()
    known: Sequence[int] | None = None
    if teacher is not None:
        known = teacher.classes or range(teacher.num_classes)
        if known:
            images, notes = with_teachers_classes(images, teacher.class_names, num_classes=teacher.num_classes)
    notes = (*notes, *note_empty(images, of_teacher=known))
    for note in notes:
        kept.warn(note)
    return images, notes


def _without_captions(data: AnyData) -> ImageSource:
    """The images for a model that takes no prompts: their captions are no classes."""
    images = data.load()
    if isinstance(data, Captioned) and data.has_captions:
        assert isinstance(images, MappedImages)
        kept.warn(f"data: the captions of {data.name} are not used: the model takes no prompts")
        return MappedImages(images.images, None, key=images.key, num_classes=0, notes=images.notes)
    return images
