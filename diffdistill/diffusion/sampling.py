"""The transfer operator and the samplers made of it.

A sampler turns unit noise [B, ...] into images. All work on any path and take any guidance: a number or a policy.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.dx_policy import DXPolicy
from diffdistill.diffusion.guidance.policies import Guidance, Guided, begin
from diffdistill.diffusion.on_device import upload
from diffdistill.diffusion.path import EDM, Path, VPDiscrete, expand
from diffdistill.settings.limits import MAX_SAMPLING_STEPS
from diffdistill.settings.numbers import SamplingSteps
from diffdistill.settings.schema import Fraction, Positive, Rates, field, schema

FreshNoise = Callable[[int], Tensor]
"""The unit noise [B, ...] that a stochastic sampler adds after step i."""


class Sampler(Protocol):
    @property
    def num_evaluations(self) -> int:
        """Calls of the denoiser for one image (a guided one counts once)."""
        ...

    def __call__(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        cond: Cond = NO_COND,
        *,
        guidance: Guidance = 1.0,
        fresh_noise: FreshNoise | None = None,
    ) -> Tensor:
        """noise: [B, ...] of N(0, 1).  Returns images [B, ...]."""
        ...


def transfer(path: Path, x: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """S(x, x0; t -> s) = alpha_s x0 + sigma_s (x - alpha_t x0) / sigma_t: one DDIM step in any path.

    x, x0: [B, ...]; t, s: [B].  Returns [B, ...].  Song et al. 2021, arXiv:2010.02502, eq. 12 with eta = 0.
    """
    ratio = path.sigma(s) / path.sigma(t)
    return expand(ratio, x) * x + expand(path.alpha(s) - path.alpha(t) * ratio, x) * x0


@schema
class Heun:
    """EDM's deterministic second-order sampler: 2 num_steps - 1 NFE.

    Karras et al. 2022, algorithm 1, in y = x / alpha and r = sigma / alpha, which is EDM's own form on EDM's path.
    """

    name: Literal["heun"] = "heun"
    num_steps: Annotated[int, Field(ge=2, le=MAX_SAMPLING_STEPS)] = 18
    rho: Positive = 7.0

    @property
    def num_evaluations(self) -> int:
        return 2 * self.num_steps - 1

    def __call__(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        cond: Cond = NO_COND,
        *,
        guidance: Guidance = 1.0,
        fresh_noise: FreshNoise | None = None,
    ) -> Tensor:
        path = denoiser.path
        times = path.karras_times(self.num_steps, self.rho)
        ratios, times = [*path.ratio(times).tolist(), 0.0], upload(times, noise.device)
        guided = begin(guidance, denoiser, cond)

        def slope(y: Tensor, i: int) -> Tensor:
            t, s = (time.expand(len(y)) for time in (times[i], times[min(i + 1, len(times) - 1)]))
            estimate = guided(expand(path.alpha(t), y) * y, t, s if i + 1 < len(times) else None)
            return (y - estimate) / ratios[i]

        y = noise * ratios[0]
        for i, (ratio, following) in enumerate(pairwise(ratios)):
            first = slope(y, i)
            moved = y + (following - ratio) * first
            if following > 0:
                second = slope(moved, i + 1)
                moved = y + (following - ratio) * 0.5 * (first + second)
            y = moved
        return y


@schema
class DDIM:
    """The transfer operator along `num_steps` times, the last of them giving x0.  Song et al. 2021.

    spacing: "time", even in the path's time (on a discrete path diffusers' "trailing"), "karras", or "auto": karras on
    `edm`, where time is the noise level and even steps would all be noisier than the images, and time elsewhere.
    """

    name: Literal["ddim"] = "ddim"
    num_steps: SamplingSteps = 50
    spacing: Literal["auto", "time", "karras"] = "auto"

    @property
    def num_evaluations(self) -> int:
        return self.num_steps

    def times(self, path: Path) -> Tensor:
        """The times [num_steps], noise first, float64."""
        is_karras = self.spacing == "karras" or (self.spacing == "auto" and isinstance(path, EDM))
        if is_karras and self.num_steps > 1:
            return path.karras_times(self.num_steps)
        if isinstance(path, VPDiscrete):
            count = path.t_max + 1
            return (count - torch.arange(self.num_steps, dtype=torch.float64) * (count / self.num_steps)).round() - 1
        return path.whole(torch.linspace(path.t_max, path.t_min, self.num_steps + 1, dtype=torch.float64)[:-1])

    def __call__(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        cond: Cond = NO_COND,
        *,
        guidance: Guidance = 1.0,
        fresh_noise: FreshNoise | None = None,
    ) -> Tensor:
        times = times_on(self, denoiser.path, noise.device)
        x = noise * expand(denoiser.path.sigma(times[:1]), noise)
        return ddim(denoiser, x, times, cond, guidance=guidance)


def ddim(denoiser: Denoiser, x: Tensor, times: Tensor, cond: Cond = NO_COND, *, guidance: Guidance = 1.0) -> Tensor:
    """Carry x from times[0] along `times` and return the last estimate of x0.

    x: [B, ...] at times[0]; times: [n], noisier first.  Returns [B, ...].
    """
    guided = begin(guidance, denoiser, cond)
    for time, following in pairwise(times):
        t, s = time.expand(len(x)), following.expand(len(x))
        x = transfer(denoiser.path, x, guided(x, t, s), t, s)
    return guided(x, times[-1].expand(len(x)))


@schema
class FewSteps:
    """One or a few steps of a distilled generator, with noise added between them.

    init_ratio: the noise-to-signal ratio of the first step, the same level on every path.
    init_noise: "sigma" feeds sigma_t n, pure noise at that level; "unit" feeds n itself (DMD2 on latents).
    later_ratios: the levels to re-noise to for further steps, decreasing.
    later_noise: "fresh" noise; "fixed", the first noise again; or "ddim", the noise in x_t.
    Yin et al. 2024, arXiv:2405.14867, section 4.4 (several steps); Zhou et al. 2024, arXiv:2404.04057 (ratio 2.5);
    Zhou et al. 2025, arXiv:2505.12674 (the three noises).
    """

    name: Literal["few_steps"] = "few_steps"
    init_ratio: Positive = 2.5
    init_noise: Literal["sigma", "unit"] = "sigma"
    later_ratios: Rates = ()
    later_noise: Literal["fresh", "fixed", "ddim"] = "fresh"

    def __post_init__(self) -> None:
        ratios = (self.init_ratio, *self.later_ratios)
        if any(a <= b for a, b in pairwise(ratios)):
            raise ValueError(f"init_ratio and later_ratios must decrease: {list(ratios)}")

    @property
    def num_evaluations(self) -> int:
        return 1 + len(self.later_ratios)

    def times(self, path: Path) -> Tensor:
        """[num_evaluations], noise first, float64.  A discrete path gets whole numbers."""
        ratios = torch.tensor([self.init_ratio, *self.later_ratios], dtype=torch.float64)
        return path.whole(path.time_of_ratio(ratios).clamp(path.t_min, path.t_max))

    def __call__(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        cond: Cond = NO_COND,
        *,
        guidance: Guidance = 1.0,
        fresh_noise: FreshNoise | None = None,
    ) -> Tensor:
        guided = begin(guidance, denoiser, cond)
        times = _each_sample_s(self, denoiser.path, noise)
        start = self._run(denoiser.path, guided, noise, times, self.num_evaluations - 1, fresh_noise)
        return guided(start.x, start.t)

    def roll_out(
        self,
        generator: Denoiser,
        noise: Tensor,
        cond: Cond = NO_COND,
        *,
        step: int,
        fresh_noise: FreshNoise | None = None,
        guidance: Guidance = 1.0,
        times: Tensor | None = None,
    ) -> "StepInput":
        """The network's input in step number `step` (0 is the first) when the generator makes the image itself.

        noise: [B, ...] unit.  times: each sample's own, [B, steps], noise first; default: the sampler's.
        Returns x_t [B, ...] and t [B].  Training on it is DMD2's backward simulation.
        Raises ValueError if a later step has no fresh noise.
        """
        times = _each_sample_s(self, generator.path, noise) if times is None else times.T
        return self._run(generator.path, begin(guidance, generator, cond), noise, times, step, fresh_noise)

    def trajectory(
        self, generator: Denoiser, noise: Tensor, cond: Cond = NO_COND, *, fresh_noise: FreshNoise | None = None
    ) -> list["StepInput"]:
        """The network's input in each step of one roll-out, where the generator makes the image itself.

        noise: [B, ...] unit.  Raises ValueError as `roll_out`.
        """
        guided, times = begin(1.0, generator, cond), _each_sample_s(self, generator.path, noise)
        return list(self._inputs(generator.path, guided, noise, times, self.num_evaluations - 1, fresh_noise))

    def _run(
        self, path: Path, guided: Guided, noise: Tensor, times: Tensor, step: int, fresh_noise: FreshNoise | None
    ) -> "StepInput":
        *_, last = self._inputs(path, guided, noise, times, step, fresh_noise)
        return last

    def _inputs(
        self, path: Path, guided: Guided, noise: Tensor, times: Tensor, last: int, fresh_noise: FreshNoise | None
    ) -> Iterator["StepInput"]:
        """Of the steps up to number `last`.  times: [steps, B]."""
        x = noise if self.init_noise == "unit" else noise * expand(path.sigma(times[0]), noise)
        yield StepInput(x, times[0])
        for i in range(last):
            x0 = guided(x, times[i])
            if self.later_noise == "ddim":
                x = transfer(path, x, x0, times[i], times[i + 1])
            elif self.later_noise == "fixed":
                x = path.diffuse(x0, noise, times[i + 1])
            elif fresh_noise is None:
                raise ValueError("several steps need fresh_noise")
            else:
                x = path.diffuse(x0, fresh_noise(i), times[i + 1])
            yield StepInput(x, times[i + 1])


@schema
class TCD:
    """Trajectory consistency sampling: each step jumps to s = (1 - eta) t', t' the next time, then noises back to t'.

    num_steps: NFE.  eta: the paper's gamma; 0 is DDIM, 1 is multistep consistency sampling.  grid: the times that the
    student was trained at, from which the steps are evenly chosen.  The last jump ends at time 0: on a continuous
    path that is x0, on a discrete one its first index, as in the authors' scheduler.
    init_noise: "sigma" begins with sigma_t n; "unit" with n itself, as the authors' scheduler.
    Zheng et al. 2024, arXiv:2402.19159, section 4.2.
    """

    name: Literal["tcd"] = "tcd"
    num_steps: SamplingSteps = 4
    eta: Fraction = 0.3
    grid: DDIM = field(default_factory=DDIM)
    init_noise: Literal["sigma", "unit"] = "sigma"

    def __post_init__(self) -> None:
        if self.num_steps > self.grid.num_steps:
            raise ValueError(f"num_steps = {self.num_steps}: the grid has only {self.grid.num_steps} times")

    @property
    def num_evaluations(self) -> int:
        return self.num_steps

    def times(self, path: Path) -> Tensor:
        """[num_steps + 1], noise first, time 0 last, float64."""
        times = self.grid.times(path)
        chosen = torch.arange(self.num_steps) * len(times) // self.num_steps
        return torch.cat([times[chosen], times.new_zeros(1)])

    def __call__(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        cond: Cond = NO_COND,
        *,
        guidance: Guidance = 1.0,
        fresh_noise: FreshNoise | None = None,
    ) -> Tensor:
        guided = begin(guidance, denoiser, cond)
        times = _each_sample_s(self, denoiser.path, noise)
        start = self._run(denoiser.path, guided, noise, times, self.num_steps - 1, fresh_noise)
        end = torch.zeros_like(start.t)
        return transfer(denoiser.path, start.x, guided(start.x, start.t, end), start.t, end)

    def roll_out(
        self,
        generator: Denoiser,
        noise: Tensor,
        cond: Cond = NO_COND,
        *,
        step: int,
        fresh_noise: FreshNoise | None = None,
        guidance: Guidance = 1.0,
        times: Tensor | None = None,
    ) -> "StepInput":
        """The network's input in step number `step` (0 is the first) on the way from noise.

        noise: [B, ...] unit.  times: each sample's own, [B, steps], noise first; default: the sampler's.
        Returns x_t [B, ...] and t [B].
        Raises ValueError if a later step has no fresh noise, unless eta is 0.
        """
        times = _each_sample_s(self, generator.path, noise) if times is None else times.T
        return self._run(generator.path, begin(guidance, generator, cond), noise, times, step, fresh_noise)

    def _run(
        self, path: Path, guided: Guided, noise: Tensor, times: Tensor, step: int, fresh_noise: FreshNoise | None
    ) -> "StepInput":
        """times: [steps, B]."""
        x = noise if self.init_noise == "unit" else noise * expand(path.sigma(times[0]), noise)
        for i in range(step):
            t, following = times[i], times[i + 1]
            target = (1 - self.eta) * following
            target = target.floor() if isinstance(path, VPDiscrete) else target
            x = transfer(path, x, guided(x, t, target), t, target)
            if self.eta:
                if fresh_noise is None:
                    raise ValueError("several steps need fresh_noise")
                x = path.renoise(x, fresh_noise(i), target, following)
        return StepInput(x, times[step])


@schema
class OneCall:
    """A student that maps unit noise to the signal at a given time: one step, at the path's least time.

    For the students of BOOT (Gu et al. 2023, arXiv:2306.05544), which are not denoisers: their input is always noise.
    """

    name: Literal["one_call"] = "one_call"

    @property
    def num_evaluations(self) -> int:
        return 1

    def __call__(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        cond: Cond = NO_COND,
        *,
        guidance: Guidance = 1.0,
        fresh_noise: FreshNoise | None = None,
    ) -> Tensor:
        t = torch.full((len(noise),), denoiser.path.t_min, dtype=torch.float64, device=noise.device)
        return begin(guidance, denoiser, cond)(noise, t)


@dataclass(frozen=True)
class StepInput:
    """x: [B, ...] at t: [B]."""

    x: Tensor
    t: Tensor


StepSampler = FewSteps | TCD
"""The samplers of generators: the input of any of their steps can be simulated."""

AnySampler = Annotated[Heun | DDIM | FewSteps | TCD | OneCall | DXPolicy, Field(discriminator="name")]
"""The samplers that a config may name."""


class Timed(Protocol):
    """What has times of its own on a path, and is equal to what has the same ones."""

    def __hash__(self) -> int: ...
    def times(self, path: Path) -> Tensor: ...


@lru_cache(maxsize=256)
def times_on(sampler: Timed, path: Path, device: torch.device) -> Tensor:
    """A sampler's times on a device, found and copied there once: not to be changed in place."""
    with torch.inference_mode(False):
        return upload(sampler.times(path), device)


def _each_sample_s(sampler: Timed, path: Path, noise: Tensor) -> Tensor:
    """The sampler's times [steps] for every sample of noise [B, ...]: [steps, B], on its device."""
    return times_on(sampler, path, noise.device)[:, None].expand(-1, len(noise))
