"""Students of noise levels, and of several steps, on the mixture ring."""

import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.sampling import Sampler
from support.ring import INIT_RATIO, NUM_CLASSES, PATH, _fit_to_teacher, _mlp, _one_hot, ring_teacher


class RingSignal(nn.Module):
    """An MLP of (noise and its waves, log sigma, class): a `Network` for students."""

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
    """As `measure_ring` asks a generator."""

    def __init__(self, student: nn.Module, sampler: Sampler) -> None:
        super().__init__()
        self.student, self.sampler = student, sampler

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.sampler(self.student, x / INIT_RATIO, cond)  # type: ignore[arg-type]


def fitted_student() -> Denoiser:
    """What a run's generator starts as: a copy of the teacher, near enough, with features sharp enough to end sharp."""
    torch.manual_seed(0)
    student = Denoiser(RingSignal(), PATH, "edm")
    _fit_to_teacher(student, ring_teacher())
    return student
