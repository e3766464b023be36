"""How processes find each other: soon, or with the names of those that did not come."""

import atexit
import gc
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from diffdistill.distributed.stopping import TrainingError, end_with_launcher
from diffdistill.settings.schema import UserError

T = TypeVar("T")

MEETING_SECONDS = "DIFFDISTILL_MEETING_SECONDS"
"""For all to come once one is there: of the environment, as processes meet before they compare their settings."""
MEETING = timedelta(minutes=10)  # as long as torch lets NCCL wait
LEAST, MOST = timedelta(seconds=1), timedelta(days=1)
PATIENCE = timedelta(hours=3)  # for the first process to prepare, evaluate or save; gloo knows a dead one at once
LOOK_SECONDS = 0.1
PLACE = "diffdistill/meeting/"  # of the keys in the store


def meet(join: Callable[[timedelta], T]) -> T:
    """What `join` returns, which connects this process with the others of its launcher in the time that it is given.

    Raises TrainingError, with the ranks that are missing after `meeting_time`. Afterwards they wait for each other for
    PATIENCE. A launcher's end is theirs.
    """
    end_with_launcher()
    limit = meeting_time()
    is_met, has_timeouts = dist.is_initialized(), is_cpu_fleet() or torch.cuda.is_available()
    with _naming():
        store = None if is_met else _wait_for_all(limit)  # the first's serves the others until they are connected
        made = join(limit if has_timeouts else PATIENCE)
        if not is_met and dist.is_initialized() and dist.get_world_size() > 1:
            if has_timeouts:
                device = "cpu" if dist.get_backend() == "gloo" else torch.device("cuda", torch.cuda.current_device())
                dist.all_reduce(torch.zeros(1, device=device))  # NCCL connects with the first thing that is said
                dist.distributed_c10d._set_pg_timeout(PATIENCE)
                if store:  # a torchrun's outlives them: those that it starts again must not meet these
                    store.delete_key(_key(dist.get_rank()))
            atexit.register(leave)
        del store
    return made


def meeting_time() -> timedelta:
    """How long the processes wait until all have come. Raises UserError for what is no time of the environment."""
    text = os.environ.get(MEETING_SECONDS, "").strip()
    if not text:
        return MEETING
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not LEAST.total_seconds() <= seconds <= MOST.total_seconds():
        most = f"{LEAST.total_seconds():g} to {MOST.total_seconds():g}"
        raise UserError(f"{MEETING_SECONDS} = {text!r}: must be a number of seconds from {most}")
    return timedelta(seconds=seconds)


def leave() -> None:
    """Close what connects this process with the others, and end the threads of it.

    A gloo thread drops a collective's tensors when the collective is done already, and needs the interpreter for it:
    one that outlives the interpreter aborts the process. A group ends its threads when its last reference goes, and
    lets them have the interpreter meanwhile only if that reference is Python's: it is kept until here.
    """
    if dist.is_initialized():
        groups = list(dist.distributed_c10d._world.pg_map)
        dist.destroy_process_group()
        gc.collect()  # models in DDP hold their group, and are parts of circles
        del groups


def is_cpu_fleet() -> bool:
    """Several processes without a GPU, which are each other's only if accelerate is told that they are on CPUs."""
    return not torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def _naming() -> Iterator[None]:
    """While open, processes that do not find each other are a TrainingError."""
    try:
        yield
    except TrainingError:
        raise
    except (RuntimeError, ValueError) as error:  # ValueError: of environments that are no launcher's
        reason = str(error).splitlines()[0]
        raise TrainingError(f"the processes cannot connect: {reason}{_stale_hint()}") from error


def _key(rank: int) -> str:
    """In the store, of one process. torchrun on one machine counts how often it has started all again, and its store
    may remember those before; of several machines each counts its own."""
    is_one = os.environ.get("GROUP_WORLD_SIZE") == "1"
    return f"{PLACE}{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if is_one else '0'}/{rank}"


def _wait_for_all(limit: timedelta) -> "dist.TCPStore | None":  # type: ignore[name-defined]
    """Return when all processes that the launcher counts are here, with the store by which they know it.

    None where the environment is no launcher's: then there is one process, or torch says what is missing.
    """
    told = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "MASTER_PORT")}
    address = os.environ.get("MASTER_ADDR")
    if not address or not all(text.isdecimal() for text in told.values()) or int(told["WORLD_SIZE"]) == 1:
        return None
    import torch.distributed.nn  # noqa: F401  # now, as its functions' defaults are the group that there is by then

    count, rank, port = (int(told[name]) for name in ("WORLD_SIZE", "RANK", "MASTER_PORT"))
    of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    deadline = time.monotonic() + limit.total_seconds()
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address,
            port,
            is_master=rank == 0 and not of_launcher,
            timeout=limit,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        if rank == 0 or of_launcher:
            raise
        raise _missing([0], count, f"{_in_time(limit)}; it is asked for at {address}:{port}") from error
    store.set(_key(rank), "here")
    missing = [other for other in range(count) if other != rank]
    try:
        while missing := [other for other in missing if not store.check([_key(other)])]:
            if time.monotonic() > deadline:
                raise _missing(missing, count, _in_time(limit))
            time.sleep(LOOK_SECONDS)
    except dist.DistError as error:
        raise _missing(missing, count, ", and where they meet is gone") from error
    return store


def _missing(ranks: list[int], count: int, more: str) -> TrainingError:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    said = f"process {shown} of {count} did not come{more}"
    return TrainingError(f"the processes cannot connect: {said}{_stale_hint()}")


def _in_time(limit: timedelta) -> str:
    return f" within {limit.total_seconds():g} s ({MEETING_SECONDS} sets how long they wait)"


def _stale_hint() -> str:
    """torchrun keeps the addresses of processes that it has replaced (pytorch/pytorch#135712)."""
    is_shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not is_shared or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return ""
    return ". With --max-restarts, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started"
