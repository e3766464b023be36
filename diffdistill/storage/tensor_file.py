"""Safetensors files that are hashed while they are written.

The bytes are those of safetensors' own `save_file`, which leaves the reader of a hash to read the file again. The
format: 8 bytes of the header's length, little-endian; the header, JSON padded by spaces to 8 bytes; the tensors, those
of the widest types first, then by name.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

import torch
from torch import Tensor

CODES = (
    *(("uint64", "U64"), ("int64", "I64"), ("float64", "F64"), ("complex64", "C64"), ("float32", "F32")),
    *(("uint32", "U32"), ("int32", "I32"), ("bfloat16", "BF16"), ("float16", "F16"), ("uint16", "U16")),
    *(("int16", "I16"), ("float8_e5m2fnuz", "F8_E5M2FNUZ"), ("float8_e4m3fnuz", "F8_E4M3FNUZ")),
    *(("float8_e8m0fnu", "F8_E8M0"), ("float8_e4m3fn", "F8_E4M3"), ("float8_e5m2", "F8_E5M2")),
    *(("int8", "I8"), ("uint8", "U8"), ("bool", "BOOL")),
)
"""Types of numbers that the format has, in the order in which a file has them, and how its header calls them."""
ORDER = {getattr(torch, name): place for place, (name, _) in enumerate(CODES) if hasattr(torch, name)}
ALIGNMENT = 8
BATCH_BYTES = 2**20


def write_and_hash(handle: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file while another thread hashes it.

    handle: open for writing, in binary.  tensors: on any device, each copied from it when its turn comes.
    Returns its SHA-256. Raises OSError, and ValueError on a type of numbers that the format has not.
    """
    ordered = sorted(tensors.items(), key=lambda one: (_place(*one), one[0]))
    digest, before = hashlib.sha256(), Future[None]()
    before.set_result(None)
    with ThreadPoolExecutor(1) as thread:
        for batch in _batches(_parts(ordered, metadata)):
            before.result()  # so that two batches are in memory, and not all
            before = thread.submit(_add, digest, batch)
            handle.writelines(batch)
        before.result()
    return digest.hexdigest()


def _place(name: str, tensor: Tensor) -> int:
    if tensor.dtype not in ORDER:
        raise ValueError(f"{name}: safetensors files have no {tensor.dtype}")
    return ORDER[tensor.dtype]


def _parts(ordered: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None) -> Iterator[Any]:
    """A file's header, and the numbers of its tensors, as buffers."""
    told: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    ordered, end = list(ordered), 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        code = CODES[ORDER[tensor.dtype]][1]
        told[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    yield len(header).to_bytes(8, "little") + header
    for _, tensor in ordered:
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _batches(parts: Iterable[Any]) -> Iterator[list[Any]]:
    """Parts by the megabyte, for a thread is not asked for each small one."""
    batch, size = list[Any](), 0
    for part in parts:
        batch.append(part)
        size += len(part)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _add(digest: Any, batch: Iterable[Any]) -> None:
    for part in batch:
        digest.update(part)
