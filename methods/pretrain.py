"""Pretraining: a diffusion model on your data, to be the teacher.  Karras et al. 2022, arXiv:2206.00364.

Implemented: the denoising loss with any weight (EDM's, or the MSE in x0, eps, v, flow), class dropout for guidance,
EDM's non-leaky augmentation.
"""

from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from diffdistill.diffusion.augmentation import augment, check_augmentation, draw_motion
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.sampling import AnySampler, Heun
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, LogNormal
from diffdistill.distillation.losses import DenoisingWeight, denoising_loss
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.settings.schema import Fraction, UserError, field, schema


@schema
class Pretrain(Method):
    """Train a teacher.

    time_law: noise levels; weight: of ||D - x0||^2; class_dropout: share of samples without their class, for
    guidance; augment: probability of each of EDM's transforms, 0 for none (EDM: 0.12 on CIFAR-10), for
    networks that take them as input; teacher_sampler: its sampler.
    """

    name: Literal["pretrain"] = "pretrain"
    time_law: AnyTimeDistribution = field(default_factory=LogNormal)
    weight: DenoisingWeight = "edm"
    class_dropout: Fraction = 0.1
    augment: Fraction = 0.0
    teacher_sampler: AnySampler = field(default_factory=Heun)

    student = "teacher"
    needs_images = True

    @property
    def updates(self) -> tuple[Update, ...]:
        return (Update(("teacher",), "teacher_loss"),)

    def sampler(self, problem: Problem) -> AnySampler:
        return self.teacher_sampler

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        if problem.network is None:
            raise UserError("network: pretrain needs one")
        check_augmentation(problem.network, "augment", self.augment)
        return {"teacher": problem.network}

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        numbers = {
            "t": self.time_law(rng.uniform("t"), problem.path),
            "eps": rng.normal("eps", problem.image_shape),
            "is_dropped": rng.uniform("class dropout") < self.class_dropout,
        }
        return numbers | ({"motion": draw_motion(rng, self.augment)} if self.augment else {})

    def teacher_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """w(t) ||D(x_t, t, c) - x_0||^2 on real data."""
        teacher: Denoiser = players.teacher
        images, cond = batch.images, batch.cond
        if self.augment:
            images, labels = augment(images, draw["motion"])
            cond = replace(cond, augmentation=labels)
        if cond.label is not None and teacher.net.has_null_condition:
            cond = teacher.drop_condition(cond, draw["is_dropped"])
        loss = denoising_loss(teacher, images, draw["eps"], draw["t"], cond, weight=self.weight)
        return Loss(loss, {"denoising": loss.detach()})
