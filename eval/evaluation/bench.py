"""A protocol made ready to judge: its extractors and references on a device, and their hashes in the protocol."""

from collections.abc import Sequence

from diffdistill.eval.evaluation.extract import Bench, specifications
from diffdistill.eval.evaluation.real import find_reference
from diffdistill.eval.evaluation.workers import Workers
from diffdistill.eval.features.extractors import load_extractor
from diffdistill.eval.features.stated import recorded
from diffdistill.eval.features.store import BLOCK
from diffdistill.eval.protocols.protocol import Protocol


def make_bench(
    protocol: Protocol,
    workers: Workers,
    *,
    batch_size: int = BLOCK,
    weights: dict[str, str] | None = None,
    references: dict[str, str] | None = None,
    captions: Sequence[str] | None = None,
    trusts_code: bool = False,
) -> Bench:
    """Extractors and references on the workers' device.  weights, references: files by label, where they are not in
    their folders.  trusts_code: as `load_extractor`. Raises UserError."""
    extractors = {
        label: load_extractor(
            features, weights=(weights or {}).get(label), device=workers.device, trusts_code=trusts_code
        )
        for label, features in specifications(protocol).items()
    }
    real = (
        {
            label: find_reference(protocol, extractor, place=(references or {}).get(label))
            for label, extractor in extractors.items()
        }
        if protocol.reference
        else {}
    )
    resolved = protocol.resolved(
        weights={label: extractor.sha256 for label, extractor in extractors.items() if extractor.sha256},
        references={label: found.about.images_sha256 for label, found in real.items()},
        features={label: recorded(extractor, is_square=protocol.is_square) for label, extractor in extractors.items()},
    )
    return Bench(
        protocol=resolved,
        extractors=extractors,
        real=real,
        workers=workers,
        batch_size=batch_size,
        captions=captions,
    )
