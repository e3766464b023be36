"""Random halves of a side's images, without replacement: what intervals of distances are taken from."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from diffdistill.eval.metrics.moments import Summary
from diffdistill.eval.metrics.sides import JudgedFeatures


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
