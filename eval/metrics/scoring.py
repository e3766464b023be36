"""Every metric of a protocol from features that are already there: one pass over the images serves them all."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple
from typing import Protocol as Interface

import torch
from torch import Tensor

from diffdistill.eval.metrics import settings as named
from diffdistill.eval.metrics.distances import frechet_from_features, frechet_from_few, frechet_from_summaries
from diffdistill.eval.metrics.kernels import cmmd, kid
from diffdistill.eval.metrics.moments import Summary
from diffdistill.eval.metrics.neighbours import Prdc, prdc
from diffdistill.eval.metrics.scores import clip_score, diversity, inception_score
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
class Scores:
    """values: by name.  within: the standard deviation over KID's subsets and over the Inception Score's splits, by
    name.  notes: what there is to know about them, warnings, once each."""

    values: dict[str, float]
    within: dict[str, float]
    notes: list[str]


class _Found(NamedTuple):
    """values: in the order of a metric's keys."""

    values: tuple[float, ...]
    within: float | None = None


def score(
    metrics: Sequence[named.AnyMetric], fake: Mapping[str, JudgedFeatures], real: Mapping[str, Features]
) -> Scores:
    """Every metric of both sides, which are on one device.

    fake, real: by the features' label.  Raises UserError where a side lacks what a metric needs.
    """
    values: dict[str, float] = {}
    within: dict[str, float] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        balls: dict[object, Prdc] = {}
        for metric in metrics:
            label = metric.features.label
            found = _of_one_side(metric, fake[label])
            if found is None:
                if label not in real:
                    raise UserError(f"{metric.keys[0]}: needs a reference, and the protocol names none")
                found = _of_both_sides(metric, fake[label], real[label], metrics, balls)
            values |= dict(zip(metric.keys, found.values, strict=True))
            within |= {key: found.within for key in metric.keys if found.within is not None}
    notes = dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, UserWarning))
    return Scores(values, within, list(notes))


def _of_one_side(metric: named.AnyMetric, fake: JudgedFeatures) -> _Found | None:
    match metric:
        case named.InceptionScore():
            mean, spread = inception_score(fake.logits, splits=metric.splits)
            return _Found((mean,), spread)
        case named.ClipScore():
            return _Found((clip_score(fake.rows(), fake.texts, scale=metric.scale, clamp=metric.clamp),))
        case named.Diversity():
            return _Found((diversity(fake.rows(), fake.conditions, max_pairs=metric.max_pairs, seed=metric.seed),))
    return None


def _of_both_sides(
    metric: named.AnyMetric,
    fake: Features,
    real: Features,
    metrics: Sequence[named.AnyMetric],
    balls: dict[object, Prdc],
) -> _Found:
    match metric:
        case named.Frechet():
            return _Found((frechet(fake, real),))
        case named.KernelDistance():
            subsets, size = metric.num_subsets, metric.subset_size
            mean, spread = kid(fake.rows(), real.rows(), num_subsets=subsets, subset_size=size, seed=metric.seed)
            return _Found((mean,), spread)
        case named.Cmmd():
            return _Found((cmmd(fake.rows(), real.rows(), sigma=metric.sigma, scale=metric.scale),))
        case named.PrecisionRecall() | named.DensityCoverage():
            both = _balls(metric, fake, real, metrics, balls)
            is_first = isinstance(metric, named.PrecisionRecall)
            return _Found((both.precision, both.recall) if is_first else (both.density, both.coverage))
    raise AssertionError(metric)


def frechet(fake: Features, real: Features) -> float:
    """From streamed means and covariances; of fewer samples than features from the features that are there."""
    summary = fake.summary
    if summary.count >= len(summary.mean):
        return frechet_from_summaries(summary, real.summary)
    try:
        return frechet_from_features(fake.rows(), real.rows())
    except MissingFeaturesError:
        return frechet_from_few(fake.rows(), real.summary)


def _balls(
    metric: named.PrecisionRecall | named.DensityCoverage,
    fake: Features,
    real: Features,
    metrics: Sequence[named.AnyMetric],
    known: dict[object, Prdc],
) -> Prdc:
    """Of the same features, precision and recall with density and coverage cost little more than either."""
    key = (metric.features.label, metric.max_samples)
    if key not in known:
        partners = [
            other
            for other in metrics
            if isinstance(other, (named.PrecisionRecall, named.DensityCoverage))
            and (other.features.label, other.max_samples) == key
        ]
        nearest = {type(partner): partner.nearest_k for partner in partners}
        own = metric.nearest_k
        known[key] = prdc(
            real.rows(metric.max_samples),
            fake.rows(metric.max_samples),
            nearest_k=nearest.get(named.PrecisionRecall, own),
            density_k=nearest.get(named.DensityCoverage, own),
        )
    return known[key]


class MissingFeaturesError(UserError):
    """There are statistics, but no features to take neighbours or kernels of."""
