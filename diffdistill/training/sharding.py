"""Weights, gradients, moments and averages shared out among the processes: torch's fully_shard (FSDP2), per player.

A block's weights are whole in a process only while it computes.  Zhao et al. 2023, arXiv:2304.11277.
Of players in LoRA it is the frozen base, once for all that stand over it; their factors are small and stay whole in
every process, whose gradients are averaged as those of replicas are. So do layers in few bits, whose packed weights
fully_shard cannot part, with their biases.
torch's package takes half a second of CPU time to import: so it is imported where something is sharded.
"""

import atexit
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from diffdistill.diffusion.denoiser import Denoiser, freeze
from diffdistill.distillation.method import Update
from diffdistill.distributed.processes import Processes
from diffdistill.distributed.sharded import whole
from diffdistill.networks.diffusers_model import DiffusersNetwork
from diffdistill.networks.lora import lora_of
from diffdistill.networks.quantised import is_quantised
from diffdistill.networks.recompute import recomputable_blocks
from diffdistill.settings.schema import UserError
from diffdistill.training.objective import Ask, Averaging

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
        raise UserError(
            f"speed.shard = 'machine': {here} of {processes.count} processes are on this machine; use all or none"
        )
    return _mesh(device, replicate=processes.count // here, shard=here)


def sharers(config: "RunConfig", count: int) -> int:
    """How many of `count` processes share one copy of the weights. Where no launcher says how many are of one machine,
    all of them are."""
    if config.speed.shard == "machine":
        return min(count, int(os.environ.get("LOCAL_WORLD_SIZE", count)))
    return count if config.speed.shard == "all" else 1


def _mesh(device: str, **sizes: int) -> DeviceMesh:
    """torch's caches of sharded tensors hold their mesh for ever; what it holds, groups and their threads, may end."""
    mesh = init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    atexit.register(getattr(mesh, "_pg_registry", {}).clear)  # torch before 2.10 holds names
    return mesh


def shard(modules: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Keep this process's part of the modules' weights alone, on its device. New parameters take the old ones' places.

    Of a denoiser each block of the network is gathered by itself, and what is left of it together. A weight that
    several networks hold, LoRA's base, is sharded once. Factors, and what stands around them, stay as they are.
    """
    common = _held_again([network_of(module) for module in modules])
    for module in modules:
        _shard_one(module, mesh)
    for (part, name), (owner, owned) in common.items():
        part.register_parameter(name, getattr(owner, owned))


def _shard_one(module: nn.Module, mesh: DeviceMesh) -> None:
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    net, lora = network_of(module), lora_of(module)
    # Gathered weights that stayed, as a root's do by default, would not follow optimisers, averages and requires_grad.
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
    kept = {*whole_in_each(net), *(lora.adapters.parameters() if lora else ())}
    if kept:
        options["ignored_params"] = kept
    for block in gathered_apart(net):
        fully_shard(block, **options)
    fully_shard(net, **options)
    for name in TAPS:
        if hasattr(net, name):
            register_fsdp_forward_method(net, name)


def whole_in_each(net: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of a network's layers in few bits."""
    return (p for part in net.modules() if is_quantised(part) for p in part.parameters(recurse=False))


Place = tuple[nn.Module, str]  # a parameter's: the module that holds it, and its name there


def _held_again(nets: Sequence[nn.Module]) -> dict[Place, Place]:
    """Where networks hold a weight that one before them holds, and where that does. They are given an empty one for it,
    so that the whole one goes when the first is sharded."""
    first: dict[int, tuple[nn.Module, Place]] = {}
    again: dict[Place, Place] = {}
    for net in nets:
        empty: dict[int, nn.Parameter] = {}
        for part in net.modules():
            if is_quantised(part):
                continue  # all networks have this layer, which stays whole
            for name, weight in part.named_parameters(recurse=False, remove_duplicate=False):
                owner, place = first.setdefault(id(weight), (net, (part, name)))
                if owner is not net:
                    again[part, name] = place
                    part.register_parameter(name, empty.setdefault(id(weight), _empty(weight)))
    return again


def network_of(module: nn.Module) -> nn.Module:
    """What is sharded of a module: a denoiser's network, or what LoRA's factors stand in."""
    lora = lora_of(module)
    if lora:
        return lora.shared_tree
    return module.net if isinstance(module, Denoiser) else module


def gathered_apart(net: nn.Module) -> Sequence[nn.Module]:
    """The blocks of a network that are each gathered by themselves."""
    return net.closed_blocks if isinstance(net, DiffusersNetwork) else recomputable_blocks(net)


def _empty(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)


class Shards:
    """The gradients of sharded players, and of those in LoRA, whose factors are whole.  An `objective.Averaging`."""

    def __init__(self, sharded: Mapping[str, nn.Module], in_factors: Averaging) -> None:
        self._sharded, self._in_factors = sharded, in_factors

    @contextmanager
    def of(self, update: Update, *, is_last: bool) -> Iterator[Ask]:
        """Until the last micro-batch gradients add up in each process, whole."""
        for name in update.players:
            for part in _sharded(self._sharded[name]) if name in self._sharded else ():
                part.set_requires_gradient_sync(is_last, recurse=False)
        with self._in_factors.of(update, is_last=is_last) as ask:
            yield ask


def outline(module: nn.Module) -> nn.Module:
    """A copy of a module that is about to be sharded, without weights."""
    weights = [p for part in _trees(module) for p in part.parameters()]
    kept = {id(p): p for part in _trees(module) for p in whole_in_each(part)}
    return deepcopy(module, {id(weight): _empty(weight) for weight in weights if id(weight) not in kept} | kept)


def filled(outline: nn.Module, module: nn.Module, device: torch.device) -> nn.Module:
    """A frozen copy of a sharded module, whole in each process: all ask for it, and then compute what they like."""
    kept = {id(p): p for part in _trees(outline) for p in whole_in_each(part)}
    copy = deepcopy(outline, kept)
    for empty, part in zip(_trees(copy), _trees(module), strict=True):
        fill(empty, part)
    return freeze(copy).to(device)


def fill(empty: nn.Module, module: nn.Module) -> None:
    """Give an outline the numbers of what it outlines: all that it does not hold already."""
    held = {id(p) for p in whole_in_each(empty)}
    names = {name for name, p in empty.named_parameters(remove_duplicate=False) if id(p) not in held}
    names |= {name for name, _ in empty.named_buffers(remove_duplicate=False)}
    found = {name: whole(tensor) for name, tensor in module.state_dict().items() if name in names}
    empty.load_state_dict(found, assign=True, strict=False)


def _trees(module: nn.Module) -> list[nn.Module]:
    """A module, and what its factors stand in, which it does not register."""
    lora = lora_of(module)
    return [module, lora.shared_tree] if lora else [module]


def _sharded(module: nn.Module) -> "Iterator[FSDPModule]":
    from torch.distributed.fsdp import FSDPModule

    return (part for part in module.modules() if isinstance(part, FSDPModule))


def _check(config: "RunConfig") -> None:
    speed = config.speed
    if speed.shard == "none":
        return
    faults = {
        "lora, or a teacher in few bits, before torch 2.7": (any(config.lora.values()) or speed.is_quantised)
        and not _can_ignore(),
        "speed.compile": speed.compile is not None,
        "speed.channels_last": speed.channels_last,
        "speed.ema_device = 'cpu'": speed.ema_device == "cpu",
        "optimisers of 8 bits": any(options.name.endswith("8bit") for options in config.optimizers.values()),
    }
    named = [name for name, is_so in faults.items() if is_so]
    if named:
        raise UserError(f"speed.shard = {speed.shard!r}: does not work with {', '.join(named)}; use none")


def _can_ignore() -> bool:
    """Whether torch can leave some of a module's parameters whole."""
    from torch.distributed.fsdp import fully_shard

    return "ignored_params" in inspect.signature(fully_shard).parameters
