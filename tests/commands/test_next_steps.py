"""How a command ends: what it says after a wanted stop, and which command comes next."""

import inspect
import re
import signal
import sys
import sysconfig
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
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
    assert "error:" not in result.stderr
    said = result.stderr.splitlines()
    assert said[-2] == f"stopped by SIGINT at step 1; saved in {config.run}/checkpoints/step-00000001"
    assert said[-1] == f"to resume: diffdistill {verb} '{file}' train.log_every=1 --resume"


def test_a_checkpoint_that_was_named_is_not_gone_back_to(
    written: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, config = written
    Trainer(config, quiet=True).run()
    stop_at_once(monkeypatch)
    result = call("train", file, "train.steps=3", "--resume", "--checkpoint", "step-00000002")
    assert result.exit_code == 130, result.stderr
    assert result.stderr.splitlines()[-1] == f"to resume: diffdistill train '{file}' train.steps=3 --resume"


def test_under_a_launcher_its_command_is_not_made_up(
    written: tuple[Path, RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(next_steps, "TYPED", ["train", "x.yaml"])
    next_steps.say_how_to_go_on("stopped", can_resume=True)
    assert (
        capsys.readouterr().err == "stopped\nto resume: the same launcher, with -m diffdistill train x.yaml --resume\n"
    )


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_in_the_demo_advises_no_option_that_it_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffdistill.commands.demo.run_demo", interrupted)
    result = call("demo", "--fast")
    assert result.exit_code == 130
    assert result.stderr == "stopped by SIGINT; finished steps are kept\nto resume: diffdistill demo --fast\n"


def test_ctrl_c_in_an_evaluation_says_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffdistill.eval.evaluation.command.run_eval", interrupted)
    result = call("eval", "runs/a", "--guidance", "{name: adaptive, scale: 2}")
    assert result.exit_code == 130
    assert result.stderr.splitlines() == [
        "stopped by SIGINT; finished measurements are kept",
        "to resume: diffdistill eval runs/a --guidance '{name: adaptive, scale: 2}'",
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


def next_of(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    return [line.strip() for line in lines[lines.index("next:") + 1 :]]


def test_training_ends_with_commands_of_the_paths_just_used(
    written: tuple[Path, RunConfig], make_config: MakeConfig, tmp_path: Path
) -> None:
    file, teacher = written
    assert next_of(call("pretrain", file)) == [
        f"diffdistill sample {teacher.run} --out {teacher.run}/samples.png",
        f"diffdistill train CONFIG teacher={teacher.run} run={teacher.run}-student",
    ]
    run, exported = tmp_path / "student", tmp_path / "exported"
    student = make_config("dmd2", "train.steps=1", f"teacher={teacher.run}", f"run={run}")
    (tmp_path / "student.yaml").write_text(dump_yaml(student))
    assert next_of(call("train", tmp_path / "student.yaml")) == [
        f"diffdistill sample {run} --teacher --out {run}/samples.png",
        f"diffdistill eval {run} --against {teacher.run}",
        f"diffdistill report {run}",
        f"diffdistill export {run} --out exported/student",
    ]
    assert next_of(call("report", run))[-1] == f"open {run}/report.html in a browser"
    assert next_of(call("export", run, "--out", exported, "--no-verify"))[0].startswith(
        f"diffdistill sample {exported}"
    )


def source_of(function: Callable[..., Any]) -> str:
    """Of a function, and of its module's private ones that it calls."""
    plain = inspect.unwrap(function)
    source = inspect.getsource(plain)
    private = inspect.getmembers(inspect.getmodule(plain), inspect.isfunction)
    return source + "".join(inspect.getsource(f) for name, f in private if name[0] == "_" and f"{name}(" in source)


def test_every_verb_says_what_is_next() -> None:
    """By its source, as some take long to run."""
    for info in cli.app.registered_commands:
        assert info.callback
        assert re.search(r"say_next\(|after_training\(", source_of(info.callback)), info.callback.__name__


def test_a_packaged_teachers_config_leads_to_the_students_of_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    next_steps.after_training("runs/t", "pretrain", None, config="pretrain/digits", can_export=True)
    assert "  diffdistill train dmd2/digits teacher=runs/t run=runs/t-student" in capsys.readouterr().err.splitlines()


def test_all_configs_are_listed_and_an_unknown_one_shows_the_nearest_five() -> None:
    listed = call("configs")
    assert "pretrain/: cifar10_budget, digits, mnist_budget" in listed.stdout.splitlines()
    assert next_of(listed)
    result = call("train", "dmd/digit")
    assert result.exit_code == 2
    assert "nearest: dmd2/digits, " in result.stderr
    near = result.stderr.split("nearest: ")[1].split(";")[0]
    assert len(near.split(", ")) == 5
    assert "`diffdistill configs` lists all" in result.stderr


def test_verbs_are_grouped_in_help() -> None:
    shown = click.unstyle(call("--help").stdout)
    titles = [
        shown.index(title) for title in ("Get started", "Train ", "Sample and export", "Evaluate", "Merge and convert")
    ]
    assert titles == sorted(titles)
    assert all(info.rich_help_panel for info in cli.app.registered_commands)


def test_the_shell_completes_a_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = CliRunner(
        env={"_DIFFDISTILL_COMPLETE": "complete_bash", "COMP_WORDS": "diffdistill pre", "COMP_CWORD": "1"}
    )
    assert runner.invoke(app, prog_name="diffdistill").stdout.split() == ["pretrain"]
    script = CliRunner(env={"_DIFFDISTILL_COMPLETE": "source_bash"}).invoke(app, prog_name="diffdistill").stdout
    assert "complete -o default -F" in script
    assert "_DIFFDISTILL_COMPLETE=complete_bash" in script
