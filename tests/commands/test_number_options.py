"""Every number that a command takes has limits, and is refused beyond them by its option's name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from diffdistill.commands.cli import app


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        *(("sample", option, 10**9) for option in ("--count", "--columns", "--steps", "--teacher-steps", "--batch")),
        *(("sample", option, 2**64) for option in ("--seed", "--label")),
        *(("sample", option, "1e400") for option in ("--guidance", "--negative-scale")),
        *(("eval", option, 10**13) for option in ("--repeats", "--seed", "--batch", "--replicates")),
        *(("eval", option, "nan") for option in ("--confidence", "--guidance")),
        *(("students", option, 10**9) for option in ("--processes-each", "--max-restarts")),
        ("reference", "--batch", 10**13),
        ("demo", "--seed", 2**64),
        ("doctor", "--memory", "1e300"),
    ],
)
def test_options_beyond_all_are_refused_by_their_name(
    command: str, option: str, value: object, quick_teacher: Path, tmp_path: Path
) -> None:
    needed = {"sample": [str(quick_teacher)], "eval": [str(quick_teacher)], "students": ["msd/digits"], "demo": []}
    needed |= {"reference": ["{name: digits}", "--protocol", "digits-pixels"], "doctor": ["pretrain/digits"]}
    out = ["--out", str(tmp_path / "a.png")] if command == "sample" else []
    done = CliRunner().invoke(app, [command, *needed[command], *out, option, str(value)])
    assert done.exit_code == 2, done.output
    assert option in done.output or option.strip("-") in done.output
    assert not (tmp_path / "a.png").exists()


def number_options() -> Iterator[tuple[str, str, Any, Any]]:
    """Every option of every command that is a number: command, option, type, what typer knows of it."""
    for command in app.registered_commands:
        assert command.callback is not None
        called = command.name or command.callback.__name__
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            inner, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
            kinds = {inner, *get_args(inner)}
            for one in filter(lambda mark: isinstance(mark, typer.models.OptionInfo), marks):
                if kinds & {int, float}:
                    yield called, f"--{name.replace('_', '-')}", int if int in kinds else float, one


OPTIONS = list(number_options())


def test_the_walk_has_found_the_options() -> None:
    assert {(command, option) for command, option, _, _ in OPTIONS} >= {
        *(("sample", option) for option in ("--columns", "--steps", "--count", "--negative-scale")),
        *(("students", "--processes-each"), ("eval", "--confidence"), ("doctor", "--memory"), ("demo", "--seed")),
    }


@pytest.mark.parametrize(("command", "option", "kind", "info"), OPTIONS, ids=lambda value: str(value)[:30])
def test_every_number_on_the_command_line_has_limits_and_is_refused_beyond_them(
    command: str, option: str, kind: type, info: Any
) -> None:
    assert info.min is not None
    assert info.max is not None
    step = 1 if kind is int else abs(info.max) * 1e-6
    for beyond in (info.max + step, info.min - step, 10**400, "nan" if kind is float else "x"):
        done = CliRunner().invoke(app, [command, option, str(beyond)], env={"COLUMNS": "200"})
        assert done.exit_code == 2, done.output
        assert option in done.output
        assert "Traceback" not in done.output
