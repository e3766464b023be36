"""What a metric compares: the features of judged and of real images, wherever they are kept."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple
from typing import Protocol as Interface

import torch
from torch import Tensor

from diffdistill.eval.metrics.distances import frechet_from_features, frechet_from_few, frechet_from_summaries
from diffdistill.eval.metrics.moments import Summary
from diffdistill.settings.schema import UserError


class Features(Interface):
    """The features of one side under one label; what is not there is a UserError that says so."""

    @property
    def summary(self) -> Summary:
        """Count, mean and scatter of all samples."""
        ...

    def rows(self, max_samples: int | None = None) -> Tensor:
        """The first samples' features [N, d], or all."""
        ...


class JudgedFeatures(Features, Interface):
    """Those of the judged images, with what else a metric may need."""

    @property
    def logits(self) -> Tensor:
        """[N, K]."""
        ...

    @property
    def texts(self) -> Tensor:
        """The features [N, d] of each image's caption."""
        ...

    @property
    def conditions(self) -> Tensor:
        """The class [N] of each image, int64."""
        ...


@dataclass(frozen=True)
class OnDevice:
    """The same features, where they are compared."""

    features: Features
    device: torch.device

    @cached_property
    def summary(self) -> Summary:
        return self.features.summary.to(self.device)

    def rows(self, max_samples: int | None = None) -> Tensor:
        return self.features.rows(max_samples).to(self.device)


@dataclass(frozen=True)
class Rows:
    """Features [N, d] in memory."""

    features: Tensor

    @cached_property
    def summary(self) -> Summary:
        return Summary.of(self.features)

    def rows(self, max_samples: int | None = None) -> Tensor:
        return self.features[:max_samples]


class MissingFeaturesError(UserError):
    """There are statistics, but no features to take neighbours or kernels of."""


@dataclass(frozen=True)
class Sides:
    """What one metric sees.

    fake: the judged images.  real: the reference, which raises UserError where the protocol names none.  metrics: all
    of the protocol's.  shared: what metrics of one protocol leave for one another.
    """

    key: str
    fake: JudgedFeatures
    reference: Features | None
    metrics: tuple[Any, ...] = ()
    shared: dict[object, Any] = field(default_factory=dict)

    @staticmethod
    def of(
        metric: Any,
        fake: Mapping[str, JudgedFeatures],
        real: Mapping[str, Features],
        metrics: tuple[Any, ...],
        shared: dict[object, Any],
    ) -> "Sides":
        """fake, real: by the features' label."""
        label = metric.features.label
        return Sides(metric.keys[0], fake[label], real.get(label), metrics, shared)

    @property
    def real(self) -> Features:
        if self.reference is None:
            raise UserError(f"{self.key}: needs a reference, and the protocol names none")
        return self.reference


class Found(NamedTuple):
    """values: in the order of a metric's keys.  within: the standard deviation inside the one value."""

    values: tuple[float, ...]
    within: float | None = None


def frechet_of(fake: Features, real: Features) -> float:
    """Frechet distance from streamed means and covariances; with fewer samples than dimensions, from the rows."""
    if fake.summary.count >= len(fake.summary.mean):
        return frechet_from_summaries(fake.summary, real.summary)
    try:
        return frechet_from_features(fake.rows(), real.rows())
    except MissingFeaturesError:
        return frechet_from_few(fake.rows(), real.summary)
