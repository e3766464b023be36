"""Random halves of a side's images, without replacement: what intervals of distances are taken from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffdistill.eval.metrics.kernels import kid_of_parts
from diffdistill.eval.metrics.moments import Summary
from diffdistill.eval.metrics.scoring import score
from diffdistill.eval.metrics.settings import AnyMetric, KernelDistance
from diffdistill.eval.metrics.sides import Features, JudgedFeatures, Rows


@dataclass(frozen=True)
class InMemory:
    """Features that are read once."""

    source: JudgedFeatures

    @cached_property
    def features(self) -> Tensor:
        return self.source.rows()

    @cached_property
    def logits(self) -> Tensor:
        return self.source.logits

    @cached_property
    def texts(self) -> Tensor:
        return self.source.texts

    @cached_property
    def conditions(self) -> Tensor:
        return self.source.conditions


@dataclass(frozen=True)
class Half:
    """Some of a side's images.  chosen: their numbers, ascending."""

    side: InMemory
    chosen: Tensor

    @cached_property
    def summary(self) -> Summary:
        return Summary.of(self.rows())

    def rows(self, max_samples: int | None = None) -> Tensor:
        """Of the first `max_samples` images those that are chosen."""
        chosen = self.chosen if max_samples is None else self.chosen[self.chosen < max_samples]
        return self.side.features[chosen.to(self.side.features.device)]

    @property
    def logits(self) -> Tensor:
        return self.side.logits[self.chosen.to(self.side.logits.device)]

    @property
    def texts(self) -> Tensor:
        return self.side.texts[self.chosen.to(self.side.texts.device)]

    @property
    def conditions(self) -> Tensor:
        return self.side.conditions[self.chosen]


def draw_half(count: int, rng: torch.Generator) -> Tensor:
    """Half of 0 .. count - 1, ascending."""
    return torch.randperm(count, generator=rng)[: count // 2].sort().values


def score_halves(
    metrics: Sequence[AnyMetric],
    judged: Sequence[Mapping[str, JudgedFeatures]],
    real: Mapping[str, Features],
    halves: Sequence[Tensor],
    halves_of_real: Sequence[Tensor] | None = None,
) -> list[list[dict[str, float]]]:
    """Every metric's values of each half, for each judged side.

    judged, real: features by label.  halves: numbers of images, ascending, the same for every side.  halves_of_real:
    as many; None takes the reference whole.  KID is over all pairs of a half, which is what its subsets estimate.
    """
    kernels = [metric for metric in metrics if isinstance(metric, KernelDistance)]
    others = [metric for metric in metrics if not isinstance(metric, KernelDistance)]
    if halves_of_real is not None:
        real = {label: Rows(features.rows()) for label, features in real.items()}
    memories = [{label: InMemory(features) for label, features in side.items()} for side in judged]
    found: list[list[dict[str, float]]] = [[] for _ in judged]
    for i, chosen in enumerate(halves):
        against = real if halves_of_real is None else {k: Rows(v.rows()[halves_of_real[i]]) for k, v in real.items()}
        for memory, values in zip(memories, found, strict=True):
            half = {label: Half(features, chosen) for label, features in memory.items()}
            values.append(score(others, half, against).values)
    for metric in kernels:
        reference = real[metric.features.label].rows()
        everything = [torch.arange(len(reference))] * len(halves)
        in_real = _members(everything if halves_of_real is None else halves_of_real, reference)
        for memory, values in zip(memories, found, strict=True):
            rows = memory[metric.features.label].features
            distances = kid_of_parts(rows, reference, _members(halves, rows), in_real)
            for value, distance in zip(values, distances.tolist(), strict=True):
                value[metric.keys[0]] = distance
    return found


def _members(parts: Sequence[Tensor], features: Tensor) -> Tensor:
    """[R, N]: whether each part holds each sample."""
    members = torch.zeros(len(parts), len(features), dtype=torch.bool)
    for row, chosen in zip(members, parts, strict=True):
        row[chosen] = True
    return members.to(features.device)
