"""SHA-256 of weights in memory."""

import hashlib

import torch
from torch import Tensor, nn

from diffdistill.eval.records.record import hash_json


def hash_weights(module: nn.Module) -> str:
    """Of the weights' names, shapes and bytes."""
    return hash_json({name: [list(t.shape), hash_tensor(t)] for name, t in module.state_dict().items()})


def hash_tensor(tensor: Tensor) -> str:
    """Of a tensor's bytes, row by row."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
