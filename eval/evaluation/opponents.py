"""What `--against PLACE` makes ready: a model that makes two sets of images, or images with a protocol made of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath

from diffdistill.eval.evaluation.against import Opponent, check_fits, opponent_benches
from diffdistill.eval.evaluation.against_images import is_images, protocol_of_images
from diffdistill.eval.evaluation.extract import Bench
from diffdistill.eval.evaluation.run import progress_bar
from diffdistill.eval.evaluation.setup import (
    EvalOptions,
    bench_of,
    default_protocol,
    is_model,
    open_place,
    set_up,
    with_seed,
)
from diffdistill.eval.evaluation.workers import find_workers
from diffdistill.eval.features.store import hash_features
from diffdistill.eval.images.describe import describe
from diffdistill.eval.images.files import open_images
from diffdistill.eval.images.generate import SampledImages
from diffdistill.eval.images.places import is_run
from diffdistill.eval.protocols.captions import captions_of
from diffdistill.eval.protocols.own import choose_features, make_protocol
from diffdistill.eval.protocols.packaged import DIGITS_PIXELS
from diffdistill.eval.protocols.protocol import Preparation, Reference
from diffdistill.export.record import guidance_of, read_record
from diffdistill.models.load import find_checkpoint, first_student
from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import Console
from diffdistill.storage.checkpoint import read_state


@dataclass(frozen=True)
class AgainstSetup:
    """What `--against` was resolved to; no image of a model is made yet.

    opponent: the model; None for images.  bench: of the records' own protocol.  told: what was chosen, in a line or
    two for people.  needs_samples: whether the model's own images are that protocol's reference.
    """

    opponent: Opponent | None
    bench: Bench
    told: str
    needs_samples: bool = False

    def sample(self) -> Bench:
        """Make the model's images, where it is one and they are not there yet. Returns the bench of the records."""
        if self.opponent is None:
            return self.bench
        opponent, workers = self.opponent, self.bench.workers
        with progress_bar(opponent.place, opponent.num_images, Console(stderr=True), is_shown=workers.is_main) as bar:
            opponent.prepare(bar)
        return _by_its_samples(self.bench, opponent) if self.needs_samples else self.bench


def prepare_against(places: Sequence[str], options: EvalOptions) -> AgainstSetup:
    """Look at the place and choose what it is measured by. Raises UserError where a place does not fit."""
    assert options.against is not None
    if not options.against:
        raise UserError("--against: is empty; give a run, a pipeline, an exported folder, or images")
    if is_model(options.against):
        return _against_model(places, options, options.against)
    if not is_images(options.against):
        raise UserError(
            f"--against {options.against}: no such folder or file; give a run, a pipeline, an exported folder, or "
            "images (a folder, a zip, a .npz, a prepared set)"
        )
    if options.protocol:
        raise UserError(
            f"--against {options.against}: are images, which define a protocol; leave out --protocol, or pass the "
            "references of your protocol with --reference"
        )
    options, told = _against_images(places, options, options.against)
    return AgainstSetup(None, set_up(places, options), told)


def _against_images(places: Sequence[str], options: EvalOptions, place: str) -> tuple[EvalOptions, str]:
    """The options with the protocol that was made of images."""
    first = places[0]
    made = describe(first, trusts_code=options.trusts_code).made if is_model(first) else None
    judged = [open_images(one, Preparation()) for one in places if not is_model(one)]
    captions = captions_of(options.captions) if options.captions else None
    kept = protocol_of_images(
        place, made, find_workers(options.device), judged=judged, weights=options.weights, captions=captions
    )
    references = (*options.references, *kept.references)
    return replace(options, protocol=str(kept.file), references=references), kept.told


def _against_model(places: Sequence[str], options: EvalOptions, place: str) -> AgainstSetup:
    described = describe(place, trusts_code=options.trusts_code)
    made, names = described.made, described.class_names
    for judged in filter(is_model, places):
        check_fits((judged, describe(judged, trusts_code=options.trusts_code).made), (place, made))
    usual = options.protocol or (DIGITS_PIXELS.name if default_protocol(place, options, made) else None)
    main = set_up(places, replace(options, protocol=usual)) if usual else None
    if options.protocol:
        assert main is not None
        judging, told = main, f"by {main.protocol.name}"
    else:
        labels = [option.partition("=")[0] for option in options.weights]
        choice = choose_features(made.shape, quantiser="none", weights=labels)
        name = f"against-{choice.features.label}"
        captions = captions_of(options.captions) if options.captions and made.takes_text else None
        protocol = make_protocol(name, made, choice, reference=None, captions=captions)
        used = replace(options, references=())
        judging, told = bench_of(with_seed(protocol, options.seed), used), f"in {choice.why}"
    if not judging.class_names and len(names) == judging.protocol.labels.num_classes:
        judging = replace(judging, class_names=names)  # students may number the same classes otherwise
    sets, pairs = opponent_benches(judging)
    guidance = _teacher_guidance(places)
    source = open_place(place, sets, replace(options, guidance=str(guidance), sampler=None, ema=None))
    if not isinstance(source, SampledImages):
        raise UserError(f"--against {place}: not a model")
    opponent = Opponent(place, source, sets, pairs, options.root)
    scale = "" if guidance == 1 else f" at guidance {guidance:g}"
    told = f"{place}{scale}: {sets.protocol.num_images:,} images a set, compared {told}"
    has_reference = main is not None and main.protocol.reference is not None
    bench = main if main and has_reference else replace(judging, protocol=replace(judging.protocol, repeats=1))
    return AgainstSetup(opponent, bench, told, needs_samples=not has_reference)


def _by_its_samples(bench: Bench, opponent: Opponent) -> Bench:
    """A bench whose reference is the model's own images: for records where no protocol compares with real ones."""
    protocol, sha256 = bench.protocol, opponent.source.model.sha256 or ""
    real = opponent.independent()
    first, end = opponent.sets.protocol.seed_ranges[1]
    reference = Reference(
        name=f"samples-{sha256[:12]}",
        dataset=opponent.place,
        split=f"own samples {first} to {end - 1}",
        num_images=end - first,
    )
    hashes = {label: hash_features([features.store], label) for label, features in real.items()}
    named = replace(protocol, reference=reference, reference_sha256=hashes)
    return replace(bench, protocol=named, real=real)


def _teacher_guidance(places: Sequence[str]) -> float:
    """The scale that the students were distilled under; 1 where nothing says. Raises UserError if they differ."""
    found = {place: scale for place in places if (scale := _own_guidance(place)) is not None}
    if len(set(found.values())) > 1:
        told = ", ".join(f"{place} {scale:g}" for place, scale in found.items())
        raise UserError(
            f"--against: the students were distilled with different guidance ({told}); evaluate them separately"
        )
    return next(iter(found.values()), 1.0)


def _own_guidance(place: str) -> float | None:
    path = FilePath(place).expanduser()
    record = read_record(path)
    if record is not None:
        return float(record.teacher_guidance)
    if not is_run(path):
        return None
    state = read_state(find_checkpoint(first_student(path)))
    return guidance_of(state["config"]["method"]) if state.get("teacher") else None
