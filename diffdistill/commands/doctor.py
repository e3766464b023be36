"""Is this machine ready? Versions, GPU, folders, disk. And will a config fit into its memory?"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

from rich.text import Text

from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import Console

if TYPE_CHECKING:
    import torch
    from torch import nn

    from diffdistill.diffusion.denoiser import Denoiser
    from diffdistill.models.spec import ModelSpec
    from diffdistill.training.assembly import Assembly
    from diffdistill.training.config import RunConfig
    from diffdistill.training.memory.prediction import MemoryPlan, Rehearsal
    from diffdistill.training.step_time import StepTime

# torch's minor version goes with torchvision's: 2.11 with 0.26, and so on for every release since 2.0 with 0.15.
TORCHVISION_OFFSET = 15
REQUIRED_GIB = 1.0
MEMORY, TIME = "memory (predicted)", "time (predicted)"
"""Topics of a config's findings."""
SLOW_SECONDS = 3.0
"""Of a micro-batch, over all updates: from there on one is counted, not two."""
CORE = (
    *("torch", "diffusers", "accelerate", "safetensors", "numpy", "pydantic", "typer"),
    *("scikit-learn", "tensorboard", "matplotlib"),
)
EXTRAS = {
    "torchvision": "eval",
    "clean-fid": "eval",
    "open-clip-torch": "eval",
    "timm": "eval",
    "transformers": "hf",
    "peft": "hf",
    "datasets": "hf",
    "xformers": "xformers",
    "bitsandbytes": "8bit",
}
ATTENTION_SHAPES = {
    "SD 1.5 at 64 x 64": (4096, 4096, 40),
    "SDXL's text at 64 x 64": (4096, 77, 64),
    "DiT-XL/2 at 512": (1024, 1024, 72),
}
"""Queries, keys and head size."""


@dataclass(frozen=True)
class Finding:
    """One line of the report. is_fault: something has to be done."""

    topic: str
    text: str
    is_fault: bool = False


def examine(folder: FilePath) -> list[Finding]:
    """Everything that `diffdistill doctor` reports. folder: where runs would be written."""
    return [*_packages(), _torchvision(), _gpu(), *_attention(), _writable(folder), _disk(folder)]


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
    from torch import OutOfMemoryError

    from diffdistill.training.assembly import assemble
    from diffdistill.training.memory.prediction import in_each_of, plan_memory, rehearse, show_bytes
    from diffdistill.training.plan import plan
    from diffdistill.training.step_time import measure_step_time, one_micro_batch

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
    try:
        timed = measure_step_time(assembly)
        counted = rehearse(
            one_micro_batch(assembly), steps=1 if sum(timed.micro_batches.values()) > SLOW_SECONDS else 2
        )
    except OutOfMemoryError as error:
        yield Finding("one micro-batch", f"out of memory, though predicted to fit: {error}", is_fault=True)
    else:
        yield from _compare(replace(needs, batch_size=needs.micro_batch_size), counted)
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


def show(findings: Sequence[Finding], console: Console) -> bool:
    """Print the findings. Returns whether there is no fault."""
    for finding in findings:
        mark = ("FAULT", "red") if finding.is_fault else ("ok   ", "green")
        console.print(Text.assemble(mark, f" {finding.topic}: {finding.text}"), soft_wrap=True)
    return not any(finding.is_fault for finding in findings)


def version_of(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def torchvision_fits(torch_version: str, torchvision_version: str) -> bool:
    """Whether the two were built for each other."""
    torch_minor, vision_minor = (int(v.split(".")[1]) for v in (torch_version, torchvision_version))
    return vision_minor == torch_minor + TORCHVISION_OFFSET


def _packages() -> list[Finding]:
    core = {name: version_of(name) for name in CORE}
    missing = [name for name, version in core.items() if version is None]
    present = ", ".join(f"{name} {version}" for name, version in core.items() if version)
    absent = [f"{name} (extra: {extra})" for name, extra in EXTRAS.items() if version_of(name) is None]
    return [
        Finding("core packages", present + (f"; missing: {', '.join(missing)}" if missing else ""), bool(missing)),
        Finding("optional packages", f"not installed: {', '.join(absent)}" if absent else "all installed"),
    ]


def _torchvision() -> Finding:
    torch_version, vision = version_of("torch"), version_of("torchvision")
    if torch_version is None or vision is None:
        return Finding("torch and torchvision", "torchvision is not installed; only evaluation needs it")
    fits = torchvision_fits(torch_version, vision)
    wanted = f"0.{int(torch_version.split('.')[1]) + TORCHVISION_OFFSET}"
    return Finding(
        "torch and torchvision",
        f"{torch_version} with {vision}" + ("" if fits else f": install torchvision {wanted}"),
        not fits,
    )


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", f"none that torch {torch.__version__} can use; training runs on the CPU")
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return Finding("GPU", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {memory:.0f} GiB")


def _attention() -> Iterator[Finding]:
    """What `auto` would choose, for a few shapes of well-known networks, and whether our kernels can be built."""
    import torch

    from diffdistill.attention.backends import Options, choose, no_kernels
    from diffdistill.attention.build import BuildError, find_compiler

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for what, (queries, keys, size) in ATTENTION_SHAPES.items():
        q, k = (torch.empty(1, 1, n, size, device=device, dtype=torch.bfloat16) for n in (queries, keys))
        name, why = choose(q, k, k, Options(size**-0.5))
        yield Finding(f"attention, {what}", f"{name}: {why}")
    missing = no_kernels(device)
    tangents = f"the chunked reference; our kernel {missing}" if missing else "our kernel, in bfloat16 and float16"
    yield Finding("attention, tangents", tangents)
    try:
        yield Finding("CUDA compiler", find_compiler().version.strip().splitlines()[-1])
    except BuildError as error:
        yield Finding("CUDA compiler", str(error))


def _writable(folder: FilePath) -> Finding:
    place = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            return Finding("folder", f"{folder} is writable")
    except OSError as error:
        return Finding("folder", f"{folder} cannot be written: {error.strerror}", is_fault=True)


def _disk(folder: FilePath) -> Finding:
    free = shutil.disk_usage(_existing(folder)).free / 2**30
    return Finding("disk", f"{free:.1f} GiB free", free < REQUIRED_GIB)


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
    pieces = f" times {timed.num_micro_batches}" if timed.num_micro_batches > 1 else ""
    steps = config.train.steps
    return Finding(
        TIME,
        f"{steps:,} steps at {show_step_time(timed.step)}: {in_words(steps * timed.step)}; a micro-batch of "
        f"{micro_batch_size} took: {each}{pieces}",
    )


def _room(assembly: "Assembly") -> Finding:
    """What the run writes to the disk, what was prepared for it in the cache, and what is free."""
    from diffdistill.data.cache import cache_folder
    from diffdistill.training.memory.prediction import show_bytes

    config, inputs = assembly.plan.config, assembly.plan.inputs
    one = sum(tensor.nbytes for group in assembly.state.tensors().values() for tensor in group.values())
    written = one * (config.train.keep_checkpoints + 1)  # one more while it is written
    folder = _existing(FilePath(config.run))
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


def _existing(folder: FilePath) -> FilePath:
    """The folder, or the nearest one above it that is there."""
    place = folder.absolute()
    while not place.is_dir():
        place = place.parent
    return place
