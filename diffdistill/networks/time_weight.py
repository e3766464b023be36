"""A learned log-weight of a loss over noise levels."""

import torch
from torch import Tensor, nn


class TimeWeight(nn.Module):
    """w(tau) = linear(random Fourier features of tau), zero at first.  Karras et al. 2024, arXiv:2312.02696, eq. 21."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width))
        self.register_buffer("phases", torch.rand(width))
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tau: Tensor) -> Tensor:
        """tau: [B], any dtype.  Returns [B]."""
        turns = tau.to(self.frequencies.dtype)[:, None] * self.frequencies + self.phases
        weight: Tensor = self.linear((2 * torch.pi * turns).cos())[:, 0]
        return weight
