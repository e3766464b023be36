"""Is A better than B? Paired differences with bootstrap intervals: image i of both has the same noise and label.

Every replicate judges the same random half of the images of both, drawn without replacement: an image that is drawn
twice would be its own nearest neighbour, which precision, recall and kernel distances do not survive. For statistics
that are smooth in the sample, the spread over halves is that of the whole (the delete-half jackknife, Shao and Wu 1989,
Annals of Statistics 17, which weights each half once). A distance of half as many images is larger, and of either
side by another amount; so only the spread is taken from the replicates, around the difference of all images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from diffdistill.eval.metrics.halves import draw_half, score_halves
from diffdistill.eval.metrics.scoring import score
from diffdistill.eval.metrics.settings import AnyMetric
from diffdistill.eval.metrics.sides import Features, JudgedFeatures
from diffdistill.settings.schema import UserError


@dataclass(frozen=True)
class Difference:
    """One metric: its value for a and b, a - b, and the interval in which a - b lies with the stated confidence."""

    a: float
    b: float
    difference: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def paired_differences(
    metrics: Sequence[AnyMetric],
    a: Mapping[str, JudgedFeatures],
    b: Mapping[str, JudgedFeatures],
    real: Mapping[str, Features],
    *,
    num_replicates: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Difference]:
    """Every metric's difference by name.  a, b: features by label, image for image on the same noise and label.

    Raises UserError for fewer than 2 replicates, a confidence outside 0 .. 1, and sides of different sizes.
    """
    if num_replicates < 2 or not 0 < confidence < 1:
        raise UserError(f"replicates = {num_replicates} must be 2 or more, confidence = {confidence} in 0 .. 1")
    label = metrics[0].features.label
    count = a[label].summary.count
    if count != b[label].summary.count:
        raise UserError(f"pairs need as many images on both sides, not {count} and {b[label].summary.count}")
    of_a, of_b = score(metrics, a, real).values, score(metrics, b, real).values
    rng = torch.Generator().manual_seed(seed)
    halves = [draw_half(count, rng) for _ in range(num_replicates)]
    replicates = [
        {name: first[name] - second[name] for name in of_a}
        for first, second in zip(*score_halves(metrics, (a, b), real, halves), strict=True)
    ]
    tail = (1 - confidence) / 2
    return {name: _interval(of_a[name], of_b[name], [one[name] for one in replicates], tail) for name in of_a}


def _interval(a: float, b: float, replicates: list[float], tail: float) -> Difference:
    values = torch.tensor(replicates, dtype=torch.float64)
    low, high = torch.quantile(values - values.mean(), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Difference(a, b, a - b, a - b + low, a - b + high)
