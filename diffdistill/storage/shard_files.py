"""A checkpoint's sharded group: a folder of safetensors, each process's own, by torch.distributed.checkpoint's
Hugging Face storage. Where a part belongs stands in its file's header.

That package takes half a second of CPU time to import: so it is imported where a checkpoint is sharded.
"""

import errno
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor

from diffdistill.distributed.processes import others
from diffdistill.distributed.sharded import is_sharded
from diffdistill.distributed.stopping import TrainingError
from diffdistill.settings.schema import UserError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

UNREADABLE = (SafetensorError, ValueError, LookupError, TypeError, AttributeError, AssertionError, OverflowError)


def write_shards(folder: FilePath, tensors: Mapping[str, Tensor]) -> None:
    """Write the parts of all processes, each its own; all call it. What all have alike is written by one.

    Raises OSError in all where one cannot.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with others():
            save({name: tensor.detach() for name, tensor in tensors.items()}, storage_writer=writer)
    except CheckpointException as error:
        rank, (fault, _) = next(iter(error.failures.items()))
        code = fault.errno if isinstance(fault, OSError) else None
        raise OSError(code or errno.EIO, f"{fault} (process {rank})", str(folder)) from error


def check_whole(folder: FilePath, tensors: Mapping[str, Tensor]) -> None:
    """Raise TrainingError unless these tensors lie in the folder, as far as headers say.

    A process whose folder is another machine's of the same name has written, and nobody has seen it fail.
    """
    try:
        stored = {name: tuple(one.size) for name, one in _stored(folder).items()}
    except ValueError:
        stored = {}
    if stored != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
        raise TrainingError(
            f"{folder}: lacks files of other processes; `run` must be on a file system that all processes share"
        )


def read_shards(folder: FilePath, like: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """The tensors of a folder: whole, but where `like` gives one of the same shape whose parts the processes hold, this
    one's parts alone; then all call it. The writers may have been more or fewer.

    Raises UserError where the parts do not make tensors.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        found = {name: _empty(stored, like(name)) for name, stored in _stored(folder).items()}
        is_shared = any(is_sharded(tensor) for tensor in found.values())
        with others(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is what no_dist asks for
            load(found, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not is_shared)
    except TrainingError:
        raise
    except (*UNREADABLE, RuntimeError, OSError) as error:
        raise UserError(f"{folder}: cannot be read: {error}") from None
    except CheckpointException as error:
        reasons = "; ".join(f"{fault}" for fault, _ in error.failures.values())
        raise UserError(f"{folder}: cannot be read: {reasons}") from None
    return found


def _stored(folder: FilePath) -> "dict[str, TensorStorageMetadata]":
    """What the files say that they hold. Raises ValueError, before anything is allocated, where parts are missing or
    overlap: a tensor is sharded along its first dimension."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found = {}
    for name, stored in HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        end = 0
        for chunk in sorted(stored.chunks, key=lambda chunk: tuple(chunk.offsets)):
            if tuple(chunk.offsets) != (end, *[0] * (len(stored.size) - 1))[: len(stored.size)]:
                raise ValueError(f"{name}: its parts are incomplete")
            if tuple(chunk.sizes[1:]) != tuple(stored.size[1:]):
                raise ValueError(f"{name}: its parts are incomplete")
            end += chunk.sizes[0] if chunk.sizes else 0
        found[name] = stored
    return found


def _empty(stored: "TensorStorageMetadata", like: Tensor | None) -> Tensor:
    if like is not None and is_sharded(like) and like.shape == stored.size:
        return torch.empty_like(like, dtype=stored.properties.dtype, requires_grad=False)
    return torch.empty(stored.size, dtype=stored.properties.dtype)
