"""The processes that train one run: which of them this one is, and what they tell each other.

Each takes its share of every batch. A process alone tells nobody anything. What only one may do (write files, mostly)
the first does while the others wait.
"""

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffdistill.distributed.stopping import TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator

PATIENCE = timedelta(hours=3)  # for the first process to prepare, evaluate or save; gloo knows a dead one at once
REPLICAS = {
    "broadcast_buffers": False,  # they are the same: nothing changes them but what changes them in all
    "find_unused_parameters": True,  # a loss may leave some out, as features do what comes after them
    "gradient_as_bucket_view": True,
}
LOST = ("gloo", "nccl", "closed by peer", "reset by peer")  # what is said where a process is gone


@dataclass(frozen=True)
class Processes:
    """device: this process's.  rank: which one it is, of `count`.  accelerator: of several; one alone needs none."""

    device: torch.device
    rank: int = 0
    count: int = 1
    accelerator: "Accelerator | None" = None

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def replicate(self, module: nn.Module) -> nn.Module:
        """The module in torch's DistributedDataParallel, by accelerate: a backward pass leaves the mean over the
        processes of each gradient. One that a process lacks counts as zero there."""
        assert self.accelerator is not None
        wrapped: nn.Module = self.accelerator.prepare_model(module, device_placement=False)
        return wrapped

    def no_sync(self, replica: nn.Module) -> AbstractContextManager[None]:
        """While open, the gradients of a `replicate`d module stay each process's own, and add up there."""
        assert self.accelerator is not None
        return self.accelerator.no_sync(replica)

    def gather(self, values: Tensor) -> Tensor:
        """The values of all, one process after the other.  values: [B, ...], as many in each.  [count B, ...]."""
        if self.count == 1:
            return values
        values = values.contiguous()
        parts = [torch.empty_like(values) for _ in range(self.count)]
        with others():
            dist.all_gather(parts, values)
        return torch.cat(parts)

    def means(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean of each over the processes, which name the same ones."""
        if self.count == 1:
            return dict(values)
        numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        return dict(zip(values, (self._combine(numbers, dist.ReduceOp.SUM) / self.count).tolist(), strict=True))

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers: what one of them has seen, all know."""
        if self.count == 1:
            return number
        return int(self._combine(torch.tensor([number], device=self.device), dist.ReduceOp.MAX))

    def agree(self, number: int) -> bool:
        """Whether it is the same number in all."""
        return self.largest(number) == -self.largest(-number)

    def ranks_where(self, is_true: bool) -> list[int]:
        """The ranks of the processes that say so."""
        if self.count == 1:
            return [self.rank] if is_true else []
        told = self.gather(torch.tensor([is_true], device=self.device, dtype=torch.int32))
        return told.nonzero()[:, 0].tolist()

    def begin_equal(self, modules: Iterable[nn.Module]) -> None:
        """Give every process the first one's weights, so that no difference in rounding stays."""
        if self.count == 1:
            return
        with others(), torch.no_grad():
            for module in modules:
                for tensor in (*module.parameters(), *module.buffers()):
                    sent = tensor.detach().to(self.device).contiguous()
                    dist.broadcast(sent, 0)
                    tensor.copy_(sent)

    def on_main_first(self, work: Callable[[], object]) -> None:
        """Let the first process do something, and wait for it.

        Raises what it raised there, and TrainingError in the others.
        """
        if self.count == 1:
            work()
            return
        failure: BaseException | None = None
        if self.is_main:
            try:
                work()
            except Exception as error:
                failure = error
        has_failed = self.largest(int(failure is not None))
        if failure:
            raise failure
        if has_failed:
            raise TrainingError("the first process has failed, and says why")

    def wait(self) -> None:
        """Return when all have called it."""
        self.largest(0)

    def _combine(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        with others():
            dist.all_reduce(values, operation)
        return values


def find_processes(device: str = "auto") -> Processes:
    """Those of the launcher that started this process (accelerate launch, torchrun), or this process alone.

    device: cpu, or auto, which takes this process's GPU where there is one.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    with meeting():
        # accelerate allows one precision a process, but runs may follow each other in one: autocast is the trainer's.
        accelerator = Accelerator(
            mixed_precision="no",
            cpu=device == "cpu" or is_cpu_fleet(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE), DistributedDataParallelKwargs(**REPLICAS)],
        )
    if accelerator.num_processes > 1:
        atexit.register(leave)
    # accelerate numbers CPUs by process, which means nothing and which safetensors refuses.
    own = torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device
    return Processes(own, accelerator.process_index, accelerator.num_processes, accelerator)


def leave() -> None:
    """Close what connects this process with the others: a thread of it that outlives the interpreter aborts."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_cpu_fleet() -> bool:
    """Several processes without a GPU, which are each other's only if accelerate is told that they are on CPUs."""
    return not torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def meeting() -> Iterator[None]:
    """While open, processes that do not find each other are a TrainingError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # ValueError: of environments that are no launcher's
        reason = str(error).splitlines()[0]
        raise TrainingError(f"the processes do not find each other: {reason}{_stale_hint()}") from error


@contextmanager
def others(advice: str = "The last checkpoint is intact; go on with --resume") -> Iterator[None]:
    """While open, a process that is gone is a TrainingError."""
    try:
        yield
    except TrainingError:  # which has said so already, or is no other's fault
        raise
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), "")
        if not dist.is_initialized() or dist.get_world_size() == 1:
            raise
        if not isinstance(error, dist.DistError) and not any(word in str(error).lower() for word in LOST):
            raise
        raise TrainingError(f"another process is gone ({reason}). {advice}") from error


def _stale_hint() -> str:
    """torchrun keeps the addresses of processes that it has replaced (pytorch/pytorch#135712)."""
    is_shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not is_shared or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return ""
    return ". With --max-restarts, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started"
