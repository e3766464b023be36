"""Gradients as means over the processes: torch's DistributedDataParallel, by accelerate, sums them while the backward
pass goes on. It wraps one module with one forward pass and one backward pass; a loss calls several players several
times. So what is wrapped is the loss.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import call
from typing import Protocol

import torch
from torch import nn

from diffdistill.distillation.method import Loss, Update
from diffdistill.distributed.processes import Processes

Ask = Callable[[Callable[[], Loss]], Loss]


class Objective(nn.Module):
    """The players that an update trains, called with a function that makes the loss of them."""

    def __init__(self, players: Iterable[nn.Module]) -> None:
        super().__init__()
        self.players = nn.ModuleList(players)
        # DDP is told that parameters may be unused. Where none is, torch complains of that in every process.
        self.unused = nn.Parameter(torch.zeros((), device=next(self.players.parameters()).device))

    def forward(self, loss: Callable[[], Loss]) -> Loss:
        return loss()


class Averaging(Protocol):
    """How an update's gradients become the processes' means: in the backward pass of its last micro-batch."""

    def of(self, update: Update, *, is_last: bool) -> AbstractContextManager[Ask]:
        """While open, a loss is asked for through what it gives, and its backward pass is run."""
        ...


class Replicas:
    """All weights in every process."""

    def __init__(self, processes: Processes, updates: Iterable[Update], trained: Mapping[str, nn.Module]) -> None:
        """updates: a method's.  trained: those of their players that are whole; the parameters count that now require a
        gradient."""
        self._processes = processes
        found = {update: [trained[name] for name in update.players if name in trained] for update in updates}
        self._wrapped = {
            update: processes.replicate(Objective(players))
            for update, players in found.items()
            if players and processes.count > 1
        }

    @contextmanager
    def of(self, update: Update, *, is_last: bool) -> Iterator[Ask]:
        """See `Averaging`."""
        if update not in self._wrapped:
            yield call
            return
        objective = self._wrapped[update]
        with nullcontext() if is_last else self._processes.no_sync(objective):
            yield objective
