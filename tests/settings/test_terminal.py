"""What people are shown is text: no control characters, no markup, no secrets, wherever it comes from."""

import ast
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import WriteConfig, small_config
from support.boards import measured
from typer.testing import CliRunner

from diffdistill.commands import doctor
from diffdistill.commands.cli import app
from diffdistill.eval.evaluation.run import Evaluation
from diffdistill.eval.evaluation.table import show_differences, show_evaluations
from diffdistill.eval.metrics.compare import Difference
from diffdistill.eval.protocols.packaged import find_protocol
from diffdistill.eval.records.environment import describe_environment
from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import OBEYED, Console, hide_secrets, printable, say
from diffdistill.settings.values import dump
from diffdistill.training.config import parse_config
from diffdistill.training.reports.log import RunLog
from diffdistill.training.resume import check_unchanged, find_start

ROOT = Path(__file__).parents[2]
HOSTILE = "[red]a[/b] [link=https://x.org]:smile: {step} \x1b[2J\x1b]0;title\x9c \u202etxt.exe\u202c \x9b31m"
SHOWN = r"[red]a[/b] [link=https://x.org]:smile: {step} \x1b[2J\x1b]0;title\x9c \u202etxt.exe\u202c \x9b31m"
KEPT = "é ü 漢字 👩\u200d🎨 → a\tb\nc"
SECRET = "s3cret-0123456789"


def test_what_a_terminal_obeys_is_written_out_and_other_text_is_left_alone() -> None:
    assert printable(HOSTILE + "\ud800\r\a\b") == SHOWN + r"\ud800\r\x07\x08"
    assert printable(KEPT) == KEPT
    assert printable("a\u2028b\ufeff\u2066\U000e0041\x7f\x00") == r"a\u2028b\ufeff\u2066\U000e0041\x7f\x00"


def log_line(folder: Path) -> None:
    with RunLog(folder, title=HOSTILE, start_step=0, num_steps=2) as log:
        log.step(1)
        log.report(1, 8, {"a/loss": 1.0})
        log.warn(HOSTILE)
        log.say(HOSTILE)


def tables(folder: Path) -> None:
    protocol = {"repeats": 1, "num_images": 8, "name": HOSTILE, "reference": {"split": HOSTILE}}
    console = Console(stderr=True)
    show_evaluations([Evaluation(measured(HOSTILE, 1.0, protocol=protocol, notes=HOSTILE), (), 1.0)], console)
    found = {"fd-pixels": Difference(1.0, 2.0, -1.0, -1.5, -0.5)}
    show_differences(found, (HOSTILE, HOSTILE), find_protocol("digits-pixels"), console, confidence=0.95)


def changed_settings(folder: Path) -> None:
    config = small_config("dmd2", folder, teacher=folder)
    before = dump(config)
    before["optimizers"] = {HOSTILE: before["optimizers"].popitem()[1]}
    source: Any = SimpleNamespace(key="k")
    check_unchanged(config, source, {"config": before, "model": {}}, origin=Path(HOSTILE), allow_changes=True)


def failure(folder: Path) -> None:
    sys.stderr.write(CliRunner().invoke(app, ["train", HOSTILE]).stderr)


OUTLETS: dict[str, Callable[[Path], None]] = {
    "a run's log": log_line,
    "the data's notes": lambda folder: say(HOSTILE + "\ud800\r\a\b"),
    "tables": tables,
    "settings of a checkpoint": changed_settings,
    "whoever has no place of its own": lambda folder: say(HOSTILE),
    "an error": failure,
    "the doctor": lambda f: print(doctor.show([doctor.Finding(HOSTILE, HOSTILE)], Console(stderr=True))),
}


