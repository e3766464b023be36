"""Layouts that families share: latents as tokens, and texts of many lengths as one table."""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.diffusion.cond import Cond

PATCH = 2  # sides of the latents' patches that become one token, and 4 times as many channels


def pack(x: Tensor) -> Tensor:
    """[B, C, H, W] as tokens [B, H/2 W/2, 4 C]."""
    patches = x.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # [B, C, h, 2, w, 2]
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack`."""
    patches = tokens.unflatten(2, (-1, PATCH, PATCH)).unflatten(1, (rows, columns))  # [B, h, w, C, 2, 2]
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def positions(rows: int, columns: int, like: Tensor) -> Tensor:
    """Zero, row and column of each token, [N, 3]."""
    row, column = torch.meshgrid(
        torch.arange(rows, device=like.device), torch.arange(columns, device=like.device), indexing="ij"
    )
    return torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1).to(like.dtype)


def padded(texts: list[Tensor], length: int) -> Cond:
    """Texts of [L_i, C] as text [N, length, C] and its mask, so that all tables of prompts have one shape."""
    rows = [F.pad(text, (0, 0, 0, length - len(text))) for text in texts]
    counts = torch.tensor([len(text) for text in texts], device=texts[0].device)
    mask = torch.arange(length, device=counts.device) < counts[:, None]
    return Cond(text=torch.stack(rows), text_mask=mask.long())


def trimmed(cond: Cond) -> tuple[Tensor, Tensor]:
    """text and its mask, without what counts in no sample: [B, L, C] and [B, L] bool, L at least 1."""
    assert cond.text is not None
    assert cond.text_mask is not None
    mask = cond.text_mask.bool()
    length = max(1, int(mask.sum(1).max()))  # the tokens that count come first
    return cond.text[:, :length], mask[:, :length]


def texts_of(cond: Cond) -> list[Tensor]:
    """The tokens of each sample that count: B texts of [L_i, C]."""
    assert cond.text is not None
    assert cond.text_mask is not None
    return [text[mask] for text, mask in zip(cond.text, cond.text_mask.bool(), strict=True)]
