"""What LoRA's factors over one base in few bits would need, by the shapes of a network alone. Arithmetic: nothing is
quantised, and no package for it is needed.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.distillation.method import Update
from diffdistill.networks.quantised import nf4_bytes, quantised_layers
from diffdistill.training.config import OptimizerConfig
from diffdistill.training.iteration import Iteration
from diffdistill.training.memory.prediction import Growth, MemoryPlan, PlayerBytes, optimizer_bytes
from diffdistill.training.plan import Plan

RANK = 64
SETTINGS = f"lora={{default: {{rank: {RANK}, targets: linear}}}} speed.teacher_dtype=nf4"
"""What this is the arithmetic of."""
ROUNDED = (nn.Linear, nn.Conv1d, nn.Conv2d)  # of a base in bf16, and of what NF4 leaves


def base_bytes(net: nn.Module, dtype: Literal["fp32", "bf16", "nf4"]) -> int:
    """A frozen network's weights and buffers, stored as `speed.teacher_dtype` does."""
    large = {id(layer): layer for layer in quantised_layers(net).values()} if dtype == "nf4" else {}
    packed = {id(layer.weight) for layer in large.values()}  # whose biases stay
    rounded = [part for part in net.modules() if isinstance(part, ROUNDED) and id(part) not in large]
    halved = {id(p) for part in rounded for p in part.parameters(recurse=False)}
    total = sum(buffer.nbytes for buffer in net.buffers())
    for weight in net.parameters():
        if id(weight) in packed:
            total += nf4_bytes(weight)
        else:
            is_halved = dtype != "fp32" and id(weight) in halved
            total += weight.numel() * min(weight.element_size(), 2) if is_halved else weight.nbytes
    return total


def factors_over(net: nn.Module, rank: int = RANK) -> list[Tensor]:
    """LoRA's factors on all linear layers, without memory: A [rank, in] and B [out, rank] of each."""
    layers = [part for part in net.modules() if isinstance(part, nn.Linear)]
    sides = [side for part in layers for side in ((rank, part.in_features), (part.out_features, rank))]
    return [torch.empty(side, device="meta") for side in sides]


def plan_for(
    base: int,
    parameters: Sequence[Tensor],
    options: OptimizerConfig,
    *,
    replicated: frozenset[str] = frozenset(),
    gathered: int = 0,
) -> MemoryPlan:
    """Doctor's plan of two players that train these parameters each, an average, and a base of so many bytes, before
    activations.  replicated, gathered: see `MemoryPlan`."""
    weights = sum(p.nbytes for p in parameters)
    trained = PlayerBytes(weights, weights, optimizer_bytes(parameters, options))
    return MemoryPlan(
        players={"teacher": PlayerBytes(base), "generator": trained, "fake": trained},
        averages=weights,
        has_averages_on_device=True,
        updates=(Update(("generator",), "loss"), Update(("fake",), "loss")),
        activations={"loss": Growth()},
        recomputed={"loss": Growth()},
        batch=Growth(),
        batch_size=1,
        micro_batch_size=1,
        replicated=replicated,
        gathered=gathered,
    )


def with_factors_over_nf4(plan: Plan, iteration: Iteration, needs: MemoryPlan) -> MemoryPlan | None:
    """The same run with factors in the place of copies, and its activations as they were; None where there is no
    teacher of large linear layers to stand over, or LoRA is there already. Whole in each process, as factors are."""
    teacher, config = iteration.problem.teacher, plan.config
    if teacher is None or plan.method.trains_network or any(config.lora.values()):
        return None
    if not quantised_layers(teacher.net):
        return None
    factors = factors_over(teacher.net)
    weights, players, replicated = sum(factor.nbytes for factor in factors), dict(needs.players), needs.replicated
    for name, module in iteration.players.items():
        if name in iteration.problem.all_teachers:
            assert isinstance(module, Denoiser)
            players[name] = PlayerBytes(base_bytes(module.net, "nf4"))
        elif isinstance(module, Denoiser) and name in iteration.trained:
            players[name] = PlayerBytes(weights, weights, optimizer_bytes(factors, config.optimizer(name)))
            replicated |= {name} if needs.parts > 1 else set()
        elif isinstance(module, Denoiser):
            players[name] = PlayerBytes(weights)
    averages = len(config.emas) * weights
    return replace(needs, players=players, averages=averages, replicated=replicated, gathered=0)
