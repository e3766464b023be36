"""The real side of a protocol: where its reference is found, and the one command that computes it."""

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath

from torch import Tensor

from diffdistill.data import AnyData, Digits
from diffdistill.data.classes import NUM_SHOWN
from diffdistill.data.collection import listed
from diffdistill.data.prepare import is_prepared, open_prepared
from diffdistill.eval.evaluation.extract import specifications
from diffdistill.eval.evaluation.reference import (
    RealFeatures,
    check_reference,
    compute_reference,
    open_reference,
    references_folder,
    save_reference,
)
from diffdistill.eval.evaluation.run import Advance, progress_bar
from diffdistill.eval.evaluation.workers import exact_matmul, find_workers
from diffdistill.eval.features.extractors import Extractor, load_extractor
from diffdistill.eval.features.stated import settings
from diffdistill.eval.images.files import DataImages, Images, open_images
from diffdistill.eval.protocols.packaged import find_protocol
from diffdistill.eval.protocols.protocol import Preparation, Protocol, Reference
from diffdistill.settings.schema import UserError, schema
from diffdistill.settings.terminal import Console
from diffdistill.settings.values import dump, parse_yaml, validate


@dataclass(frozen=True)
class FirstImages:
    """The first `count` of more images."""

    images: Images
    count: int

    @property
    def origin(self) -> str:
        return self.images.origin

    @property
    def notes(self) -> str:
        more = f"the first {self.count:,} of {len(self.images):,} images" if self.count < len(self.images) else ""
        return "; ".join(filter(None, [more, self.images.notes]))

    def __len__(self) -> int:
        return self.count

    def rows(self, index: Tensor) -> Tensor:
        return self.images.rows(index)

    def class_names(self, count: int | None = None) -> tuple[str, ...]:
        return self.images.class_names(self.count if count is None else min(count, self.count))


def find_reference(
    protocol: Protocol, extractor: Extractor, *, place: str | FilePath | None = None, asked: str | None = None
) -> RealFeatures:
    """The real features that a protocol compares `extractor`'s with.

    place: a file of statistics; without it the references' folder is looked into, under this package's name for it and
    under the published file's. The digits need no file; of a data set as YAML ("{name: image_folder, ...}") it is
    computed, and kept.  asked: what the user called the protocol, its file; default: its name.
    Raises UserError if there is none, saying how to get it, or it does not fit the protocol or the extractor.
    """
    reference = _reference_of(protocol)
    found = _found(protocol, reference, extractor, None if place is None else FilePath(place), asked or protocol.name)
    check_reference(found, extractor, protocol.preparation, is_square=protocol.is_square)
    if reference.num_images not in (None, found.summary.count):
        raise UserError(
            f"the reference {found.about.origin} is of {found.summary.count:,} images; {protocol.name} compares with "
            f"{reference.num_images:,}"
        )
    return found


def reference_file(protocol: Protocol, label: str, *, folder: FilePath | None = None) -> FilePath:
    """Where `diffdistill reference` writes, and `find_reference` looks first."""
    return (folder or references_folder()) / f"{_reference_of(protocol).name}-{label}.npz"


def write_references(
    place: str,
    protocol: str,
    *,
    console: Console,
    weights: Sequence[str] = (),
    folder: FilePath | None = None,
    batch_size: int = 64,
    trusts_code: bool = False,
) -> list[FilePath]:
    """Compute and write the reference of each of a protocol's features from real images. Returns the files.

    place: as `open_real_images`.  weights: LABEL=FILE.  trusts_code: as `load_extractor`.  Raises
    UserError.
    """
    known = find_protocol(protocol)
    files = parse_weights(weights, list(specifications(known)))
    images = open_real_images(place, known)
    device = find_workers().device
    with exact_matmul():
        written = []
        for label, features in specifications(known).items():
            extractor = load_extractor(features, weights=files.get(label), device=device, trusts_code=trusts_code)
            with progress_bar(label, len(images), console) as advance:
                made = make_reference(known, images, extractor, batch_size=batch_size, advance=advance)
            written.append(reference_file(known, label, folder=folder))
            save_reference(made, written[-1])
    names = made.about.class_names
    told = f"{images.origin}: the names of its classes are kept: {listed(names, most=NUM_SHOWN)}" if names else ""
    for note in filter(None, (images.notes, told)):
        console.print(note, highlight=False, soft_wrap=True, markup=False)
    return written


