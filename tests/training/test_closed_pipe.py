"""A run whose lines nobody reads any more (`2>&1 | head -1`) trains to its end and saves."""

import subprocess
import sys
from pathlib import Path

from conftest import WriteConfig

from diffdistill.storage.checkpoint import list_checkpoints


def test_a_closed_pipe_ends_no_run(write_config: WriteConfig, tmp_path: Path) -> None:
    file = write_config("pretrain", "train.steps=40", "train.log_every=1", "train.preview_every=20")
    process = subprocess.Popen(
        [sys.executable, "-m", "diffdistill", "pretrain", str(file), f"run={tmp_path / 'run'}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout
    assert b" left, " in process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert [found.name for found in list_checkpoints(tmp_path / "run" / "checkpoints")][-1] == "step-00000040"
