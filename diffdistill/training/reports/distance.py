"""How far the student's samples are from its teacher's, while it trains, and whether it moves away.

The other signals look at one sample, or at the mean of all; none of them sees a student whose samples are sharp,
various and right on the average, and of another law. This one is the Frechet distance of the averaged student's
samples to the teacher's, less what the teacher has to itself at so few samples, as a share of the teacher's variance:
0 at the teacher, about 1 where nothing is alike.

The teacher's samples are made once, and the student's are always of the same noise. What is by chance in either is then
in every reading, and cancels in the difference of two: the readings are biased all alike, and a rise shows that a
single distance of so few samples would not. The interval of a rise is taken from random halves of the student's noises,
the same ones in every reading.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path as FilePath
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import device_of
from diffdistill.diffusion.gaussians import frechet_distance
from diffdistill.diffusion.sampling import AnySampler
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Method, Problem
from diffdistill.distributed.processes import Processes
from diffdistill.settings.reading import read_log
from diffdistill.storage.atomic import write_tensors_atomically, write_text_atomically
from diffdistill.storage.checkpoint import read_tensors

READINGS = "distance.jsonl"
MOST, FEWEST = 1024, 256
"""Samples of either side; below the fewest the signal is off."""
FEATURES = 64
"""Numbers that a sample is described by, at most: so few samples say nothing of more."""
HALVES = 16
SMOOTHED = 3
"""Readings whose mean is compared."""
SHARE, EVALUATIONS = 0.03, 8
"""Of the run's own evaluations of networks, counted as 8 for each image of a batch, what either side may take."""
DEVIATIONS = 1.96
LEAST = 0.01
"""Of the teacher's variance: what a student that is nearer than so far rises by is measured in."""


@dataclass(frozen=True)
class Reading:
    """count: of samples.  distance: of them all.  halves: the same of fixed halves of them."""

    step: int
    count: int
    distance: float
    halves: tuple[float, ...]

    @property
    def line(self) -> str:
        """As JSON."""
        return json.dumps({"step": self.step, "count": self.count, "distance": self.distance, "halves": self.halves})


@dataclass
class DistanceCurve:
    """The readings of a run.  teacher: [M, d], features of the teacher's samples.  readings: those so far."""

    teacher: Tensor
    readings: list[Reading] = field(default_factory=list)

    def read(self, step: int, student: Tensor) -> Reading:
        """Take a reading of features [N, d], of the same noises every time. What is not finite is infinitely far."""
        generator = torch.Generator().manual_seed(len(student))
        halves = []
        for _ in range(HALVES):
            chosen = torch.randperm(len(student), generator=generator)[: len(student) // 2]
            halves.append(self._of(student[chosen.to(student.device)]))
        reading = Reading(step, len(student), self._of(student), tuple(halves))
        self.readings = [*(one for one in self.readings if one.step < step), reading]
        return reading

    @property
    def value(self) -> float:
        """The newest distance: 0 at the teacher, less by chance."""
        return self.readings[-1].distance

    @property
    def rise(self) -> float:
        """By how much the mean of the newest readings is surely above the least such mean before them, as a share of
        that, or of a hundredth of the variance where that is more; 0 where it is not, comes back, or they are too few.

        Surely: the low end of the difference's 95 % interval.  The means are of SMOOTHED readings in a row, as a
        student that goes nowhere swings.
        """
        if not math.isfinite(self.value):
            return math.inf
        means = [_mean(self.readings[end - SMOOTHED : end]) for end in range(SMOOTHED, len(self.readings) + 1)]
        if len(means) <= SMOOTHED:
            return 0.0
        now, best = means[-1], min(means[:-SMOOTHED], key=lambda one: one.distance)
        if not math.isfinite(now.distance + best.distance) or now.distance < means[-2].distance:
            return 0.0
        apart = [a - b for a, b in zip(now.halves, best.halves, strict=True)]
        low = now.distance - best.distance - DEVIATIONS * stdev(apart)
        return max(low, 0.0) / max(best.distance, LEAST)

    def _of(self, student: Tensor) -> float:
        """The Frechet distance less its bias at so many samples, over the teacher's variance."""
        if not bool(student.isfinite().all()):
            return math.inf
        variance = float(self._moments[1].trace())
        expected = self._bias * (1 + len(self.teacher) / len(student)) / 2
        return (frechet_distance(*moments(student), *self._moments) - expected) / max(variance, 1e-12)

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        return moments(self.teacher)

    @cached_property
    def _bias(self) -> float:
        """What two sets of M of the teacher's samples have: two halves have twice as much, as it falls as 1 / M.

        The halves are random ones, as conditions come in turn.
        """
        order = torch.randperm(len(self.teacher), generator=torch.Generator().manual_seed(0))
        halves = order.to(self.teacher.device).chunk(2)
        a, b = (moments(self.teacher[half]) for half in halves)
        return frechet_distance(*a, *b) / 2


def _mean(readings: Sequence[Reading]) -> Reading:
    """Of several readings, half by half."""
    halves = tuple(fmean(values) for values in zip(*(one.halves for one in readings), strict=True))
    return Reading(readings[-1].step, readings[-1].count, fmean(one.distance for one in readings), halves)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] and covariance [d, d] of [N, d], in float64."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


