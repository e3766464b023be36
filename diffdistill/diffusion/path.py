"""Paths: how a clean image becomes noise, x_t = alpha_t x_0 + sigma_t eps.

Every quantity of time is float64 and is cast to the image's type only where it meets the image.
`t` is [B] (or a scalar tensor) in [path.t_min, path.t_max].
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from diffdistill.diffusion.level_table import LevelTable, table_on
from diffdistill.diffusion.scheduler_betas import read_betas
from diffdistill.settings.numbers import Betas, TableSize
from diffdistill.settings.schema import Positive, schema

Prediction = Literal["edm", "x0", "eps", "v", "flow"]
"""What a network's output means. `edm` is x0 through the preconditioning of Karras et al. 2022, table 1."""


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """Give a [B] coefficient the trailing ones that let it multiply `like` [B, ...], in at least float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return coefficient.to(like.device, dtype).reshape(-1, *[1] * (like.ndim - 1))


class Path(ABC):
    """One family of noise levels. Subclasses say alpha, sigma and the log-ratio; the rest follows."""

    @property
    @abstractmethod
    def t_min(self) -> float: ...

    @property
    @abstractmethod
    def t_max(self) -> float: ...

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale, float64, shape of t."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale, float64, shape of t."""

    @abstractmethod
    def log_ratio_derivative(self, t: Tensor) -> Tensor:
        """d/dt log(alpha_t / sigma_t): negative, float64, shape of t."""

    @abstractmethod
    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        """The t at which sigma_t / alpha_t equals `ratio`, float64: inverse of `ratio`."""

    def time_input(self, t: Tensor) -> Tensor:
        """The number that a network is given for t, float64: a thousand times t, unless a path says another."""
        return 1000 * t.double()

    def time_of_input(self, time_input: Tensor) -> Tensor:
        """The inverse of `time_input`, float64."""
        return time_input.double() / 1000

    def whole(self, times: Tensor) -> Tensor:
        """The nearest times that diffusers can tell a network on this path; most paths have all."""
        return times

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        """What networks on this path may predict."""
        return ("x0", "eps", "v")

    def ratio(self, t: Tensor) -> Tensor:
        """Noise-to-signal ratio sigma_t / alpha_t, float64. Equal ratios are equal noise levels in any path."""
        return self.sigma(t) / self.alpha(t)

    def diffuse(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Noise x0 to time t: alpha_t x0 + sigma_t eps.

        x0, eps: [B, ...]; t: [B].  Returns [B, ...] in x0's dtype.
        Raises ValueError if t is not [B].  Karras et al. 2022, eq. 2 generalised.
        """
        if t.shape != x0.shape[:1]:
            raise ValueError(f"t must be [B] = {tuple(x0.shape[:1])}, not {tuple(t.shape)}")
        return (expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * eps).to(x0.dtype)

    def renoise(self, x: Tensor, eps: Tensor, t_from: Tensor, t_to: Tensor) -> Tensor:
        """Take x at noise level t_from to the noisier t_to, as the forward process would.

        x, eps: [B, ...]; t_from, t_to: [B], ratio(t_to) >= ratio(t_from).  Returns [B, ...].
        Raises ValueError where t_to is the cleaner one; on a GPU, for which that would mean to wait, x is NaN there.
        """
        scale = self.alpha(t_to) / self.alpha(t_from)
        variance = self.sigma(t_to) ** 2 - (scale * self.sigma(t_from)) ** 2
        is_cleaner = variance < -1e-12
        if variance.device.type == "cpu" and bool(is_cleaner.any()):
            raise ValueError("renoise goes from a cleaner to a noisier time; t_to is cleaner than t_from")
        added = torch.where(is_cleaner, math.nan, variance.clamp_min(0).sqrt())
        return (expand(scale, x) * x + expand(added, x) * eps).to(x.dtype)

    def to_x0(self, prediction: Tensor, kind: Prediction, x_t: Tensor, t: Tensor) -> Tensor:
        """Read x0, eps, v or flow at (x_t, t) as x0.  v = alpha eps - sigma x0; flow = eps - x0."""
        alpha, sigma = expand(self.alpha(t), x_t), expand(self.sigma(t), x_t)
        if kind in ("x0", "edm"):
            return prediction
        if kind == "eps":
            return (x_t - sigma * prediction) / alpha
        if kind == "v":
            return (alpha * x_t - sigma * prediction) / (alpha**2 + sigma**2)
        return (x_t - sigma * prediction) / (alpha + sigma)

    def from_x0(self, x0: Tensor, kind: Prediction | Literal["score"], x_t: Tensor, t: Tensor) -> Tensor:
        """The inverse of `to_x0`, and the score (alpha D - x_t) / sigma^2."""
        alpha, sigma = expand(self.alpha(t), x_t), expand(self.sigma(t), x_t)
        if kind in ("x0", "edm"):
            return x0
        if kind == "score":
            return (alpha * x0 - x_t) / sigma**2
        if kind == "eps":
            return (x_t - alpha * x0) / sigma
        if kind == "v":
            return (alpha * x_t - (alpha**2 + sigma**2) * x0) / sigma
        return (x_t - (alpha + sigma) * x0) / sigma

    def karras_times(self, num_steps: int, rho: float = 7.0) -> Tensor:
        """num_steps times from t_max down to t_min, even in ratio^(1/rho): Karras et al. 2022, eq. 5."""
        low, high = (float(self.ratio(torch.tensor(t, dtype=torch.float64))) for t in (self.t_min, self.t_max))
        return self.time_of_ratio(karras_ratios(torch.linspace(1, 0, num_steps, dtype=torch.float64), low, high, rho))


def karras_ratios(fraction: Tensor, low: float, high: float, rho: float) -> Tensor:
    """Noise levels even in ratio^(1/rho): `low` at fraction 0, `high` at 1.  Karras et al. 2022, eq. 5."""
    bottom, top = low ** (1 / rho), high ** (1 / rho)
    levels: Tensor = (bottom + fraction * (top - bottom)) ** rho
    return levels


@schema
class EDM(Path):
    """alpha = 1, sigma = t.  Karras et al. 2022, arXiv:2206.00364."""

    name: Literal["edm"] = "edm"
    sigma_min: Positive = 0.002
    sigma_max: Positive = 80.0

    def __post_init__(self) -> None:
        _check_order("sigma_min", self.sigma_min, "sigma_max", self.sigma_max)

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        return ("edm", "x0", "eps")

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        return t.double()

    def log_ratio_derivative(self, t: Tensor) -> Tensor:
        return -1 / t.double()

    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        return ratio.double()

    def time_input(self, t: Tensor) -> Tensor:
        return t.double().log() / 4

    def time_of_input(self, time_input: Tensor) -> Tensor:
        return (4 * time_input.double()).exp()


@schema
class VPCosine(Path):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2), t in (0, 1).  Nichol & Dhariwal 2021, without the offset."""

    name: Literal["vp_cosine"] = "vp_cosine"
    t_start: Positive = 1e-3
    t_end: Annotated[float, Field(gt=0, lt=1)] = 0.999

    def __post_init__(self) -> None:
        _check_order("t_start", self.t_start, "t_end", self.t_end)

    @property
    def t_min(self) -> float:
        return self.t_start

    @property
    def t_max(self) -> float:
        return self.t_end

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(math.pi / 2 * t.double())

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t.double())

    def log_ratio_derivative(self, t: Tensor) -> Tensor:
        return -math.pi / torch.sin(math.pi * t.double())

    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        return torch.atan(ratio.double()) * (2 / math.pi)


