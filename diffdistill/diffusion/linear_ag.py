"""LinearAG: some unconditional estimates are not evaluated but predicted, from the run's earlier ones.

Castillo et al. 2023, arXiv:2312.12487. Which evaluations are predicted, and from what, is not in the paper, and
is ours: every other one of the first half, from every earlier estimate; then Adaptive Guidance.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.guidance.policies import AdaptiveGuidance, AdaptiveRun, Guided, Pair
from diffdistill.diffusion.sampling import FreshNoise, Sampler


@dataclass(frozen=True)
class LinearFit:
    """How eps_u of one evaluation is predicted: the sum of weights times `History.features`, plus the intercept.

    weights: [2 k + 1] for evaluation k.  intercept: in a sample's shape, or a single 0.  Both float64.
    """

    weights: Tensor
    intercept: Tensor

    def predict(self, features: Tensor) -> Tensor:
        """features: [2 k + 1, B, ...].  Returns [B, ...]."""
        return torch.tensordot(self.weights.to(features), features, 1) + self.intercept.to(features)


@dataclass
class History:
    """eps of a run's evaluations so far, with and without the condition, each [B, ...]."""

    with_cond: list[Tensor] = field(default_factory=list)
    without_cond: list[Tensor] = field(default_factory=list)

    def add(self, with_cond: Tensor, without_cond: Tensor) -> None:
        self.with_cond.append(with_cond)
        self.without_cond.append(without_cond)

    def features(self, with_cond: Tensor) -> Tensor:
        """What predicts the next eps_u, given its eps_c: [2 k + 1, B, ...], after k evaluations."""
        return torch.stack([*self.with_cond, with_cond, *self.without_cond])


@dataclass(frozen=True)
class LinearAG:
    """A guidance policy.  adaptive: the scale, and when guidance ends.  fits: of the evaluations that are predicted."""

    adaptive: AdaptiveGuidance
    fits: Mapping[int, LinearFit]

    def begin(self, denoiser: Denoiser, cond: Cond) -> Guided:
        run, history = AdaptiveRun(self.adaptive, denoiser, cond), History()

        def estimate(x: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
            fit = self.fits.get(len(history.with_cond))
            if fit is None or not bool(run.guided.any()):
                x0, seen = run(x, t, s), run.last
                assert seen is not None
                history.add(*_both_eps(denoiser, seen))
                return x0
            with_cond = denoiser(x, t, cond)
            eps = denoiser.convert(with_cond, "eps", x, t)
            predicted = fit.predict(history.features(eps))
            history.add(eps, predicted)
            without_cond = denoiser.path.to_x0(predicted, "eps", x, t)
            return Pair(x, t, with_cond, without_cond, run.guided).at_scale(denoiser, self.adaptive.scale)

        return estimate


@torch.no_grad()
def fit_linear_ag(
    denoiser: Denoiser,
    sampler: Sampler,
    noise: Tensor,
    cond: Cond,
    *,
    adaptive: AdaptiveGuidance,
    evaluations: Iterable[int] | None = None,
    has_intercept: bool = False,
    fresh_noise: FreshNoise | None = None,
) -> LinearAG:
    """Fit the policy, by ordinary least squares on the sampler's own guided trajectories from `noise`.

    evaluations: which are predicted, by number from 0, which cannot be; default: the odd ones of the first half.
    has_intercept: one number a pixel too, for all samples: for trajectories of one condition. Where the classes are
    Gaussians of one covariance the fit is then exact.  Raises ValueError if one is not the sampler's.
    """
    total = sampler.num_evaluations
    chosen = set(range(1, total // 2, 2) if evaluations is None else evaluations)
    if not chosen <= set(range(1, total)):
        raise ValueError(f"evaluations: {sorted(chosen)} must be among 1 to {total - 1}")
    watched = _Watched(replace(adaptive, threshold=2.0))
    sampler(denoiser, noise, cond, guidance=watched, fresh_noise=fresh_noise)
    history, fits = History(), {}
    for number, pair in enumerate(watched.pairs):
        with_cond, without_cond = _both_eps(denoiser, pair)
        if number in chosen:
            features = history.features(with_cond)
            fits[number] = least_squares(features, without_cond, has_intercept=has_intercept)
            without_cond = fits[number].predict(features)  # what later evaluations will have
        history.add(with_cond, without_cond)
    return LinearAG(adaptive, fits)


def least_squares(features: Tensor, target: Tensor, *, has_intercept: bool) -> LinearFit:
    """features: [M, B, ...]; target: [B, ...].  One weight a feature, for all samples and pixels."""
    wide, goal = features.double().cpu(), target.double().cpu()
    intercept = torch.zeros((), dtype=torch.float64)
    if has_intercept:
        means, mean = wide.mean(1), goal.mean(0)
        wide, goal = wide - means[:, None], goal - mean
    # gelsd: the least weights where features depend on one another.
    weights = torch.linalg.lstsq(wide.flatten(1).T, goal.reshape(-1, 1), driver="gelsd").solution[:, 0]
    if has_intercept:
        intercept = mean - torch.tensordot(weights, means, 1)
    return LinearFit(weights, intercept)


class _Watched:
    """Guidance that keeps both estimates of every evaluation."""

    def __init__(self, policy: AdaptiveGuidance) -> None:
        self.policy = policy
        self.pairs: list[Pair] = []

    def begin(self, denoiser: Denoiser, cond: Cond) -> Guided:
        run = AdaptiveRun(self.policy, denoiser, cond)

        def estimate(x: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
            x0 = run(x, t, s)
            assert run.last is not None
            self.pairs.append(run.last)
            return x0

        return estimate


def _both_eps(denoiser: Denoiser, pair: Pair) -> tuple[Tensor, Tensor]:
    """With the condition, and without."""
    found = (denoiser.convert(x0, "eps", pair.x, pair.t) for x0 in (pair.with_cond, pair.without_cond))
    return next(found), next(found)
