"""Where a number was made: versions, commit, command, device. Every record and timing carries it."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path as FilePath

import torch

from diffdistill.eval.records.record import Environment
from diffdistill.settings.terminal import hide_secrets

PACKAGES = (
    *("diffdistill", "torch", "numpy", "pillow", "diffusers", "accelerate"),
    *("torchvision", "clean-fid", "open-clip-torch", "timm"),
)
"""Those whose version can change a number; the ones that are not installed are left out."""


def describe_environment(
    device: torch.device, *, dtype: str, wall_seconds: float, num_processes: int = 1, batch_size: int | None = None
) -> Environment:
    """This process, now.  dtype: of the network that makes the images, as in float32."""
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=_versions(),
        commit=_commit(FilePath(__file__).resolve().parent),
        command=hide_secrets(" ".join(["diffdistill", *map(shlex.quote, sys.argv[1:])])),
        device=device_name(device),
        dtype=dtype,
        tf32=device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32,
        wall_seconds=round(wall_seconds, 3),
        num_processes=num_processes,
        batch_size=batch_size,
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's and its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    file = FilePath("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor() or platform.machine()}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit(folder: FilePath) -> str | None:
    """The checkout's commit, with "-dirty" where files differ from it; None where there is no checkout."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
