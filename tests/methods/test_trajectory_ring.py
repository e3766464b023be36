"""Hyper-SD and BOOT on the mixture ring: one call arrives where the exact teacher's DDIM arrives from the same noise.

Unlike the methods that match laws, these have a right answer for each noise. The bar is the width of a mode: a student
that only finds the right mode misses by more.
"""

from dataclasses import dataclass, replace

import torch
from support.ring import (
    INIT_RATIO,
    NUM_CLASSES,
    NUM_MODES,
    PATH,
    STD,
    RingResult,
    _mlp,
    _one_hot,
    measure_ring,
    ring_problem,
    ring_teacher,
    trained_generator,
)
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.sampling import DDIM, TCD, OneCall, Sampler
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import Karras
from diffdistill.distillation.segments import Stage
from diffdistill.methods.boot import Boot
from diffdistill.methods.hyper_sd import HyperSD

SOLVER = DDIM(num_steps=16, spacing="karras")


@dataclass(frozen=True)
class Arrival:
    """error: RMS distance from the end points of the teacher's DDIM.  ring: how the samples lie."""

    error: float
    ring: RingResult

    @property
    def passes(self) -> bool:
        return self.error <= STD and self.ring.coverage == NUM_MODES and self.ring.accuracy >= 0.97


class RingSignal(nn.Module):
    """An MLP of (noise and its waves, log sigma, class): a `Network` for BOOT's student."""

    accepts = frozenset({"label"})
    num_classes = NUM_CLASSES
    has_null_condition = True
    resolution_multiple = 1

    def __init__(self) -> None:
        super().__init__()
        self.layers = _mlp(11 + NUM_CLASSES, 128, 2)

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        waves = [wave(k * x) for k in (2, 5) for wave in (torch.sin, torch.cos)]
        output: Tensor = self.layers(torch.cat([x, *waves, 4 * time_input[:, None], _one_hot(cond)], 1))
        return output


class Sampled(nn.Module):
    """A student with its sampler, as `measure_ring` asks a generator."""

    def __init__(self, student: nn.Module, sampler: Sampler) -> None:
        super().__init__()
        self.student, self.sampler = student, sampler

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.sampler(self.student, x / INIT_RATIO, cond)  # type: ignore[arg-type]


@torch.no_grad()
def arrival(student: nn.Module, sampler: Sampler) -> Arrival:
    """Where the student's one call arrives."""
    rng, label = StepRandom(5, 0, torch.arange(2000)), torch.arange(2000) % NUM_CLASSES
    noise, cond = rng.normal("z", (2,)), Cond(label=label)
    made = sampler(student, noise, cond).double()  # type: ignore[arg-type]
    wanted = SOLVER(ring_teacher(), noise.double(), cond)
    return Arrival(float((made - wanted).square().mean().sqrt()), measure_ring(Sampled(student, sampler)))


def test_hyper_sd_s_one_call_arrives_where_the_teacher_s_sixteen_do() -> None:
    steps = TCD(num_steps=1, eta=0, grid=SOLVER)
    stages = tuple(Stage(segments=k, num_steps=150) for k in (4, 2, 1))
    method = HyperSD(stages=stages, steps=steps, stage_teacher="base", ends="fixed", target_decay=0.9)
    problem = ring_problem(method)
    start = problem.initial["fake"]  # fitted to the teacher
    assert not arrival(start, steps).passes
    problem = replace(problem, initial={"generator": start})
    result = arrival(trained_generator(method, num_steps=450, problem=problem), steps)
    assert result.passes, result


def test_boot_s_one_call_arrives_where_the_teacher_s_sixteen_do() -> None:
    method = Boot(time_law=Karras(ratio_min=PATH.sigma_min, ratio_max=PATH.sigma_max), delta=0.1)
    problem = ring_problem(method)
    torch.manual_seed(0)
    student = Denoiser(RingSignal(), PATH, "x0")
    assert not arrival(student, OneCall()).passes
    problem = replace(problem, initial={"generator": student})
    result = arrival(trained_generator(method, num_steps=900, lr=4e-3, problem=problem), OneCall())
    assert result.passes, result
