"""DDK: Distilling Domain Knowledge.  Liu et al. 2024, arXiv:2407.16154, for the classes of an image generator.

Implemented: around a base with a fake score, conditions are drawn more often where student and teacher are further
apart, by a law that follows the gap and has a floor. The paper's is for language models, where the gap of a domain is a
ratio of perplexities; here it is that of the fake score and the teacher on the student's samples. So ours, DERIVED.
Not implemented: weights that keep the classes' shares where these matter; bases where they do are refused.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diffdistill.diffusion.sampling import StepSampler
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Draw, Method, Players, Problem
from diffdistill.distillation.score_distillation import condition, generate
from diffdistill.distillation.wrapper import Wrapper, default_base, methods_above
from diffdistill.settings.limits import MAX_BATCH
from diffdistill.settings.schema import Fraction, Positive, PositiveInt, UserError, field, schema

if TYPE_CHECKING:
    AnyBase = Method
else:
    AnyBase = methods_above("ddk")

SEED = 2407  # of the samples that the gap is measured on
AT_ONCE = 64  # of them in the networks


class LabelLaw(nn.Module):
    """classes: [K] int64; shares: [K] float64, which sum to one."""

    classes: Tensor
    shares: Tensor

    def __init__(self, classes: Tensor, image_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.register_buffer("classes", classes)
        self.register_buffer("shares", torch.full((len(classes),), 1 / len(classes), dtype=torch.float64))

    def draw(self, uniform: Tensor, floor: float) -> Tensor:
        """Uniform numbers [B] in (0, 1) as classes, [B]; each has the share floor / K at least."""
        law = floor / len(self.shares) + (1 - floor) * self.shares
        edges = law.cumsum(0)
        place = torch.searchsorted(edges / edges[-1], uniform.to(edges), right=True)
        return self.classes[place.clamp_max(len(edges) - 1)]


@schema
class DDK(Wrapper):
    """Settings. Players and updates are the base's; `label_law`, which nothing trains, is saved beside them."""

    name: Literal["ddk"] = "ddk"
    base: AnyBase = field(default_factory=default_base)  # the method that distils, with a fake score
    floor: Fraction = 0.2  # share of the samples with uniform classes; 1 is the base
    every: PositiveInt = 25  # iterations between two measurements of the gap
    samples: Annotated[int, Field(ge=1, le=MAX_BATCH)] = 256  # for one of them, spread over the classes
    decay: Fraction = 0.5  # of the previous shares, at each measurement
    ratio: Positive = 0.6  # the noise-to-signal ratio at which student and teacher are compared

    tells_teacher_class = False  # a class that is forgotten would be drawn over

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        """Raises UserError where the base has no fake score, or the classes' shares matter to it."""
        made = self.base.players(problem)
        if "fake" not in made or not isinstance(getattr(self.base, "steps", None), StepSampler):
            raise UserError(f"method.base.name = {self.base.name!r}: has no fake score, which ddk needs")
        if self.base.needs_images:
            raise UserError("method.base: compares with real images, whose class shares are fixed; use gan_weight 0")
        for setting in ("fake_guidance", "fake_training_guidance"):
            if getattr(self.base, setting, 1.0) not in (None, 1.0):
                raise UserError(f"method.base.{setting}: its unconditional estimate depends on the class shares; use 1")
        if problem.num_classes < 2:
            raise UserError("method.name = 'ddk': the teacher has no classes to choose from")
        classes = torch.tensor(problem.classes or tuple(range(problem.num_classes)))
        return made | {"label_law": LabelLaw(classes, problem.image_shape)}

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        """The base's numbers, and those that its labels are drawn by."""
        drawn = self.base.draw(rng, problem)
        names = [name for name in drawn if name.endswith("label")]
        uniforms = rng.grouped(getattr(self.base, "samples_per_condition", 1)).uniforms(names)
        return drawn | {f"{name} uniform": uniforms[name] for name in names}

    def call(self, function: str, players: Players, draw: Draw, batch: Batch) -> Any:
        """The base's, of labels by the law."""
        return self.base.call(function, players, self._by_law(players, draw), batch)

    def _by_law(self, players: Players, draw: Draw) -> dict[str, Tensor]:
        changed = dict(draw)
        for name in [name.removesuffix(" uniform") for name in draw if name.endswith("label uniform")]:
            label = players.label_law.draw(draw[f"{name} uniform"], self.floor)
            for role in [other for other in draw if other.startswith(f"{name} for ")]:  # dropped stays dropped
                changed[role] = torch.where(draw[role] == draw[name], label, draw[role])
            changed[name] = label
        return changed

    def after_step(self, players: Players, stored: Mapping[str, Tensor], step: int) -> None:
        """Measure the gap of each class when it is due, and let the law follow its share."""
        self.base.after_step(players, stored, step)
        if step % self.every == 0:
            gaps, law = self.gaps(players, step), players.label_law
            found = gaps / gaps.sum()
            found = torch.where(
                found.isfinite().all(), found, law.shares
            )  # of no gap, or of no number, nothing is said
            law.shares.lerp_(found, 1 - self.decay)
            law.shares.div_(law.shares.sum())

    def gaps(self, players: Players, step: int) -> Tensor:
        """|D_fake - D_teacher| of the student's samples, the mean over each class's, [K]. Of `step` alone, so that
        all processes find the same."""
        law = players.label_law
        rows = torch.arange(max(self.samples, len(law.classes)), device=law.classes.device)
        learning = [player for player in players.values() if player.training]
        for player in learning:
            player.eval()
        apart = torch.cat([self._apart(players, StepRandom(SEED, step, some)) for some in rows.split(AT_ONCE)])
        for player in learning:
            player.train()
        which = rows % len(law.classes)
        return torch.zeros_like(law.shares).index_add_(0, which, apart) / torch.bincount(which)

    def _apart(self, players: Players, rng: StepRandom) -> Tensor:
        """|D_fake - D_teacher| of the samples with these numbers, which go round the classes, [B]."""
        law, steps, path = players.label_law, self.base.steps, players.teacher.path  # type: ignore[attr-defined]
        count, label = steps.num_evaluations, law.classes[rng.index % len(law.classes)]
        noises = rng.normals(["z", "eps", *(f"fresh {i}" for i in range(count - 1))], law.image_shape)
        draw = {**noises, "label": label, "step": torch.tensor(count - 1)}
        x = generate(players, draw, steps)
        t = path.whole(path.time_of_ratio(torch.full((len(x),), self.ratio, dtype=torch.float64, device=x.device)))
        x_t, cond = path.diffuse(x, draw["eps"], t), condition(players, draw)
        return (players.fake(x_t, t, cond) - players.teacher(x_t, t, cond)).double().flatten(1).norm(dim=1)
