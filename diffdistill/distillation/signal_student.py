"""The start of students that are given noise alone and answer with the signal, those of `networks/signal.py`."""

from torch import nn

from diffdistill.distillation.method import Problem
from diffdistill.networks.signal import start_from


def signal_student(problem: Problem) -> nn.Module:
    """An earlier run's generator, or the run's own network with its teacher's weights.

    Raises UserError if there is no teacher.
    """
    if problem.teacher is None or "generator" in problem.initial:
        return problem.copies("generator")["generator"]
    assert problem.network is not None
    start_from(problem.network, problem.teacher)
    return problem.network
