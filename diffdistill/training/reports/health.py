"""Health signals of a distillation: numbers with a band, and plain words with what to try when one leaves it.

A distillation's losses do not tell: the generator's swings around zero when all is well. These do. All are measured
on fresh samples of the student as it trains, at three noise levels, without gradient.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from diffdistill.data.source import ImageSource
from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser, device_of
from diffdistill.diffusion.path import expand
from diffdistill.diffusion.sampling import AnySampler
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.losses import denoising_weight
from diffdistill.distillation.method import Batch, Method, Players, Problem
from diffdistill.settings.limits import MAX_BATCH
from diffdistill.settings.numbers import NonNegativeInt
from diffdistill.settings.schema import PositiveInt, schema

RATIOS = (0.2, 0.6, 2.0)  # the noise-to-signal ratios that are looked at
REMEMBERED = 50  # readings of a gradient norm that its usual size is taken from


@schema
class HealthConfig:
    """every: steps between readings; samples: of the student per reading; patience: consecutive readings outside a band
    before a warning; warmup_steps: iterations without warnings at the start; distance_every: steps between two
    measurements of the distance to the teacher, 0 for none."""

    every: PositiveInt = 50
    samples: Annotated[int, Field(ge=8, le=MAX_BATCH)] = 64
    patience: PositiveInt = 2
    warmup_steps: NonNegativeInt = 100
    distance_every: NonNegativeInt = 250


@dataclass(frozen=True)
class Band:
    """low .. high is healthy. too_low, too_high: what it means and what to try."""

    low: float
    high: float
    too_low: str
    too_high: str


BANDS = {
    "fake_lag": Band(
        0.0,
        1.1,
        "",
        "the fake score denoises the student's samples worse than the teacher does: it lags. Try more "
        "fake_updates, a higher learning rate for `fake`, or a lower one for `generator`",
    ),
    "cosine": Band(
        0.2,
        0.99999,
        "teacher and fake score pull the samples in different directions: one of them is fed the wrong noise level, "
        "condition or prediction, or the fake score has diverged. Look at the preview; try a lower "
        "learning rate for `fake`",
        "fake score and teacher are the same function on the student's samples, so the student gets no gradient: is "
        "the fake score trained at all? Look at fake/gradient_norm. Try a higher learning rate for `fake`",
    ),
    "mean_drift": Band(
        0.0,
        0.5,
        "",
        "the mean of the samples has left the data's. A wrong sign or a learning rate far too high causes this; try a "
        "tenth of the generator's learning rate, and guidance 1",
    ),
    "std_ratio": Band(
        0.6,
        1.4,
        "the samples have lost contrast. Try a lower learning rate, or more fake_updates",
        "the samples are much more spread than the data: they diverge. Try a tenth of the generator's learning "
        "rate; check guidance, which widens them too",
    ),
    "diversity": Band(
        0.4,
        1.6,
        "samples of one condition look alike: the student drops modes. Try a GAN or regression term, or a larger "
        "gan_weight",
        "samples of one condition differ more than the data's: the student ignores its condition, or diverges. Look "
        "at the preview. Try a lower learning rate",
    ),
    "discriminator_accuracy": Band(
        0.0,
        0.97,
        "",
        "the discriminator tells every sample from real data, so its gradient says little. Try a lower "
        "gan_fake_weight, or a higher gan_weight",
    ),
    "teacher_rise": Band(
        0.0,
        0.1,
        "",
        "the student's samples move away from the teacher's, to which they were nearer before. Take an earlier "
        "checkpoint; try a smaller gan_weight, or gan_features: teacher",
    ),
    "memorisation": Band(
        0.0,
        1.5,
        "",
        "the student does better on its stored pairs than on new ones: it memorises them (teacher hacking). Try "
        "more pairs, or fewer steps",
    ),
    "gradient_jump": Band(
        0.0,
        20.0,
        "",
        "a gradient is many times its usual size. Try clip_norm at its usual size, or a lower learning rate",
    ),
}
"""Every signal's band. The defaults were set on digits; a signal's meaning does not depend on the data."""


@dataclass(frozen=True)
class Reference:
    """The data's side of the comparisons: mean and std over all pixels, distance within one condition."""

    mean: float
    std: float
    distance: float

    @staticmethod
    def of(images: Tensor, labels: Tensor | None) -> "Reference":
        """images: [N, ...]; labels: [N] or None."""
        return Reference(float(images.mean()), float(images.std()), mean_distance(images, labels))

    @staticmethod
    def of_source(source: ImageSource, members: Tensor, count: int = 512) -> "Reference":
        """Of `count` images spread over those numbered `members`; NaN where there are none."""
        if not len(members):
            return Reference(math.nan, math.nan, math.nan)
        rows = members[torch.linspace(0, len(members) - 1, min(count, len(members))).long()]
        labels = source.labels
        return Reference.of(source.rows(rows), None if labels is None else labels[rows.to(labels.device)])


def mean_distance(images: Tensor, labels: Tensor | None) -> float:
    """Mean RMS distance between two images of one condition. images: [N, ...]."""
    flat = images.flatten(1).double()
    apart = torch.cdist(flat, flat) / math.sqrt(flat.shape[1])
    same = torch.ones_like(apart, dtype=torch.bool) if labels is None else labels[:, None] == labels
    same.fill_diagonal_(False)
    return float(apart[same].mean()) if bool(same.any()) else math.nan


