"""`pytest --cpu-times N` counts what a test and the processes that it starts take, and what came before it apart."""

import os
import time
from types import SimpleNamespace
from typing import Any

from support.cpu_times import START, CpuTimes


def burn(seconds: float) -> None:
    began = time.process_time()
    while time.process_time() - began < seconds:
        pass


def test_a_test_counts_with_its_processes_and_without_what_came_before() -> None:
    burn(0.1)
    times, report = CpuTimes(1), SimpleNamespace(nodeid="a test")
    times.pytest_runtest_logstart()
    burn(0.05)
    child = os.fork()
    if child == 0:
        burn(0.2)
        os._exit(0)
    os.waitpid(child, 0)
    making: Any = times.pytest_runtest_makereport()
    next(making)
    try:
        making.send(report)
    except StopIteration as made:
        times.pytest_runtest_logreport(made.value)
    assert 0.25 <= times.seconds["a test"] < 1
    assert times.seconds[START] > 0.1
    lines: list[str] = []
    times.pytest_terminal_summary(SimpleNamespace(section=lines.append, line=lines.append))  # type: ignore[arg-type]
    assert lines[0] == f"{sum(times.seconds.values()):.0f} CPU-seconds"
    assert len(lines) == 2, "as many as were asked for"
