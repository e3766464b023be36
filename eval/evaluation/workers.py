"""The processes and the device that share an evaluation's work, through accelerate."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from diffdistill.distributed.devices import check_device
from diffdistill.distributed.meeting import is_cpu_fleet, meet
from diffdistill.distributed.processes import others

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """rank: this process, of `count`.  wait: returns when all have called it; a TrainingError where one is gone."""

    device: torch.device
    rank: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, work: Sequence[T]) -> Sequence[T]:
        """This process's part: every count-th piece."""
        return work[self.rank :: self.count]


def find_workers(device: str = "auto") -> Workers:
    """Those of the launcher that started this process (accelerate launch, torchrun), or this process alone.

    device: cpu, or auto, which takes this process's GPU where there is one.  Raises UserError for another one, and
    TrainingError where the processes do not find each other.
    """
    from accelerate import PartialState

    check_device(device)
    state = meet(lambda patience: PartialState(cpu=device == "cpu" or is_cpu_fleet(), timeout=patience))

    def wait() -> None:
        with others("What was measured so far is kept; give the command again"):
            state.wait_for_everyone()

    return Workers(state.device, state.process_index, state.num_processes, wait)


@contextmanager
def exact_matmul() -> Iterator[None]:
    """While open, GPUs do not round float32 products to TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
