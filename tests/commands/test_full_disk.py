"""A disk that is full: every command names the file and gives advice that fits it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SMALL_FILES = """
import resource, sys
import torch
from diffdistill.commands.cli import main
torch.set_num_threads(1)
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # beyond it a write fails, as on a full disk
main()
"""


def call(limit: int, *arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", SMALL_FILES, str(limit), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"COLUMNS": "500"},
    )


@pytest.fixture
def run(quick_teacher: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quick_teacher, tmp_path / "teacher"))


COMMANDS: dict[str, tuple[int, tuple[str, ...], str, str]] = {
    "sample": (300, ("sample", "{run}", "--count", "8", "--out", "{out}/a.png"), "a.png", "give the command again"),
    "report": (300, ("report", "{run}"), "report.html", "give the command again"),
    "export": (300, ("export", "{run}", "--out", "{out}/exported"), "exported", "Nothing was left behind"),
    "eval": (300, ("eval", "{run}", "--protocol", "digits-pixels", "--features", "{out}/f"), ".safetensors", "is kept"),
    "train": (
        2000,
        ("pretrain", "pretrain/digits", "run={out}/new", "train.steps=1", "trackers=[]"),
        "out/new/",
        "--resume",
    ),
}


@pytest.mark.parametrize(("limit", "arguments", "file", "advice"), COMMANDS.values(), ids=COMMANDS)
def test_a_full_disk_names_the_file_and_what_to_do(
    run: Path, tmp_path: Path, limit: int, arguments: tuple[str, ...], file: str, advice: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    told = call(limit, *(argument.format(run=run, out=out) for argument in arguments))
    assert told.returncode == 1, told.stderr
    assert "error: the disk is full" in told.stderr
    assert "Traceback" not in told.stderr
    line = next(line for line in told.stderr.splitlines() if "disk is full" in line)
    assert file in line
    assert advice in line
    assert ("--resume" in line) == (arguments[0] == "pretrain")
    assert not [entry.name for entry in out.rglob("*") if "exporting" in entry.name or "writing" in entry.name]
