"""BOOT: Data-free Distillation of Denoising Diffusion Models with Bootstrapping.  Gu et al. 2023, arXiv:2306.05544.

Implemented: the signal ODE, bootstrapped from noise down to the image with the exponential (exact for a constant
estimate) or the Euler target, the boundary loss, guidance in the targets, its scale as an input on request. No data.
Not implemented: cascades, prompts. The paper's weights, delta, range of times and of scales were not to be had: the
defaults are ours. Ours too is the reading of EDM networks: their own skip would return the noise where t is small.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from diffdistill.diffusion.guidance.check import check_guidance
from diffdistill.diffusion.path import Path, Prediction, expand
from diffdistill.diffusion.sampling import OneCall
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, even_times
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.distillation.signal_student import signal_student
from diffdistill.networks.guided import GuidedConfig
from diffdistill.networks.registry import SignalBase
from diffdistill.networks.signal import SignalConfig, signal_config
from diffdistill.settings.schema import NonNegative, Number, UserError, schema

Target = Literal["exponential", "euler"]


@schema
class Boot(Method):
    """time_law: of the output's times, from the path's least to its greatest; null: `even_times`.  delta: step of the
    bootstrap, a share of it.  guidance: least and greatest w of the targets; takes_guidance: w is an input of the
    student."""

    name: Literal["boot"] = "boot"
    time_law: AnyTimeDistribution | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] = 0.05
    target: Target = "exponential"
    bootstrap_weight: NonNegative = 1.0
    boundary_weight: NonNegative = 1.0
    guidance: tuple[Number, Number] = (1.0, 1.0)
    takes_guidance: bool = False

    student = "generator"
    needs_images = False
    updates = (Update(("generator",), "generator_loss"),)

    def __post_init__(self) -> None:
        if self.guidance[0] > self.guidance[1]:
            raise ValueError(f"guidance: must be increasing: {list(self.guidance)}")

    def sampler(self, problem: Problem) -> OneCall:
        return OneCall()

    def student_model(
        self, network: SignalBase, predicts: Prediction, problem: Problem
    ) -> tuple[SignalConfig, Prediction]:
        """The teacher's raw network F, read as at t_max whatever the time: y = skip eps + scale F(scale' eps, t)."""
        assert problem.teacher is not None
        if self.takes_guidance and not isinstance(network, GuidedConfig):
            network = GuidedConfig(base=network)
        return signal_config(problem.teacher, network), "x0"

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        """Raises UserError where the law leaves out an end of the path, or w has no meaning to the teacher."""
        student, path = signal_student(problem), problem.path
        assert problem.teacher is not None
        ends = self.times(torch.tensor([0.0, 1.0], dtype=torch.float64), path).tolist()
        if not all(map(math.isclose, ends, (path.t_min, path.t_max))):
            raise UserError(
                f"method.time_law: must go from {path.t_min:g} to {path.t_max:g}, not {ends[0]:g} to {ends[1]:g}"
            )
        check_guidance(problem.teacher, "method.guidance", self.guidance)
        return {"generator": student}

    def times(self, uniform: Tensor, path: Path) -> Tensor:
        """The law's quantiles [B], float64."""
        return (self.time_law or even_times(path))(uniform, path)

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        """The times are a step of the law apart. Near t_max the step is shorter, so that no time goes untrained."""
        uniforms, (low, high) = rng.uniforms(["s", "label", "w"]), self.guidance
        share = uniforms["s"]
        return {
            "s": self.times(share, problem.path),
            "t": self.times((share + self.delta).clamp_max(1), problem.path),
            "eps": rng.normal("eps", problem.image_shape),
            "label": problem.label_of(uniforms["label"]),
            "w": low + uniforms["w"] * (high - low),
        }

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """The bootstrap at s, and the teacher's own estimate at t_max."""
        path, eps, s = players.teacher.path, draw["eps"], draw["s"]
        last = torch.full_like(s, path.t_max)
        bootstrap = mse_loss(self._signal(players, draw, s), self.bootstrap(players, draw))
        with torch.no_grad():
            start = self._estimate(players, draw, expand(path.sigma(last), eps) * eps, last)
        boundary = mse_loss(self._signal(players, draw, last), start.to(eps.dtype))
        total = self.bootstrap_weight * bootstrap + self.boundary_weight * boundary
        return Loss(total, {"bootstrap": bootstrap.detach(), "boundary": boundary.detach()})

    @torch.no_grad()
    def bootstrap(self, players: Players, draw: Draw) -> Tensor:
        """y at s by one step of dy/dt = -(d lambda/dt) (f(x_t, t) - y) from the student's own y at t.

        x_t = alpha_t y + sigma_t eps, lambda = log(sigma / alpha).  The exponential target is DDIM's step, read as y.
        """
        path, eps, s, t = players.teacher.path, draw["eps"], draw["s"], draw["t"]
        y = self._signal(players, draw, t)
        f = self._estimate(players, draw, path.diffuse(y, eps, t), t)
        if self.target == "exponential":
            gain = 1 - path.ratio(s) / path.ratio(t)
        else:
            gain = (s - t) * path.log_ratio_derivative(t)
        return (y + expand(gain, y) * (f - y)).to(y.dtype)

    def _signal(self, players: Players, draw: Draw, t: Tensor) -> Tensor:
        """The student's y(eps, t, c), with w where it is told."""
        cond = players.teacher.class_cond(draw["label"])
        y: Tensor = players.generator(draw["eps"], t, cond, guidance=draw["w"] if self.takes_guidance else 1.0)
        return y

    def _estimate(self, players: Players, draw: Draw, x: Tensor, t: Tensor) -> Tensor:
        """The teacher's f, guided."""
        cond = players.teacher.class_cond(draw["label"])
        f: Tensor = players.teacher(x, t, cond, guidance=1.0 if self.guidance == (1, 1) else draw["w"])
        return f
