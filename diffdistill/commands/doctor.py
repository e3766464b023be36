"""Is this machine ready? Versions, GPU, folders, disk."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path as FilePath

from rich.text import Text

from diffdistill.settings.terminal import Console

# torch's minor version goes with torchvision's: 2.11 with 0.26, and so on for every release since 2.0 with 0.15.
TORCHVISION_OFFSET = 15
REQUIRED_GIB = 1.0
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
    place = existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            return Finding("folder", f"{folder} is writable")
    except OSError as error:
        return Finding("folder", f"{folder} cannot be written: {error.strerror}", is_fault=True)


def _disk(folder: FilePath) -> Finding:
    free = shutil.disk_usage(existing(folder)).free / 2**30
    return Finding("disk", f"{free:.1f} GiB free", free < REQUIRED_GIB)


def existing(folder: FilePath) -> FilePath:
    """The folder, or the nearest one above it that is there."""
    place = folder.absolute()
    while not place.is_dir():
        place = place.parent
    return place
