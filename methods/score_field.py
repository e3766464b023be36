"""Score fields: SDS, VSD, ESD, ASD, CSD, CSM, ISM, TSM and BSD, on images or on a generator.

Poole et al. 2022, arXiv:2209.14988 (SDS); Wang et al. 2023, arXiv:2305.16213 (VSD); Wang et al. 2024, arXiv:2401.00909
(ESD); Ma et al. 2024, arXiv:2407.02040 (ASD); Yang et al. 2024, arXiv:2410.21299 (CSD, CSM); Liang et al. 2023,
arXiv:2311.11284 (ISM); Miao et al. 2024, arXiv:2405.11252 (TSM); Huang et al. 2024, arXiv:2407.13976 (BSD).

Implemented: what pulls (the guided teacher, or BSD's balance of class and smoothness), what is subtracted, where the
image is noised (at random, or by inversion) and the weight, each a setting; images as parameters, any network that
draws them, or a generator; a fake score, with LoRA where `lora` names it. docs/score-fields.md has a recipe for each.
Not implemented: noise levels that shrink during the run; perpendicular negative prompts; BSD's weight of its automatic
form; everything of the 3-D systems that is not their field. Only with `subtract: fake` is the teacher's law at rest.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.guidance.check import check_null_condition
from diffdistill.diffusion.sampling import FewSteps, transfer
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, Karras, LogNormal
from diffdistill.distillation.losses import DenoisingWeight, field_loss, zero_nonfinite
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.distillation.scales import FakeScale, Scale, scale_in
from diffdistill.distillation.score_distillation import (
    condition,
    critics_loss,
    draw_step,
    generate,
    sample_at_hand,
    start_players,
)
from diffdistill.distillation.score_fields import (
    FieldWeight,
    estimate_of,
    inverted,
    limit_pixels,
    noise_of,
    noisier_time,
    shortest_mix,
    way_from_clean,
    weighted,
)
from diffdistill.settings.numbers import SamplingSteps
from diffdistill.settings.schema import Fraction, Positive, UserError, field, schema

Subtracted = Literal["noise", "fake", "noisier", "no_class", "cleaner", "nothing"]

SUBTRACTS = {"random": ("noise", "fake", "noisier", "no_class"), "inverted": ("no_class", "cleaner")}
BALANCES = ("noise", "fake", "nothing")


@schema
class ScoreField(Method):
    """The field is w(t) (eps_P - eps_S), of noise estimates; no gradient is taken through them."""

    name: Literal["score_field"] = "score_field"
    steps: FewSteps = field(default_factory=FewSteps)  # the sampling steps of a generator
    generator: Literal["teacher", "model"] = "teacher"  # starts as the teacher, or is the run's `model`
    pull: Literal["teacher", "balanced"] = "teacher"  # P: the guided teacher; or BSD's mix, see `smoothing`
    subtract: Subtracted = "fake"  # S: the drawn noise (SDS), a fake score (VSD) or the teacher's estimate elsewhere
    noising: Literal["random", "inverted"] = "random"  # x_t by the drawn noise, or by steps of DDIM inversion
    weight: FieldWeight = "sigma^2"  # w(t)
    guidance: Scale = 1.0  # w of D_u + w (D_c - D_u), of P
    fake_guidance: FakeScale = 1.0  # of the fake score; ESD is 1 - lambda
    fake_class_dropout: Fraction = 0.1  # in the fake score's loss, where it is guided
    fake_updates: SamplingSteps = 1  # updates of the fake score per update of the images
    time_law: AnyTimeDistribution = field(default_factory=Karras)  # noise levels of the field
    fake_time_law: AnyTimeDistribution = field(default_factory=LogNormal)  # those of the fake score's loss
    fake_weight: DenoisingWeight = "edm"  # of its squared errors, as `weight` of `pretrain`
    gap: Fraction = 0.1  # noisier: at most this share beyond t; cleaner: this much of the range before t
    gamma: Fraction = 1.0  # cleaner: 1 is ISM; TSM is 0.3, nearer to t
    inversion_steps: SamplingSteps = 5  # of DDIM, from a nearly clean image
    inversion_stride: Fraction = 0.2  # of the range, a step of them
    smoothing: Positive = 1.25  # balanced: weight of eps_0 - eps_S, relative to eps_c - eps_0
    pixel_limit: Positive | None = None  # of a pixel's field, in every channel; null: none

    student = "generator"
    needs_images = False
    tells_teacher_class = True

    def __post_init__(self) -> None:
        choices = BALANCES if self.pull == "balanced" else SUBTRACTS[self.noising]
        if self.subtract not in choices or (self.pull == "balanced" and self.noising != "random"):
            how = f"pull {self.pull} and noising {self.noising}"
            raise ValueError(f"subtract: {self.subtract} does not go with {how}; choose from {', '.join(choices)}")
        if self.pull == "balanced" and self.guidance != 1:
            raise ValueError("guidance: pull balanced sets the weight of the class; use 1")

    @property
    def trains_network(self) -> bool:
        return self.generator == "model"

    @property
    def scales(self) -> dict[str, FakeScale]:
        fake = {"fake_guidance": self.fake_guidance} if self.subtract == "fake" else {}
        return {"guidance": self.guidance, **fake}

    @property
    def updates(self) -> tuple[Update, ...]:
        if self.subtract != "fake":
            return (Update(("generator",), "generator_loss"),)
        return (Update(("generator",), "generator_loss", self.fake_updates), Update(("fake",), "fake_loss"))

    def sampler(self, problem: Problem) -> FewSteps:
        return self.steps

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        """Raises UserError where the field is zero by itself, or needs a class that the teacher cannot leave out."""
        players = start_players(problem, **self.scales)
        assert problem.teacher is not None
        if problem.num_classes and (self.pull == "balanced" or self.subtract in ("no_class", "cleaner")):
            check_null_condition(problem.teacher, f"method.subtract = {self.subtract}, with pull {self.pull},")
        if not problem.num_classes and (self.pull == "balanced" or self.subtract == "no_class"):
            raise UserError(f"method.subtract = {self.subtract}, pull {self.pull}: the teacher has no classes")
        if problem.network is not None and self.trains_network:
            players["generator"] = problem.network
        return players if self.subtract == "fake" else {"generator": players["generator"]}

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        laws = {"": self.time_law, **({"fake ": self.fake_time_law} if self.subtract == "fake" else {})}
        numbers = draw_step(
            rng, problem, self.steps, laws, scales=self.scales, fake_class_dropout=self.fake_class_dropout
        )
        path, t = problem.path, numbers["t"]
        if self.subtract == "noisier":
            numbers["noisier t"] = noisier_time(path, t, self.gap * rng.uniform("gap"))
        if self.noising == "inverted":
            gap, steps = self.gap if self.subtract == "cleaner" else 0.0, self.inversion_steps
            way = way_from_clean(path, t, gap=gap, num_steps=steps, stride=self.inversion_stride)
            numbers["way"] = torch.stack(way, 1)
        return numbers

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """Move the images down the field."""
        x = generate(players, draw, self.steps)
        field_value = self.field(players, draw, x)
        return Loss(field_loss(x, field_value), {"field": field_value.abs().mean()}, carry={"x": x.detach()})

    @torch.no_grad()
    def field(self, players: Players, draw: Draw, x: Tensor) -> Tensor:
        """w(t) (eps_P - eps_S) at x noised, [B, ...]; 0 for a sample of which it is not finite."""
        teacher, t, cond = players.teacher, draw["t"], condition(players, draw, role="teacher")
        x_t, subtracted = self._subtracted(players, draw, x)
        pull = teacher(x_t, t, cond, guidance=scale_in(draw, self.scales, "guidance"))
        pulled = teacher.convert(pull, "eps", x_t, t)
        if self.pull == "balanced":
            free = noise_of(teacher, x_t, t, cond, guidance=None)
            gap = shortest_mix(pulled - free, self.smoothing * (free - subtracted))
        else:
            gap = pulled - subtracted
        made = weighted(self.weight, teacher.path, gap, t, x=x, pull=pull)
        return zero_nonfinite(limit_pixels(made, self.pixel_limit))

    def _subtracted(self, players: Players, draw: Draw, x: Tensor) -> tuple[Tensor, Tensor]:
        """x_t, and eps_S."""
        teacher, path, t, eps = players.teacher, players.teacher.path, draw["t"], draw["eps"]
        cond = condition(players, draw, role="teacher")
        if self.noising == "inverted":
            way = draw["way"].unbind(1)
            s, x_s = way[-1], inverted(teacher, path.diffuse(x, eps, way[0]), way, cond)
            x0 = estimate_of(teacher, x_s, s, cond, guidance=None)
            if self.subtract == "no_class":  # where s is t
                return x_s, teacher.convert(x0, "eps", x_s, s)
            between = torch.lerp(s, t, math.sqrt(1 - self.gamma**2))
            x_t, x_between = (transfer(path, x_s, x0, s, end) for end in (t, between))
            return x_t, noise_of(teacher, x_between, between, cond, guidance=None)
        x_t = path.diffuse(x, eps, t)
        if self.subtract == "fake":
            guidance = scale_in(draw, self.scales, "fake_guidance")
            return x_t, noise_of(players.fake, x_t, t, condition(players, draw, role="fake"), guidance=guidance)
        if self.subtract == "noisier":
            later = draw["noisier t"]
            return x_t, noise_of(teacher, path.diffuse(x, eps, later), later, cond)
        if self.subtract == "no_class":
            return x_t, noise_of(teacher, x_t, t, cond, guidance=None)
        return x_t, eps if self.subtract == "noise" else torch.zeros_like(eps)

    def fake_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """Denoising on the images that the field has moved last."""
        x = sample_at_hand(players, draw, self.steps)
        return critics_loss(players, draw, batch, x, weight=self.fake_weight, gan_weight=None, features="fake")
