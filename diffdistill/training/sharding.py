"""Weights, gradients, moments and averages shared out among the processes: torch's fully_shard (FSDP2), per player.

A block's weights are whole in a process only while it computes.  Zhao et al. 2023, arXiv:2304.11277.
torch's package takes half a second of CPU time to import: so it is imported where something is sharded.
"""

import atexit
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from diffdistill.diffusion.denoiser import Denoiser, freeze
from diffdistill.distillation.method import Update
from diffdistill.distributed.parts import whole
from diffdistill.distributed.processes import Processes
from diffdistill.networks.diffusers_model import DiffusersNetwork
from diffdistill.networks.recompute import recomputable_blocks
from diffdistill.settings.schema import UserError
from diffdistill.training.objective import Ask

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

    from diffdistill.training.config import RunConfig

TAPS = ("features", "forward_with_features")  # what is asked of a network beside its forward pass


def make_mesh(config: "RunConfig", processes: Processes) -> DeviceMesh | None:
    """The processes that share one copy of the weights, or None where each has all of them: one process alone, too.

    Raises UserError for settings that do not go with `speed.shard`.
    """
    kind = config.speed.shard
    _check(config)
    if kind == "none" or processes.count == 1:
        return None
    device = processes.device.type
    if kind == "all":
        return _mesh(device, shard=processes.count)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of the launcher: torchrun, accelerate
    if here == 1 or processes.count % here:
        raise UserError(f"speed.shard = 'machine': {here} of {processes.count} processes are here; use all or none")
    return _mesh(device, replicate=processes.count // here, shard=here)


def _mesh(device: str, **sizes: int) -> DeviceMesh:
    """torch's caches of sharded tensors hold their mesh for ever; what it holds, groups and their threads, may end."""
    mesh = init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    atexit.register(getattr(mesh, "_pg_registry", {}).clear)  # torch before 2.10 holds names
    return mesh


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Keep this process's part of a module's weights alone, on its device. New parameters take the old ones' places.

    Of a denoiser each block of the network is gathered by itself, and what is left of it together.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    net = module.net if isinstance(module, Denoiser) else module
    for block in net.closed_blocks if isinstance(net, DiffusersNetwork) else recomputable_blocks(net):
        fully_shard(block, mesh=mesh)
    # Gathered weights that stayed, as a root's do by default, would not follow optimisers, averages and requires_grad.
    fully_shard(net, mesh=mesh, reshard_after_forward=True)
    for name in TAPS:
        if hasattr(net, name):
            register_fsdp_forward_method(net, name)


class Shards:
    """The gradients of sharded players.  An `objective.Averaging`."""

    def __init__(self, trained: Mapping[str, nn.Module]) -> None:
        self._trained = trained

    @contextmanager
    def of(self, update: Update, *, is_last: bool) -> Iterator[Ask]:
        """Until the last micro-batch gradients add up in each process, whole."""
        for name in update.players:
            for part in _sharded(self._trained[name]):
                part.set_requires_gradient_sync(is_last, recurse=False)
        yield lambda loss: loss()


def outline(module: nn.Module) -> nn.Module:
    """A copy of a module that is about to be sharded, without weights."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in module.parameters()}
    return deepcopy(module, empty)


def filled(outline: nn.Module, module: nn.Module, device: torch.device) -> nn.Module:
    """A frozen copy of a sharded module, whole in each process: all ask for it, and then compute what they like."""
    copy = deepcopy(outline)
    copy.load_state_dict({name: whole(tensor) for name, tensor in module.state_dict().items()}, assign=True)
    return freeze(copy).to(device)


def _sharded(module: nn.Module) -> "Iterator[FSDPModule]":
    from torch.distributed.fsdp import FSDPModule

    return (part for part in module.modules() if isinstance(part, FSDPModule))


def _check(config: "RunConfig") -> None:
    speed, method = config.speed, config.method
    if speed.shard == "none":
        return
    faults = {
        "lora": any(config.lora.values()),
        "speed.compile": speed.compile is not None,
        "speed.channels_last": speed.channels_last,
        "speed.ema_device = 'cpu'": speed.ema_device == "cpu",
        "optimisers of 8 bits": any(options.name.endswith("8bit") for options in config.optimizers.values()),
        f"method.name = {method.name!r}, which differentiates a forward pass": method.differentiates_forward,
    }
    named = [name for name, is_so in faults.items() if is_so]
    if named:
        instead = (
            ": every process holds the frozen base once and the small factors, and speed.teacher_dtype and "
            "speed.activation_checkpointing make it less"
        )
        raise UserError(
            f"speed.shard = {speed.shard!r}: does not go with {', '.join(named)}; use none"
            f"{instead if faults['lora'] else ''}"
        )
