"""`eval STUDENT --against MODEL`: how far a student is from its teacher, and what the teacher scores against itself.

The teacher makes two sets of images, once; their features stay in the cache. One is of the noise that the student
starts from, the other of independent noise, and both student and teacher are compared with that one.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path as FilePath

import torch

from diffdistill.eval.evaluation.extract import Bench, Source, Stopwatch, StoredFeatures, extract
from diffdistill.eval.evaluation.run import Advance, own_images, store_key
from diffdistill.eval.evaluation.workers import exact_matmul
from diffdistill.eval.features.extractors import Pixels, load_extractor
from diffdistill.eval.features.store import FeatureStore, discard, locked
from diffdistill.eval.images.exported_folder import record_of
from diffdistill.eval.images.generate import SampledImages, show
from diffdistill.eval.metrics.against import EndPoints, distances_above_floor, end_points
from diffdistill.eval.metrics.settings import Frechet
from diffdistill.eval.protocols.own import Made
from diffdistill.eval.protocols.protocol import Labels, Preparation, Protocol
from diffdistill.eval.records.record import Against
from diffdistill.models.teachers import is_pipeline
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import dump

PAIRS, PAIR_VALUES = 1024, 2**28
"""Pairs of images of one noise: at most so many, and so many values of theirs (1 GiB as float32)."""


def check_fits(student: tuple[str, Made], teacher: tuple[str, Made]) -> None:
    """Raise UserError, in one sentence, where two models cannot be compared sample by sample."""
    (name, own), (place, other) = student, teacher
    classes = [own.num_classes, other.num_classes]
    if is_pipeline(place) and record_of(FilePath(place)) is None:  # its last class may be "none"
        classes[1] -= classes[1] == classes[0] + 1
    for is_same, theirs, ours in (
        (own.shape == other.shape, f"makes {show(other.shape)} images", f"makes {show(own.shape)}"),
        (own.takes_text == other.takes_text, _text(other), _text(own)),
        (own.takes_text or classes[0] == classes[1], _classes(other), _classes(own)),
    ):
        if not is_same:
            raise UserError(f"--against {place}: {theirs}, and {name} {ours}; use a model of the same images")


def _text(made: Made) -> str:
    return "takes text" if made.takes_text else "takes no text"


def _classes(made: Made) -> str:
    return f"knows {made.num_classes} classes" if made.num_classes else "is unconditional"


@dataclass(frozen=True)
class Opponent:
    """The model that students are measured against.

    place: of it.  source: of its images, on the student's noise (repeat 0) and on independent noise (repeat 1).
    sets: what judges them.  pairs: what takes the pixels of some of the first.  root: where features are kept.
    """

    place: str
    source: SampledImages
    sets: Bench
    pairs: Bench
    root: FilePath

    def prepare(self, advance: Advance = lambda count: None) -> None:
        """Make its images where they are not there yet."""
        for repeat in range(2):
            self._fill(self.source, self.sets, repeat, advance)
        self._fill(replace(self.source, protocol=self.pairs.protocol), self.pairs, 0, advance)

    @property
    def num_images(self) -> int:
        """What this process has to make or find, for `prepare`."""
        return own_images(self.sets) + own_images(self.pairs)

    def independent(self) -> dict[str, StoredFeatures]:
        """Its features of independent noise, by label, once they are prepared."""
        return self._features(self._store(self.source, self.sets, 1), 1)

    def student(self, source: Source) -> Source:
        """A judged source, as it is measured here: a model by the names that this one has for its classes."""
        protocol = replace(self.sets.protocol, repeats=1)
        if isinstance(source, SampledImages):
            return replace(source, protocol=protocol, wanted=self.sets.class_names)
        changed: Source = replace(source, protocol=protocol)  # type: ignore[type-var]
        return changed

    def measure(self, student: Source, *, num_replicates: int = 50, confidence: float = 0.95) -> Against | None:
        """The distance of a student whose protocol is that of `sets`. None in every process but the first.

        Its features stay until `forget`.
        """
        bench = self.sets
        stores = [self._fill(student, bench, 0)]
        paired = None
        if isinstance(student, SampledImages):
            paired = replace(student, protocol=self.pairs.protocol)
            stores.append(self._fill(paired, self.pairs, 0))
        if not bench.workers.is_main:
            return None
        judged = (self._features(stores[0], 0), self._features(self._store(self.source, bench, 0), 0))
        found = distances_above_floor(
            bench.protocol.metrics,
            *judged,
            self.independent(),
            num_replicates=num_replicates,
            confidence=confidence,
        )
        ends = self._end_points(stores[1], confidence) if paired else None
        own, other = bench.protocol.seed_ranges
        return Against(
            place=self.place,
            sha256=self.source.model.sha256,
            sampler=self.source.sampler_record,
            protocol=dump(replace(bench.protocol, repeats=1)),
            num_images=bench.protocol.num_images,
            seeds=own,
            independent_seeds=other,
            metrics=found,
            end_points=ends,
            confidence=confidence,
            replicates=num_replicates,
        )

    def forget(self, student: Source) -> None:
        """Remove a student's features; the model's own stay."""
        own = {self._store(source, bench, 0).folder.parent for source, bench in self._with_pairs(self.source)}
        for source, bench in self._with_pairs(student):
            folder = self._store(source, bench, 0).folder.parent
            if folder not in own:
                discard(folder)

    def _with_pairs(self, source: Source) -> list[tuple[Source, Bench]]:
        """A source as both benches look at it."""
        if not isinstance(source, SampledImages):
            return [(source, self.sets)]
        return [(source, self.sets), (replace(source, protocol=self.pairs.protocol), self.pairs)]

    def _end_points(self, student: FeatureStore, confidence: float) -> EndPoints:
        own = self._store(replace(self.source, protocol=self.pairs.protocol), self.pairs, 0)
        count, protocol = num_pairs(self.pairs.protocol), self.pairs.protocol
        both = (store.all(Pixels().label, max_samples=count) for store in (student, own))
        return end_points(*both, num_conditions=max(protocol.labels.num_classes, 1), confidence=confidence)

    def _store(self, source: Source, bench: Bench, repeat: int) -> FeatureStore:
        first, end = bench.protocol.seed_ranges[repeat]
        return FeatureStore(self.root / store_key(source, bench) / f"seeds-{first}-{end}", end - first)

    def _fill(self, source: Source, bench: Bench, repeat: int, advance: Advance = lambda count: None) -> FeatureStore:
        store = self._store(source, bench, repeat)
        with locked(store.folder.parent) if bench.workers.is_main else nullcontext(), exact_matmul():
            extract(source, bench, repeat, store, watch=Stopwatch(), advance=advance)
            bench.workers.wait()
        return store

    def _features(self, store: FeatureStore, repeat: int) -> dict[str, StoredFeatures]:
        bench = self.sets
        device = bench.workers.device if bench.workers.device.type == "cuda" else torch.device("cpu")
        return {label: StoredFeatures(store, label, bench.protocol, repeat, device) for label in bench.extractors}


def opponent_benches(bench: Bench) -> tuple[Bench, Bench]:
    """`Opponent.sets` and `pairs`.  bench: of the protocol that student and model are judged by.

    Raises UserError for a protocol none of whose metrics compares images.
    """
    protocol = bench.protocol
    metrics = tuple(metric for metric in protocol.metrics if metric.compares)
    if not metrics:
        raise UserError(f"--against: {protocol.name} has no metric that compares images; name another --protocol")
    labels = {metric.features.label for metric in metrics}
    sets = replace(
        bench,
        protocol=replace(protocol, metrics=metrics, reference=None, reference_sha256={}, repeats=2),
        extractors={label: made for label, made in bench.extractors.items() if label in labels},
        real={},
    )
    if Pixels().label in labels and protocol.preparation == UNTOUCHED and protocol.labels.policy in ("none", "cyclic"):
        return sets, replace(sets, protocol=replace(sets.protocol, repeats=1))  # the pixels are there already
    classes = protocol.labels.num_classes
    pairs = replace(
        protocol,
        num_images=num_pairs(protocol),
        labels=Labels(policy="cyclic", num_classes=classes) if classes else protocol.labels,
        preparation=UNTOUCHED,
        reference=None,
        reference_sha256={},
        weights_sha256={},
        repeats=1,
        metrics=(Frechet(features=Pixels()),),
    )
    return sets, replace(bench, protocol=pairs, extractors={Pixels().label: load_extractor(Pixels())}, real={})


UNTOUCHED = Preparation(quantiser="none")
"""Pixels as the network, or its VAE, makes them."""


def num_pairs(protocol: Protocol) -> int:
    """How many pairs of one noise are compared pixel by pixel."""
    shape = protocol.image_shape
    most = PAIRS if shape is None else min(PAIRS, PAIR_VALUES // prod(shape))
    return min(protocol.num_images, most)
