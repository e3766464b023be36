"""Several processes on this machine that train one run together, forked from the test's."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate.state import AcceleratorState

T = TypeVar("T")


def run_together(count: int, work: Callable[[], T], *, timeout: float = 900) -> list[T]:
    """What `work` returns in each of `count` processes, by rank.  Raises AssertionError with the traceback of one."""
    context = multiprocessing.get_context("fork")
    told: Any = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    members = [context.Process(target=_member, args=(rank, count, port, work, told)) for rank in range(count)]
    for member in members:
        member.start()
    try:
        answers = sorted((told.get(timeout=timeout) for _ in members), key=lambda answer: int(answer[0]))
    finally:
        for member in members:
            member.join(timeout=10)
            member.kill()
    faults = [f"process {rank}: {fault}" for rank, _, fault in answers if fault]
    assert not faults, "\n".join(faults)
    return [answer for _, answer, _ in answers]


def _member(rank: int, count: int, port: int, work: Callable[[], Any], told: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    # Or accelerate takes all cores for a process alone, and OpenMP does not survive a fork of who has computed on two.
    os.environ["OMP_NUM_THREADS"] = "1"
    AcceleratorState._reset_state(True)
    torch.set_num_threads(1)
    try:
        answer, fault = work(), None
    except BaseException:
        answer, fault = None, traceback.format_exc()
    told.put((rank, answer, fault))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
