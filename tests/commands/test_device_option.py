"""`--device` takes what its help names, and nothing else means the CPU unsaid."""

import pytest
import torch
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.distributed.devices import choose_device

COMMANDS = (
    ("sample", "nowhere"),
    ("benchmark", "nowhere", "--prompts", "none", "--out", "none"),
    ("play", "nowhere"),
    ("eval", "nowhere", "--protocol", "digits-pixels"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("device", ["cuda", "cup"])
def test_another_device_is_refused(command: tuple[str, ...], device: str) -> None:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*command, "--device", device])
    assert done.exit_code == 2
    assert f"--device {device}: choose from auto, cpu" in done.output


def test_auto_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_gpu, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        assert (choose_device("auto").type, choose_device("cpu").type) == (kind, "cpu")
