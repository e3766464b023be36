"""An evaluation made ready: what the command line may say, the protocol's bench, and places opened."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath

from diffdistill.data.cache import cache_folder
from diffdistill.diffusion.guidance.policies import parse_guidance
from diffdistill.eval.evaluation.bench import make_bench
from diffdistill.eval.evaluation.extract import Bench, Source, specifications
from diffdistill.eval.evaluation.real import parse_weights
from diffdistill.eval.evaluation.workers import find_workers
from diffdistill.eval.features.store import BLOCK
from diffdistill.eval.images.describe import describe
from diffdistill.eval.images.diffusers_folder import is_diffusers, open_diffusers
from diffdistill.eval.images.exported_folder import open_exported, record_of
from diffdistill.eval.images.files import in_number_order, open_images
from diffdistill.eval.images.judged_files import FileImages
from diffdistill.eval.images.places import SamplingOptions, is_run, open_run, parse_sampler
from diffdistill.eval.protocols.captions import read_captions
from diffdistill.eval.protocols.own import Made
from diffdistill.eval.protocols.packaged import DIGITS_PIXELS, PROTOCOLS, find_protocol
from diffdistill.eval.protocols.protocol import Protocol
from diffdistill.settings.schema import UserError


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What the command line may say.

    protocol: a name or a YAML file; None takes digits-pixels for what makes digits.  repeats, seed: another number of
    repeats, and the first range of image seeds; either is another protocol.  weights, references: LABEL=FILE.
    features: a folder where features are kept; None keeps them until the record is there.  records: a JSONL file.
    out: the table's rows as JSON.  trusts_code: whether features that are a program, and an exported folder's own code,
    may run.
    against: a model, the distance to which is measured as well, or images that a protocol is made of.
    replicates, confidence: of the intervals of that distance, or of the differences between two models.
    """

    protocol: str | None = None
    against: str | None = None
    repeats: int | None = None
    seed: int = 0
    guidance: str = "1"
    sampler: str | None = None
    ema: str | None = None
    names: Sequence[str] = ()
    batch_size: int = BLOCK
    device: str = "auto"
    weights: Sequence[str] = ()
    references: Sequence[str] = ()
    captions: str | None = None
    features: str | None = None
    records: str | None = None
    out: str | None = None
    grid: bool = False
    save_images: str | None = None
    efficiency: bool = False
    trusts_code: bool = False
    replicates: int = 50
    confidence: float = 0.95

    @property
    def root(self) -> FilePath:
        """Where features lie."""
        return FilePath(self.features) if self.features else cache_folder(None) / "features"


def set_up(places: Sequence[str], options: EvalOptions) -> Bench:
    """The protocol with its extractors and references, whose hashes it then carries. Raises UserError."""
    if not 1 <= options.batch_size <= BLOCK:
        raise UserError(f"--batch {options.batch_size}: must be 1 .. {BLOCK}, the images of a block")
    return bench_of(_protocol(places, options), options)


def bench_of(protocol: Protocol, options: EvalOptions) -> Bench:
    """What judges by a protocol, as the options say. Raises UserError."""
    workers, labels = find_workers(options.device), list(specifications(protocol))
    weights = parse_weights(options.weights, labels)
    references = parse_weights(options.references, labels, setting="--reference")
    protocol, captions = read_captions(protocol, options.captions)
    return make_bench(
        protocol,
        workers,
        batch_size=options.batch_size,
        weights=weights,
        references=references,
        captions=captions,
        trusts_code=options.trusts_code,
        asked=options.protocol,
    )


def open_place(place: str, bench: Bench, options: EvalOptions) -> Source:
    """A run, a checkpoint, a diffusers or an exported folder, or images: a folder, a zip, a .npz. Raises UserError."""
    path, protocol = FilePath(place).expanduser(), bench.protocol
    if is_model(place):
        sampler = parse_sampler(options.sampler) if options.sampler else None
        sampling = SamplingOptions(
            guidance=parse_guidance(options.guidance),
            sampler=sampler,
            ema=options.ema,
            captions=bench.captions,
            class_names=bench.class_names,
            trusts_code=options.trusts_code,
        )
        opener = open_run if is_run(path) else open_exported if record_of(path) else open_diffusers
        return opener(path, protocol, sampling, bench.workers.device)
    channels = protocol.image_shape[0] if protocol.image_shape else 3
    if not path.exists():
        raise UserError(f"{place}: no such folder or file; give a run's folder, one of its checkpoints, or images")
    images = open_images(path, protocol.preparation, channels=channels)
    return FileImages(in_number_order(images) if bench.captions else images, protocol)


def _protocol(places: Sequence[str], options: EvalOptions) -> Protocol:
    protocol = find_protocol(options.protocol) if options.protocol else default_protocol(places[0], options)
    if protocol is None:
        raise UserError(f"{places[0]}: name a --protocol (choices: {', '.join(PROTOCOLS)}, or a YAML file)")
    if options.repeats:
        protocol = replace(protocol, repeats=options.repeats)
    return with_seed(protocol, options.seed)


def with_seed(protocol: Protocol, seed: int) -> Protocol:
    """Of another range of image seeds."""
    return replace(protocol, first_seed=protocol.first_seed + seed * protocol.num_images)


def default_protocol(place: str, options: EvalOptions, made: Made | None = None) -> Protocol | None:
    """digits-pixels for a model of digits; None for anything else.  made: what it makes, where that is known."""
    path = FilePath(place).expanduser()
    if is_run(path) or record_of(path) or not (path.exists() or is_diffusers(path)):
        made = made or describe(place, trusts_code=options.trusts_code).made
        if made.shape == DIGITS_PIXELS.image_shape and made.num_classes == DIGITS_PIXELS.labels.num_classes:
            return DIGITS_PIXELS
    return None


def is_model(place: str) -> bool:
    """Whether a place is a run, a checkpoint, students behind a router, a pipeline, or an exported folder."""
    path = FilePath(place).expanduser()
    return is_run(path) or record_of(path) is not None or is_diffusers(path)
