"""What a command does not import: torch's compiler takes as long as torch itself."""

import subprocess
import sys
from pathlib import Path

import pytest

SLOW = (
    *("torch._dynamo", "sympy", "torch.distributed.fsdp", "torch.distributed.checkpoint"),
    *("scipy", "sklearn", "matplotlib", "diffusers", "transformers", "tensorboard"),
)
CODE = f"""
import sys
from diffdistill.commands.cli import main
try:
    main()
except SystemExit as end:
    print("exit code", end.code or 0)
print("imported", *(name for name in {SLOW} if name in sys.modules))
"""


def last_lines(*arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    return done.stdout.splitlines()[-2:]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("methods",), 0),
        (("train", "dmd2/digits", "nonsense=3"), 2),
        (("pretrain", "pretrain/digits", "train.steps=many"), 2),
    ],
    ids=["methods", "an unknown key", "a wrong value"],
)
def test_a_config_is_read_without_the_compiler(arguments: tuple[str, ...], code: int) -> None:
    assert last_lines(*arguments) == [f"exit code {code}", "imported"]


def test_images_are_drawn_without_the_compiler(quick_teacher: Path, tmp_path: Path) -> None:
    images = str(tmp_path / "images.png")
    assert last_lines("sample", str(quick_teacher), "--count", "1", "--out", images) == ["exit code 0", "imported"]