class Health:
    """Examines a run every so often and remembers what has already been said."""

    def __init__(self, config: HealthConfig, reference: Reference) -> None:
        """reference: what it lacks (NaN) is not compared."""
        self.config, self.reference = config, reference
        self._outside: dict[str, int] = {}
        self._norms: dict[str, list[float]] = {}

    def is_due(self, step: int, log_every: int) -> bool:
        """Whether a multiple of `every` has passed since the last report, `log_every` steps ago."""
        return step // self.config.every > (step - log_every) // self.config.every

    @torch.no_grad()
    def examine(
        self,
        players: Players,
        student: str,
        sampler: AnySampler,
        problem: Problem,
        *,
        step: int,
        seed: int,
    ) -> dict[str, float]:
        """The signals that these players allow, by name.

        student: the player that makes the images, of the setting's classes.  The numbers depend on (seed, step) alone.
        """
        generator = players[student]
        device = device_of(generator)
        rng = StepRandom(seed, step, torch.arange(self.config.samples, device=device))
        num_classes = int(players.teacher.num_classes) if "teacher" in players else 0
        known = torch.tensor(problem.classes or range(max(num_classes, 1)), device=device)
        label = known[torch.arange(self.config.samples, device=device) % min(len(known), self.config.samples // 8)]
        cond = Cond(label=label) if num_classes else Cond()
        was_training = generator.training
        generator.eval()
        shape = problem.image_shape
        x = sampler(generator, rng.normal("health", shape), cond, fresh_noise=rng.fresh_noise(shape))  # type: ignore[arg-type]
        generator.train(was_training)
        signals: dict[str, float] = {}
        if not math.isnan(self.reference.std):
            signals["mean_drift"] = abs(float(x.mean()) - self.reference.mean) / self.reference.std
            signals["std_ratio"] = float(x.std()) / self.reference.std
        if not math.isnan(self.reference.distance):
            signals["diversity"] = mean_distance(x, cond.label) / self.reference.distance
        if "fake" in players and "teacher" in players:
            signals |= compare_scores(players.teacher, players.fake, x, rng, cond)
        return signals

    @torch.no_grad()
    def examine_method(
        self, method: Method, players: Players, problem: Problem, stored: Mapping[str, Tensor], *, step: int, seed: int
    ) -> dict[str, float]:
        """The signals of the method's own.  stored: what it prepared.  They depend on (seed, step) alone."""
        device, learning = (
            device_of(players[method.student]),
            [player for player in players.values() if player.training],
        )
        for player in learning:
            player.eval()
        rng = StepRandom(seed, step, torch.arange(self.config.samples, device=device))
        found = method.signals(players, rng, problem, Batch(torch.empty(0, device=device), stored=stored))
        for player in learning:
            player.train()
        return found

    def judge(self, step: int, signals: Mapping[str, float], means: Mapping[str, float]) -> list[str]:
        """Warnings after a reading: one line for each signal that has just been outside for long enough.

        means: the run's own logged means, of which gradient norms and the discriminator's accuracy are looked at.
        """
        found = {name: value for name, value in signals.items() if name in BANDS} | self._gradient_jumps(means)
        if "fake/accuracy" in means:
            found["discriminator_accuracy"] = means["fake/accuracy"]
        said = []
        for name, value in found.items():
            band = BANDS[name.partition(":")[0]]
            is_outside = not band.low <= value <= band.high  # NaN is outside too
            counts = is_outside and step > self.config.warmup_steps
            self._outside[name] = self._outside.get(name, 0) + 1 if counts else 0
            if self._outside[name] == self.config.patience:
                words = band.too_low if value < band.low else band.too_high
                limits = f"healthy: {band.low:g} to {band.high:g}"
                said.append(f"step {step}: {name} = {value:.4g} ({limits}): {words}")
        return said

    def _gradient_jumps(self, means: Mapping[str, float]) -> dict[str, float]:
        """Each player's gradient norm over its usual one."""
        jumps = {}
        for name, value in means.items():
            if name.endswith("/gradient_norm"):
                usual = self._norms.setdefault(name, [])
                if len(usual) >= 3:
                    jumps[f"gradient_jump:{name.partition('/')[0]}"] = value / max(median(usual), 1e-12)
                self._norms[name] = [*usual, value][-REMEMBERED:]
        return jumps


def compare_scores(teacher: Denoiser, fake: Denoiser, x: Tensor, rng: StepRandom, cond: Cond) -> dict[str, float]:
    """fake_lag: the fake score's denoising loss on x over the teacher's, EDM's weight.  cosine: of (x - D_teacher)
    and (x - D_fake) at the same x_t, mean over samples and noise levels.

    A fake score that is at its optimum has the lowest denoising loss of all on its student's samples: lag <= 1.
    """
    losses, cosines = {"teacher": 0.0, "fake": 0.0}, []
    for number, ratio in enumerate(RATIOS):
        path = teacher.path
        t = path.time_of_ratio(torch.full((len(x),), ratio, dtype=torch.float64, device=x.device))
        x_t = path.diffuse(x, rng.normal(f"health eps {number}", tuple(x.shape[1:])), t)
        weight = expand(denoising_weight("edm", path, t, teacher.sigma_data), x)
        gaps = {"teacher": x - teacher(x_t, t, cond), "fake": x - fake(x_t, t, cond)}
        for name, gap in gaps.items():
            losses[name] += float((weight * gap**2).mean())
        cosines.append(
            F.cosine_similarity(gaps["teacher"].flatten(1).double(), gaps["fake"].flatten(1).double()).mean()
        )
    return {"fake_lag": losses["fake"] / max(losses["teacher"], 1e-12), "cosine": float(torch.stack(cosines).mean())}