@dataclass(frozen=True)
class Sampling:
    """How both sides are sampled.  count: of samples; batch: at a time.  guidance: the scale that is distilled."""

    problem: Problem
    student: AnySampler
    teacher: AnySampler
    guidance: float
    seed: int
    count: int
    batch: int

    def teacher_features(self) -> Tensor:
        """[count, d], of noise that the student never sees."""
        assert self.problem.teacher is not None
        return self._features(self.problem.teacher, self.teacher, "health teacher", self.guidance)

    def student_features(self, student: nn.Module) -> Tensor:
        """[count, d], of the same noise every time."""
        is_told = "guidance_input" in getattr(getattr(student, "net", None), "accepts", ())
        return self._features(student, self.student, "health student", self.guidance if is_told else 1.0)

    @torch.no_grad()
    def _features(self, model: nn.Module, sampler: AnySampler, name: str, guidance: float) -> Tensor:
        device, shape = device_of(model), self.problem.image_shape
        was_training = model.training
        model.eval()
        found = []
        for index in torch.arange(self.count, device=device).split(self.batch):
            rng, cond = StepRandom(self.seed, 0, index), self._cond(index)
            fresh = lambda i, rng=rng: rng.normal(f"{name} fresh {i}", shape)  # noqa: E731
            x = sampler(model, rng.normal(name, shape), cond, guidance=guidance, fresh_noise=fresh)  # type: ignore[arg-type]
            found.append(small_copies(x))
        model.train(was_training)
        return torch.cat(found)

    def _cond(self, index: Tensor) -> Cond:
        """All conditions in turn."""
        teacher, problem = self.problem.teacher, self.problem
        num_classes = int(teacher.num_classes) if teacher is not None else 0
        if not num_classes:
            return NO_COND
        known = torch.tensor(problem.classes or range(num_classes), device=index.device)
        return Cond(label=known[index % len(known)])


def small_copies(x: Tensor) -> Tensor:
    """[B, d] of samples [B, ...], d at most FEATURES: tiny ones as they are; of images [B, C, H, W] the means of as
    many squares as that allows."""
    if math.prod(x.shape[1:]) <= FEATURES or x.ndim != 4:
        return x.flatten(1)[:, :FEATURES]
    side = max(1, math.isqrt(FEATURES // x.shape[1]))
    sides = (min(side, x.shape[2]), min(side, x.shape[3]))
    return torch.nn.functional.adaptive_avg_pool2d(x.float(), sides).flatten(1)[:, :FEATURES]


def affordable(evaluations: int, images: int) -> int:
    """Samples that take no more than a small share of a run's work: a power of two up to MOST, or 0.

    evaluations: of a network for one sample.  images: that the run trains on.
    """
    count = MOST
    while count >= FEWEST and count * evaluations > SHARE * EVALUATIONS * images:
        count //= 2
    return count if count >= FEWEST else 0


def distilled_guidance(method: Method) -> float | None:
    """The scale that a method distils, the middle of a range; 1 where it has none, None for a policy."""
    found: Any = getattr(method, "guidance", getattr(getattr(method, "base", None), "guidance", 1.0))
    scales = found if isinstance(found, tuple) else (found,)
    return fmean(scales) if all(isinstance(scale, int | float) for scale in scales) else None


class TeacherDistance:
    """The signal of one run: the teacher's samples when they are first asked for, readings, and their file."""

    def __init__(self, sampling: Sampling, every: int, *, key: str) -> None:
        """key: tells apart what decides on the teacher's samples."""
        self.sampling, self.every, self.key = sampling, every, key
        self.curve: DistanceCurve | None = None
        self._folder: FilePath | None = None
        self._earlier: list[Reading] = []

    def is_due(self, step: int, log_every: int) -> bool:
        """Whether a multiple of `every` has passed since the last report, `log_every` steps ago."""
        return step // self.every > (step - log_every) // self.every

    def open(self, folder: FilePath, step: int) -> None:
        """Keep everything in a run's folder, and go on from its readings up to a step."""
        self._folder = folder
        known = read_readings(folder / READINGS)
        self._earlier = [one for one in known if one.step <= step and one.count == self.sampling.count]

    def examine(self, student: nn.Module, step: int, processes: Processes) -> dict[str, float]:
        """The signals after a new reading; all processes ask for it, and the first writes."""
        if self.curve is None:
            self.curve = DistanceCurve(self._teacher_features(processes), self._earlier)
        self.curve.read(step, self.sampling.student_features(student))
        if self._folder and processes.is_main:
            write_text_atomically(self._folder / READINGS, "".join(f"{one.line}\n" for one in self.curve.readings))
        return {"teacher_distance": self.curve.value, "teacher_rise": self.curve.rise}

    def _teacher_features(self, processes: Processes) -> Tensor:
        """Made once, and kept in the run's folder for the same run resumed."""
        file = self._folder / f"distance-{self.key[:12]}.safetensors" if self._folder else None
        if file and len(processes.ranks_where(file.exists())) == processes.count:
            return read_tensors(file, str(processes.device))["teacher"]
        features = self.sampling.teacher_features()
        if file:
            processes.on_main_first(lambda: write_tensors_atomically(file, {"teacher": features}))
        return features


def read_readings(file: FilePath) -> list[Reading]:
    """Those that a run has written; a damaged line is passed over."""
    found = []
    for line in read_log(file).splitlines():
        try:
            told = json.loads(line)
            halves = tuple(float(value) for value in told["halves"])
            found.append(Reading(int(told["step"]), int(told["count"]), float(told["distance"]), halves))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return [one for one in found if len(one.halves) == HALVES]
