"""Images to stored features: each image is made or read once, judged by every extractor, and then forgotten."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from typing import Protocol as Interface

import torch
from torch import Tensor

from diffdistill.diffusion.step_random import StepRandom
from diffdistill.eval.evaluation.workers import Workers
from diffdistill.eval.features.extractors import AnyFeatures, Extracted, Extractor
from diffdistill.eval.features.store import FeatureStore
from diffdistill.eval.images.generate import labels_of
from diffdistill.eval.images.preparation import prepare
from diffdistill.eval.metrics.moments import Moments, Summary
from diffdistill.eval.protocols.protocol import Protocol
from diffdistill.eval.records.record import Cost, ModelRecord, SamplerRecord
from diffdistill.settings.schema import UserError


class Source(Interface):
    """Where the judged images come from: a model that makes them, or files."""

    @property
    def model(self) -> ModelRecord: ...
    @property
    def method(self) -> str | None: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def cost(self) -> Cost | None: ...
    @property
    def notes(self) -> str: ...
    @property
    def sampler_record(self) -> SamplerRecord | None:
        """None for files."""
        ...

    @property
    def key(self) -> Mapping[str, Any]:
        """All that decides the images, beside the protocol."""
        ...

    def take(self, repeat: int, index: Tensor) -> Tensor:
        """The images `index` [B] of a repeat: [B, C, H, W], uint8 or float in [-1, 1]."""
        ...


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What judges: it is set up once and serves any number of sources.

    protocol: with the hashes of what is used.  extractors, real: by the features' label.  captions: one an image.
    class_names: of the protocol's classes, by its numbers, where it or its reference says them.
    """

    protocol: Protocol
    extractors: Mapping[str, Extractor]
    real: Mapping[str, Any]
    workers: Workers
    batch_size: int
    captions: Sequence[str] | None = None
    class_names: tuple[str, ...] = ()

    def judge(self, images: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """What every extractor finds: features, and of those that a metric asks for also logits and texts."""
        found = {}
        for label, extractor in self.extractors.items():
            seen: Extracted = extractor(images)
            found[label] = seen.features
            if label in self.with_logits:
                if seen.logits is None:
                    raise UserError(f"protocol {self.protocol.name}: a metric needs logits, and {label} has none")
                found[logits_name(label)] = seen.logits
            if label in self.with_texts:
                found[texts_name(label)] = self._texts(extractor, captions)
        return found

    @cached_property
    def specifications(self) -> Mapping[str, AnyFeatures]:
        """What the protocol names, by label."""
        return specifications(self.protocol)

    @cached_property
    def with_logits(self) -> frozenset[str]:
        asking = (m for m in self.protocol.metrics if "logits" in m.needs)
        return frozenset(metric.features.label for metric in asking)

    @cached_property
    def with_texts(self) -> frozenset[str]:
        asking = (m for m in self.protocol.metrics if "texts" in m.needs)
        return frozenset(metric.features.label for metric in asking)

    @cached_property
    def text_prefixes(self) -> dict[str, str]:
        """What is put before every caption, by label. Raises UserError for two under one label."""
        found: dict[str, str] = {}
        for metric in self.protocol.metrics:
            label = metric.features.label
            if "texts" in metric.needs and found.setdefault(label, metric.text_prefix) != metric.text_prefix:
                raise UserError(f"protocol {self.protocol.name}: metrics: two prefixes of the captions for {label}")
        return found

    def _texts(self, extractor: Extractor, captions: Sequence[str]) -> Tensor:
        if extractor.encode_text is None:
            raise UserError(f"protocol {self.protocol.name}: a metric needs texts, and {extractor.label} knows none")
        prefix = self.text_prefixes[extractor.label]
        return extractor.encode_text([prefix + caption for caption in captions])


def specifications(protocol: Protocol) -> dict[str, AnyFeatures]:
    """The features that a protocol's metrics ask for, by label. Raises UserError for two under one label."""
    found: dict[str, AnyFeatures] = {}
    for metric in protocol.metrics:
        features = metric.features
        if found.setdefault(features.label, features) != features:
            raise UserError(
                f"protocol {protocol.name}: metrics: {features.label} names two different feature extractors"
            )
    return found


@dataclass
class Stopwatch:
    """Seconds and images of generation. The first batch, which warms up, counts only if it stays alone."""

    batches: list[tuple[float, int]] = field(default_factory=list)

    @property
    def ms_per_image(self) -> float | None:
        counted = self.batches[1:] or self.batches
        seconds, images = sum(s for s, _ in counted), sum(n for _, n in counted)
        return 1000 * seconds / images if images else None


def extract(
    source: Source,
    bench: Bench,
    repeat: int,
    store: FeatureStore,
    *,
    watch: Stopwatch,
    advance: Callable[[int], None],
    on_images: Callable[[int, Tensor, Tensor], None] | None = None,
) -> None:
    """Fill this process's share of a repeat's blocks; those that are there already stay.

    advance: told the images that are done.  on_images: given the repeat, the numbers and the prepared images.
    """
    for block in bench.workers.share(range(store.num_blocks)):
        samples = store.samples(block)
        if store.has(block) and on_images is None:
            advance(len(samples))
            continue
        pieces = []
        for index in samples.split(bench.batch_size):
            images = prepare(_timed(source, repeat, index, watch, bench.workers.device), bench.protocol.preparation)
            if on_images:
                on_images(repeat, index, images)
            captions = [bench.captions[i] for i in index.tolist()] if bench.captions else []
            pieces.append({name: found.cpu() for name, found in bench.judge(images, captions).items()})
            advance(len(index))
        store.write(block, {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]})


def _timed(source: Source, repeat: int, index: Tensor, watch: Stopwatch, device: torch.device) -> Tensor:
    began = time.perf_counter()
    images = source.take(repeat, index)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    watch.batches.append((time.perf_counter() - began, len(index)))
    return images


@dataclass(frozen=True)
class StoredFeatures:
    """One label's features of a repeat, for the metrics: `scoring.JudgedFeatures`."""

    store: FeatureStore
    label: str
    protocol: Protocol
    repeat: int
    device: torch.device

    @cached_property
    def summary(self) -> Summary:
        blocks = self.store.rows(self.label)
        first = next(blocks)
        moments = Moments(first.shape[1], device=self.device)
        moments.update(first.to(self.device))
        for rows in blocks:
            moments.update(rows.to(self.device))
        return moments.summary()

    def rows(self, max_samples: int | None = None) -> Tensor:
        return self.store.all(self.label, max_samples=max_samples).to(self.device)

    @property
    def logits(self) -> Tensor:
        return self.store.all(logits_name(self.label)).to(self.device)

    @property
    def texts(self) -> Tensor:
        return self.store.all(texts_name(self.label)).to(self.device)

    @property
    def conditions(self) -> Tensor:
        """Raises UserError where the protocol names no classes."""
        protocol, index = self.protocol, torch.arange(self.store.num_samples)
        rng = StepRandom(0, protocol.noise.step, protocol.seed_ranges[self.repeat][0] + index)
        labels = labels_of(protocol.labels, index, protocol.num_images, rng)
        if labels is None:
            raise UserError(
                f"protocol {protocol.name}: a metric needs the class of each image, and the protocol has none"
            )
        return labels


def logits_name(label: str) -> str:
    """Under which a label's logits are stored."""
    return f"{label}/logits"


def texts_name(label: str) -> str:
    """Under which the captions' features are stored."""
    return f"{label}/texts"
