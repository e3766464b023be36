"""Features on disk, in blocks of samples: each whole or absent, its SHA-256 in its name, read back in order.

A block holds the samples of fixed numbers. So a broken-off evaluation goes on where it was, several processes share
the work, and neither they nor the batches inside a block change the order in which anything is added up.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path as FilePath

import torch
from safetensors.torch import load, save
from torch import Tensor

from diffdistill.settings.links import refuse_link, refuse_links
from diffdistill.settings.lock import Held, hold
from diffdistill.settings.schema import UserError
from diffdistill.storage.atomic import write_bytes

BLOCK = 256
"""Samples of a block: what a broken-off evaluation loses at most, for each process."""


@dataclass(frozen=True)
class FeatureStore:
    """The features of samples 0 .. num_samples - 1, by name, under `folder`."""

    folder: FilePath
    num_samples: int

    @property
    def num_blocks(self) -> int:
        return -(-self.num_samples // BLOCK)

    def samples(self, block: int) -> Tensor:
        """The numbers of a block's samples, [BLOCK] or fewer in the last one."""
        return torch.arange(block * BLOCK, min((block + 1) * BLOCK, self.num_samples))

    def has(self, block: int) -> bool:
        """Whether a block is there and whole; what is damaged is removed."""
        return self._find(block) is not None

    def write(self, block: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep a block: tensors [samples in the block, ...] by name."""
        refuse_link(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        file = self.folder / f"{block:06d}-{hashlib.sha256(data).hexdigest()}.safetensors"
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            write_bytes(temporary, data)
            temporary.replace(file)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise

    def read(self, block: int) -> dict[str, Tensor]:
        """A block's tensors by name. Raises UserError if it is not there or damaged."""
        data = self._find(block)
        if data is None:
            raise UserError(f"{self.folder}: block {block} is missing or damaged; run the evaluation again")
        return load(data)

    def rows(self, name: str, *, max_samples: int | None = None) -> Iterator[Tensor]:
        """The first `max_samples` samples' features in order, block by block: [B, d] each."""
        wanted = self.num_samples if max_samples is None else min(max_samples, self.num_samples)
        for block in range(-(-wanted // BLOCK)):
            yield self.read(block)[name][: wanted - block * BLOCK]

    def all(self, name: str, *, max_samples: int | None = None) -> Tensor:
        """`rows` as one tensor [N, d]."""
        return torch.cat(list(self.rows(name, max_samples=max_samples)))

    def _find(self, block: int) -> bytes | None:
        """A block's bytes, whose hash is that of its name."""
        for file in sorted(self.folder.glob(f"{block:06d}-*.safetensors")):
            data = file.read_bytes()
            if hashlib.sha256(data).hexdigest() == file.stem.partition("-")[2]:
                return data
            file.unlink(missing_ok=True)
        return None


def hash_features(stores: Sequence[FeatureStore], name: str) -> str:
    """SHA-256 of the bytes of all samples' features, in order; the blocks do not matter."""
    digest = hashlib.sha256()
    for store in stores:
        for rows in store.rows(name):
            digest.update(rows.contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def locked(folder: FilePath) -> Iterator[None]:
    """While open, no other evaluation writes or removes these features. Raises UserError if one already does."""
    with ExitStack() as held:
        try:
            refuse_links(folder)
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(hold(folder / ".lock"))
        except Held as holder:
            raise UserError(f"{folder}: another evaluation of the same images is running ({holder})") from None
        except (PermissionError, FileExistsError, NotADirectoryError) as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
        yield


def discard(folder: FilePath) -> None:
    """Remove an evaluation's features."""
    shutil.rmtree(folder, ignore_errors=True)
