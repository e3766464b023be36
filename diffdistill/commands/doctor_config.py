"""Will a config fit into this machine's memory, and how long will it take? A micro-batch is tried out."""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

from diffdistill.commands.doctor import Finding, existing
from diffdistill.settings.schema import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from diffdistill.diffusion.denoiser import Denoiser
    from diffdistill.models.spec import ModelSpec
    from diffdistill.training.assembly import Assembly
    from diffdistill.training.config import RunConfig
    from diffdistill.training.memory.prediction import MemoryPlan, Rehearsal
    from diffdistill.training.step_time import StepTime

MEMORY, TIME = "memory (predicted)", "time (predicted)"
"""Topics of a config's findings."""
ANSWER_SECONDS = 20.0
"""In which a config's findings are there, the imports before them included."""
STARTING_SECONDS = 4.0
"""Of Python and the imports, before a config is examined."""
BUSY = 0.7
"""Of its time a process on one thread has the CPU to itself, and below that other programs take it."""


def examine_config(
    config: "RunConfig",
    memory_gib: float | None = None,
    *,
    processes: int | None = None,
    trusts_code: bool = False,
    teacher: "Denoiser | None" = None,
) -> Iterator[Finding]:
    """Say what players drop, predict a run's memory, then train on one micro-batch, which is measured, and predict
    the time. With several image sizes, the largest. Nothing is written.

    memory_gib: of the device to fit into; default: this GPU's, or this machine's.  processes: that would train it
    together, default: those that run this; what each of several needs is arithmetic.  teacher: one that is not on the
    disk yet, where the config names none.  Raises UserError as a run would.
    """
    from diffdistill.diffusion.threads import threads

    findings = _examine(config, memory_gib, processes, teacher, trusts_code=trusts_code)
    while True:
        with threads(config.train.num_threads):  # while something is examined, and not while a caller reads it
            finding = next(findings, None)
        if finding is None:
            return
        yield finding


def _examine(
    config: "RunConfig",
    memory_gib: float | None,
    processes: int | None,
    teacher: "Denoiser | None",
    *,
    trusts_code: bool,
) -> Iterator[Finding]:
    from diffdistill.training.assembly import assemble
    from diffdistill.training.memory.prediction import in_each_of, plan_memory, show_bytes
    from diffdistill.training.plan import plan
    from diffdistill.training.step_time import own_seconds

    began = own_seconds(config.train)
    config, count = _part_of(config, processes)
    assembly = assemble(plan(config, resume=None, trusts_code=trusts_code, teacher=teacher).at_largest)
    yield _dropout(config, assembly.plan.trained)
    yield _export(assembly.plan.spec)
    needs = plan_memory(assembly.plan, assembly.iteration)
    available = _device_memory(assembly.plan.device)
    each = in_each_of(count, needs, assembly.plan, assembly.iteration)
    yield _fit(assembly, each, available if memory_gib is None else int(memory_gib * 2**30))
    if count > 1:
        yield _shares(assembly, needs, each, count)
    if available is not None and needs.total > available:
        yield Finding("one micro-batch", f"not run: this machine has {show_bytes(available)}")
        return
    yield from _try_out(config, assembly, needs, began)


def _try_out(config: "RunConfig", assembly: "Assembly", needs: "MemoryPlan", began: float) -> Iterator[Finding]:
    """A micro-batch: its time, and its memory against what is needed, where the seconds since `began` leave some."""
    from torch import OutOfMemoryError

    from diffdistill.training.memory.prediction import rehearse
    from diffdistill.training.step_time import BUDGET_SECONDS, measure_step_time, one_micro_batch, own_seconds

    left = ANSWER_SECONDS - STARTING_SECONDS - (own_seconds(config.train) - began)
    try:
        timed = measure_step_time(assembly, min(BUDGET_SECONDS, max(left / 2, 1.0)))
        size = timed.num_measured
        left = ANSWER_SECONDS - STARTING_SECONDS - (own_seconds(config.train) - began)
        seconds = timed.step / timed.num_micro_batches * size / needs.micro_batch_size
        if 2 * seconds < left:
            is_on_gpu = assembly.plan.device.type == "cuda"  # whose allocator's peak needs the optimisers' moments
            counted = rehearse(one_micro_batch(assembly, size), steps=2 if is_on_gpu else 1)
            yield from _compare(replace(needs, batch_size=size, micro_batch_size=size), counted)
    except OutOfMemoryError as error:
        yield Finding("one micro-batch", f"out of memory, though predicted to fit: {error}", is_fault=True)
    else:
        yield _time(config, timed, needs.micro_batch_size)
        yield _room(assembly)


