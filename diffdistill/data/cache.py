"""The cache of prepared images: folders that are whole or absent, also when two processes write the same one."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path as FilePath
from typing import Any

from diffdistill.settings.launcher import this_rank
from diffdistill.settings.links import refuse_link
from diffdistill.settings.lock import hold
from diffdistill.settings.reading import read_json
from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import say
from diffdistill.storage.atomic import naming, sync, write_synced

IMAGES, LABELS, META = "images.npy", "labels.npy", "meta.json"
SOURCES = "sources"
ENVIRONMENT = "DIFFDISTILL_CACHE"
DEFAULT = "~/.cache/diffdistill"
HASHED_BYTES = 2**30
"""Files up to this size are checked by their hash whenever they are opened, larger ones by their size."""


def cache_folder(named: str | None) -> FilePath:
    """The folder that the config names, or $DIFFDISTILL_CACHE, or ~/.cache/diffdistill."""
    return FilePath(named or os.environ.get(ENVIRONMENT) or DEFAULT).expanduser()


def warn(message: str) -> None:
    """The same, by the first of several processes alone."""
    if this_rank() == 0:
        say(message)


def is_whole(folder: FilePath) -> bool:
    """Whether a prepared set is there and its files are as they were written."""
    try:
        meta = read_json(folder / META)
        for name, (size, digest) in meta["files"].items():
            file = folder / name
            if file.stat().st_size != size or (size <= HASHED_BYTES and _hash(file) != digest):
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def seal(folder: FilePath, meta: dict[str, Any]) -> None:
    """Write meta.json with the sizes and hashes of the other files, and everything through to the disk."""
    files = {file.name: (file.stat().st_size, _hash(file)) for file in sorted(folder.iterdir())}
    write_synced(folder / META, json.dumps(meta | {"files": files}, indent=1) + "\n")
    for path in (*folder.iterdir(), folder):
        _sync(path)


def recall(root: FilePath, fingerprint: str | None) -> str | None:
    """The key that the files with this fingerprint had."""
    if fingerprint:
        with suppress(OSError, UnicodeDecodeError):
            return (root / SOURCES / fingerprint).read_text(encoding="ascii").strip() or None
    return None


def remember(root: FilePath, fingerprint: str, key: str) -> None:
    """Note the key of the files with this fingerprint. A cache that cannot be written is left alone."""
    target = root / SOURCES / fingerprint
    refuse_link(target.parent)
    temporary = target.with_name(f".{fingerprint}-{_unique()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_synced(temporary, key + "\n")
        temporary.replace(target)
    except OSError:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def locked(root: FilePath, key: str) -> Iterator[bool]:
    """Keep other processes from preparing the same set meanwhile. Yields whether the file system knows locks.

    Raises UserError if the cache cannot be written.
    """
    with ExitStack() as held:
        try:
            root.mkdir(parents=True, exist_ok=True)
            has_locks = held.enter_context(hold(root / f".{key}.lock", waiting=_say_waiting))
        except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise UserError(f"{root}: cannot be written: {error.strerror}; set data.cache or ${ENVIRONMENT}") from None
        yield has_locks


@contextmanager
def new_folder(root: FilePath, key: str, *, is_alone: bool) -> Iterator[FilePath]:
    """A temporary folder that becomes `root / key` at the end of the block, or vanishes when the block fails.

    is_alone: nobody else prepares this key, so what killed processes left behind can go.
    """
    if is_alone:
        for leftover in root.glob(f".preparing-{key}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
    folder = root / f".preparing-{key}-{_unique()}"
    try:
        folder.mkdir()
        yield folder
        _publish(folder, root / key)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _publish(folder: FilePath, target: FilePath) -> None:
    try:
        folder.rename(target)
    except OSError:
        if not target.exists():
            raise
        if is_whole(target):  # another process's; else a damaged one
            shutil.rmtree(folder)
            return
        doomed = target.with_name(f".preparing-{target.name}-{_unique()}")
        target.rename(doomed)
        folder.rename(target)
        shutil.rmtree(doomed, ignore_errors=True)
    _sync(target.parent)


def _say_waiting() -> None:
    say("waiting for another process that prepares the same data")


def _sync(path: FilePath) -> None:
    with naming(path):
        sync(path)


def _hash(file: FilePath) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _unique() -> str:
    return f"{os.getpid()}-{secrets.token_hex(4)}"
