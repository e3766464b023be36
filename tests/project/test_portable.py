"""Nothing needs what only Linux has: the package imports and trains without flock and without links."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(file for room in ("diffdistill", "methods", "eval") for file in (ROOT / room).rglob("*.py"))
UNIX_MODULES = {"fcntl", "grp", "pwd", "resource", "termios", "tty"}
UNIX_NAMES = {
    "O_CLOEXEC",
    "O_DIRECTORY",
    "O_NOFOLLOW",
    "O_NONBLOCK",
    "fchmod",
    "fork",
    "geteuid",
    "getpgid",
    "getuid",
} | {
    *("killpg", "mkfifo", "posix_fallocate", "pread", "pwrite", "setsid", "statvfs", "sysconf", "uname", "wait4"),
}
GUARDED = {("doctor_config.py", "sysconf")}
"""Asked for by `hasattr` first."""

WITHOUT = """
import os, sys
sys.modules["fcntl"] = None  # importing it now raises ImportError

def symlink(*arguments, **options):
    raise OSError(1314, "A required privilege is not held by the client")

os.symlink = symlink
"""
EVERY_MODULE_AND_THE_DEMO = f"""{WITHOUT}
import importlib, pkgutil
import diffdistill
names = [found.name for found in pkgutil.walk_packages(diffdistill.__path__, "diffdistill.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names))
import dataclasses
import torch
torch.set_num_threads(1)
from diffdistill.commands import cli, demo
from diffdistill.eval.evaluation import digits
demo.FAST = ("train.steps=2", "train.global_batch_size=8", "train.preview_every=2", "train.checkpoint_every=1")
teacher = ("method.teacher_sampler={{name: heun, num_steps: 2}}", "model.network={{name: mlp, width: 32, blocks: 2}}")
load = demo.load_config
demo.load_config = lambda file, settings: load(file, [*settings, *(teacher if "pretrain" in str(file) else ())])
digits.DIGITS_PIXELS = dataclasses.replace(digits.DIGITS_PIXELS, num_images=200)
cli.main()
"""


def run(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple["subprocess.CompletedProcess[str]", Path]:
    """What was said where every module was imported and the demo run, and the demo's folder."""
    folder = tmp_path_factory.mktemp("portable")
    return run(EVERY_MODULE_AND_THE_DEMO, "demo", "--fast", "--run", str(folder)), folder


def test_without_flock_every_module_is_imported(demo: tuple["subprocess.CompletedProcess[str]", Path]) -> None:
    done, _ = demo
    first = done.stdout.partition("\n")[0]
    assert first.isdecimal(), done.stderr
    assert int(first) >= len(SOURCES) - 10


def test_without_flock_and_links_the_fast_demo_runs(demo: tuple["subprocess.CompletedProcess[str]", Path]) -> None:
    done, folder = demo
    assert done.returncode == 0, done.stderr
    assert (folder / "student" / "checkpoints" / "step-00000002").is_dir()
    assert not [file for file in folder.rglob("*") if file.is_symlink()]


@pytest.mark.parametrize("file", SOURCES, ids=[str(file.relative_to(ROOT)) for file in SOURCES])
def test_no_file_takes_for_granted_what_only_unix_has(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not UNIX_MODULES.intersection(names)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr not in UNIX_NAMES or (file.name, node.attr) in GUARDED
