"""Optimisers by name, their rates as a function of the step, and their state as plain tensors."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffdistill.distributed.sharded import sharded_as, whole
from diffdistill.settings.schema import UserError
from diffdistill.training.config import OptimizerConfig


def learning_rate(options: OptimizerConfig, step: int, num_steps: int) -> float:
    """The rate at an iteration: linear warm-up, then constant, then the decay to zero at num_steps."""
    warmup = min(1.0, (step + 1) / options.warmup_steps) if options.warmup_steps else 1.0
    begin = options.decay_start * num_steps
    done = min(1.0, max(0.0, (step - begin) / max(num_steps - begin, 1)))
    decay = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[options.decay]
    return options.lr * warmup * decay


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a new player that training may change: those that were not frozen."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def make_optimizer(module: nn.Module, options: OptimizerConfig) -> torch.optim.Optimizer:
    """The named optimiser over a module's trainable parameters.

    Raises UserError where an 8-bit one cannot be: bitsandbytes is not installed, or the module is not on a GPU.
    """
    parameters = trainable(module)
    if options.name.endswith("8bit"):
        return _make_8bit(parameters, options)
    is_sgd = options.name == "sgd"
    use_fused = True if options.implementation == "fused" or (options.implementation == "auto" and not is_sgd) else None
    use_foreach = {"foreach": True, "loop": False}.get(options.implementation)  # None: torch's choice
    if is_sgd:
        return torch.optim.SGD(
            parameters,
            lr=options.lr,
            momentum=options.betas[0],
            weight_decay=options.weight_decay,
            fused=use_fused,
            foreach=use_foreach,
        )
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "radam": torch.optim.RAdam,  # Liu et al. 2020, arXiv:1908.03265; torch has no fused one
    }
    return kinds[options.name](
        parameters,
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        foreach=use_foreach,
        **({} if options.name == "radam" else {"fused": use_fused}),
    )


def _make_8bit(parameters: list[nn.Parameter], options: OptimizerConfig) -> torch.optim.Optimizer:
    """bitsandbytes' Adam with block-wise 8-bit moments.  Dettmers et al. 2022, arXiv:2110.02861."""
    plain = options.name.removesuffix("8bit")
    try:
        from bitsandbytes import optim
    except ImportError:
        install = "pip install 'diffdistill[8bit]'"
        raise UserError(f"optimizers: {options.name} needs bitsandbytes: {install}, or use {plain}") from None
    if any(not parameter.is_cuda for parameter in parameters):
        raise UserError(f"optimizers: {options.name} needs a CUDA GPU; use {plain}")
    kind = optim.Adam8bit if plain == "adam" else optim.AdamW8bit
    made: torch.optim.Optimizer = kind(
        parameters, lr=options.lr, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay
    )
    return made


def clip(parameters: list[nn.Parameter], options: OptimizerConfig) -> Tensor:
    """The gradient's norm before clipping, after clipping it as the config says."""
    norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if options.clip_norm:
        nn.utils.clip_grads_with_norm_(parameters, options.clip_norm, norm)
    if options.clip_value:
        nn.utils.clip_grad_value_(parameters, options.clip_value)
    return norm


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's moments and counters by parameter number; rates depend on the step and are not kept."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for number, parameter in enumerate(parameters_of(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                place = tensor.data_ptr()  # 0 where processes hold parts
                is_shared = place in seen  # bitsandbytes' tables, which safetensors would refuse
                found[f"{number}.{key}"] = tensor.clone() if is_shared else tensor
                seen |= {place} if place else set()
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put `optimizer_tensors` back."""
    parameters = parameters_of(optimizer)
    state: dict[int, dict[str, Tensor | int]] = {}
    for name, value in tensors.items():
        number, key = name.split(".", 1)
        state.setdefault(int(number), {})[key] = _like_before(value, parameters[int(number)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What an optimiser changes, in the order of `optimizer_tensors`."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _like_before(value: Tensor, parameter: Tensor) -> Tensor | int:
    """A moment in its parameter's layout, which fused kernels take for granted; a whole number as such."""
    if value.shape == parameter.shape and value.ndim:
        part = sharded_as(value, parameter)
        return torch.empty_like(parameter, dtype=value.dtype, device=part.device).copy_(part)
    return int(value) if value.dtype == torch.int64 else value
