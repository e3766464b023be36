"""Does an exported folder make the images of the run that it came from, where this package cannot be imported?"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

TOLERANCE = 1e-5
"""The greatest difference of any value of two images in [-1, 1], float32."""
CALL = "images"  # the name of `Check.call`
HALF_STEP = 0.5 / 255  # of an image in [0, 1] with 8 bits


class ExportError(RuntimeError):
    """The exported folder does not do what the run does."""


@dataclass(frozen=True)
class Check:
    """code: the card's program, which loads the folder as `pipe` and makes one `image`.  shown: that image, as the run
    makes it.  call: how that pipeline is called once more, by seed 0.  expected: its images, as the run makes them.
    habits: other calls by name, that may make these images too.  num_threads: of the CPU; 0: as many as torch has."""

    folder: FilePath
    code: str
    call: Mapping[str, Any]
    expected: Tensor
    shown: Tensor
    habits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    num_threads: int = 0


@dataclass(frozen=True)
class Found:
    """difference: the greatest of a folder's images from those expected, or what went wrong with it.  habits: the same
    of each other call."""

    difference: float | str
    habits: Mapping[str, float | str]


def verify(checks: Sequence[Check], *, tolerance: float = TOLERANCE) -> list[float]:
    """Load all folders in one new process that cannot import this package, and compare their images.

    Returns the greatest difference of each.  Raises ExportError if one cannot be loaded or differs by more.
    """
    found = compare(checks)
    for check, difference in zip(checks, found, strict=True):
        if isinstance(difference, str):
            raise ExportError(f"the exported folder cannot be used without diffdistill: {difference}")
        if not difference <= tolerance:
            raise ExportError(f"{check.folder}: its images differ from the run's by up to {difference:.2g}")
    return [float(difference) for difference in found]


def compare(checks: Sequence[Check]) -> list[float | str]:
    """The greatest difference of each folder's images from those expected, or what went wrong with it."""
    return [found.difference for found in measure(checks)]


def measure(checks: Sequence[Check]) -> list[Found]:
    """What all folders make, of their other calls too.

    The image of the card's program has 8 bits, and may be half a step of these away.
    """
    with tempfile.TemporaryDirectory() as name:
        made = _call(checks, FilePath(name))
    return [_found(check, images) for check, images in zip(checks, made, strict=True)]


def _found(check: Check, made: Mapping[str, Tensor | str] | str) -> Found:
    if isinstance(made, str):
        return Found(made, dict.fromkeys(check.habits, made))
    off = _greatest(made["shown"], check.shown)
    difference = _greatest(made[CALL], check.expected)
    if isinstance(off, str) or not off <= HALF_STEP + TOLERANCE:
        difference = off if isinstance(off, str) else f"the card's own program makes another image, {off:.2g} away"
    return Found(difference, {name: _greatest(made[name], check.expected) for name in check.habits})


def _greatest(images: Tensor | str, expected: Tensor) -> float | str:
    if isinstance(images, str):
        return images
    if images.shape != expected.shape:
        return f"makes {tuple(images.shape)}, not {tuple(expected.shape)}"
    return float((images.double() - expected.double().cpu()).abs().max())


def _call(checks: Sequence[Check], place: FilePath) -> list[Mapping[str, Tensor | str] | str]:
    """The images of each folder, or what went wrong."""
    requests = [
        {
            "code": check.code,
            "output": str(place / f"{number}.safetensors"),
            "calls": {CALL: check.call, **check.habits},
        }
        for number, check in enumerate(checks)
    ]
    (place / "requests.json").write_text(json.dumps(requests), encoding="utf-8")
    # A home of its own for the code that diffusers copies; nothing is asked of the network.
    threads = max(check.num_threads or torch.get_num_threads() for check in checks)
    settings = {"HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-I", str(FilePath(__file__).with_name("reload.py")), str(place / "requests.json")],
        capture_output=True,
        text=True,
        check=False,
        cwd=place,
        env=os.environ | settings | {"OMP_NUM_THREADS": str(threads)},
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        raise ExportError(f"the exported folder cannot be used without diffdistill: {last}")
    return [_read(FilePath(str(request["output"]))) for request in requests]


def _read(output: FilePath) -> Mapping[str, Tensor | str] | str:
    failed = output.with_suffix(".txt")
    if failed.exists():
        return failed.read_text(encoding="utf-8")
    errors = {
        file.name.split(".")[1]: file.read_text(encoding="utf-8") for file in output.parent.glob(f"{output.stem}.*.txt")
    }
    return {**load_file(output), **errors}
