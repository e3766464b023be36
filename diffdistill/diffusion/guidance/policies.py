"""Guidance policies: how much a sampler guides, when, and with how few evaluations. None needs training.

Every sampler takes as `guidance` a number w (classifier-free guidance, D_u + w (D_c - D_u); a tensor [B] gives each
sample its own) or a policy. Here are limited intervals, CFG++ and Adaptive Guidance; LinearAG is in
`diffdistill.diffusion.linear_ag`. An evaluation is one sample through the network: plain guidance takes two
per step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.guidance_rules import LINEAR
from diffdistill.settings.numbers import Number
from diffdistill.settings.schema import Fraction, NonNegative, Positive, UserError, schema
from diffdistill.settings.values import parse_yaml, validate

Metric = Literal["eps", "x0"]
"""In which of its forms the two estimates are compared."""


class Guided(Protocol):
    """One sampling run's guided denoiser. It may remember the run's earlier evaluations."""

    def __call__(self, x: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
        """x: [B, ...] at t: [B], one time for all; s: [B], the next time on the sampler's grid, None for the image.

        Returns the guided estimate of x0, [B, ...].
        """
        ...


class Policy(Protocol):
    def begin(self, denoiser: Denoiser, cond: Cond) -> Guided:
        """The guided denoiser of a new sampling run. Raises ValueError where the network knows no "no class"."""
        ...


Guidance = float | Tensor | Policy
"""What a sampler takes: w, w for each sample [B], or a policy."""


def begin(guidance: Guidance, denoiser: Denoiser, cond: Cond) -> Guided:
    """The guided denoiser of a new sampling run."""
    if isinstance(guidance, (int, float, Tensor)):
        return lambda x, t, s=None: denoiser(x, t, cond, guidance=guidance)
    return guidance.begin(denoiser, cond)


def _scaled(denoiser: Denoiser, cond: Cond, scale: Callable[[Tensor, Tensor | None], float]) -> Guided:
    """Plain guidance by a scale that depends on the noise-to-signal ratios now and next (None: no noise)."""

    def estimate(x: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
        now, following = denoiser.path.ratio(t[:1]), None if s is None else denoiser.path.ratio(s[:1])
        return denoiser(x, t, cond, guidance=scale(now, following))

    return estimate


@schema
class CFG:
    """Classifier-free guidance by one scale: what a bare number means.  Ho & Salimans 2022, arXiv:2207.12598."""

    name: Literal["cfg"] = "cfg"
    scale: Number

    def begin(self, denoiser: Denoiser, cond: Cond) -> Guided:
        return begin(self.scale, denoiser, cond)


@schema
class Interval:
    """Guidance where ratio_low < sigma / alpha <= ratio_high; elsewhere one evaluation, of the condition alone.

    Kynkaanniemi et al. 2024, arXiv:2404.07724. Theirs on ImageNet-512 with EDM2-XXL: 0.19 to 1.61.
    """

    name: Literal["interval"] = "interval"
    scale: Number
    ratio_low: NonNegative
    ratio_high: Positive

    def __post_init__(self) -> None:
        if self.ratio_low >= self.ratio_high:
            raise ValueError(f"ratio_low = {self.ratio_low} must be below ratio_high = {self.ratio_high}")

    def begin(self, denoiser: Denoiser, cond: Cond) -> Guided:
        def scale(now: Tensor, following: Tensor | None) -> float:
            return self.scale if self.ratio_low < float(now) <= self.ratio_high else 1.0

        return _scaled(denoiser, cond, scale)


@schema
class CFGPlusPlus:
    """x_s = alpha_s D_scale + sigma_s eps_u, scale in 0 .. 1: the noise is the unconditional one.

    Chung et al. 2024, arXiv:2406.08070. The same step is DDIM's under plain guidance by scale / (1 - r_s / r_t), with
    r = sigma / alpha (expand the transfer operator), which is what is computed here: so every sampler can take it.
    That scale grows as steps shrink. Where a step ends at the image, it is `scale` itself.
    """

    name: Literal["cfg++"] = "cfg++"
    scale: Fraction

    def begin(self, denoiser: Denoiser, cond: Cond) -> Guided:
        def scale(now: Tensor, following: Tensor | None) -> float:
            return self.scale if following is None else self.scale / float(1 - following / now)

        if denoiser.runtime.guidance_rule != LINEAR:
            raise UserError("guidance: cfg++ is for linearly guided models; this one has its own guidance rule")

        return _scaled(denoiser, cond, scale)


@schema
class AdaptiveGuidance:
    """Guidance until both estimates of a sample agree, and from then on one evaluation per step for this sample.

    threshold: a sample is done when the cosine between its conditional and unconditional estimate, in the form that
    `metric` says, exceeds it; above 1: never.  armed_below_ratio: the cosine of eps is close to 1 at the start too,
    where both are the noise itself. So it counts only once it has fallen from one step to the next, or below this
    noise-to-signal ratio, by default that of 0.7 T on a cosine path. The cosine of x0 rises all the way.
    Castillo et al. 2023, arXiv:2312.12487. Not from the paper: the threshold's default, arming, metric x0.
    """

    name: Literal["adaptive"] = "adaptive"
    scale: Number
    threshold: Number = 0.99
    metric: Metric = "eps"
    armed_below_ratio: NonNegative = 2.0

    def begin(self, denoiser: Denoiser, cond: Cond) -> "AdaptiveRun":
        return AdaptiveRun(self, denoiser, cond)


@dataclass(frozen=True)
class Pair:
    """Both estimates of x0 at x [B, ...] and t [B].  guided: [B], which samples are; where the unconditional estimate
    was not asked for, `without_cond` is `with_cond`."""

    x: Tensor
    t: Tensor
    with_cond: Tensor
    without_cond: Tensor
    guided: Tensor

    def at_scale(self, denoiser: Denoiser, scale: float) -> Tensor:
        """The guided estimate by the denoiser's rule where `guided`, elsewhere D_c, bit for bit."""
        mixed = denoiser.combine(self.without_cond, self.with_cond, scale, self.x, self.t)
        return torch.where(self.guided.reshape(-1, *[1] * (mixed.ndim - 1)), mixed, self.with_cond)


