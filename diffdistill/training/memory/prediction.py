"""What a run needs: weights, gradients, optimiser states and averages to the byte, activations by measuring small.

Activations are what autograd keeps for the backward pass. They grow by the same bytes with every sample, so losses on
micro-batches of 2 and 3, without a backward pass, tell those of any size. (Not of 1: with one sample some operations
take other ways through memory, and keep more.) What each of several processes holds is counted from the shapes.
Not predicted: what an operation needs while it runs, and what the allocator rounds up.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.distillation.method import Players, Update, first_with_all
from diffdistill.distillation.rewards import Judge, find_reward
from diffdistill.distributed.sharded import is_sharded
from diffdistill.models.encoders import PixelDecoder
from diffdistill.networks.lora import lora_of
from diffdistill.networks.quantised import stored
from diffdistill.networks.recompute import recomputable_blocks
from diffdistill.training.assembly import Assembly
from diffdistill.training.config import OptimizerConfig, RunConfig
from diffdistill.training.iteration import Iteration, MicroBatch
from diffdistill.training.memory.counting import SavedTensors, storage_bytes
from diffdistill.training.plan import Plan
from diffdistill.training.sharding import gathered_apart, network_of, sharers, whole_in_each
from diffdistill.training.speed.offload import is_offloaded
from diffdistill.training.trainer import Trainer

EIGHT_BIT_MINIMUM = 4096  # bitsandbytes keeps smaller parameters' moments in 32 bits
EIGHT_BIT_BLOCK = 256  # numbers that share a 4-byte scale
EIGHT_BIT_TABLES = 2 * 256 * 4  # the codes of both moments, once an optimiser


@dataclass(frozen=True)
class PlayerBytes:
    """One player. gradients: while one of its updates runs.  accumulated: of a player in shards where micro-batches add
    up; they are whole until the last."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    accumulated: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Growth:
    """Bytes for n samples: fixed + each n."""

    fixed: int = 0
    each: int = 0

    def at(self, size: int) -> int:
        return self.fixed + self.each * size

    @staticmethod
    def through(two: int, three: int, group: int = 1) -> "Growth":
        """From the bytes for two groups of samples and for three."""
        return Growth(3 * two - 2 * three, -(-(three - two) // group))


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes.

    averages: all of them, and whether they are on the device.  activations, recomputed: by loss, for one micro-batch;
    recomputed is the largest block's inside, which activation checkpointing brings back one block at a time.
    batch: images and random numbers of all the step's samples.  replicated: players of whose gradients DDP keeps the
    space, once for each of their updates.  parts: processes that share out the weights.  gathered: of those, what is
    whole for a time.
    """

    players: Mapping[str, PlayerBytes]
    averages: int
    has_averages_on_device: bool
    updates: tuple[Update, ...]
    activations: Mapping[str, Growth]
    recomputed: Mapping[str, Growth]
    batch: Growth
    batch_size: int
    micro_batch_size: int
    replicated: frozenset[str] = frozenset()
    parts: int = 1
    gathered: int = 0

    @property
    def fixed(self) -> int:
        """What is there all the time."""
        stays = sum(player.weights + player.optimizer for player in self.players.values()) + self.buckets
        return stays + self.averages * self.has_averages_on_device + self.batch.at(self.batch_size)

    @property
    def buckets(self) -> int:
        """The gradients whose space stays."""
        named = (name for update in self.updates for name in update.players if name in self.replicated)
        return sum(self.players[name].gradients for name in named)

    @property
    def peak_activations(self) -> int:
        """Of the loss that keeps most."""
        return max(growth.at(self.micro_batch_size) for growth in self.activations.values())

    @property
    def total(self) -> int:
        """The device's bytes while the most demanding update runs."""
        return self.fixed + self.gathered + max(self._transient(update) for update in self.updates)

    def _transient(self, update: Update) -> int:
        kept = self.activations[update.loss].at(self.micro_batch_size)
        again = self.recomputed[update.loss].at(self.micro_batch_size)
        players = [self.players[name] for name in update.players if name not in self.replicated]
        if self.micro_batch_size < self.batch_size:
            return kept + again + sum(player.accumulated or player.gradients for player in players)
        return kept + again + sum(player.gradients for player in players)


def plan_memory(plan: Plan, iteration: Iteration) -> MemoryPlan:
    """Predict a run's memory, before any step. Nothing is written.  iteration: of the plan, with what is prepared."""
    config, share = plan.config, plan.share
    group = iteration.method.group
    twos, threes = (_micro_batch(plan, iteration, size * group) for size in (2, 3))
    needs = MemoryPlan(
        players={
            **{name: _player_bytes(config, iteration, name, module) for name, module in iteration.players.items()},
            **_beside_players(iteration),
        },
        averages=len(config.emas) * module_bytes(plan.student),
        has_averages_on_device=config.speed.ema_device == "same",
        updates=plan.method.updates,
        activations=saved_growth(plan, iteration),
        recomputed=block_growth(plan, iteration),
        batch=Growth.through(_batch_bytes(twos), _batch_bytes(threes), group),
        batch_size=share,
        micro_batch_size=min(config.train.micro_batch_size or share, share),
    )
    return in_each_of(plan.processes.count, needs, plan, iteration)


def in_each_of(count: int, needs: MemoryPlan, plan: Plan, iteration: Iteration) -> MemoryPlan:
    """The same for the first of `count` processes, which holds most: `needs` with players and averages in shards, or in
    replicas."""
    if count == 1:
        return needs
    config, parts = plan.config, sharers(plan.config, count)
    in_shards = {n: m for n, m in iteration.players.items() if parts > 1 and not lora_of(m) and not is_offloaded(m)}
    players = {name: _player_bytes(config, iteration, name, module, parts) for name, module in in_shards.items()}
    return replace(
        needs,
        players={**needs.players, **players},
        averages=len(config.emas) * _part_bytes(plan.student, 1 if lora_of(plan.student) else parts),
        parts=parts,
        replicated=frozenset(name for name in iteration.trained if name not in in_shards),
        gathered=max((gathered_bytes(module) for module in in_shards.values()), default=0),
    )


def optimizer_bytes(parameters: Sequence[Tensor], options: OptimizerConfig) -> int:
    """Bytes of the optimiser's state after its first step."""
    if options.name == "sgd":
        return sum(p.nbytes for p in parameters) if options.betas[0] else 0
    if options.name.endswith("8bit"):
        return EIGHT_BIT_TABLES + sum(_moments_in_8bit(p.numel()) for p in parameters)
    return sum(2 * p.nbytes + 4 for p in parameters)  # two moments and a counter


def _moments_in_8bit(numbers: int) -> int:
    if numbers < EIGHT_BIT_MINIMUM:
        return 2 * 4 * numbers
    return 2 * (numbers + 4 * math.ceil(numbers / EIGHT_BIT_BLOCK))


def saved_growth(plan: Plan, iteration: Iteration) -> dict[str, Growth]:
    """What autograd keeps of each loss."""
    return _growth(plan, iteration, _saved_bytes)


def block_growth(plan: Plan, iteration: Iteration) -> dict[str, Growth]:
    """What the largest recomputed block of each loss brings back; nothing where none is recomputed."""
    if not any(block.is_recomputed for player in iteration.players.values() for block in recomputable_blocks(player)):
        return {update.loss: Growth() for update in iteration.method.updates}
    return _growth(plan, iteration, _block_bytes)


def module_bytes(module: nn.Module) -> int:
    """Weights and buffers."""
    return sum(part.nbytes for tensor in _tensors(module) for part in stored(tensor))


@dataclass(frozen=True)
class Rehearsal:
    """Counted in two real steps. seconds: of each, measurement included.  device_peak: the GPU allocator's."""

    players: Mapping[str, PlayerBytes]
    averages: int
    activations: int
    seconds: tuple[float, ...]
    device_peak: int | None


def rehearse(assembly: Assembly, steps: int = 2) -> Rehearsal:
    """Take real steps, from the first in which every update is due, and count. Nothing is written."""
    gradients: dict[str, int] = {}
    trainer, players = Trainer(assembly, quiet=True), assembly.iteration.players
    trainer.step = _step(assembly.plan)

    def note(name: str, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        gradients[name] = sum(part_of(p.grad, 1).nbytes for p in parameters if p.grad is not None)

    for name, optimizer in assembly.optimizers.items():
        optimizer.register_step_pre_hook(partial(note, name))
    is_on_gpu = trainer.device.type == "cuda"
    if is_on_gpu:
        torch.cuda.reset_peak_memory_stats(trainer.device)
    seconds = []
    with SavedTensors(_all_tensors(assembly.iteration)) as saved:
        for _ in range(steps):
            began = time.perf_counter()
            trainer.train_step()
            if is_on_gpu:
                torch.cuda.synchronize(trainer.device)
            seconds.append(time.perf_counter() - began)
    return Rehearsal(
        players={
            name: PlayerBytes(
                _resident_bytes(module), gradients.get(name, 0), _state_bytes(assembly.optimizers.get(name))
            )
            for name, module in players.items()
        }
        | _beside_players(assembly.iteration),
        averages=sum(module_bytes(ema.module) for ema in assembly.emas.values()),
        activations=saved.peak,
        seconds=tuple(seconds),
        device_peak=torch.cuda.max_memory_allocated(trainer.device) if is_on_gpu else None,
    )


def show_bytes(count: int) -> str:
    """In MiB, or from 1024 of them on in GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _resident_bytes(module: nn.Module) -> int:
    """Those that stay on the device."""
    return sum(b.nbytes for b in module.buffers()) if is_offloaded(module) else module_bytes(module)


def standing_by(iteration: Iteration) -> dict[str, tuple[nn.Module, ...]]:
    """What stays in memory beside the players: the VAE that decodes latents for a loss, and judges, by name."""
    teacher, rewards = iteration.problem.teacher, {name: find_reward(name) for name in iteration.method.rewards}
    decoder = teacher.runtime.decode if teacher else None
    vae = {"VAE": (decoder.vae,)} if isinstance(decoder, PixelDecoder) else {}
    return vae | {name: reward.parts for name, reward in rewards.items() if isinstance(reward, Judge)}


def _beside_players(iteration: Iteration) -> dict[str, PlayerBytes]:
    return {name: PlayerBytes(sum(map(module_bytes, parts))) for name, parts in standing_by(iteration).items()}


def _all_tensors(iteration: Iteration) -> list[Tensor]:
    """The players' own, the base of those that stand over one, and what stands by."""
    players: Players = iteration.players
    bases = [found for found in map(lora_of, players.values()) if found]
    modules = [*players.values(), *(part for parts in standing_by(iteration).values() for part in parts)]
    own = [tensor for module in modules for tensor in _tensors(module)]
    return own + [tensor for base in bases for tensor in base.base_tensors()]


def _player_bytes(config: RunConfig, iteration: Iteration, name: str, module: nn.Module, parts: int = 1) -> PlayerBytes:
    """parts: processes that share out its weights."""
    if name not in iteration.trained:
        return PlayerBytes(_resident_bytes(module) if parts == 1 else _part_bytes(module, parts))
    whole = iteration.trained[name]
    parameters = [part_of(p, parts) for p in whole]
    gradients = sum(p.nbytes for p in parameters)
    return PlayerBytes(
        _part_bytes(module, parts),
        gradients,
        optimizer_bytes(parameters, config.optimizer(name)),
        accumulated=sum(p.nbytes for p in whole) if parts > 1 else 0,
    )


def part_of(weight: Tensor, parts: int) -> Tensor:
    """What the first of the processes holds of a weight whose rows are shared out, without memory."""
    if is_sharded(weight):
        return weight.to_local()  # type: ignore[attr-defined]
    if parts == 1 or not weight.dim():
        return weight
    return weight.new_empty(math.ceil(len(weight) / parts), *weight.shape[1:], device="meta")


def _part_bytes(module: nn.Module, parts: int) -> int:
    """Buffers are whole in each process."""
    if parts == 1:
        return module_bytes(module)
    held = sum(b.nbytes for b in module.buffers()) + sum(part_of(p, parts).nbytes for p in module.parameters())
    packed = list(whole_in_each(module))
    return held + sum(sum(t.nbytes for t in stored(p)) - part_of(p, parts).nbytes for p in packed)


def gathered_bytes(module: nn.Module) -> int:
    """The most of a network that is whole at a time: a block that computes and the one after it, beside what is in no
    block."""
    net = network_of(module)
    packed = {id(p) for p in whole_in_each(net)}
    rest, *blocks = (
        {id(p): p.nbytes for p in part.parameters() if id(p) not in packed} for part in (net, *gathered_apart(net))
    )
    for block in blocks:
        rest = {key: count for key, count in rest.items() if key not in block}
    sizes = [*(sum(block.values()) for block in blocks), 0]
    return sum(rest.values()) + max(map(sum, pairwise(sizes)), default=0)


def _state_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    if optimizer is None:
        return 0
    return storage_bytes(v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, Tensor))


def _micro_batch(plan: Plan, iteration: Iteration, size: int) -> MicroBatch:
    images, cond = plan.real(0, size)
    return iteration.micro_batch(_step(plan), 0, images, cond, size)


def _step(plan: Plan) -> int:
    """In which every update is due that the run reaches, so that nothing of it is left out."""
    train = plan.config.train
    return first_with_all(plan.method.updates, train.global_batch_size, num_steps=train.steps)


def _batch_bytes(micro: MicroBatch) -> int:
    batch = micro.batch
    return storage_bytes([batch.images, *batch.cond.parts().values(), *batch.stored.values(), *micro.draw.values()])


def _growth(
    plan: Plan, iteration: Iteration, measure: Callable[[Iteration, Update, MicroBatch], tuple[int, Any]]
) -> dict[str, Growth]:
    """By loss, from micro-batches of two and three groups of samples."""
    found, group = list[dict[str, int]](), iteration.method.group
    for size in (2, 3):
        micro = _micro_batch(plan, iteration, size * group)
        found.append({})
        for update in iteration.method.updates:
            found[-1][update.loss], carry = measure(iteration, update, micro)
            micro.draw |= carry
    twos, threes = found
    return {name: Growth.through(twos[name], threes[name], group) for name in twos}


def _saved_bytes(iteration: Iteration, update: Update, micro: MicroBatch) -> tuple[int, Mapping[str, Tensor]]:
    """What autograd keeps of a loss, and what the loss carries over."""
    with SavedTensors(_all_tensors(iteration)) as saved:
        carry = iteration.loss(update, micro).carry
    return saved.peak, carry


def _block_bytes(iteration: Iteration, update: Update, micro: MicroBatch) -> tuple[int, Mapping[str, Tensor]]:
    """What the largest of the recomputed blocks would keep if it were not, and what the loss carries over."""
    found = [block for player in iteration.players.values() for block in recomputable_blocks(player)]
    blocks = [block for block in found if block.is_recomputed]
    before: list[int] = []
    inside = [0]
    with SavedTensors(_all_tensors(iteration)) as saved:
        handles = [block.register_forward_pre_hook(lambda *_: before.append(saved.live)) for block in blocks]
        handles += [
            block.register_forward_hook(lambda *_: inside.append(saved.live - before.pop())) for block in blocks
        ]
        try:
            for block in blocks:
                block.is_recomputed = False
            carry = iteration.loss(update, micro).carry
        finally:
            for block in blocks:
                block.is_recomputed = True
            for handle in handles:
                handle.remove()
    return max(inside), carry
