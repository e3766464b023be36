"""SiD: Score identity Distillation.  Zhou et al. 2024, arXiv:2404.04057.

Implemented: the score identity loss through both networks for any alpha, with the detached normaliser or a weight of
time; SiDA's adversarial share on the fake score's bottleneck, without parameters of its own (arXiv:2410.14919);
long-short guidance with its four scales (arXiv:2406.01561); several steps, matched as a uniform mixture, with Zero-CFG
and Anti-CFG (arXiv:2505.12674).
Not implemented: EDM2's learned uncertainty u(sigma) and its forced weight normalisation.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.augmentation import augment, check_augmentation, draw_motion
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, Karras, LogNormal
from diffdistill.distillation.losses import (
    DenoisingWeight,
    denoising_error,
    denoising_weight,
    gan_discriminator_loss,
    gan_generator_loss,
    widen,
)
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.distillation.score_distillation import (
    SampleWeight,
    check_trained,
    condition,
    draw_step,
    fake_sample,
    judged_sample,
    mean_of_finite,
    score_identity,
    start_players,
)
from diffdistill.networks.discriminator import features_shapes
from diffdistill.settings.numbers import NonNegativeInt, SamplingSteps
from diffdistill.settings.schema import Fraction, NonNegative, Number, Positive, field, schema

Images = NonNegativeInt
MAX_LOGIT = 10.0  # SiDA's clamp of the generator's logits


@schema
class SiD(Method):
    """Settings, in the papers' terms; sums over pixels and means over samples, as there.

    Zero-CFG: the three guidance scales of the fake score are 0, the teacher's 1. Anti-CFG: they are negative.
    """

    name: Literal["sid"] = "sid"
    steps: FewSteps = field(default_factory=FewSteps)
    alpha: Number = 1.2  # 0.5 to 1 point the right way from any start; more needs a start near the teacher
    weight: SampleWeight = "nu"
    normaliser_minimum: Positive = 1e-5
    time_law: AnyTimeDistribution = field(default_factory=lambda: Karras(ratio_max=24.41))
    fake_time_law: AnyTimeDistribution = field(default_factory=LogNormal)
    fake_weight: DenoisingWeight = "edm"
    fake_updates: SamplingSteps = 1  # exactly this many to one generator update
    fake_augment: Fraction = 0.0
    guidance: Number = 1.0  # kappa_4, of the teacher
    fake_training_guidance: Number = 1.0  # kappa_1, of the D that the fake score's loss trains
    fake_guidance: Number = 1.0  # kappa_2, of the fake score in its difference from the teacher
    residual_guidance: Number = 1.0  # kappa_3, of the fake score in its difference from the image
    fake_class_dropout: Fraction = 0.1  # in the fake score's loss, where one of its scales is not 1
    loss_scale: Positive = 100.0
    gan_weight: NonNegative = 0.0  # SiDA on EDM: 0.01
    gan_fake_weight: NonNegative = 1.0
    generator_start_images: Images = 0  # SiDA: 100_000
    gan_start_images: Images = 0  # SiDA: 200_000

    student = "generator"
    tells_teacher_class = True

    def __post_init__(self) -> None:
        check_trained(self.gan_fake_weight, is_asked=self.gan_weight > 0, why="gan_weight is above 0")
        if self.gan_weight and not {self.fake_training_guidance, self.fake_guidance} <= {0.0, 1.0}:
            raise ValueError(
                "gan_weight: the discriminator takes one condition; the fake score's scales must be 0 or 1"
            )

    @property
    def needs_images(self) -> bool:
        return self.gan_weight > 0

    @property
    def updates(self) -> tuple[Update, ...]:
        of_all = ("fake_weights", "sample_weights") if self.gan_weight else (None, None)
        return (
            Update(("fake",), "fake_loss", statistics=of_all[0]),
            Update(
                ("generator",),
                "generator_loss",
                self.fake_updates,
                self.generator_start_images,
                of_all[1],
                more_from_images=self.gan_start_images if self.gan_weight else 0,
            ),
        )

    def sampler(self, problem: Problem) -> FewSteps:
        return self.steps

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        scales = ("guidance", "fake_training_guidance", "fake_guidance", "residual_guidance")
        players = start_players(problem, **{name: getattr(self, name) for name in scales})
        assert problem.teacher is not None
        check_augmentation(problem.teacher, "fake_augment", self.fake_augment)
        if self.gan_weight:
            features_shapes(problem.teacher, problem.image_shape)  # raises where there is no bottleneck
        return players

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        laws = {"": self.time_law, "fake ": self.fake_time_law}
        numbers = draw_step(rng, problem, self.steps, laws, samples=("", "fake "))
        numbers["fake is_dropped"] = rng.uniform("fake class dropout") < self.fake_class_dropout
        numbers["is_gan_on"] = torch.tensor(rng.step * problem.batch_size >= self.gan_start_images)
        if self.fake_augment:
            numbers["fake motion"] = draw_motion(rng, self.fake_augment)
            numbers["real motion"] = draw_motion(rng, self.fake_augment, "real ")
        return numbers

    def generator_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """The score identity loss, through both score networks, and SiDA's adversarial share."""
        x, x_t, teacher, weight = self._judged(players, draw)
        t, cond = draw["t"], condition(players, draw, role="fake")
        is_adversarial = self.gan_weight > 0 and bool(draw["is_gan_on"])
        ask = players.fake.with_features if is_adversarial else players.fake
        seen = ask(x_t, t, cond, guidance=self.fake_guidance)
        fake, features = seen if is_adversarial else (seen, None)
        residual = fake
        if self.residual_guidance != self.fake_guidance:
            residual = players.fake(x_t, t, cond, guidance=self.residual_guidance)
        identity = mean_of_finite(weight * score_identity(x, teacher, fake, residual, alpha=self.alpha))
        logs = {"identity": identity.detach(), "gap": (teacher - fake).detach().abs().mean()}
        if features is None:
            return Loss(self.loss_scale * identity, logs)
        adversarial = gan_generator_loss(bottleneck_logits(features).clamp(-MAX_LOGIT, MAX_LOGIT))
        scale = x[0].numel() * draw.get("all weight", weight).mean()
        total = 0.5 * self.loss_scale * identity + 0.5 * self.gan_weight * scale * adversarial
        return Loss(total, logs | {"gan": adversarial.detach()})

    def fake_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """Denoising on fresh samples, and SiDA's discrimination at the same time, noise and class as theirs."""
        if self.gan_weight and batch.cond.label is not None:
            draw = {**draw, "fake label": batch.cond.label}
        # Without a condition for some, and their images too, the fake score knows their law as a whole (SiD-LSG).
        is_guided = {self.fake_training_guidance, self.fake_guidance, self.residual_guidance} != {1.0}
        drops = is_guided and players.fake.net.has_null_condition  # others are told w instead
        x, cond = fake_sample(players, draw, self.steps, is_dropped=draw["fake is_dropped"] if drops else None)
        path, t, eps, guidance = players.teacher.path, draw["fake t"], draw["fake eps"], self.fake_training_guidance
        ask = players.fake.with_features if self.gan_weight else players.fake
        seen = ask(path.diffuse(x, eps, t), t, cond, guidance=guidance)
        estimate, features = seen if self.gan_weight else (seen, None)
        denoising = denoising_error(players.fake, estimate, x, t, weight=self.fake_weight)
        logs, total = {"denoising": denoising.detach()}, x[0].numel() * denoising
        if features is None:
            return Loss(total, logs)
        images = batch.images
        if self.fake_augment:  # of its own, as in SiDA's code
            images, labels = augment(images, draw["real motion"])
            cond = replace(cond, augmentation=labels)
        tapped = players.fake.features(path.diffuse(images, eps, t), t, cond, guidance=guidance)
        discrimination = gan_discriminator_loss(bottleneck_logits(tapped), bottleneck_logits(features)) / 2
        weight = draw.get("all fake weight", self.fake_weights(players, draw, batch)["fake weight"]).mean()
        logs["gan"] = discrimination.detach()
        return Loss(total + self.gan_fake_weight * weight * discrimination, logs)

    def fake_weights(self, players: Players, draw: Draw, batch: Batch) -> Mapping[str, Tensor]:
        """The weight of time of each sample's denoising error, which SiDA's discrimination has in the mean."""
        fake = players.fake
        return {"fake weight": denoising_weight(self.fake_weight, fake.path, draw["fake t"], fake.sigma_data)}

    def sample_weights(self, players: Players, draw: Draw, batch: Batch) -> Mapping[str, Tensor]:
        """The weight of each sample's identity loss, which SiDA's adversarial share has in the mean."""
        return {"weight": self._judged(players, draw)[3]}

    def _judged(self, players: Players, draw: Draw) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weight, minimum = self.weight, self.normaliser_minimum
        return judged_sample(players, draw, self.steps, guidance=self.guidance, weight=weight, minimum=minimum)


def bottleneck_logits(features: Tensor) -> Tensor:
    """SiDA's discriminator: the mean over channels of a bottleneck [B, C, h, w], as logits [B, h, w]."""
    return widen(features).mean(1)
