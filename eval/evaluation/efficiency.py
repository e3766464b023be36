"""What a model costs when it samples: evaluations, parameters, latency, throughput, memory. One tool for all rows.

Timed is the sampler with its network, from noise and condition on the device to the image on the device. Drawing the
noise, moving and storing images are not. What runs besides (a text encoder, a VAE) is named by the caller, who times
it inside the sampler or leaves it out.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from statistics import median
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from diffdistill.diffusion.denoiser import Denoiser, device_of
from diffdistill.diffusion.guidance.policies import Guidance
from diffdistill.diffusion.sampling import Sampler
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.eval.records.environment import device_name
from diffdistill.eval.records.record import Efficiency
from diffdistill.settings.schema import UserError
from diffdistill.training.memory.counting import LiveTensors, storage_bytes

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@torch.inference_mode()
def measure_efficiency(
    denoiser: Denoiser,
    sampler: Sampler,
    image_shape: tuple[int, ...],
    *,
    guidance: Guidance = 1.0,
    batch: int = 64,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    compile: bool = False,
    warm_up: int = 3,
    repeats: int = 10,
    beside: Mapping[str, nn.Module] | None = None,
) -> Efficiency:
    """Time `sampler` on the device that the denoiser is on.

    image_shape: [C, H, W].  batch: of the throughput and the peak memory.  dtype: of autocast around the network, or
    float32 without any.  compile: torch.compile of the denoiser; its first calls fall into the warm-up.  warm_up,
    repeats: calls before the clock, and timed ones, of which the median counts.  beside: what else the sampler runs, by
    name; its weights count as memory and not as parameters.
    Raises UserError where there is nothing to time or not enough memory.
    """
    if batch < 1 or warm_up < 1 or repeats < 1:
        raise UserError(f"batch = {batch}, warm_up = {warm_up}, repeats = {repeats}: each must be at least 1")
    device = device_of(denoiser)
    timed = cast(Denoiser, torch.compile(denoiser)) if compile else denoiser
    try:
        single, many = (
            _sampling(timed, sampler, image_shape, size, guidance, device, DTYPES[dtype]) for size in (1, batch)
        )
        latency = median(_times(single, device, warm_up, repeats))
        seconds = median(_times(many, device, warm_up, repeats))
        peak = (
            None
            if compile and device.type != "cuda"
            else _peak_bytes(many, [denoiser, *(beside or {}).values()], device)
        )
    except torch.OutOfMemoryError:
        raise UserError(f"--batch {batch}: does not fit into the memory of {device_name(device)}") from None
    return Efficiency(
        num_evaluations=_evaluations(denoiser, sampler, image_shape, guidance, device),
        parameters=sum(parameter.numel() for parameter in denoiser.parameters()),
        latency_ms=1000 * latency,
        throughput=batch / seconds,
        throughput_batch=batch,
        peak_memory_bytes=peak,
        device=device_name(device),
        dtype=dtype,
        compile=compile,
        includes=tuple(beside or ()),
        warm_up=warm_up,
        repeats=repeats,
        threads=torch.get_num_threads() if device.type == "cpu" else None,
    )


def _sampling(
    denoiser: Denoiser,
    sampler: Sampler,
    image_shape: tuple[int, ...],
    size: int,
    guidance: Guidance,
    device: torch.device,
    cast_to: torch.dtype | None,
) -> Callable[[], Tensor]:
    """What is timed: `size` images from noise that is there already."""
    index = torch.arange(size)
    rng = StepRandom(0, 0, index)
    noise, fresh = rng.normal("noise", image_shape).to(device), rng.fresh_noise(image_shape)
    later = cache(lambda i: fresh(i).to(device))  # drawn in the warm-up, as far as it is asked for
    cond = denoiser.class_cond((index % max(denoiser.num_classes, 1)).to(device))

    def sample() -> Tensor:
        with torch.autocast(device.type, cast_to) if cast_to else nullcontext():
            return sampler(denoiser, noise, cond, guidance=guidance, fresh_noise=later)

    return sample


def _times(call: Callable[[], Tensor], device: torch.device, warm_up: int, repeats: int) -> list[float]:
    """Seconds of each repeat, the device's queue empty before and after."""
    for _ in range(warm_up):
        call()
    found = []
    for _ in range(repeats):
        _wait(device)
        began = time.perf_counter()
        call()
        _wait(device)
        found.append(time.perf_counter() - began)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(call: Callable[[], Tensor], modules: Sequence[nn.Module], device: torch.device) -> int:
    """Weights and everything alive beside them at the worst moment: by the allocator on a GPU, by count on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device)
    with LiveTensors() as alive:
        call()
    return storage_bytes(tensor for module in modules for tensor in _weights(module)) + alive.peak


def _evaluations(
    denoiser: Denoiser, sampler: Sampler, image_shape: tuple[int, ...], guidance: Guidance, device: torch.device
) -> int:
    """Images that pass through the network for one image: counted, so that guidance counts twice."""
    seen: list[int] = []

    def count(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(len(inputs[0]))

    rng = StepRandom(0, 0, torch.zeros(1, dtype=torch.int64))
    cond = denoiser.class_cond(torch.zeros(1, dtype=torch.int64, device=device))
    fresh = rng.fresh_noise(image_shape)
    handle = denoiser.net.register_forward_pre_hook(count)
    try:
        noise = rng.normal("noise", image_shape).to(device)
        sampler(denoiser, noise, cond, guidance=guidance, fresh_noise=lambda i: fresh(i).to(device))
    finally:
        handle.remove()
    return sum(seen)


def _weights(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
