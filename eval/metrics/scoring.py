"""Every metric of a protocol from features that are already there: one pass over the images serves them all."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffdistill.eval.metrics.settings import AnyMetric
from diffdistill.eval.metrics.sides import Features, JudgedFeatures, Sides


@dataclass(frozen=True)
class Scores:
    """values: by name.  within: the standard deviation over KID's subsets and over the Inception Score's splits, by
    name.  notes: what there is to know about them, warnings, once each."""

    values: dict[str, float]
    within: dict[str, float]
    notes: list[str]


def score(metrics: Sequence[AnyMetric], fake: Mapping[str, JudgedFeatures], real: Mapping[str, Features]) -> Scores:
    """Every metric of both sides, which are on one device.

    fake, real: by the features' label.  Raises UserError where a side lacks what a metric needs.
    """
    values: dict[str, float] = {}
    within: dict[str, float] = {}
    shared: dict[object, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        for metric in metrics:
            found = metric.compute(Sides.of(metric, fake, real, tuple(metrics), shared))
            values |= dict(zip(metric.keys, found.values, strict=True))
            within |= {key: found.within for key in metric.keys if found.within is not None}
    notes = dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, UserWarning))
    return Scores(values, within, list(notes))
