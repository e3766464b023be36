"""Kernels on a GPU through CUDA's driver, in torch's context and on its current stream."""

import ctypes
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from ctypes import Structure, byref, c_char_p, c_int, c_uint, c_void_p, cast, pointer
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from diffdistill.attention.build import BuildError, cubin
from diffdistill.attention.kernels import Kernel, Variant

MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # of enum CUfunction_attribute
MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97  # of enum CUdevice_attribute
THREADS = 128


def launch(kernel: Kernel, arguments: Structure, variant: Variant, blocks: int, like: Tensor) -> None:
    """Start a kernel on the GPU of `like`. The tensors in `arguments` must live until it is queued.

    Raises BuildError if it cannot be compiled or does not fit, RuntimeError if the driver refuses.
    """
    if not blocks:
        return
    with torch.cuda.device(like.device):
        function, shared_bytes = _function(kernel, variant, like.device.index)
        parameters = (c_void_p * 1)(cast(pointer(arguments), c_void_p))
        stream = c_void_p(torch.cuda.current_stream(like.device).cuda_stream)
        grid, block = (c_uint(blocks), c_uint(1), c_uint(1)), (c_uint(THREADS), c_uint(1), c_uint(1))
        code = _driver().cuLaunchKernel(function, *grid, *block, c_uint(shared_bytes), stream, parameters, None)
        _check(code, f"launch of {kernel}")


def architecture_of(device: int) -> int:
    """As in 90. Raises BuildError for a GPU older than sm_80."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise BuildError(f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}; the kernels need sm_80 or newer")
    return 10 * major + minor


def fitting(kernel: Kernel, variant: Variant, limit: int) -> Variant:
    """The variant with as many stages as a block's shared memory holds, in bytes. Raises BuildError if none fits."""
    for stages in (2, 1):
        chosen = replace(variant, stages=stages)
        if chosen.shared_bytes(kernel) <= limit:
            return chosen
    raise BuildError(f"head size {variant.head_size} does not fit in the {limit} bytes of a block's shared memory")


def build_all(wanted: Iterable[tuple[Kernel, Variant]], device: int = 0) -> int:
    """Compile many kernels for a GPU beforehand, side by side. Returns how many files. Raises BuildError."""
    architecture, limit = architecture_of(device), _shared_memory(device)
    chosen = {fitting(kernel, variant, limit) for kernel, variant in wanted}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return len(list(pool.map(lambda variant: cubin(variant, architecture), chosen)))


@cache
def _function(kernel: Kernel, variant: Variant, device: int) -> tuple[c_void_p, int]:
    chosen = fitting(kernel, variant, _shared_memory(device))
    image = cubin(chosen, architecture_of(device))
    torch.zeros(1, device=torch.device("cuda", device))  # torch's context, if nothing made it before
    module, function, driver = c_void_p(), c_void_p(), _driver()
    _check(driver.cuModuleLoadData(byref(module), c_char_p(image)), "loading the kernels")
    name = f"attention_{kernel}".encode()
    _check(driver.cuModuleGetFunction(byref(function), module, c_char_p(name)), f"finding {kernel}")
    shared_bytes = chosen.shared_bytes(kernel)
    code = driver.cuFuncSetAttribute(function, c_int(MAX_DYNAMIC_SHARED_SIZE_BYTES), c_int(shared_bytes))
    _check(code, f"asking for {shared_bytes} bytes of shared memory")
    return function, shared_bytes


def _shared_memory(device: int) -> int:
    """The most bytes that a block may ask for."""
    properties: Any = torch.cuda.get_device_properties(device)
    handle, found, driver = c_int(), c_int(), _driver()
    place = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    _check(driver.cuDeviceGetByPCIBusId(byref(handle), c_char_p(place.encode())), "finding the GPU")
    attribute = c_int(MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
    _check(driver.cuDeviceGetAttribute(byref(found), attribute, handle), "asking for its shared memory")
    return found.value


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise BuildError("no CUDA driver (libcuda.so.1)") from None


def _check(code: int, what: str) -> None:
    if code:
        text = c_char_p()
        _driver().cuGetErrorString(c_int(code), byref(text))
        raise RuntimeError(f"CUDA: {what} failed: {(text.value or b'error').decode()} ({code})")