@schema
class VPLinear(Path):
    """The VP SDE with beta(t) linear in t in (0, 1).  Song et al. 2021, arXiv:2011.13456, eq. 32."""

    name: Literal["vp_linear"] = "vp_linear"
    beta_min: Positive = 0.1
    beta_max: Positive = 20.0
    t_start: Positive = 1e-3
    t_end: Annotated[float, Field(gt=0, le=1)] = 1.0

    def __post_init__(self) -> None:
        _check_order("t_start", self.t_start, "t_end", self.t_end)
        _check_order("beta_min", self.beta_min, "beta_max", self.beta_max)

    @property
    def t_min(self) -> float:
        return self.t_start

    @property
    def t_max(self) -> float:
        return self.t_end

    def _log_alpha(self, t: Tensor) -> Tensor:
        t = t.double()
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def log_ratio_derivative(self, t: Tensor) -> Tensor:
        # d log alpha = -beta/2 and d log sigma = (beta/2) alpha^2 / sigma^2, so the sum is -beta / (2 sigma^2).
        beta = self.beta_min + t.double() * (self.beta_max - self.beta_min)
        return -beta / (2 * self.sigma(t) ** 2)

    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        log_alpha = -0.5 * torch.log1p(ratio.double() ** 2)
        slope = self.beta_max - self.beta_min
        root = (self.beta_min**2 / 4 - slope * log_alpha).sqrt()
        return 2 * (root - self.beta_min / 2) / slope


