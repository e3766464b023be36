"""The last lines of a command: what to run next, with the paths just used."""

import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path as FilePath

from diffdistill.settings.launcher import this_rank
from diffdistill.settings.terminal import Console, hide_secrets

TYPED: list[str] = []
"""The words after `diffdistill` on the command line."""


def say_next(*commands: Sequence[object], also: Sequence[str] = ()) -> None:
    """Print the next commands to the standard error stream, as they can be typed in this shell.

    commands: each the words after `diffdistill`.  also: other lines.  In distributed training the main process prints
    them.
    """
    if this_rank():
        return
    first, program = how_to_call()
    lines = [first] if first and commands else []
    lines += [f"{program} {shlex.join(map(str, words))}" for words in commands]
    _print("next:", *(f"  {line}" for line in (*lines, *also)))


def launched(processes: int, words: Sequence[str]) -> str:
    """The line that starts a command of ours in so many processes.  words: those behind `diffdistill`."""
    return f"accelerate launch --multi_gpu --num_processes {processes} -m diffdistill {shlex.join(words)}"


def after_training(run: str, method: str, teacher: str | None, *, config: str, can_export: bool) -> None:
    """What follows a run.  config: as it was typed.  can_export: whether `export` can write the model."""
    if method == "pretrain":
        student = f"dmd2/{config.rpartition('/')[2]}" if config.startswith("pretrain/") else "CONFIG"
        say_next(
            ("sample", run, "--out", f"{run}/samples.png"),
            ("train", student, f"teacher={run}", f"run={run}-student"),
        )
        return
    beside = ("--teacher",) if teacher else ()
    say_next(
        ("sample", run, *beside, "--out", f"{run}/samples.png"),
        ("eval", run, *(("--against", teacher) if teacher else ())),
        ("report", run),
        *([("export", run, "--out", exported(run))] if can_export else []),
    )


def exported(run: str) -> str:
    """Where an export of a run may go."""
    return f"exported/{FilePath(run).resolve().name}"


def as_run(folder: str) -> bool:
    """Whether this is the folder of a run, or of joined students."""
    return (FilePath(folder) / "checkpoints").is_dir() or (FilePath(folder) / "router.json").is_file()


def say_how_to_go_on(stopped: str, *, can_resume: bool) -> None:
    """What stopped a command, what of it was saved, and the command that resumes it.

    can_resume: whether it has the option --resume.
    """
    first, program = how_to_call()
    words = going_on(TYPED, can_resume=can_resume)
    if not words:
        _print(stopped)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        program = "the same launcher, with -m diffdistill"
    _print(stopped, f"to resume: {f'{first}; ' if first else ''}{program} {shlex.join(words)}")


def going_on(typed: Sequence[str], *, can_resume: bool) -> list[str]:
    """The same words with --resume where the command has it. A checkpoint that was named is left out: the newest one
    has what was done since."""
    words: list[str] = []
    left = iter(typed)
    for word in left:
        if word == "--checkpoint":
            next(left, None)
        elif not word.startswith("--checkpoint="):
            words.append(word)
    return [*words, "--resume"] if words and can_resume and "--resume" not in words else words


def how_to_call() -> tuple[str | None, str]:
    """A line to type first, if one is needed, and the name of this program."""
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
