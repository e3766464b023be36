"""DMM: one student of several teachers, by Distillation-Based Model Merging.  Song et al. 2025, arXiv:2504.12364.

Implemented: several teachers (`teachers`, by name) and one student that is told which of them to be: its styles. The
student starts as `teacher`, whose weights it is built over; the squared error in eps, features of any blocks, one mask
for dropped conditions. The style's last layer starts at zero, so that the student starts as `teacher`: the released
code starts it at random. Styles are drawn for each sample; there each process has one.
The student makes the teachers' steps. With one style, or a mixture of several (`--style`), it is a network of its
base's own class, to be sampled, exported, and distilled further.
Not implemented: text encoders that differ between teachers, the merging of further teachers later on.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.diffusion.denoiser import Denoiser, Features
from diffdistill.diffusion.on_device import on_host, upload
from diffdistill.diffusion.path import Prediction
from diffdistill.diffusion.sampling import AnySampler, Heun
from diffdistill.diffusion.step_random import StepRandom, integer_of
from diffdistill.diffusion.time_distributions import AnyTimeDistribution, LogNormal
from diffdistill.distillation.losses import DenoisingWeight, denoising_error, widen
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update, shapes_of
from diffdistill.distillation.score_distillation import GanTaps
from diffdistill.networks.guided import take_weights
from diffdistill.networks.registry import BaseNetwork
from diffdistill.networks.styled import Styled, StyledConfig
from diffdistill.settings.numbers import Width
from diffdistill.settings.schema import Fraction, NonNegative, UserError, field, schema


@schema
class MergeTeachers(Method):
    """steps: the student's sampler.  width: of a style's vector.  class_dropout: share of samples without their
    condition, for teachers with an unconditional estimate.  feature_weight, feature_taps: of the features'
    squared error."""

    name: Literal["merge_teachers"] = "merge_teachers"
    steps: AnySampler = field(default_factory=Heun)
    width: Width = 64
    time_law: AnyTimeDistribution = field(default_factory=LogNormal)
    weight: DenoisingWeight = "eps"
    class_dropout: Fraction = 0.1
    feature_weight: NonNegative = 0.0
    feature_taps: GanTaps = None  # null: the bottleneck

    student = "student"
    needs_images = True
    keeps_teacher = False
    takes_teachers = True
    updates = (Update(("student",), "student_loss"),)

    def sampler(self, problem: Problem) -> AnySampler:
        return self.steps

    def student_model(
        self, network: BaseNetwork, predicts: Prediction, problem: Problem
    ) -> tuple[StyledConfig, Prediction]:
        if not problem.teachers:
            raise UserError("teachers: merge_teachers needs further teachers, by name, besides `teacher`")
        return StyledConfig(base=network, styles=tuple(problem.teachers), width=self.width), predicts

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        """The first teacher's weights and a new input. Raises UserError if the teachers cannot be merged."""
        student = problem.network
        if problem.teacher is None:
            raise UserError("teacher: this method distils several; name a pretrained run, and others under `teachers`")
        if student is None or not isinstance(student.net, Styled):
            raise UserError("init: that student has no styles; leave it out")
        if student.net.names != tuple(problem.teachers):
            styles, names = ", ".join(student.net.names), ", ".join(problem.teachers)
            raise UserError(
                f"init: its styles are {styles}; `teachers` names {names}; use the same names in the same order"
            )
        for name, teacher in problem.teachers.items():
            if self.class_dropout and student.net.has_null_condition and not teacher.net.has_null_condition:
                raise UserError(
                    f"teachers.{name}: has no unconditional estimate, which `teacher` has; use method.class_dropout 0"
                )
            if self.feature_weight and shapes_of(teacher) != shapes_of(problem.teacher):
                raise UserError(
                    f"teachers.{name}: its network differs from that of `teacher`; use method.feature_weight 0"
                )
        take_weights(student, problem.start_of("student"))
        return {"student": student}

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        return {
            "t": self.time_law(rng.uniform("t"), problem.path),
            "eps": rng.normal("eps", problem.image_shape),
            "style": integer_of(rng.uniform("style"), len(problem.teachers)),
            "is_dropped": rng.uniform("class dropout") < self.class_dropout,
        }

    def student_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        """w(t) ||D(x_t, t, c, i) - D_i(x_t, t, c)||^2 + feature_weight mean over taps of MSE(h, h_i), on real data."""
        student: Denoiser = players.student
        style, t, cond = draw["style"], draw["t"], batch.cond
        x_t = student.path.diffuse(batch.images, draw["eps"], t)
        if student.net.has_null_condition and cond.label is not None:
            cond = student.drop_condition(cond, draw["is_dropped"])
        teachers = [module for name, module in players.items() if name.startswith("teacher_")]
        told = replace(cond, style=F.one_hot(style, len(teachers)).to(x_t.dtype))

        def ask(denoiser: Denoiser, rows: Tensor | slice, of: Tensor | slice) -> list[Tensor]:
            asked = (x_t[rows], t[rows], (told if denoiser is student else cond)[rows])
            if not self.feature_weight:
                return [denoiser(*asked)[of]]
            x0, features = denoiser.with_features(*asked, taps=self.feature_taps)
            return [x0[of], *(feature[of] for feature in _listed(features))]

        with torch.no_grad():
            target, *wanted = by_teacher(style, teachers, ask)  # type: ignore[arg-type]
        estimate, *found = ask(student, slice(None), slice(None))
        error = denoising_error(student, estimate, target, t, weight=self.weight)
        logs, total = {"error": error.detach()}, error
        if self.feature_weight:
            pairs = zip(found, wanted, strict=True)
            apart = torch.stack([F.mse_loss(widen(own), widen(other)) for own, other in pairs]).mean()
            logs, total = {**logs, "features": apart.detach()}, error + self.feature_weight * apart
        return Loss(total, logs)


def by_teacher(
    style: Tensor, teachers: Sequence[Denoiser], ask: Callable[[Denoiser, Tensor, slice], list[Tensor]]
) -> list[Tensor]:
    """What each sample's own teacher says of it, in the samples' order.  style: [B], the number of its teacher.

    ask: (teacher, rows, which of the answers count).  A teacher without a sample is asked the first one, for nothing:
    where processes hold parts of it, all of them must call it.
    """
    number_of = on_host(style)
    rows = [(number_of == number).nonzero()[:, 0] for number in range(len(teachers))]
    asked = [upload(own if len(own) else own.new_zeros(1), style.device) for own in rows]
    parts = [ask(teacher, at, slice(len(own))) for teacher, at, own in zip(teachers, asked, rows, strict=True)]
    order = upload(torch.cat(rows).argsort(), style.device)
    return [torch.cat(pieces)[order] for pieces in zip(*parts, strict=True)]


def _listed(features: Features) -> tuple[Tensor, ...]:
    return (features,) if isinstance(features, Tensor) else features
