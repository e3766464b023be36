"""One run at a time in a folder."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path as FilePath

from diffdistill.schema import UserError

LOCK = ".lock"


@contextmanager
def locked(folder: FilePath) -> Iterator[None]:
    """While open, no other run can open the same folder. The lock ends with the process, however that ends.

    Raises UserError naming the process that holds it. A file system without locks keeps nobody out.
    """
    with (folder / LOCK).open("a+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read(200).strip()
            raise UserError(
                f"run = {str(folder)!r}: another run is writing there ({holder}); name another `run`"
            ) from None
        except OSError:
            pass
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        yield
