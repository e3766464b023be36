"""Who computes plain attention: the backends by name, and what `auto` takes."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffdistill.attention import kernels, ops, reference
from diffdistill.attention.build import BuildError, find_compiler
from diffdistill.attention.launch import architecture_of
from diffdistill.settings.schema import UserError

Backend = Literal["auto", "cuda", "cudnn", "flash", "efficient", "math", "xformers", "reference"]
"""auto: `choose`. cuda: ours. cudnn, flash, efficient, math: torch's. reference: ours, in plain torch, by chunks."""

OF_TORCH = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
WORTH = 1.05
"""Our plain kernel is chosen where it measured at least this many times as fast as the best other backend."""

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """What `torch.compiler.assume_constant_result` does to a function, without the second of CPU time that its import
    of the compiler takes: a compiled graph takes the answer at compile time."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class Options:
    """What goes with q, k and v. mask: bool (True: seen) or additive, broadcastable to [B, H, M, N]; key_lengths: [B]
    int32, in place of a mask."""

    scale: float
    mask: Tensor | None = None
    key_lengths: Tensor | None = None
    causal: bool = False
    dropout: float = 0.0

    def dense_mask(self, q: Tensor, k: Tensor) -> Tensor | None:
        """All of them as one mask."""
        if self.key_lengths is not None:
            return reference.length_mask(self.key_lengths, k.shape[-2])
        if self.causal:
            return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        return self.mask


def check_backend(name: str) -> Backend:
    """The name, if it is one. Raises UserError."""
    if name not in get_args(Backend):
        raise UserError(f"attention backend {name!r}: choose from {', '.join(get_args(Backend))}")
    return name  # type: ignore[return-value]


def run(name: Backend, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """Attention [B, H, M, D] by a backend. Raises UserError where it cannot do that, saying why."""
    if name == "auto":
        name = choose(q, k, v, options)[0]
    elif name == "cuda" and (missing := no_kernels(q.device)):
        say_once(f"attention backend 'cuda': {missing}; the reference computes it, by chunks")
        name = "reference"
    if name != "auto" and (reason := unfit(name, q, k, v, options)):
        raise UserError(f"attention backend {name!r}: {reason}")
    if name == "cuda":
        return cast_first(ops.cuda_attention(q, k, v, options.key_lengths, options.scale))
    if name == "reference":
        return cast_first(ops.reference_attention(q, k, v, options.dense_mask(q, k), options.scale))
    if name == "xformers":
        return _xformers(q, k, v, options)
    mask = options.dense_mask(q, k) if options.key_lengths is not None else options.mask
    given: dict[str, Any] = {"attn_mask": mask, "dropout_p": options.dropout, "is_causal": options.causal}
    if name == "auto":
        return F.scaled_dot_product_attention(q, k, v, **given, scale=options.scale)
    with sdpa_kernel([OF_TORCH[name]]):
        return F.scaled_dot_product_attention(q, k, v, **given, scale=options.scale)


def cast_first(pair: tuple[Tensor, Tensor]) -> Tensor:
    """The attention, without its log-sum-exp."""
    return pair[0]


def choose(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Backend, str]:
    """What `auto` takes, and why: our kernel where the table says so, else torch's own choice, which is called auto."""
    if reason := no_kernels(q.device) or unfit("cuda", q, k, v, options):
        return "auto", f"torch's own choice; our kernel {reason}"
    ratio = measured_ratio(name_of(q.device), q, k)
    if ratio is None:
        return "auto", "torch's own choice; our kernel was not measured for this on this GPU"
    return (
        "cuda" if ratio >= WORTH else "auto"
    ), f"our kernel measured {ratio:.2f} times as fast as the best of torch's"


def measured_ratio(device: str, q: Tensor, k: Tensor) -> float | None:
    """How many times as fast as the best other backend ours was on this GPU, for the nearest measured shape of this
    head size and type; None if there is none within a factor of 4 in the number of scores."""
    dtype, scores = str(q.dtype).removeprefix("torch."), q.shape[-2] * k.shape[-2]
    near = [
        (max(row["queries"] * row["keys"] / scores, scores / (row["queries"] * row["keys"])), row["ratio"])
        for row in _table()
        if row["device"] == device and row["dtype"] == dtype and row["head_size"] == q.shape[-1]
    ]
    return min(near)[1] if near and min(near)[0] <= 4 else None


@constant_in_graphs
def was_measured(device: torch.device) -> bool:
    """Whether the table of `auto` has anything about this GPU."""
    return device.type == "cuda" and any(row["device"] == name_of(device) for row in _table())


@constant_in_graphs
def name_of(device: torch.device) -> str:
    """Of a GPU."""
    return torch.cuda.get_device_name(device)


@constant_in_graphs
def _table() -> list[dict[str, Any]]:
    return _read_table()


@cache
def _read_table() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((Path(__file__).parent / "measured.json").read_text(encoding="utf-8"))
    return rows


def unfit(name: Backend, q: Tensor, k: Tensor, v: Tensor, options: Options) -> str | None:
    """Why a backend cannot compute this; None if it can, or if only torch knows."""
    special = options.mask is not None or options.causal or options.dropout > 0
    if name == "cuda":
        if special:
            return "takes no mask, no causal attention and no dropout; key_lengths it takes"
        return kernels.unfit(q, k, v)
    if name == "reference":
        return "takes no dropout" if options.dropout else None
    if name == "xformers":
        if special or options.key_lengths is not None:
            return "is used here without masks, lengths and dropout"
        return no_gpu(q) or (None if find_spec("xformers") else "is not installed; pip install xformers")
    return no_gpu(q) if name in ("cudnn", "efficient") else None


def no_gpu(q: Tensor) -> str | None:
    """Why nothing that needs a CUDA GPU can work on this tensor; None if it can."""
    return None if q.device.type == "cuda" else f"needs a CUDA GPU, not a {q.device.type.upper()}"


# Dynamo would trace the search for a compiler, and cannot.
@constant_in_graphs
def no_kernels(device: torch.device) -> str | None:
    """Why our kernels cannot run on a device; None if they can. Nothing is compiled for the answer."""
    return _no_kernels(device)


@cache
def _no_kernels(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"needs a CUDA GPU, not a {device.type.upper()}"
    if not torch.cuda.is_available():
        return "needs a CUDA GPU, and none is there"
    try:
        find_compiler()
        architecture_of(device.index or 0)
    except BuildError as error:
        return str(error)
    return None


@cache
def say_once(line: str) -> None:
    """Warn, the first time."""
    warnings.warn(line, stacklevel=2)


def _xformers(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    from xformers.ops import memory_efficient_attention

    turned = (x.transpose(1, 2) for x in (q, k, v))  # its layout is [B, N, H, D]
    out: Tensor = memory_efficient_attention(*turned, scale=options.scale)
    return out.transpose(1, 2)
