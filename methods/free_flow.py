"""FreeFlow: Flow Map Distillation Without Data.  Tong et al. 2025, arXiv:2511.19428.

Implemented: the flow map learned from noise alone. Its prediction: the map's own change along the teacher's velocity at
the point that it reaches, by forward mode in the time alone. Its correction: a fake score's field at what it makes.
The student is BOOT's: it is given noise z and a time, and returns the signal y, so that f(z, d) = d y + (1 - d) z is
the point at t = 1 - d of the line, and the paper's F = z - y.
The training code is not public: the law of d, the weights of the two parts and their normalisation are ours.
Not implemented: guidance as an input of the student.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import Path, Prediction, expand
from diffdistill.diffusion.sampling import OneCall
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, Karras, LogNormal, even_times
from diffdistill.distillation.derivatives import along
from diffdistill.distillation.dropout_masks import masks_again
from diffdistill.distillation.losses import DenoisingWeight, field_loss
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.distillation.scales import FakeScale, Scale, draw_scales, scale_in
from diffdistill.distillation.score_distillation import condition, critics_loss, guided_field, start_players
from diffdistill.networks.registry import SignalBase
from diffdistill.networks.signal import SignalConfig, signal_config, start_from
from diffdistill.settings.numbers import SamplingSteps
from diffdistill.settings.schema import NonNegative, Positive, UserError, field, schema


@schema
class FreeFlow(Method):
    """prediction_time_law: of the times that the map reaches; null: `even_times`.  time_law: of the correction's."""

    name: Literal["free_flow"] = "free_flow"
    guidance: Scale = 1.0
    prediction_time_law: AnyTimeDistribution | None = None
    prediction_weight: NonNegative = 1.0
    correction_weight: NonNegative = 1.0
    time_law: AnyTimeDistribution = field(default_factory=Karras)
    normaliser_minimum: Positive = 1e-5
    fake_time_law: AnyTimeDistribution = field(default_factory=LogNormal)
    fake_weight: DenoisingWeight = "edm"
    fake_updates: SamplingSteps = 1

    student = "generator"
    needs_images = False

    @property
    def scales(self) -> dict[str, FakeScale]:
        return {"guidance": self.guidance, "fake_guidance": 1.0}

    @property
    def updates(self) -> tuple[Update, ...]:
        generator = Update(("generator",), "generator_loss", self.fake_updates)
        return (generator, Update(("fake",), "fake_loss")) if self.correction_weight else (generator,)

    def sampler(self, problem: Problem) -> OneCall:
        return OneCall()

    def student_model(
        self, network: SignalBase, predicts: Prediction, problem: Problem
    ) -> tuple[SignalConfig, Prediction]:
        """BOOT's student: the teacher's raw network, read as at t_max whatever the time."""
        assert problem.teacher is not None
        return signal_config(problem.teacher, network), "x0"

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        teacher, student = problem.teacher, problem.network
        if teacher is None or student is None:
            raise UserError("teacher: this method distils one; name a pretrained run")
        fake = start_players(problem, guidance=self.guidance)["fake"]
        start_from(student, problem.initial.get("generator", teacher))
        return {"generator": student} | ({"fake": fake} if self.correction_weight else {})

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        uniforms, path = rng.uniforms(["t", "fake t", "prediction t", "label"]), problem.path
        return {
            "label": problem.label_of(uniforms["label"]),
            "t": self.time_law(uniforms["t"], path),
            "fake t": self.fake_time_law(uniforms["fake t"], path),
            "prediction t": (self.prediction_time_law or even_times(path))(uniforms["prediction t"], path),
            **rng.normals(["z", "eps", "fake eps"], problem.image_shape),
            **draw_scales(rng, {"guidance": self.guidance}),
        }

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """Prediction at the drawn times, correction at the image."""
        z, t, cond = draw["z"], draw["prediction t"], condition(players, draw)
        with masks_again(z):
            target = self.target(players, draw)
        prediction = mse_loss(players.generator(z, t, cond), target)
        total, logs = self.prediction_weight * prediction, {"prediction": prediction.detach()}
        if not self.correction_weight:
            return Loss(total, logs)
        x = self.image(players, draw)
        pushed = guided_field(players, draw, x, scales=self.scales, minimum=self.normaliser_minimum)
        correction = field_loss(x, pushed)
        logs["correction"] = correction.detach()
        return Loss(total + self.correction_weight * correction, logs, carry={"x": x.detach()})

    @torch.no_grad()
    def target(self, players: Players, draw: Draw) -> Tensor:
        """z - (u_T(f(z, d), 1 - d) - d dF/dd), what y is to be, [B, ...]: dF/dd = -dy/dd at the same noise."""
        z, cond, path = draw["z"], condition(players, draw), players.teacher.path
        t = line_time(path, draw["prediction t"])
        signal, change = along(
            lambda d: players.generator(z, path.time_of_ratio((1 - d) / d), cond),
            (1 - t,),
            (torch.ones_like(t),),
            network=players.generator,
        )
        reached = expand(1 - t, z) * signal + expand(t, z) * z
        velocity = (reached - self.teacher_estimate(players, draw, reached, t)) / expand(t, z)
        return (z - velocity - expand(1 - t, z) * change).to(z.dtype)

    def teacher_estimate(self, players: Players, draw: Draw, reached: Tensor, t: Tensor) -> Tensor:
        """D of the point at the line's t, guided."""
        teacher: Denoiser = players.teacher
        time = teacher.path.time_of_ratio(t / (1 - t))
        x = reached * expand(teacher.path.alpha(time) / (1 - t), reached)
        guidance = scale_in(draw, self.scales, "guidance")
        estimate: Tensor = teacher(x, time, condition(players, draw, role="teacher"), guidance=guidance)
        return estimate

    def image(self, players: Players, draw: Draw) -> Tensor:
        """f(z, 1), at the path's least time."""
        t = torch.full_like(draw["t"], players.teacher.path.t_min)
        x: Tensor = players.generator(draw["z"], t, condition(players, draw))
        return x

    def fake_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """Denoising on the map's images."""
        with torch.no_grad():
            x = draw["x"] if "x" in draw else self.image(players, draw)
        return critics_loss(players, draw, batch, x, weight=self.fake_weight, gan_weight=None, features="fake")


def line_time(path: Path, t: Tensor) -> Tensor:
    """t in (0, 1) of (1 - t) x0 + t z at the same noise-to-signal ratio, float64."""
    ratio = path.ratio(t)
    return ratio / (1 + ratio)
