"""A training run in a process of its own, with one thread, so that its CPU-seconds say what it cost."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

QUIET = ("train.num_threads=1", "train.preview_every=0", "health=null")


def train_alone(config: str, run: Path, overrides: Sequence[str], *, name: str) -> None:
    """Train a config, packaged or a file; goes on where it was stopped. Ends the program where the run fails.

    name: what the message calls it.
    """
    command = [sys.executable, "-m", "diffdistill", "train", config, f"run={run}", *overrides, *QUIET, "--resume"]
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | one, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr.strip()[-2000:]}")
