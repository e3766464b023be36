"""Attention for every network: one entry, one context, our own CUDA kernels, and a forward-mode derivative."""

from diffdistill.attention.backends import Backend, choose
from diffdistill.attention.context import reaching, use_attention
from diffdistill.attention.entry import attention, attention_difference
from diffdistill.attention.state import current_backend

__all__ = ["Backend", "attention", "attention_difference", "choose", "current_backend", "reaching", "use_attention"]
