"""Methods that follow trajectories on the mixture ring: one call arrives where the exact teacher's DDIM does.

Unlike the methods that match laws, these have a right answer for each noise. The bar is the width of a mode: a student
that only finds the right mode misses by more.
"""

from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from support.ring import (
    NUM_CLASSES,
    NUM_MODES,
    PATH,
    STD,
    TIME_LAW,
    RingResult,
    measure_ring,
    ring_problem,
    ring_teacher,
    trained_generator,
)
from support.trajectory_ring import RingSignal, Sampled, fitted_student
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.sampling import DDIM, TCD, FewSteps, OneCall, Sampler
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import Karras
from diffdistill.distillation.curricula import Doubling
from diffdistill.distillation.method import Problem
from diffdistill.distillation.segments import Stage
from diffdistill.methods.boot import Boot
from diffdistill.methods.consistency import Consistency
from diffdistill.methods.free_flow import FreeFlow
from diffdistill.methods.hyper_sd import HyperSD
from diffdistill.methods.rectified_flow import RectifiedFlow

EVEN = Karras(ratio_min=PATH.sigma_min, ratio_max=PATH.sigma_max)
SOLVER = DDIM(num_steps=16, spacing="karras")


@dataclass(frozen=True)
class Arrival:
    """error: RMS distance from the end points of the teacher's DDIM.  ring: how the samples lie."""

    error: float
    ring: RingResult

    @property
    def passes(self) -> bool:
        return self.error <= STD and self.ring.coverage == NUM_MODES and self.ring.accuracy >= 0.97


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


@pytest.mark.full
@pytest.mark.parametrize("correction_weight", [0.0, 0.1])
def test_free_flow_s_one_call_arrives_where_the_teacher_s_sixteen_do(correction_weight: float) -> None:
    """By its prediction, with or without the correction."""
    method = FreeFlow(prediction_time_law=EVEN, correction_weight=correction_weight, time_law=TIME_LAW)
    problem = ring_problem(method)
    torch.manual_seed(0)
    student = Denoiser(RingSignal(), PATH, "x0")
    assert not arrival(student, OneCall()).passes
    problem = replace(problem, initial={"generator": student, "fake": problem.initial["fake"]})
    result = arrival(trained_generator(method, num_steps=900, lr=4e-3, problem=problem), OneCall())
    assert result.passes, result


@pytest.mark.full
@pytest.mark.parametrize("velocity", ["teacher", "data"])
def test_consistency_s_one_call_arrives_where_the_teacher_s_sixteen_do(velocity: Literal["teacher", "data"]) -> None:
    steps = FewSteps(init_ratio=PATH.sigma_max)
    method = Consistency(velocity=velocity, steps=steps, curriculum=Doubling(first=8, last=64), time_law=EVEN)
    start = fitted_student()
    assert not arrival(start, steps).passes
    problem = replace(ring_problem(method), initial={"generator": start}, num_steps=600)
    result = arrival(trained_generator(method, num_steps=600, problem=problem), steps)
    assert result.passes, result


class SinglePrecision(RectifiedFlow):
    """Its pairs as a run's are: the ring's teacher answers in float64."""

    def prepare(self, problem: Problem, seed: int) -> dict[str, Tensor]:
        made = RectifiedFlow.prepare(self, problem, seed)
        return made | {"image": made["image"].float()}


@pytest.mark.full
def test_rf_s_one_call_arrives_where_the_teacher_s_sixteen_do() -> None:
    steps = FewSteps(init_ratio=PATH.sigma_max, later_noise="fixed")
    method = SinglePrecision(steps=steps, pairs=10_000, pair_sampler=SOLVER, huber_constant=1.0)
    problem = replace(ring_problem(method), initial={"generator": fitted_student()})
    result = arrival(trained_generator(method, num_steps=1500, problem=problem), steps)
    assert result.passes, result
