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


_RESUMED = "The newest checkpoint is intact: free disk space, then use --resume"
WHEN_FULL = {
    **dict.fromkeys(("pretrain", "train", "students"), _RESUMED),
    "evaluate": "Finished measurements are kept: free disk space, then run the command again to resume",
    "export": "No partial folder was left and an earlier export is intact: free disk space, then run the command again",
}
"""What to do, by command."""

WHEN_STOPPED = {
    **dict.fromkeys(("pretrain", "train", "students"), "; saved checkpoints are kept"),
    "demo": "; finished steps are kept",
    "evaluate": "; finished measurements are kept",
}
"""What Ctrl-C leaves, by command, where no handler saves more."""


def fail(message: str, code: int) -> NoReturn:
    """Print the error and exit. In distributed training each process but the main one adds its rank."""
    who = f" process {this_rank()}:" if this_rank() else ""
    said = Text.assemble(("error:", "bold red"), f"{who} {hide_secrets(message)}")
    Console(stderr=True).print(said, soft_wrap=True)
    raise typer.Exit(code)


def stop(message: str, code: int, *, can_resume: bool) -> NoReturn:
    """Exit after a signal, which is no error. The main process says so."""
    if this_rank() == 0:
        say_how_to_go_on(message, can_resume=can_resume)
    raise typer.Exit(code)


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """A command whose expected errors end in one message and an exit code, never in a traceback."""

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
        return f"the disk is full: {error}. {WHEN_FULL.get(command, 'Free disk space, then run the command again')}", 1
    if isinstance(error, (TrainingError, ExportError, OSError)):
        return str(error), 1
    return "", None
