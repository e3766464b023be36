"""The processes that train one run: which of them this one is, and what they tell each other.

Each takes its share of every batch. A process alone tells nobody anything. What only one may do (write files, mostly)
the first does while the others wait.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffdistill.distributed.meeting import is_cpu_fleet, meet
from diffdistill.distributed.stopping import TrainingError
from diffdistill.settings.schema import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

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

    def check_same(self, facts: Mapping[str, object]) -> None:
        """Compare what all must have alike, by one hash.  facts: by name, of what JSON knows.

        Raises UserError in all of them, with what differs, and which process has what.
        """
        if self.count == 1:
            return
        text = json.dumps(facts, sort_keys=True, default=str).encode()
        if self.agree(int.from_bytes(hashlib.sha256(text).digest()[:7])):
            return
        told = [json.loads(one) for one in self._all_texts(text)]
        listed = []
        for name in sorted({name for one in told for name in one}):
            ranks: dict[str, list[int]] = {}
            for rank, one in enumerate(told):
                ranks.setdefault(repr(one[name]) if name in one else "nothing", []).append(rank)
            if len(ranks) > 1:
                listed.append(f"{name}: " + ", ".join(f"{value} in {_named(who)}" for value, who in ranks.items()))
        raise UserError("the processes were started differently:\n  " + "\n  ".join(listed))

    def _all_texts(self, text: bytes) -> list[bytes]:
        """The texts of all, by rank."""
        sizes = self.gather(torch.tensor([len(text)], device=self.device)).tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        rows = self.gather(padded.to(self.device)).view(self.count, -1).cpu()
        return [bytes(row[:size].tolist()) for row, size in zip(rows, sizes, strict=True)]

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
            raise TrainingError("the main process failed; see its message")

    def wait(self) -> None:
        """Return when all have called it."""
        self.largest(0)

    def _combine(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        with others():
            dist.all_reduce(values, operation)
        return values


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
    return f"process{'es' * (len(ranks) > 1)} {shown}"


def find_processes(device: str = "auto") -> Processes:
    """Those of the launcher that started this process (accelerate launch, torchrun), or this process alone.

    device: cpu, or auto, which takes this process's GPU where there is one.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    def join(patience: timedelta) -> Accelerator:
        # accelerate allows one precision a process, but runs may follow each other in one: autocast is the trainer's.
        return Accelerator(
            mixed_precision="no",
            cpu=device == "cpu" or is_cpu_fleet(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=patience), DistributedDataParallelKwargs(**REPLICAS)],
        )

    accelerator = meet(join)
    # accelerate numbers CPUs by process, which means nothing and which safetensors refuses.
    own = torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device
    return Processes(own, accelerator.process_index, accelerator.num_processes, accelerator)


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
        raise TrainingError(f"another process has exited ({reason}). {advice}") from error
