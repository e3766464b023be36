"""A disk that is full: every command names the file and gives advice that fits it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SMALL_FILES = """
import json, resource, sys
import torch
from diffdistill.commands.cli import main
torch.set_num_threads(1)
most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit, *arguments in json.loads(sys.argv[1]):
    sys.argv = ["diffdistill", *arguments]
    code = None
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))  # beyond it a write fails, as on a full disk
    try:
        main()
    except SystemExit as end:
        code = end.code
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    print(f"exit code {code}", file=sys.stderr, flush=True)
"""
"""Each command in turn, in one process: importing torch takes longer than most of them."""


@pytest.fixture
def run(quick_teacher: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quick_teacher, tmp_path / "teacher"))


COMMANDS: dict[str, tuple[int, tuple[str, ...], str, str]] = {
    "sample": (300, ("sample", "{run}", "--count", "8", "--out", "{out}/a.png"), "a.png", "run the command again"),
    "report": (300, ("report", "{run}"), "report.html", "run the command again"),
    "export": (300, ("export", "{run}", "--out", "{out}/exported"), "exported", "No partial folder was left"),
    "eval": (
        300,
        ("eval", "{run}", "--protocol", "digits-pixels", "--features", "{out}/f"),
        ".safetensors",
        "are kept",
    ),
    "train": (
        2000,
        ("pretrain", "pretrain/digits", "run={out}/new", "train.steps=1", "trackers=[]"),
        "out/new/",
        "--resume",
    ),
}


def test_a_full_disk_names_the_file_and_what_to_do(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    calls = [[limit, *(part.format(run=run, out=out) for part in parts)] for limit, parts, *_ in COMMANDS.values()]
    done = subprocess.run(
        [sys.executable, "-c", SMALL_FILES, json.dumps(calls)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"COLUMNS": "500"},
    )
    assert done.stderr.count("exit code 1\n") == len(COMMANDS), done.stderr
    for (_, arguments, file, advice), said in zip(COMMANDS.values(), done.stderr.split("exit code 1\n"), strict=False):
        assert "error: the disk is full" in said
        assert "Traceback" not in said
        line = next(line for line in said.splitlines() if "disk is full" in line)
        assert file in line
        assert advice in line
        assert ("--resume" in line) == (arguments[0] == "pretrain")
    assert not [entry.name for entry in out.rglob("*") if "exporting" in entry.name or "writing" in entry.name]
