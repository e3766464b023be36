"""What a command says at its end: what can be typed next, with the paths just used."""

import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path as FilePath

import click

from diffdistill.settings.launcher import this_rank
from diffdistill.settings.terminal import Console, hide_secrets

ARGUMENTS = "diffdistill.arguments"
"""Under this key the context of click keeps what was typed."""


def say_next(*commands: Sequence[object]) -> None:
    """Commands for people, on the standard error stream, as they can be typed in this shell.

    commands: each the words behind `diffdistill`.  Of several processes the first says it.
    """
    if this_rank():
        return
    first, program = how_to_call()
    lines = [first] if first else []
    lines += [f"{program} {shlex.join(map(str, words))}" for words in commands]
    _print("next:", *(f"  {line}" for line in lines))


def say_how_to_go_on(stopped: str) -> None:
    """What stopped a command, what of it was saved, and the command that goes on."""
    first, program = how_to_call()
    words = going_on()
    if words is None:
        _print(stopped)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        program = "the same launcher, with -m diffdistill"
    _print(stopped, f"to go on: {f'{first}; ' if first else ''}{program} {shlex.join(words)}")


def going_on() -> list[str] | None:
    """What was typed behind `diffdistill`, with --resume where the command has it; None outside a command.

    A checkpoint that was named is left out: the newest one has what was done since.
    """
    context = click.get_current_context(silent=True)
    if context is None or ARGUMENTS not in context.meta:
        return None
    words: list[str] = []
    typed = iter(context.meta[ARGUMENTS])
    for word in typed:
        if word == "--checkpoint":
            next(typed, None)
        elif not word.startswith("--checkpoint="):
            words.append(word)
    can_resume = any("--resume" in parameter.opts for parameter in context.command.params)
    return [*words, "--resume"] if can_resume and "--resume" not in words else words


def how_to_call() -> tuple[str | None, str]:
    """A line to type first, if one is needed, and how this program is then called."""
    found, scripts = shutil.which("diffdistill"), FilePath(sysconfig.get_path("scripts"))
    activate = scripts / "activate"
    if found and (FilePath(found).parent == scripts or not activate.is_file()):
        return None, "diffdistill"
    if activate.is_file():
        return f"source {shlex.quote(_short(activate))}", "diffdistill"
    return None, f"{shlex.quote(sys.executable)} -m diffdistill"


def _short(file: FilePath) -> str:
    here = FilePath.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)


def _print(*lines: str) -> None:
    Console(stderr=True).print(hide_secrets("\n".join(lines)), soft_wrap=True)
