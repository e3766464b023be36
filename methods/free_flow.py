"""FreeFlow: Flow Map Distillation Without Data.  Tong et al. 2025, arXiv:2511.19428.

Implemented: the flow map learned from noise alone. Its prediction: the map's own change along the teacher's velocity at
the point that it reaches, by forward mode in the time alone. Its correction: a fake score's field on what it makes.
The student is BOOT's: it is given noise z and a time, and answers with the signal y, so that f(z, d) = d y + (1 - d) z
is the point at t = 1 - d of flow matching's line, and the paper's F = z - y.
The training code is not public: the laws of d and r, the weights, normalisation and ratio of updates are ours.
Not implemented: a student that is told the guidance's scale.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from diffdistill.diffusion.guidance.check import check_guidance
from diffdistill.diffusion.line import line, line_time, line_velocity
from diffdistill.diffusion.path import Prediction, expand
from diffdistill.diffusion.sampling import OneCall
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, Karras, LogNormal, even_times
from diffdistill.distillation.derivatives import along
from diffdistill.distillation.dropout_masks import masks_again
from diffdistill.distillation.losses import DenoisingWeight, field_loss, zero_nonfinite
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.distillation.scales import FakeScale, Scale, draw_scales, scale_in
from diffdistill.distillation.score_distillation import condition, critics_loss, guided_estimates, guided_field
from diffdistill.distillation.signal_student import signal_student
from diffdistill.networks.registry import SignalBase
from diffdistill.networks.signal import SignalConfig, signal_config
from diffdistill.settings.numbers import SamplingSteps
from diffdistill.settings.schema import NonNegative, Positive, field, schema


@schema
class FreeFlow(Method):
    """prediction_time_law: of the times that the map reaches; null: `even_times`.  time_law: of the correction's noise.
    normaliser: r, of the paper's difference of velocities, or DMD2's nu."""

    name: Literal["free_flow"] = "free_flow"
    guidance: Scale = 1.0  # w of D_u + w (D_c - D_u), of the teacher, in both parts
    prediction_weight: NonNegative = 1.0
    prediction_time_law: AnyTimeDistribution | None = None
    correction_weight: NonNegative = 1.0
    time_law: AnyTimeDistribution = field(default_factory=Karras)
    normaliser: Literal["r", "nu"] = "r"
    normaliser_minimum: Positive = 1e-5
    fake_time_law: AnyTimeDistribution = field(default_factory=LogNormal)
    fake_weight: DenoisingWeight = "edm"
    fake_updates: SamplingSteps = 1  # of the fake score to one of the generator

    student = "generator"
    needs_images = False

    def __post_init__(self) -> None:
        if not (self.prediction_weight or self.correction_weight):
            raise ValueError("correction_weight: with prediction_weight = 0 nothing is left to learn; set one of them")

    @property
    def scales(self) -> dict[str, FakeScale]:
        return {"guidance": self.guidance, "fake_guidance": 1.0}

    @property
    def updates(self) -> tuple[Update, ...]:
        if not self.correction_weight:
            return (Update(("generator",), "generator_loss"),)
        return Update(("generator",), "generator_loss", self.fake_updates), Update(("fake",), "fake_loss")

    def sampler(self, problem: Problem) -> OneCall:
        return OneCall()

    def student_model(
        self, network: SignalBase, predicts: Prediction, problem: Problem
    ) -> tuple[SignalConfig, Prediction]:
        """BOOT's: the teacher's raw network, read as at t_max whatever the time."""
        assert problem.teacher is not None
        return signal_config(problem.teacher, network), "x0"

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        """Raises UserError where guidance has no meaning to the teacher."""
        student = signal_student(problem)
        assert problem.teacher is not None
        check_guidance(problem.teacher, "method.guidance", self.guidance)
        if not self.correction_weight:
            return {"generator": student}
        # Never as the student, which denoises nothing.
        starts = {} if "fake" in problem.initial else {"fake": "teacher"}
        return {"generator": student} | problem.copies("fake", starts=starts)

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        laws = {"prediction t": self.prediction_time_law or even_times(problem.path)}
        laws |= {"t": self.time_law, "fake t": self.fake_time_law} if self.correction_weight else {}
        uniforms = rng.uniforms([*laws, "label"])
        return {
            "label": problem.label_of(uniforms["label"]),
            **{name: law(uniforms[name], problem.path) for name, law in laws.items()},
            **rng.normals(["z", *(("eps", "fake eps") if self.correction_weight else ())], problem.image_shape),
            **draw_scales(rng, {"guidance": self.guidance}),
        }

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """The squared error to `target` at drawn times and F^T sg[u_N - u_T] at d = 1, both means over pixels."""
        total, logs, carry = draw["z"].new_zeros(()), dict[str, Tensor](), dict[str, Tensor]()
        if self.prediction_weight:
            with masks_again(draw["z"]):  # y and its derivative have the same dropout
                target = self.target(players, draw)
            prediction = mse_loss(self.signal(players, draw, draw["prediction t"]), target)
            total, logs["prediction"] = total + self.prediction_weight * prediction, prediction.detach()
        if self.correction_weight:
            x = self.signal(players, draw)
            correction = field_loss(x, self.field(players, draw, x))
            total, logs["correction"] = total + self.correction_weight * correction, correction.detach()
            carry["x"] = x.detach()
        return Loss(total, logs, carry=carry)

    @torch.no_grad()
    def target(self, players: Players, draw: Draw) -> Tensor:
        """z - (u_T(f(z, d), 1 - d) - d dF/dd), what y is to be, [B, ...]: dF/dd = -dy/dd at the same noise."""
        z, teacher, student = draw["z"], players.teacher, players.generator
        t = line_time(teacher.path.ratio(draw["prediction t"]))
        y, change = along(
            lambda d: self.signal(players, draw, student.path.time_of_ratio((1 - d) / d)),
            (1 - t,),
            (torch.ones_like(t),),
            network=student,
        )
        told, guidance = condition(players, draw, role="teacher"), scale_in(draw, self.scales, "guidance")
        velocity = line_velocity(teacher, line(y.to(z.dtype), z, t), t, told, guidance=guidance)
        return (z - velocity - expand(1 - t, z) * change).to(z.dtype)

    @torch.no_grad()
    def field(self, players: Players, draw: Draw, x: Tensor) -> Tensor:
        """u_T - u_N = (D_fake - D_teacher) / r at x noised, or DMD2's field: down it, the images' law moves."""
        if self.normaliser == "nu":
            return guided_field(players, draw, x, scales=self.scales, minimum=self.normaliser_minimum)
        fake, teacher = guided_estimates(players, draw, x, scales=self.scales)
        return zero_nonfinite((fake - teacher) / expand(line_time(players.teacher.path.ratio(draw["t"])), x))

    def signal(self, players: Players, draw: Draw, t: Tensor | None = None) -> Tensor:
        """The student's y(z, t, c); by default f(z, 1), the image, at the path's least time."""
        t = torch.full_like(draw["prediction t"], players.teacher.path.t_min) if t is None else t
        y: Tensor = players.generator(draw["z"], t, condition(players, draw))
        return y

    def fake_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """Denoising on the map's images."""
        with torch.no_grad():
            x = draw["x"] if "x" in draw else self.signal(players, draw)
        return critics_loss(players, draw, batch, x, weight=self.fake_weight, gan_weight=None, features="fake")