def make_reference(
    protocol: Protocol,
    images: Images,
    extractor: Extractor,
    *,
    batch_size: int = 64,
    advance: Advance = lambda count: None,
) -> RealFeatures:
    """The features of the first images, as many as the protocol names. Raises UserError if there are fewer."""
    wanted = _reference_of(protocol).num_images or len(images)
    if len(images) < wanted:
        raise UserError(f"{images.origin}: holds {len(images):,} images; {protocol.name} compares with {wanted:,}")
    chosen = FirstImages(images, wanted)
    return compute_reference(chosen, extractor, protocol.preparation, batch_size=batch_size, advance=advance)


def open_real_images(place: str, protocol: Protocol) -> Images:
    """Real images as the protocol prepares them. See `open_pictures`. Raises UserError."""
    return open_pictures(place, protocol.preparation, channels=protocol.image_shape[0] if protocol.image_shape else 3)


def open_pictures(place: str, preparation: Preparation, *, channels: int) -> Images:
    """Real images: a folder, a zip, a .npz, a prepared set's folder, or a data set as YAML.

    place: a path, or as in "{name: cifar10, root: data}".  Raises UserError.
    """
    if place.lstrip().startswith("{"):
        holder = validate(_DataHolder, {"data": parse_yaml(place, origin=place)}, origin=place)
        return DataImages(place, holder.data.load(), preparation)
    if is_prepared(FilePath(place).expanduser()):
        return DataImages(place, open_prepared(FilePath(place).expanduser()), preparation)
    return open_images(place, preparation, channels=channels, is_judged=False)


def parse_weights(options: Sequence[str], labels: Sequence[str], *, setting: str = "--weights") -> dict[str, str]:
    """Files by the features' label, from LABEL=FILE. Raises UserError for another form or label."""
    found = {}
    for option in options:
        label, equals, file = option.partition("=")
        if not equals or not file:
            raise UserError(f"{setting} {option}: write LABEL=FILE, as in {labels[0]}=FILE")
        if label not in labels:
            raise UserError(f"{setting} {option}: {label} is not one of the protocol's features ({', '.join(labels)})")
        found[label] = file
    return found


@schema
class _DataHolder:
    data: AnyData


def _reference_of(protocol: Protocol) -> Reference:
    if protocol.reference is None:
        raise UserError(f"protocol {protocol.name}: does not compare with real images")
    return protocol.reference


def _of_data_set(protocol: Protocol, reference: Reference, extractor: Extractor) -> RealFeatures:
    """Of a data set that the protocol names as YAML; computed once for this content, these settings and weights."""
    images = open_real_images(reference.dataset, protocol)
    assert isinstance(images, DataImages)
    used = [images.source.key, dump(protocol.preparation), reference.num_images, extractor.sha256]
    used.append(settings(extractor.features) if extractor.features else None)
    key = hashlib.sha256(json.dumps(used).encode()).hexdigest()[:12]
    file = references_folder() / f"{reference.name}-{extractor.label}-{key}.npz"
    if not file.is_file():
        with exact_matmul():
            save_reference(make_reference(protocol, images, extractor), file)
    return open_reference(file, label=extractor.label)


def _found(
    protocol: Protocol, reference: Reference, extractor: Extractor, place: FilePath | None, asked: str
) -> RealFeatures:
    ours, published = reference_file(protocol, extractor.label), references_folder() / (reference.file or "")
    for file in (place,) if place else (ours, published):
        if place or file.is_file():
            return open_reference(file, label=extractor.label, num_images=reference.num_images)
    if reference.dataset == "digits":
        digits = validate(Digits, {"split": reference.split}, origin=f"protocol {protocol.name}: reference")
        images = DataImages("digits", digits.load(), protocol.preparation)
        return compute_reference(images, extractor, protocol.preparation, batch_size=256)
    if reference.dataset.lstrip().startswith("{"):
        return _of_data_set(protocol, reference, extractor)
    wanted = f"IMAGES being {reference.dataset}'s {reference.split} split ({reference.preparation})"
    told = f", or put {reference.source} at {published}" if reference.source else ""
    raise UserError(
        f"protocol {protocol.name}: there is no {ours}; compute it with: diffdistill reference IMAGES --protocol "
        f"{shlex.quote(asked)}, {wanted}{told}"
    )