@pytest.mark.parametrize("is_live", [True, False])
@pytest.mark.parametrize("outlet", OUTLETS)
def test_no_outlet_obeys_a_hostile_text(
    outlet: str, is_live: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TTY_INTERACTIVE", "0")  # a bar is drawn at the end alone
    if is_live:
        monkeypatch.setenv("FORCE_COLOR", "1")
    OUTLETS[outlet](tmp_path)
    said = capsys.readouterr().err
    assert SHOWN in said
    own = ("\x1b[2J", "\x1b]", "\a", "\b", "\x9b", "\x9c", "\u202e", "\ud800", "\r")
    assert not [piece for piece in own if piece in said]
    assert is_live or not OBEYED.search(said)


def test_nothing_is_printed_past_the_console_that_sees_to_it() -> None:
    """rich's own console is imported by one module; nothing is printed, echoed or written to a stream beside it."""
    consoles, others = [], []
    for file in (file for wing in ("diffdistill", "eval", "methods") for file in (ROOT / wing).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "rich.console":
                consoles += [file.name for name in node.names if name.name == "Console"]
            if isinstance(node, ast.ImportFrom) and node.module == "rich":
                others += [f"{file}: rich.{name.name}" for name in node.names if name.name == "print"]
            if isinstance(node, ast.Name) and node.id == "print":  # called, or handed on
                others.append(f"{file}, line {node.lineno}: print")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                *("sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__"),
                *("click.echo", "click.secho", "typer.echo", "typer.secho", "traceback.print_exc", "rich.print"),
            ):
                others.append(f"{file}, line {node.lineno}: {ast.unparse(node)}")
    assert consoles == ["terminal.py"]
    assert others == []


@pytest.mark.parametrize("name", ["../..", "..", ".", "step-00000001/../../..", "/", "/tmp"])
def test_a_checkpoint_s_name_leads_nowhere_else(name: str, quick_teacher: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        find_start(quick_teacher, name)


def test_a_run_whose_folder_is_named_like_markup_trains(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    run = tmp_path / "[b]run{step}[" / "]"
    done = CliRunner().invoke(app, ["pretrain", str(write_config("pretrain", "train.steps=1")), f'run="{run}"'])
    assert done.exit_code == 0, done.output
    assert f"done: {run}/checkpoints/step-00000001" in done.stdout


@pytest.mark.parametrize("text", ["\ud800", "\x1b[31m", "[/red]"])
def test_a_hostile_checkpoint_is_refused_in_plain_text(text: str, quick_teacher: Path, tmp_path: Path) -> None:
    from fuzz import _read_checkpoint  # writes hashes that fit

    source = next((quick_teacher / "checkpoints").iterdir())
    state = json.loads((source / "state.json").read_text()) | {"student": text}
    (tmp_path / "seeds").mkdir()
    (tmp_path / "seeds" / "run").symlink_to(quick_teacher)
    (tmp_path / "one").mkdir()
    with pytest.raises(UserError):
        _read_checkpoint(tmp_path / "one", b"state.json\n" + json.dumps(state).encode())
    done = CliRunner().invoke(
        app, ["sample", str(tmp_path / "one" / "step-00000001"), "--out", str(tmp_path / "a.png")]
    )
    assert done.exit_code == 2, done.output
    assert "error: " in done.stderr
    assert not OBEYED.search(done.output)


def test_the_environment_s_secrets_are_not_in_errors_notes_and_records(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    done = CliRunner().invoke(app, ["train", f"https://me:pw@host/{SECRET}"])
    assert (done.exit_code, "https://***@host/***: no such file" in done.stderr) == (2, True)
    say(f"a {SECRET}")
    with RunLog(tmp_path, title="t", start_step=0, num_steps=1, quiet=True) as log:
        log.warn(f"b {SECRET}")
        log.note(f"c {SECRET}")
    assert (tmp_path / "warnings.txt").read_text() == "b ***\nc ***\n"
    assert SECRET not in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["diffdistill", "eval", f"--x={SECRET}"])
    assert (
        describe_environment(torch.device("cpu"), dtype="float32", wall_seconds=1.0).command
        == "diffdistill eval --x=***"
    )


def test_names_that_only_look_like_a_secret_s_hide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GIT_AUTHOR_NAME", "KEYBOARD_LAYOUT", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "diffdistill")
    assert hide_secrets("diffdistill") == "diffdistill"
    assert hide_secrets("'api_key': 'abc', Authorization: Bearer abc") == "'api_key': '***', Authorization: ***"


@pytest.mark.parametrize("value", ["https://me:hunter22@host/x", "hf_abcdefghijklmnopqrstuvwx"])
def test_a_config_that_holds_a_secret_is_refused_without_it(value: str) -> None:
    with pytest.raises(UserError, match=r"config: data\.path: holds a password or token") as caught:
        parse_config({"run": "x", "data": {"name": "huggingface", "path": value}})
    assert value not in str(caught.value)


def test_a_terminal_that_is_one_still_has_its_colours() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    console.print("[red]a[/]", markup=True)
    assert console.file.getvalue() == "\x1b[31ma\x1b[0m\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_when_nobody_reads_any_more_the_work_goes_on(stream: str, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from diffdistill.settings.terminal import Console
console = Console(stderr={stream == "stderr"})
for number in range(5000):
    console.print("a line", number)
Path({str(tmp_path / "done")!r}).write_text("all of it")
"""
    process = subprocess.Popen([sys.executable, "-c", code], **{stream: subprocess.PIPE})  # type: ignore[call-overload]
    pipe = getattr(process, stream)
    pipe.readline()
    pipe.close()
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "done").read_text() == "all of it"
