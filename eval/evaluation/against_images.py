"""`eval MODEL --against IMAGES`: a protocol and its references, made from the images and kept for the next time."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath

import torch

from diffdistill.eval.evaluation.real import make_reference, open_pictures
from diffdistill.eval.evaluation.reference import references_folder, save_reference
from diffdistill.eval.evaluation.workers import Workers, exact_matmul
from diffdistill.eval.features.extractors import load_extractor
from diffdistill.eval.images.files import DataImages, ImageFiles, Images
from diffdistill.eval.images.generate import show
from diffdistill.eval.protocols.own import Choice, Made, choose_features, make_protocol
from diffdistill.eval.protocols.protocol import Captions, Preparation, Protocol, Reference
from diffdistill.settings.links import refuse_links
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import dump_yaml
from diffdistill.storage.atomic import write_text_atomically

PROTOCOL = "protocol.yaml"
LOOKED_AT = 64
"""Images whose size is looked at."""
LEAST = 2
"""Images of a reference: kernel distances compare two of each side."""


@dataclass(frozen=True)
class KeptProtocol:
    """file: the protocol as YAML.  references: LABEL=FILE, as `--reference` takes them.  told: what was chosen."""

    file: FilePath
    references: tuple[str, ...]
    told: str


def protocol_of_images(
    place: str,
    made: Made | None,
    workers: Workers,
    *,
    judged: Sequence[ImageFiles] = (),
    weights: Sequence[str] = (),
    captions: Captions | None = None,
) -> KeptProtocol:
    """The protocol that compares with these images: made now, or found as it was made before.

    place: a folder, a zip, a .npz, a prepared set, or a data set as YAML.  made: what the judged model makes; None
    where images are judged.  judged: these.  weights: LABEL=FILE of the networks.  Raises UserError.
    """
    channels, is_model = made.shape[0] if made else 3, made is not None
    images = open_pictures(place, Preparation(), channels=channels)
    if len(images) < LEAST:
        raise UserError(f"--against {place}: holds {len(images)} image; a distance needs at least {LEAST}")
    shape = made.shape if made else tuple(images.rows(torch.tensor([0])).shape[1:])
    made = made or Made(shape, 0, False)
    files = dict(option.split("=", 1) for option in weights if "=" in option)
    choice = choose_features(made.shape, weights=tuple(files))
    how, sized = _preparation(images, made.shape, choice)
    if how.side is None:
        _check_alike(judged, made.shape, place)
    reference = Reference(name=_slug(place), dataset=place, split="whole", num_images=len(images))
    usual = make_protocol("against", made, choice, reference=reference, preparation=how, captions=captions)
    count = usual.num_images if is_model else min(usual.num_images, *map(len, judged))
    told = f"{_content(images)} {dump_yaml(usual)} {count} {' '.join(map(repr, images.class_names()))}".rstrip()
    key = hashlib.sha256(told.encode()).hexdigest()[:12]
    name = f"{_slug(place)[:40]}-{key}"
    protocol = make_protocol(
        name,
        made,
        choice,
        reference=Reference(
            name=name, dataset=place, split="whole", num_images=len(images), preparation=sized or "as they are"
        ),
        num_images=count,
        preparation=how,
        captions=captions,
    )
    folder = references_folder() / name
    file, label = folder / PROTOCOL, choice.features.label
    target = folder / f"{label}.npz"
    told = f"{place}: {len(images):,} images{', ' + sized if sized else ''}; compared with {count:,} in {choice.why}"
    if not (file.is_file() and target.is_file()):
        if workers.is_main:
            _write(protocol, place, channels, choice, target, workers, weights=files.get(label))
        workers.wait()
        told += f". Kept: {file}"
    else:
        told += f", as before ({file})"
    return KeptProtocol(file, (f"{label}={target}",), told)


def is_images(place: str) -> bool:
    """Whether a place is of images: files, a data set as YAML, or a folder that is no model's."""
    path = FilePath(place).expanduser()
    return place.lstrip().startswith("{") or path.is_file() or path.is_dir()


def _write(
    protocol: Protocol,
    place: str,
    channels: int,
    choice: Choice,
    target: FilePath,
    workers: Workers,
    *,
    weights: str | None,
) -> None:
    refuse_links(target.parent)
    extractor = load_extractor(choice.features, weights=weights, device=workers.device)
    with exact_matmul():
        images = open_pictures(place, protocol.preparation, channels=channels)
        save_reference(make_reference(protocol, images, extractor), target)
    write_text_atomically(target.parent / PROTOCOL, dump_yaml(protocol))


def _check_alike(judged: Sequence[ImageFiles], shape: tuple[int, ...], place: str) -> None:
    """Raise UserError where judged images have another size than those to compare with, and none is resized."""
    for images in judged:
        own = tuple(images.rows(torch.tensor([0])).shape[1:])
        if own[1:] != shape[1:]:
            raise UserError(f"--against {place}: holds images of {show(shape)}, and {images.origin} of {show(own)}")


def _preparation(images: Images, shape: tuple[int, ...], choice: Choice) -> tuple[Preparation, str]:
    """How the images come to the model's size, and that in words."""
    how = choice.preparation
    if how.side is not None:
        return Preparation(crop="centre_square", side=how.side, filter=how.filter), "cut to squares"
    looked = torch.linspace(0, len(images) - 1, min(LOOKED_AT, len(images))).long().unique()
    sizes = {tuple(images.rows(number[None]).shape[1:]) for number in looked}
    if sizes == {tuple(shape)}:
        return how, ""
    if shape[1] != shape[2]:
        found = ", ".join(sorted(show(size) for size in sizes)[:3])
        raise UserError(f"--against: images of {found}, and the model makes {show(shape)}, which are not square")
    sized = Preparation(crop="centre_square", side=shape[1], filter="lanczos")
    return sized, f"their middle squares at {shape[1]} x {shape[1]}"


def _content(images: Images) -> str:
    """Tells sets of images apart by what is in them."""
    if isinstance(images, ImageFiles):
        return images.sha256
    assert isinstance(images, DataImages)
    return images.source.key


def _slug(place: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", place.lower()).strip("-")[-40:].strip("-") or "images"