def evaluate_pair(denoiser: Denoiser, x: Tensor, t: Tensor, cond: Cond, null: Cond, guided: Tensor) -> Pair:
    """One batch through the network: every sample with its condition, those that are `guided` without it too."""
    rows = guided.nonzero()[:, 0]
    # The order of `Denoiser`, so that a batch with all samples guided gives the bits of plain guidance.
    inputs = torch.cat([x[rows], x]), torch.cat([t[rows], t]), Cond.cat(null[rows], cond)
    made = denoiser(*inputs)
    with_cond = made[len(rows) :]
    return Pair(x, t, with_cond, with_cond.index_copy(0, rows, made[: len(rows)]), guided)


class AdaptiveRun:
    """One run under Adaptive Guidance.  last: the latest estimates.  guided: [B], who goes on being guided."""

    def __init__(self, policy: AdaptiveGuidance, denoiser: Denoiser, cond: Cond) -> None:
        self.policy, self.denoiser, self.cond = policy, denoiser, cond
        self.null = unconditional(denoiser, cond)
        self.last: Pair | None = None
        self.guided = self._armed = torch.empty(0, dtype=torch.bool)
        self._cosine = torch.empty(0, dtype=torch.float64)

    def __call__(self, x: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
        if self.last is None:
            self.guided = torch.ones(len(x), dtype=torch.bool, device=x.device)
            self._armed = ~self.guided
            self._cosine = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
        asked = evaluate_pair(self.denoiser, x, t, self.cond, self.null, self.guided)
        cosine = alignment(self.denoiser, asked, self.policy.metric)
        is_late = self.denoiser.path.ratio(t) < self.policy.armed_below_ratio
        self._armed = self._armed | (cosine < self._cosine) | is_late
        self.guided = self.guided & ~(self._armed & (cosine > self.policy.threshold))  # once done, always done
        self._cosine = cosine
        self.last = replace(asked, guided=self.guided)
        return self.last.at_scale(self.denoiser, self.policy.scale)


def alignment(denoiser: Denoiser, pair: Pair, metric: Metric) -> Tensor:
    """The cosine between the two estimates, [B] float64."""
    first, second = pair.with_cond, pair.without_cond
    if metric == "eps":
        first, second = (denoiser.convert(x0, "eps", pair.x, pair.t) for x0 in (first, second))
    return F.cosine_similarity(first.flatten(1).double(), second.flatten(1).double())


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a sampling run: the guided denoiser's inputs, [B, ...] and [B], and its estimate."""

    x: Tensor
    t: Tensor
    x0: Tensor


class Recorder:
    """Another guidance, of which every evaluation is kept, in order."""

    def __init__(self, guidance: Guidance) -> None:
        self.guidance = guidance
        self.evaluations: list[Evaluation] = []

    def begin(self, denoiser: Denoiser, cond: Cond) -> Guided:
        guided = begin(self.guidance, denoiser, cond)

        def estimate(x: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
            self.evaluations.append(Evaluation(x, t, guided(x, t, s)))
            return self.evaluations[-1].x0

        return estimate


def unconditional(denoiser: Denoiser, cond: Cond) -> Cond:
    """`cond` without its class, for policies that look at both estimates.

    Raises UserError if the network takes the scale as input: it has one estimate only.
    """
    if "guidance_input" in denoiser.net.accepts:
        raise UserError("guidance: this network takes the scale as input, at 1 NFE per step; give a number")
    return denoiser.unconditional(cond)


AnyPolicy = Annotated[CFG | Interval | CFGPlusPlus | AdaptiveGuidance, Field(discriminator="name")]
"""The policies that a command may name."""


def parse_guidance(text: str) -> float | AnyPolicy:
    """A scale, or a policy as in `{name: interval, scale: 2, ratio_low: 0.2, ratio_high: 5}`. Raises UserError."""
    value = parse_yaml(text, origin="--guidance")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if not isinstance(value, dict):
        raise UserError(f"--guidance {text}: give a number, or a policy as {{name: adaptive, scale: 2}}")
    return validate(AnyPolicy, value, origin="--guidance")  # type: ignore[arg-type]
