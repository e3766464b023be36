"""Optimisers by name, their rates as a function of the step, and their state as plain tensors."""

import math

import torch
from torch import Tensor, nn

from diffdistill.config import OptimizerConfig


def learning_rate(options: OptimizerConfig, step: int, num_steps: int) -> float:
    """The rate at an iteration: linear warm-up, then constant, then the decay to zero at num_steps."""
    warmup = min(1.0, (step + 1) / options.warmup_steps) if options.warmup_steps else 1.0
    begin = options.decay_start * num_steps
    done = min(1.0, max(0.0, (step - begin) / max(num_steps - begin, 1)))
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[options.decay]
    return options.lr * warmup * decay


def make_optimizer(module: nn.Module, options: OptimizerConfig) -> torch.optim.Optimizer:
    """The named optimiser over all of a module's parameters, in torch's fused form."""
    parameters = list(module.parameters())
    if options.name == "sgd":
        return torch.optim.SGD(parameters, lr=options.lr, momentum=options.betas[0], weight_decay=options.weight_decay)
    kind = torch.optim.Adam if options.name == "adam" else torch.optim.AdamW
    return kind(
        parameters,
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        fused=True,
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's moments and counters by parameter number; rates depend on the step and are not kept."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{key}": value for number, entry in state.items() for key, value in entry.items() if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put `optimizer_tensors` back."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
