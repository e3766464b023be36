"""What a command does not import: torch's compiler takes as long as torch itself."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

SLOW = (
    *("torch._dynamo", "sympy", "torch.distributed.fsdp", "torch.distributed.checkpoint"),
    *("scipy", "sklearn", "matplotlib", "diffusers", "transformers", "tensorboard"),
)
CODE = f"""
import json, sys
from diffdistill.commands.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["diffdistill", *arguments]
    try:
        main()
    except SystemExit as end:
        print("exit code", end.code or 0)
    print("imported", *(name for name in {SLOW} if name in sys.modules))
"""
COMMANDS: dict[str, tuple[tuple[str, ...], int]] = {
    "the methods": (("methods",), 0),
    "an unknown key": (("train", "dmd2/digits", "nonsense=3"), 2),
    "a wrong value": (("pretrain", "pretrain/digits", "train.steps=many"), 2),
    "images": (("sample", "{teacher}", "--count", "1", "--out", "{teacher}/../images.png"), 0),
}


def test_commands_do_not_import_the_compiler(quick_teacher: Path, tmp_path: Path) -> None:
    """One after another in one process: what one of them imports stands behind its own exit code."""
    teacher = shutil.copytree(quick_teacher, tmp_path / "teacher")
    calls = [[part.format(teacher=teacher) for part in arguments] for arguments, _ in COMMANDS.values()]
    command = [sys.executable, "-c", CODE, json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    said = [line for line in done.stdout.splitlines() if line.startswith(("exit code", "imported"))]
    assert said == [line for _, code in COMMANDS.values() for line in (f"exit code {code}", "imported")], done.stderr
