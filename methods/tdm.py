"""TDM: Learning Few-Step Diffusion Models by Trajectory Distribution Matching.  Luo et al. 2025, arXiv:2503.06674.

Implemented: a student of K deterministic steps, whose law is matched to the teacher's at the point where each of them
arrives, noised further; one roll-out for both updates; the fake score's loss with the importance weight (`image`)
and one whose minimum is the arriving points' own score (`target: noise`, ours and the default: with it a student that
follows the teacher's ODE exactly is at rest); the pseudo-Huber distance.
Not implemented: random ends of the steps, levels up to the greatest with a fake score that is told the step.
The released code takes the weight's exponent as a mean over pixels, which makes it about 1; here it is the sum.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.on_device import constant
from diffdistill.diffusion.path import Path, expand
from diffdistill.diffusion.sampling import FewSteps, times_on
from diffdistill.diffusion.step_random import StepRandom, integer_of
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, Karras, LogNormal, shares_between
from diffdistill.distillation.first_noise import check_first_noise
from diffdistill.distillation.losses import (
    DenoisingWeight,
    denoising_weight,
    field_loss,
    sample_normaliser,
    zero_nonfinite,
)
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.distillation.scales import Scale, draw_scales, scale_in
from diffdistill.distillation.score_distillation import condition, start_players
from diffdistill.settings.numbers import SamplingSteps
from diffdistill.settings.schema import Positive, field, schema

STEPS = FewSteps(init_ratio=80.0, later_ratios=(5.0, 1.0, 0.3), later_noise="ddim")
"""Four steps; their levels are ours, the paper's are even in the time of Stable Diffusion's and PixArt's schedules."""