@schema
class VPDiscrete(Path):
    """A diffusers training schedule: t is the index 0 .. len(betas) - 1, alpha^2 = prod(1 - beta).

    Between two indices log(alpha/sigma) is linear, so that any noise level has a time.
    `betas` overrides `beta_schedule`; `from_scheduler` reads either from a diffusers scheduler's config.
    """

    name: Literal["vp_discrete"] = "vp_discrete"
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    beta_start: Positive = 1e-4
    beta_end: Positive = 0.02
    num_steps: TableSize = 1000
    betas: Betas | None = None

    @classmethod
    def from_scheduler(cls, config: Mapping[str, Any]) -> "VPDiscrete":
        """The path of any diffusers scheduler that has betas (DDPM, DDIM, PNDM, Euler, DPM-Solver ...).

        config: `scheduler.config` or the parsed scheduler_config.json.
        Raises UserError as `read_betas`.
        """
        return cls(betas=tuple(read_betas(config).tolist()))

    @cached_property
    def _log_ratios(self) -> Tensor:
        """log(alpha/sigma) at every index, [num_steps], decreasing."""
        if self.betas is not None:
            betas = torch.tensor(self.betas, dtype=torch.float64)
        else:
            from diffusers import DDPMScheduler

            betas = DDPMScheduler(self.num_steps, self.beta_start, self.beta_end, self.beta_schedule).betas.double()
        log_alpha_squared = torch.log1p(-betas).cumsum(0)
        return 0.5 * (log_alpha_squared - torch.log(-torch.expm1(log_alpha_squared)))

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_max(self) -> float:
        return float(len(self._log_ratios) - 1)

    @cached_property
    def _tables(self) -> dict[torch.device, LevelTable]:
        return {}

    def _log_ratio(self, t: Tensor) -> Tensor:
        table, index = table_on(t.device, self._tables, self._log_ratios), self._index(t)
        return table.values[index] + (t.double() - index) * table.slopes[index]

    def _index(self, t: Tensor) -> Tensor:
        return t.double().floor().long().clamp(0, len(self._log_ratios) - 2)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(2 * self._log_ratio(t)).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-2 * self._log_ratio(t)).sqrt()

    def whole(self, times: Tensor) -> Tensor:
        return times.round()

    def log_ratio_derivative(self, t: Tensor) -> Tensor:
        return table_on(t.device, self._tables, self._log_ratios).slopes[self._index(t)]

    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        rising = table_on(ratio.device, self._tables, self._log_ratios).rising
        value = ratio.double().log().clamp(rising[0], rising[-1])
        index = torch.searchsorted(rising, value.contiguous(), right=True).sub(1).clamp(0, len(rising) - 2)
        return index + (value - rising[index]) / (rising[index + 1] - rising[index])

    def time_input(self, t: Tensor) -> Tensor:
        return t.double()

    def time_of_input(self, time_input: Tensor) -> Tensor:
        return time_input.double()


@schema
class Flow(Path):
    """Rectified flow: alpha = 1 - s, sigma = s.  Liu et al. 2023, arXiv:2209.03003.

    s = shift t / (1 + (shift - 1) t), which is t itself at shift 1: above 1, more noise.  Esser
    et al. 2024, arXiv:2403.03206, eq. 23.
    network_time: the network's input is 1000 sigma, or 1000 t; diffusers rounds t to integers.
    """

    name: Literal["flow"] = "flow"
    t_start: Positive = 1e-3
    t_end: Annotated[float, Field(gt=0, lt=1)] = 0.999
    shift: Positive = 1.0
    network_time: Literal["sigma", "time"] = "sigma"

    def __post_init__(self) -> None:
        _check_order("t_start", self.t_start, "t_end", self.t_end)

    @property
    def t_min(self) -> float:
        return self.t_start

    @property
    def t_max(self) -> float:
        return self.t_end

    @property
    def predictions(self) -> tuple[Prediction, ...]:
        return ("flow", "x0", "eps")

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t.double()) / (1 + (self.shift - 1) * t.double())

    def sigma(self, t: Tensor) -> Tensor:
        return self.shift * t.double() / (1 + (self.shift - 1) * t.double())

    def log_ratio_derivative(self, t: Tensor) -> Tensor:
        t = t.double()
        return -1 / (t * (1 - t))

    def time_of_ratio(self, ratio: Tensor) -> Tensor:
        ratio = ratio.double()
        return ratio / (self.shift + ratio)

    def whole(self, times: Tensor) -> Tensor:
        return (1000 * times).round() / 1000 if self.network_time == "time" else times

    def time_input(self, t: Tensor) -> Tensor:
        return 1000 * (self.sigma(t) if self.network_time == "sigma" else t.double())

    def time_of_input(self, time_input: Tensor) -> Tensor:
        told = time_input.double() / 1000
        return told if self.network_time == "time" else told / (self.shift - (self.shift - 1) * told)


AnyPath = Annotated[EDM | VPCosine | VPLinear | VPDiscrete | Flow, Field(discriminator="name")]
"""The paths that a config may name."""


def _check_order(low_name: str, low: float, high_name: str, high: float) -> None:
    if low >= high:
        raise ValueError(f"{low_name} = {low} must be below {high_name} = {high}")