def _part_of(config: "RunConfig", processes: int | None) -> tuple["RunConfig", int]:
    """The run of one process alone with its part of the batch, and how many there are. The config as it is where they
    run already."""
    from diffdistill.training.plan import check_batch

    running = int(os.environ.get("WORLD_SIZE", "1"))
    if running > 1:
        if processes not in (None, running):
            raise UserError(f"--processes = {processes}: {running} run this already; leave it out")
        return config, running
    train, count = config.train, processes or 1
    if count == 1:
        return config, 1
    check_batch(train, count)
    share = train.global_batch_size // count
    micro = min(train.micro_batch_size, share) if train.micro_batch_size else None
    return replace(config, train=replace(train, global_batch_size=share, micro_batch_size=micro)), count


def _export(spec: "ModelSpec") -> Finding:
    """What `export` will write of the student."""
    from diffdistill.export.exportable import export_kind_of

    found = export_kind_of(spec)
    if found.kind is None:
        return Finding("export", f"not possible: {found.note}", is_fault=True)
    return Finding("export", found.kind + (f" ({found.note})" if found.note else ""))


def _device_memory(device: "torch.device") -> int | None:
    """Bytes of the GPU, or of the machine where it trains on the CPU; None where the system does not say."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return _windows_memory()


def _windows_memory() -> int | None:
    """By GlobalMemoryStatusEx: its structure is 64 bytes long, and the second of its 8-byte fields says it."""
    import ctypes

    kernel = getattr(getattr(ctypes, "windll", None), "kernel32", None)
    status = (ctypes.c_uint64 * 8)(64)  # the length, a DWORD, lies in the low half of the first
    if kernel is None or not kernel.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return int(status[1])


def _dropout(config: "RunConfig", players: Mapping[str, "nn.Module"]) -> Finding:
    """With which probability each trained player drops, and whether a config or the network it started as says so."""
    from diffdistill.networks.dropout import dropout_of

    parts = []
    for name, module in players.items():
        probability = dropout_of(module)
        is_set = config.dropout.get(name, config.dropout.get("default")) is not None
        source = "set" if is_set else "of the network that it starts from"
        parts.append(f"{name}: none" if probability is None else f"{name}: {probability:g} ({source})")
    return Finding("dropout", "; ".join(parts))


def _fit(assembly: "Assembly", plan: "MemoryPlan", memory: int | None) -> Finding:
    from diffdistill.training.memory.advice import advise
    from diffdistill.training.memory.prediction import show_bytes

    kept = f"{show_bytes(plan.peak_activations)} of activations for {plan.micro_batch_size} samples"
    known = "an unknown amount (set --memory)" if memory is None else show_bytes(memory)
    text = f"{show_bytes(plan.total)} of {known}: {show_bytes(plan.fixed)} throughout, {kept}, gradients"
    if memory is None or plan.total <= memory:
        return Finding(MEMORY, text)
    advice = "".join(f"\n      {line}" for line in advise(assembly.plan, assembly.iteration, plan, memory))
    return Finding(MEMORY, f"{text}. It does not fit. Turn on, in this order:{advice}", is_fault=True)


def _shares(assembly: "Assembly", alone: "MemoryPlan", each: "MemoryPlan", count: int) -> Finding:
    """What the processes share out, and what each of them has whole."""
    from diffdistill.training.memory.prediction import show_bytes

    config = assembly.plan.config
    whole = ["buffers", f"{show_bytes(each.peak_activations)} of activations"]
    if any(config.lora.values()):
        whole.insert(0, "LoRA's factors")
    if each.buckets:
        whole.append(f"{show_bytes(each.buckets)} of gradients, whose space DDP keeps for every update")
    if each.parts == 1:
        divided = "the batch alone (speed.shard = none); each has all weights, moments and averages"
    else:
        divided = f"weights, gradients, moments and averages by {each.parts} (speed.shard = {config.speed.shard})"
        whole.append(f"{show_bytes(each.gathered)} of weights that are gathered, a block and the next at a time")
    text = f"divided: {divided}; not divided: {', '.join(whole)}. {show_bytes(each.total)} each"
    return Finding(f"{count} processes, by arithmetic", f"{text}, {show_bytes(alone.total)} with one as large a batch")


def _compare(plan: "MemoryPlan", counted: "Rehearsal") -> Iterator[Finding]:
    """Predicted against counted."""
    for name, expected in plan.players.items():
        found = counted.players[name]
        parts = {
            "weights": (expected.weights, found.weights),
            "gradients": (expected.gradients, found.gradients),
            "optimiser": (expected.optimizer, found.optimizer),
        }
        yield Finding(name, ", ".join(f"{part} {_both(*pair)}" for part, pair in parts.items() if any(pair)))
    if counted.averages:
        place = "" if plan.has_averages_on_device else ", on the CPU"
        yield Finding("EMA", f"{_both(plan.averages, counted.averages)}{place}")
    yield Finding("activations", _both(plan.peak_activations, counted.activations))
    if counted.device_peak is not None:
        yield Finding("GPU peak", _both(plan.total, counted.device_peak))


def _time(config: "RunConfig", timed: "StepTime", micro_batch_size: int) -> Finding:
    """Of a step and of all of them, without previews, evaluations and checkpoints."""
    from diffdistill.training.reports.progress import in_words, show_step_time

    each = ", ".join(f"{name} {show_step_time(seconds)}" for name, seconds in timed.micro_batches.items())
    took = "took" if timed.num_measured == micro_batch_size else f"takes, by {timed.num_measured} of its samples"
    pieces = f" times {timed.num_micro_batches}" if timed.num_micro_batches > 1 else ""
    steps, share = config.train.steps, timed.cpu_share
    text = (
        f"{steps:,} steps at {show_step_time(timed.step)}: {in_words(steps * timed.step)}; a micro-batch of "
        f"{micro_batch_size} {took}: {each}{pieces}"
    )
    if share is not None and share < BUSY:
        idle = timed.step * share
        text += f"; other programs use this CPU: on an idle one {show_step_time(idle)}, {in_words(steps * idle)}"
    return Finding(TIME, text)


def _room(assembly: "Assembly") -> Finding:
    """What the run writes to the disk, what was prepared for it in the cache, and what is free."""
    from diffdistill.data.cache import cache_folder
    from diffdistill.training.memory.prediction import show_bytes

    config, inputs = assembly.plan.config, assembly.plan.inputs
    one = sum(tensor.nbytes for group in assembly.state.tensors().values() for tensor in group.values())
    written = one * (config.train.keep_checkpoints + 1)  # one more while it is written
    folder = existing(FilePath(config.run))
    free = shutil.disk_usage(folder).free
    cache = cache_folder(getattr(config.data, "cache", None))
    prepared = int(getattr(getattr(inputs.source, "images", None), "nbytes", 0))
    if inputs.conditions and inputs.conditions.shards:
        prepared += len(inputs.conditions) * sum(part.nbytes for part in inputs.conditions.empty.parts().values())
    text = (
        f"{config.train.keep_checkpoints} checkpoints of {show_bytes(one)}, and one while it is written: "
        f"{show_bytes(written)} of {show_bytes(free)} free; images and prompts in the cache: {show_bytes(prepared)} "
        f"({cache})"
    )
    return Finding("disk", text, is_fault=written > free)


def _both(predicted: int, counted: int) -> str:
    from diffdistill.training.memory.prediction import show_bytes

    if predicted == counted:
        return f"{show_bytes(predicted)} as predicted"
    return f"{show_bytes(counted)}, {show_bytes(predicted)} predicted ({predicted / max(counted, 1) - 1:+.1%})"