@schema
class TDM(Method):
    """steps: the student's sampling steps: one, or several with `later_noise: ddim`.
    time_law: noise levels of the comparison, for each step those between its ends
    fake_time_law: those of the fake score's loss, for each step between its ends"""

    name: Literal["tdm"] = "tdm"
    steps: FewSteps = STEPS
    guidance: Scale = 1.0  # w of D_u + w (D_c - D_u), of the teacher; `[low, high]`: drawn for each sample
    generator_updates_every: SamplingSteps = 1  # updates of the fake score per update of the generator
    time_law: AnyTimeDistribution = field(default_factory=Karras)
    fake_time_law: AnyTimeDistribution = field(default_factory=LogNormal)
    target: Literal["noise", "image"] = "noise"  # of the fake score: the noise that was added, or the step's image
    importance: Literal["sum", "mean"] = "sum"  # the exponent of the weight of `target: image`, over a sample's pixels
    fake_weight: DenoisingWeight = "edm"  # of the fake score's squared error, as `weight` of `pretrain`
    distance: Literal["square", "huber"] = "square"  # in the generator's loss; `huber`: element by element
    huber_width: Positive = 1e-3  # c of `huber`, below which it is a square
    normaliser_minimum: Positive = 1e-5  # least value of the normaliser nu

    student = "generator"
    tells_teacher_class = True
    needs_images = False

    def __post_init__(self) -> None:
        if self.steps.num_evaluations > 1 and self.steps.later_noise != "ddim":
            raise ValueError(f"steps.later_noise = {self.steps.later_noise}: tdm's student follows an ODE; use ddim")

    @property
    def updates(self) -> tuple[Update, ...]:
        return (Update(("fake",), "fake_loss"), Update(("generator",), "generator_loss", self.generator_updates_every))

    def sampler(self, problem: Problem) -> FewSteps:
        return self.steps

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        check_first_noise(self.name, self.steps, problem.path)
        return start_players(problem, guidance=self.guidance)

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        uniforms = rng.uniforms(["call", "t", "fake t", "label"])
        call, path = integer_of(uniforms["call"], self.steps.num_evaluations), problem.path
        return {
            "call": call,
            "label": problem.label_of(uniforms["label"]),
            "t": self.levels(self.time_law, uniforms["t"], call, path),
            "fake t": self.levels(self.fake_time_law, uniforms["fake t"], call, path, "fake_time_law"),
            **rng.normals(["z", "eps", "fake eps"], problem.image_shape),
            **draw_scales(rng, {"guidance": self.guidance}),
        }

    def levels(
        self, law: AnyTimeDistribution, uniform: Tensor, call: Tensor, path: Path, setting: str = "time_law"
    ) -> Tensor:
        """Times [B] of the setting's law between the ends of each sample's step; call: [B], the step's number."""
        starts = times_on(self.steps, path, torch.device("cpu"))
        ends = torch.cat([starts[1:], starts.new_full((1,), path.t_min)])
        ranges = zip(ends.tolist(), starts.tolist(), strict=True)
        shares = tuple(share for ends in ranges for share in shares_between(law, path, *ends, setting))
        low, high = constant(shares, uniform.device, torch.float64).view(-1, 2)[call].unbind(1)
        t = law(low + uniform * (high - low), path)
        return t.maximum(
            constant(tuple(ends.tolist()), t.device, torch.float64)[call]
        )  # a law of whole levels may fall short of the end by one

    def fake_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """The fake score learns the law of the points where steps arrive, noised to t."""
        path, t, eps = players.teacher.path, draw["fake t"], draw["fake eps"]
        with torch.no_grad():
            start = self.start(players, draw)
            x0 = self.image(players, draw, start)
            x_t, beta = self.noised(path, draw, start, x0, t, eps)
        estimate = players.fake(x_t, t, condition(players, draw, role="fake loss"))
        weight = denoising_weight(self.fake_weight, path, t, players.fake.sigma_data)
        if self.target == "image":
            error, weight = estimate - x0, weight * self.importance_of(path, x_t, x0, t, eps, beta)
        else:  # score times beta + eps, whose mean square is least at the score of x_t's own law, in units of an image
            sigma, alpha = expand(path.sigma(t), x_t), expand(path.alpha(t), x_t)
            error = expand(beta, x_t) / sigma * (estimate - x_t / alpha) + sigma / alpha * eps
            data = players.fake.sigma_data**2  # the target's variance grows with what the step has left
            weight = weight * data / (data + (path.sigma(t) ** 2 - beta**2) / path.alpha(t) ** 2)
        loss = (expand(weight, x0) * error.square()).mean()
        return Loss(loss, {"denoising": loss.detach()}, carry={"start": start})

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """The step's image is pushed along (D_fake - D_teacher) / nu at the point of arrival, noised to t."""
        start = self.start(players, draw)
        x0 = self.image(players, draw, start)
        field_value = self.field(players, draw, start, x0)
        return Loss(field_loss(x0, field_value), {"field": field_value.abs().mean()})

    @torch.no_grad()
    def field(self, players: Players, draw: Draw, start: Tensor, x0: Tensor) -> Tensor:
        """(D_fake - D_teacher) / nu at the point where the step to x0 arrives, noised; nu: of x0."""
        t = draw["t"]
        x_t, _ = self.noised(players.teacher.path, draw, start, x0, t, draw["eps"])
        guidance = scale_in(draw, {"guidance": self.guidance}, "guidance")
        teacher = players.teacher(x_t, t, condition(players, draw, role="teacher"), guidance=guidance)
        fake = players.fake(x_t, t, condition(players, draw, role="fake"))
        gap, scale = fake - teacher, 1 / sample_normaliser(x0, teacher, self.normaliser_minimum)
        if self.distance == "huber":  # the gradient of sqrt(gap^2 + c^2)
            gap = gap / (gap.square() + self.huber_width**2).sqrt()
        return zero_nonfinite(gap * scale)

    def start(self, players: Players, draw: Draw) -> Tensor:
        """Where the drawn step of each sample starts, [B, ...], without gradient: of one roll-out for the iteration."""
        if "start" in draw:
            return draw["start"]
        with torch.no_grad():
            states = self.steps.trajectory(players.generator, draw["z"], condition(players, draw))
        rows = torch.arange(len(draw["call"]), device=draw["call"].device)
        return torch.stack([state.x for state in states], 1)[rows, draw["call"]]

    def image(self, players: Players, draw: Draw, start: Tensor) -> Tensor:
        """The generator's x0 of the drawn step."""
        t = times_on(self.steps, players.generator.path, start.device)[draw["call"]]
        x0: Tensor = players.generator(start, t, condition(players, draw))
        return x0

    def noised(
        self, path: Path, draw: Draw, start: Tensor, x0: Tensor, t: Tensor, eps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The step's point of arrival, by x0, noised to t with eps: x_t [B, ...], and the noise's scale beta [B]."""
        times, call = times_on(self.steps, path, start.device), draw["call"]
        following = times[(call + 1).clamp_max(len(times) - 1)]
        is_last = call == len(times) - 1
        alpha = torch.where(is_last, 1.0, path.alpha(following))  # the last step arrives at the image itself
        sigma = torch.where(is_last, 0.0, path.sigma(following))
        ratio = sigma / path.sigma(times[call])
        arrived = expand(ratio, x0) * start + expand(alpha - path.alpha(times[call]) * ratio, x0) * x0
        scale = path.alpha(t) / alpha
        beta = (path.sigma(t) ** 2 - (scale * sigma) ** 2).clamp_min(0).sqrt()
        return (expand(scale, x0) * arrived + expand(beta, x0) * eps).to(x0.dtype), beta

    def importance_of(self, path: Path, x_t: Tensor, x0: Tensor, t: Tensor, eps: Tensor, beta: Tensor) -> Tensor:
        """The density of x_t given x0 under the forward process over that by which it was made, [B].

        All noise of x_t, (x_t - alpha x0) / sigma, is not standard normal, as it also holds what the step left.
        """
        noise = (x_t - expand(path.alpha(t), x0) * x0) / expand(path.sigma(t), x0)
        exponent = 0.5 * (eps.double().square() - noise.double().square()).flatten(1)
        if self.importance == "mean":
            return exponent.mean(1).exp()
        return (exponent.sum(1) + exponent.shape[1] * (beta / path.sigma(t)).log()).exp()
