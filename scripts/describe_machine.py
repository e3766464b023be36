"""Print one line about the machine and the versions, to stand beside measured numbers."""

import os
import platform
from pathlib import Path

import torch


def describe() -> str:
    """The processor (or GPU), its cores and the versions of Python and torch."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores of {processor}{gpu}, Python {platform.python_version()}, torch {torch.__version__}"


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


if __name__ == "__main__":
    print(describe())
