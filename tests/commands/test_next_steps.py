"""How a command ends: what it says after a wanted stop, and which command comes next."""

import signal
import sys
import sysconfig
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from diffdistill.commands import cli, next_steps
from diffdistill.commands.cli import app
from diffdistill.settings.values import dump_yaml
from diffdistill.training.config import RunConfig
from diffdistill.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, [*map(str, arguments)])


@pytest.fixture
def written(make_config: MakeConfig, tmp_path: Path) -> tuple[Path, RunConfig]:
    """A config of two steps in a file, and what it says."""
    config, file = make_config("pretrain", "train.steps=2"), tmp_path / "a config.yaml"
    file.write_text(dump_yaml(config))
    return file, config


def stop_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffdistill.training.trainer.stop_signals", lambda: nullcontext([signal.SIGINT]))


@pytest.mark.parametrize("verb", ["pretrain", "train"])
def test_a_wanted_stop_is_no_error_and_names_the_command_that_goes_on(
    written: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    file, config = written
    stop_at_once(monkeypatch)
    result = call(verb, file, "train.log_every=1")
    assert result.exit_code == 130
    assert "error" not in result.stderr
    said = result.stderr.splitlines()
    assert said[-2] == f"stopped by SIGINT at step 1; saved in {config.run}/checkpoints/step-00000001"
    assert said[-1] == f"to go on: diffdistill {verb} '{file}' train.log_every=1 --resume"


def test_a_checkpoint_that_was_named_is_not_gone_back_to(
    written: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, config = written
    Trainer(config, quiet=True).run()
    stop_at_once(monkeypatch)
    result = call("train", file, "train.steps=3", "--resume", "--checkpoint", "step-00000002")
    assert result.exit_code == 130, result.stderr
    assert result.stderr.splitlines()[-1] == f"to go on: diffdistill train '{file}' train.steps=3 --resume"


def test_under_a_launcher_its_command_is_not_made_up(
    written: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(next_steps, "going_on", lambda: ["train", "x.yaml", "--resume"])
    next_steps.say_how_to_go_on("stopped")
    assert capsys.readouterr().err == "stopped\nto go on: the same launcher, with -m diffdistill train x.yaml --resume\n"


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_in_the_demo_advises_no_option_that_it_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffdistill.commands.demo.run_demo", interrupted)
    result = call("demo", "--fast")
    assert result.exit_code == 130
    assert result.stderr == "stopped by SIGINT; what is done is kept\nto go on: diffdistill demo --fast\n"


def test_ctrl_c_in_an_evaluation_says_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffdistill.eval.evaluation.command.run_eval", interrupted)
    result = call("eval", "runs/a", "--guidance", "{name: adaptive, scale: 2}")
    assert result.exit_code == 130
    assert result.stderr.splitlines() == [
        "stopped by SIGINT; what was measured so far is kept",
        "to go on: diffdistill eval runs/a --guidance '{name: adaptive, scale: 2}'",
    ]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_of_several_processes_the_first_says_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("diffdistill.eval.evaluation.command.run_eval", interrupted)
    assert (call("eval", "runs/a").stderr == "") == (rank == "1")
    next_steps.say_next(("sample", "runs/a"))
    assert (capsys.readouterr().err == "") == (rank == "1")


def test_where_the_command_is_not_found_the_environment_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts = tmp_path / ".venv" / "bin"
    scripts.mkdir(parents=True)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(scripts))
    monkeypatch.setattr(next_steps.shutil, "which", lambda name: None)  # type: ignore[attr-defined]
    monkeypatch.chdir(tmp_path)
    assert next_steps.how_to_call() == (None, f"{sys.executable} -m diffdistill")
    (scripts / "activate").touch()
    next_steps.say_next(("sample", "runs/a b"), ("export", "runs/a b", "--out", Path("exported/a")))
    assert capsys.readouterr().err.splitlines() == [
        "next:",
        "  source .venv/bin/activate",
        "  diffdistill sample 'runs/a b'",
        "  diffdistill export 'runs/a b' --out exported/a",
    ]
    monkeypatch.setattr(next_steps.shutil, "which", lambda name: "/usr/bin/diffdistill")  # type: ignore[attr-defined]
    assert next_steps.how_to_call()[0] == "source .venv/bin/activate", "another installation's"
    monkeypatch.setattr(next_steps.shutil, "which", lambda name: str(scripts / name))  # type: ignore[attr-defined]
    assert next_steps.how_to_call() == (None, "diffdistill")


def test_every_verb_is_run_as_typed() -> None:
    assert cli.app.info.cls is cli.Verbs
