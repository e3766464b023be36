"""A protocol made ready to judge: its extractors and references on a device, and their hashes in the protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from diffdistill.data.classes import NUM_SHOWN
from diffdistill.data.collection import listed
from diffdistill.data.names import composed
from diffdistill.eval.evaluation.extract import Bench, specifications
from diffdistill.eval.evaluation.real import find_reference
from diffdistill.eval.evaluation.reference import RealFeatures
from diffdistill.eval.evaluation.workers import Workers
from diffdistill.eval.features.extractors import load_extractor
from diffdistill.eval.features.stated import recorded
from diffdistill.eval.features.store import BLOCK
from diffdistill.eval.protocols.protocol import Labels, Protocol
from diffdistill.settings.schema import UserError


def make_bench(
    protocol: Protocol,
    workers: Workers,
    *,
    batch_size: int = BLOCK,
    weights: dict[str, str] | None = None,
    references: dict[str, str] | None = None,
    captions: Sequence[str] | None = None,
    trusts_code: bool = False,
    asked: str | None = None,
) -> Bench:
    """Extractors and references on the workers' device.  weights, references: files by label, where they are not in
    their folders.  trusts_code: as `load_extractor`.  asked: as `find_reference`. Raises UserError."""
    extractors = {
        label: load_extractor(
            features, weights=(weights or {}).get(label), device=workers.device, trusts_code=trusts_code
        )
        for label, features in specifications(protocol).items()
    }
    real = (
        {
            label: find_reference(protocol, extractor, place=(references or {}).get(label), asked=asked)
            for label, extractor in extractors.items()
        }
        if protocol.reference
        else {}
    )
    names = _names_of(real)
    resolved = replace(protocol, labels=_labels_of(protocol, names)).resolved(
        weights={label: extractor.sha256 for label, extractor in extractors.items() if extractor.sha256},
        references={label: found.about.images_sha256 for label, found in real.items()},
        features={label: recorded(extractor, is_square=protocol.is_square) for label, extractor in extractors.items()},
    )
    return Bench(
        protocol=resolved,
        class_names=resolved.labels.names or (names if resolved.labels.num_classes else ()),
        extractors=extractors,
        real=real,
        workers=workers,
        batch_size=batch_size,
        captions=captions,
    )


def _names_of(real: Mapping[str, RealFeatures]) -> tuple[str, ...]:
    """Of the classes that the references are of. Raises UserError where two of them differ."""
    named = [found.about for found in real.values() if found.about.class_names]
    for about in named:
        if about.class_names != named[0].class_names:
            told = " and ".join(f"{one.origin} of {listed(one.class_names)}" for one in (named[0], about))
            raise UserError(f"the references have other classes: {told}; compute them from the same images")
    return named[0].class_names if named else ()


def _labels_of(protocol: Protocol, names: Sequence[str]) -> Labels:
    """Which classes are drawn: the reference's, where it has names and the protocol counts others.

    Raises UserError where the protocol names others.
    """
    labels = protocol.labels
    if not names or not labels.num_classes or (len(names) == labels.num_classes and not labels.names):
        return labels
    if not labels.names:
        if labels.policy == "class_major" and protocol.num_images % len(names):
            raise UserError(
                f"protocol {protocol.name}: its reference is of {len(names)} classes, "
                f"{listed(names, most=NUM_SHOWN)}, of which num_images = {protocol.num_images} is no multiple"
            )
        return replace(labels, num_classes=len(names), names=tuple(names))
    if set(map(composed, labels.names)) != set(map(composed, names)):
        raise UserError(
            f"protocol {protocol.name}: draws {listed(labels.names, most=NUM_SHOWN)}; its reference is of "
            f"{listed(names, most=NUM_SHOWN)}"
        )
    return labels
