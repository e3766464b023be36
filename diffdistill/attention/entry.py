"""The one entry to attention, for every network, with a forward-mode derivative.

torch's fused attention has no forward-mode derivative: `torch.func.jvp` through it raises. Here dual tensors are taken
apart, the primal goes where it always goes, and the tangent has a kernel of its own:

    tangent = P tv + (P * tS) v - rowsum(P * tS) out,  P = exp(S - lse),  S = scale q k^T,  tS = scale (tq k^T + q tk^T)

An `autograd.Function` with a `jvp`, or an operator without one, would give a tangent of zero without a word under
`torch.compile` or `torch.func.jvp`; taking the tensors apart does not.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffdistill.attention import kernels, ops
from diffdistill.attention.backends import Backend, Options, check_backend, no_kernels, run, say_once, unfit
from diffdistill.attention.state import current_backend, inside, is_dual
from diffdistill.settings.schema import UserError


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    backend: Backend | None = None,
) -> Tensor:
    """softmax(scale q k^T) v, as `torch.nn.functional.scaled_dot_product_attention`, with derivatives of both modes.

    q: [B, H, M, D]; k, v: [B, H, N, D].  mask: bool (True: seen) or additive, broadcastable to [B, H, M, N].
    key_lengths: [B] whole numbers, of the keys that each sample sees, in place of a mask.  scale: default 1/sqrt(D).
    backend: default that of `use_attention`, else auto.  Returns [B, H, M, D].
    Raises UserError where the backend cannot do that.
    """
    if key_lengths is not None and (mask is not None or causal):
        raise UserError("attention: give key_lengths or a mask, not both")
    lengths = _checked(key_lengths, k)
    options = Options(q.shape[-1] ** -0.5 if scale is None else scale, mask, lengths, causal, dropout)
    name = _for_layer(current_backend(), q, k, v, options) if backend is None else check_backend(backend)
    with inside():
        if any(map(is_dual, (q, k, v))):
            return _moving(name, q, k, v, options)
        return run(name, q, k, v, options)


def _for_layer(name: Backend, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Backend:
    """The context's backend for one layer among many: auto, and a line that says so, where it does not fit."""
    if name in ("cuda", "xformers") and (reason := unfit(name, q, k, v, options)):
        say_once(f"attention backend {name!r}: {reason}; torch's own choice computes it")
        return "auto"
    return name


def attention_difference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    other_k: Tensor,
    other_v: Tensor,
    *,
    weight: float,
    key_lengths: Tensor | None = None,
    other_key_lengths: Tensor | None = None,
    mask: Tensor | None = None,
    other_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """A(q, k, v) - weight A(q, other_k, other_v): cross attention that steers away from a second context.

    other_k, other_v: [B, H, N', D]; lengths and masks as `attention`'s.  One pass over q on a GPU where our kernel
    fits and nothing has a mask, else two attentions.
    Negative-away steer attention: Nguyen et al. 2024, arXiv:2412.02687, section 3.2.
    """
    tensors, lengths = (q, k, v, other_k, other_v), (_checked(key_lengths, k), _checked(other_key_lengths, other_k))
    fits = not kernels.unfit(q, k, v, kernel="difference") and not kernels.unfit(q, other_k, other_v)
    if (
        no_kernels(q.device) is None
        and fits
        and mask is None
        and other_mask is None
        and not any(map(is_dual, tensors))
        and current_backend() in ("auto", "cuda")
    ):
        return ops.cuda_difference(*tensors, *lengths, weight, q.shape[-1] ** -0.5 if scale is None else scale)
    towards = attention(q, k, v, key_lengths=key_lengths, mask=mask, scale=scale)
    other = attention(q, other_k, other_v, key_lengths=other_key_lengths, mask=other_mask, scale=scale)
    return towards - weight * other


def _checked(key_lengths: Tensor | None, k: Tensor) -> Tensor | None:
    """Key lengths as kernels read them: [B] int32 on the keys' device. Raises UserError."""
    if key_lengths is None:
        return None
    if key_lengths.shape != k.shape[:1] or key_lengths.is_floating_point() or key_lengths.dtype == torch.bool:
        shown = f"{list(key_lengths.shape)} {str(key_lengths.dtype).removeprefix('torch.')}"
        raise UserError(f"attention: key_lengths must be {k.shape[0]} integers, one per sample, not {shown}")
    return key_lengths.to(k.device, torch.int32).contiguous()


def _moving(name: Backend, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """Attention of dual tensors."""
    if options.dropout:
        raise UserError("attention: no forward-mode derivative with dropout; put the network in eval mode")
    (p_q, tq), (p_k, tk), (p_v, tv) = map(forward_ad.unpack_dual, (q, k, v))
    if name == "math" or (options.mask is not None and options.mask.requires_grad):
        with sdpa_kernel([SDPBackend.MATH]):
            mask = options.dense_mask(q, k)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=options.scale)
    tq = torch.zeros_like(p_q) if tq is None else tq
    mask, scale = options.dense_mask(p_q, p_k), options.scale
    by_kernel = _takes_kernel(name, p_q, p_k, p_v, options)
    if by_kernel:
        out, lse = _primal(p_q, p_k, p_v, options)
    else:
        out, lse = ops.reference_attention(p_q, p_k, p_v, mask, scale)
    tangents = (tq, tk, tv, None if by_kernel else mask, options.key_lengths if by_kernel else None)
    moved = ops.attention_tangent(p_q, p_k, p_v, out, lse, *tangents, scale, by_kernel)
    return forward_ad.make_dual(out, moved)


def _takes_kernel(name: Backend, q: Tensor, k: Tensor, v: Tensor, options: Options) -> bool:
    plain = options.mask is None and not options.causal
    return (
        name != "reference"
        and plain
        and no_kernels(q.device) is None
        and kernels.unfit(q, k, v, kernel="tangent") is None
    )


def _primal(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp: torch's flash attention, or our kernel where the numbers of keys differ."""
    if options.key_lengths is not None:
        return ops.cuda_attention(q, k, v, options.key_lengths, options.scale)
    flash: Any = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse = flash(q, k, v, 0.0, False, scale=options.scale)[:2]
    return out, lse[..., : q.shape[-2]]  # some versions of torch round its length up
