"""Which tests cost the most: `pytest --cpu-times 25` lists them by CPU-seconds, with those of processes they start."""

import os
from collections.abc import Generator
from typing import Any

import pytest
from _pytest.terminal import TerminalReporter

START = "start and collection, each process"


class CpuTimes:
    """CPU-seconds by test: set-up, call and tear-down; a fixture that several share counts for the first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.last = 0.0
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logstart(self) -> None:
        if not self.last:
            self.start, self.last = _now(), _now()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, Any, Any]:
        report = yield
        now = _now()
        report.cpu_seconds, report.cpu_start, self.last = now - self.last, self.start, now
        self.start = 0.0
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        for name, of in ((report.nodeid, "cpu_seconds"), (START, "cpu_start")):  # a worker that died has said none
            self.seconds[name] = self.seconds.get(name, 0.0) + getattr(report, of, 0.0)

    def pytest_terminal_summary(self, terminalreporter: TerminalReporter) -> None:
        terminalreporter.section(f"{sum(self.seconds.values()):.0f} CPU-seconds")
        for name, seconds in sorted(self.seconds.items(), key=lambda pair: -pair[1])[: self.count]:
            terminalreporter.line(f"{seconds:8.2f} {name}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-times", type=int, default=0, metavar="N", help="list so many of the most expensive tests")


def pytest_configure(config: pytest.Config) -> None:
    if count := config.getoption("--cpu-times"):
        config.pluginmanager.register(CpuTimes(count))


def _now() -> float:
    return sum(os.times()[:4])
