"""The most memory that this process has held.

Of getrusage's ru_maxrss a child process begins at its parent's peak, so that a small child shows the parent's; VmHWM
begins anew with the program.
"""

from pathlib import Path


def peak_bytes() -> int:
    """VmHWM of Linux's /proc, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status says no VmHWM: peaks are measured on Linux")
