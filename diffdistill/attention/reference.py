"""Attention and its derivatives in plain torch, by chunks of queries: memory grows with the length, not its square.

All of it computes in float32 (float64 for float64 inputs) and returns the inputs' type. q: [B, H, M, D]; k, v:
[B, H, N, D]; mask: None, bool (True: seen) or additive, broadcastable to [B, H, M, N]. S = scale q k^T, P = softmax(S).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

SCORES = 2**24
"""At most so many scores are in memory at a time (64 MiB in float32)."""


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """P v, [B, H, M, D], and log sum exp S, [B, H, M]. A query that sees no key gets zeros and minus infinity."""
    wide, out = _wide(q), torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=wide, device=q.device)
    for rows in _chunks(q, k):
        scores = _scores(q[..., rows, :], k, mask, rows, scale)
        lse[..., rows] = scores.logsumexp(-1)
        out[..., rows, :] = (_weights(scores, lse[..., rows]) @ v.to(wide)).to(q.dtype)
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v from that of P v.

    dS = P * (dP - rowsum(dO * O)), dP = dO v^T. Dao et al. 2022, arXiv:2205.14135, appendix B.2.
    """
    wide = _wide(q)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    for rows in _chunks(q, k):
        part, g = q[..., rows, :].to(wide), grad[..., rows, :].to(wide)
        p = _weights(_scores(part, k, mask, rows, scale), lse[..., rows])
        inner = (g * out[..., rows, :].to(wide)).sum(-1, keepdim=True)
        ds = p * (g @ v.to(wide).mT - inner) * scale
        dq[..., rows, :] = (ds @ k.to(wide)).to(q.dtype)
        dk += ds.mT @ part
        dv += p.mT @ g
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tq: Tensor,
    tk: Tensor | None,
    tv: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """The derivative of P v along (tq, tk, tv), [B, H, M, D]: P tv + (P * tS) v - rowsum(P * tS) P v.

    tS = scale (tq k^T + q tk^T).  tk, tv: None where keys or values stand still.
    """
    wide, made = _wide(q), torch.empty_like(out)
    for rows in _chunks(q, k):
        p = _weights(_scores(q[..., rows, :], k, mask, rows, scale), lse[..., rows])
        moved = tq[..., rows, :].to(wide) @ k.to(wide).mT
        if tk is not None:
            moved += q[..., rows, :].to(wide) @ tk.to(wide).mT
        moved *= p * scale
        part = moved @ v.to(wide) - moved.sum(-1, keepdim=True) * out[..., rows, :].to(wide)
        made[..., rows, :] = (part if tv is None else part + p @ tv.to(wide)).to(out.dtype)
    return made


def whole_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor,
    tk: Tensor | None,
    tv: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """As `tangent`, from q, k and v alone and with a graph. Keeps every score."""
    wide = _wide(q)
    x_q, x_k, x_v, t_q = (x.to(wide) for x in (q, k, v, tq))
    scores = _scores(x_q, x_k, mask, slice(None), scale)
    p = _weights(scores, scores.logsumexp(-1))
    moved = t_q @ x_k.mT
    if tk is not None:
        moved = moved + x_q @ tk.to(wide).mT
    moved = moved * p * scale
    made = moved @ x_v - moved.sum(-1, keepdim=True) * (p @ x_v)
    return (made if tv is None else made + p @ tv.to(wide)).to(q.dtype)


def length_mask(key_lengths: Tensor, num_keys: int) -> Tensor:
    """[B] key lengths as a mask [B, 1, 1, N]: the first ones are seen."""
    return (torch.arange(num_keys, device=key_lengths.device) < key_lengths[:, None])[:, None, None]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunks(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Ranges of queries."""
    size = max(1, SCORES // max(1, k.shape[-2] * q.shape[:-2].numel()))
    return (slice(first, first + size) for first in range(0, q.shape[-2], size))


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, rows: slice, scale: float) -> Tensor:
    scores = q.to(_wide(q)) @ k.to(_wide(k)).mT * scale
    if mask is None:
        return scores
    seen = mask[..., rows, :] if mask.shape[-2] > 1 else mask
    return scores.masked_fill(~seen, -torch.inf) if mask.dtype == torch.bool else scores + seen.to(scores.dtype)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(S - lse), zero for a query that sees no key."""
    return (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
