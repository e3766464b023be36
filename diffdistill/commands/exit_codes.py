"""How a command ends. Exit codes: 0 done; 1 failed; 2 bad input; 130 and 143 stopped by SIGINT and SIGTERM."""

import functools
import inspect
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

import typer
from rich.text import Text

from diffdistill.commands.next_steps import say_how_to_go_on
from diffdistill.settings.launcher import this_rank
from diffdistill.settings.terminal import Console, hide_secrets

P = ParamSpec("P")
R = TypeVar("R")


_RESUMED = "The last good checkpoint is intact; make room and go on with --resume"
WHEN_FULL = {
    **dict.fromkeys(("pretrain", "train", "students"), _RESUMED),
    "evaluate": "What was measured so far is kept; make room and give the command again, which goes on from there",
    "export": "Nothing was left behind, and what was there before is intact; make room and give the command again",
}
"""What to do, by command."""

WHEN_STOPPED = {
    **dict.fromkeys(("pretrain", "train", "students"), "; checkpoints that were saved stay"),
    "demo": "; what is done is kept",
    "evaluate": "; what was measured so far is kept",
}
"""What is kept when Ctrl-C comes where nothing waits for it, by command."""


def fail(message: str, code: int) -> NoReturn:
    """Say what is wrong, plainly, and leave. Of several processes each says which one it is, but for the first."""
    who = f" process {this_rank()}:" if this_rank() else ""
    said = Text.assemble(("error:", "bold red"), f"{who} {hide_secrets(message)}")
    Console(stderr=True).print(said, soft_wrap=True)
    raise typer.Exit(code)


def stop(message: str, code: int, *, can_resume: bool) -> NoReturn:
    """Leave as asked by a signal: no error. The first of several processes says so."""
    if this_rank() == 0:
        say_how_to_go_on(message, can_resume=can_resume)
    raise typer.Exit(code)


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """A command whose expected faults end in one message and the right exit code, never in a traceback."""

    can_resume = "resume" in inspect.signature(command).parameters

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        from diffdistill.distributed.stopping import StopRequested
        from diffdistill.settings.schema import UserError

        try:
            return command(*args, **kwargs)
        except UserError as error:
            fail(str(error), 2)
        except KeyboardInterrupt:
            kept = WHEN_STOPPED.get(command.__name__, "")
            stop(f"stopped by SIGINT{kept}", 130, can_resume=can_resume)
        except StopRequested as wanted:
            stop(str(wanted), wanted.exit_code, can_resume=can_resume)
        except Exception as error:
            message, code = _expected(error, command.__name__)
            if code is None:
                raise
            fail(message, code)

    return run


def _expected(error: Exception, command: str) -> tuple[str, int | None]:
    """The message and exit code of a fault of a command that is not a bug, or (.., None)."""
    from pydantic import ValidationError

    from diffdistill.distributed.stopping import TrainingError
    from diffdistill.export.verify import ExportError
    from diffdistill.storage.atomic import is_disk_full

    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()), 2
    if is_disk_full(error):
        return f"the disk is full: {error}. {WHEN_FULL.get(command, 'Make room and give the command again')}", 1
    if isinstance(error, (TrainingError, ExportError, OSError)):
        return str(error), 1
    return "", None
