"""Our kernels and the reference as torch operators: they trace, compile and have a backward pass.

None has a forward-mode derivative of its own, and torch would then give a tangent of zero without a word; so they are
called through `entry`, which takes dual tensors apart first.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from diffdistill.attention import kernels, reference
from diffdistill.attention.kernels import Launch


def launcher() -> Launch:
    """What starts a kernel."""
    from diffdistill.attention.launch import launch

    return launch


@custom_op("diffdistill::attention", mutates_args=())
def cuda_attention(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Our kernel's attention [B, H, M, D] and its log-sum-exp [B, H, M]; the backward pass is torch's own."""
    return kernels.forward(launcher(), q, k, v, key_lengths, scale)


@cuda_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return kernels.empty_rows(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


def torchs_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, scale: float
) -> tuple[Tensor, ...]:
    """The gradients of q, k and v, by torch's attention computed again."""
    mask = None if key_lengths is None else reference.length_mask(key_lengths, k.shape[2])
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return torch.autograd.grad(out, (q, k, v), grad)


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, ctx.key_lengths, ctx.scale = inputs
    ctx.save_for_backward(q, k, v)


def _attention_gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    q, k, v = ctx.saved_tensors
    return *torchs_gradients(grad, q, k, v, ctx.key_lengths, ctx.scale), None, None


cuda_attention.register_autograd(_attention_gradients, setup_context=_keep_attention)


@custom_op("diffdistill::attention_difference", mutates_args=())
def cuda_difference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    other_k: Tensor,
    other_v: Tensor,
    key_lengths: Tensor | None,
    other_key_lengths: Tensor | None,
    weight: float,
    scale: float,
) -> Tensor:
    """A(q, k, v) - weight A(q, other_k, other_v) in one pass over q; the backward pass is torch's own, twice."""
    lengths = (key_lengths, other_key_lengths)
    return kernels.difference(launcher(), q, k, v, other_k, other_v, weight, *lengths, scale)


@cuda_difference.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    other_k: Tensor,
    other_v: Tensor,
    key_lengths: Tensor | None,
    other_key_lengths: Tensor | None,
    weight: float,
    scale: float,
) -> Tensor:
    return kernels.empty_rows(q)


def _keep_difference(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.lengths, (ctx.weight, ctx.scale) = inputs[5:7], inputs[7:]


def _difference_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, k, v, other_k, other_v = ctx.saved_tensors
    dq, dk, dv = torchs_gradients(grad, q, k, v, ctx.lengths[0], ctx.scale)
    other = torchs_gradients(-ctx.weight * grad, q, other_k, other_v, ctx.lengths[1], ctx.scale)
    return dq + other[0], dk, dv, other[1], other[2], None, None, None, None


cuda_difference.register_autograd(_difference_gradients, setup_context=_keep_difference)


@custom_op("diffdistill::attention_tangent", mutates_args=())
def attention_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tq: Tensor,
    tk: Tensor | None,
    tv: Tensor | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    by_kernel: bool,
) -> Tensor:
    """The tangent of the attention `out`, [B, H, M, D]: by our kernel, which takes no mask, or by the reference."""
    if by_kernel:
        return kernels.tangent(launcher(), q, k, v, out, lse, tq, tk, tv, key_lengths, scale)
    return reference.tangent(q, k, v, out, lse, tq, tk, tv, mask, scale)


@attention_tangent.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tq: Tensor,
    tk: Tensor | None,
    tv: Tensor | None,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    by_kernel: bool,
) -> Tensor:
    return kernels.empty_rows(q) if by_kernel else torch.empty_like(out)


def _keep_tangent(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, _, _, tq, tk, tv, *ctx.others, _ = inputs
    ctx.save_for_backward(q, k, v, tq, tk, tv)


def _tangent_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Of q, k, v and their tangents; those through `out` and `lse` are among them. Keeps every score."""
    q, k, v, tq, tk, tv = ctx.saved_tensors
    mask, key_lengths, scale = ctx.others
    if key_lengths is not None:
        mask = reference.length_mask(key_lengths, k.shape[2])
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in (q, k, v, tq, tk, tv)]
        whole: Any = reference.whole_tangent
        made = whole(*leaves, mask, scale)
    given = [x for x in leaves if x is not None]
    found = iter(torch.autograd.grad(made, given, grad))
    dq, dk, dv, dtq, dtk, dtv = (None if x is None else next(found) for x in leaves)
    return dq, dk, dv, None, None, dtq, dtk, dtv, None, None, None, None


attention_tangent.register_autograd(_tangent_gradients, setup_context=_keep_tangent)


@custom_op("diffdistill::reference_attention", mutates_args=())
def reference_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """`reference.forward`, with `reference.backward`: no part of it holds all scores."""
    return reference.forward(q, k, v, mask, scale)


@reference_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=wide)


@custom_op("diffdistill::reference_attention_backward", mutates_args=())
def reference_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.backward`."""
    return reference.backward(grad, q, k, v, out, lse, mask, scale)


@reference_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep_reference(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, ctx.mask, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _reference_gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    made = cast(Any, reference_backward)(grad, *ctx.saved_tensors, ctx.mask, ctx.scale)
    return *made, None, None


reference_attention.register_autograd(_reference_gradients, setup_context=_keep_reference)
