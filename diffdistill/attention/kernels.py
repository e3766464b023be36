"""Our CUDA kernels, seen from Python: what they take, and the C structures that they are given.

The sources are in cuda/; a variant is one head size and element type of them.
"""

from collections.abc import Callable
from ctypes import Structure, c_float, c_int, c_longlong, c_void_p
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

HEAD_SIZES = (*range(32, 161, 8), 256)
QUERIES = 64  # of a block, as in attention.cu
Kernel = Literal["forward", "difference", "tangent"]


@dataclass(frozen=True)
class Variant:
    """What the sources are built for.  moving_keys: whether keys and values have tangents.  stages: of the pipeline."""

    head_size: int
    half: bool
    moving_keys: bool = True
    stages: int = 2

    @property
    def defines(self) -> tuple[str, ...]:
        """For the compiler."""
        named = {"HEAD_SIZE": self.head_size, "STAGES": self.stages, "MOVING_KEYS": int(self.moving_keys)}
        return (*(f"-D{name}={value}" for name, value in named.items()), *(["-DHALF"] if self.half else []))

    def shared_bytes(self, kernel: Kernel) -> int:
        """Shared memory of a block."""
        pitch = (self.head_size + 15) // 16 * 16 + 8
        if kernel == "tangent":
            keys = 32 if self.head_size <= 160 else 16
            rows = 2 * QUERIES + self.stages * keys * (4 if self.moving_keys else 2)
        else:
            keys = 64 if self.head_size <= 80 else 32 if self.head_size <= 160 else 16
            rows = QUERIES + self.stages * keys * 2
        return rows * pitch * 2


class TensorArgument(Structure):
    """struct Tensor."""

    _fields_ = [("data", c_void_p), ("batch", c_longlong), ("head", c_longlong), ("row", c_longlong)]


class ShapeArgument(Structure):
    """struct Shape."""

    _fields_ = [
        ("batch", c_int),
        ("heads", c_int),
        ("queries", c_int),
        ("keys", c_int),
        ("scale", c_float),
        ("key_lengths", c_void_p),
    ]


def _tensors(*names: str) -> list[tuple[str, type]]:
    return [(name, TensorArgument) for name in names]


class ForwardArguments(Structure):
    """struct ForwardArguments."""

    _fields_ = [("shape", ShapeArgument), *_tensors("q", "k", "v", "out"), ("lse", c_void_p)]


class DifferenceArguments(Structure):
    """struct DifferenceArguments."""

    _fields_ = [
        ("shape", ShapeArgument),
        *_tensors("q", "k", "v", "other_k", "other_v", "out"),
        ("other_keys", c_int),
        ("weight", c_float),
        ("other_key_lengths", c_void_p),
    ]


class TangentArguments(Structure):
    """struct TangentArguments."""

    _fields_ = [
        ("shape", ShapeArgument),
        *_tensors("q", "k", "v", "out", "tq", "tk", "tv", "tangent"),
        ("lse", c_void_p),
    ]


Launch = Callable[[Kernel, Structure, Variant, int, Tensor], None]
"""(kernel, its arguments, variant, number of blocks, a tensor that says which device)."""


def unfit(q: Tensor, k: Tensor, v: Tensor, *, kernel: Kernel = "forward") -> str | None:
    """Why a kernel cannot take these tensors [B, H, N, D]; None if it can."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return "takes q, k and v of one type"
    if q.dim() != 4 or k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[-1] != q.shape[-1]:
        return "takes q [B, H, M, D] and k, v [B, H, N, D] with the same B, H and D"
    if q.shape[-1] not in HEAD_SIZES or (kernel == "difference" and q.shape[-1] > 160):
        largest = "" if kernel == "difference" else ", and 256"
        return f"takes head sizes 32 to 160 in steps of 8{largest}, not {q.shape[-1]}"
    return None


def forward(
    launch: Launch, q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention [B, H, M, D] and its log-sum-exp [B, H, M] float32.  key_lengths: [B] int32, or None."""
    out, lse = empty_rows(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    q, k, v = map(dense_rows, (q, k, v))
    arguments = ForwardArguments(_shape(q, k, scale, key_lengths), *map(_tensor, (q, k, v, out)), lse.data_ptr())
    launch("forward", arguments, _variant(q), _blocks(q), q)
    return out, lse


def difference(
    launch: Launch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    other_k: Tensor,
    other_v: Tensor,
    weight: float,
    key_lengths: Tensor | None,
    other_key_lengths: Tensor | None,
    scale: float,
) -> Tensor:
    """A(q, k, v) - weight A(q, other_k, other_v), [B, H, M, D]."""
    out = empty_rows(q)
    q, k, v, other_k, other_v = map(dense_rows, (q, k, v, other_k, other_v))
    tensors = map(_tensor, (q, k, v, other_k, other_v, out))
    others = None if other_key_lengths is None else other_key_lengths.data_ptr()
    arguments = DifferenceArguments(_shape(q, k, scale, key_lengths), *tensors, other_k.shape[2], weight, others)
    launch("difference", arguments, _variant(q), _blocks(q), q)
    return out


def tangent(
    launch: Launch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tq: Tensor,
    tk: Tensor | None,
    tv: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
) -> Tensor:
    """The tangent of the attention `out`, [B, H, M, D].  lse: [B, H, M] float32, of the primal.

    tk, tv: None for both where keys and values stand still: three matrix products in place of five.
    """
    moving = tk is not None or tv is not None
    tk, tv = (torch.zeros_like(x) if t is None and moving else t for x, t in ((k, tk), (v, tv)))
    lse, made = lse.contiguous(), empty_rows(q)
    q, k, v, out, tq = map(dense_rows, (q, k, v, out, tq))
    moved = [k if t is None else dense_rows(t) for t in (tk, tv)]
    tensors = map(_tensor, (q, k, v, out, tq, *moved, made))
    arguments = TangentArguments(_shape(q, k, scale, key_lengths), *tensors, lse.data_ptr())
    launch("tangent", arguments, _variant(q, moving_keys=moving), _blocks(q), q)
    return made


def dense_rows(x: Tensor) -> Tensor:
    """`x` itself if a kernel can read it (dense rows, aligned to 16 bytes), else a copy.

    `contiguous` would not do: it returns a tensor that is contiguous as it is, wherever it begins.
    """
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    aligned = x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in strides)
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def empty_rows(like: Tensor) -> Tensor:
    """What a kernel writes: dense rows in the order of `like`'s, as [B, N, H, D] turned, where it has an order."""
    made = torch.empty_like(like)
    return made if made.stride(-1) == 1 else like.new_empty(like.shape)


def _tensor(x: Tensor) -> TensorArgument:
    return TensorArgument(x.data_ptr(), *x.stride()[:3])


def _shape(q: Tensor, k: Tensor, scale: float, key_lengths: Tensor | None) -> ShapeArgument:
    lengths = None if key_lengths is None else key_lengths.data_ptr()
    return ShapeArgument(*q.shape[:3], k.shape[2], scale, lengths)


def _variant(q: Tensor, *, moving_keys: bool = True) -> Variant:
    return Variant(q.shape[-1], q.dtype == torch.float16, moving_keys)


def _blocks(q: Tensor) -> int:
    return q.shape[0] * q.shape[1] * ((q.shape[2] + QUERIES - 1) // QUERIES)
