"""Do images arrive in time? The wait for data in each step, from memory, and mapped with and without reading ahead.

python scripts/bench_data.py [--images 20000] [--side 32] [--batch 256] [--steps 20] [--rounds 5] [--out bench.json]

The step is `--step-ms` of waiting, as for an accelerator, or with --step-ms 0 a training step of a small U-Net on this
machine's cores.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from diffdistill.data import Npz
from diffdistill.data.order import DataOrder
from diffdistill.data.source import ImageSource, MappedImages, TensorImages
from diffdistill.diffusion.cond import NO_COND
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM
from diffdistill.networks.unet import UNetConfig


class NotAhead(MappedImages):
    """Mapped images that are read only when they are asked for."""

    def expect(self, index: torch.Tensor) -> None:
        """Nothing is read."""


def make_step(milliseconds: float, side: int) -> Callable[[torch.Tensor], None]:
    """What is done with a batch."""
    if milliseconds:
        return lambda images: time.sleep(milliseconds / 1000)
    net = Denoiser(UNetConfig(channels=(16, 32)).build((3, side, side), 0, 0.0), EDM(), "edm")
    optimizer = torch.optim.Adam(net.parameters())

    def step(images: torch.Tensor) -> None:
        t = torch.ones(len(images), dtype=torch.float64)
        (net(images + torch.randn_like(images), t, NO_COND) - images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(
    source: ImageSource, step: Callable[[torch.Tensor], None], *, batch: int, steps: int
) -> tuple[float, float]:
    """Milliseconds of waiting for images, and of the whole step; means over `steps` after the first."""
    order, waited, began = DataOrder(source, 0), 0.0, 0.0
    for number in range(steps + 1):
        before = time.perf_counter()
        images, _ = order.take(number * batch, batch, next_first=(number + 1) * batch)
        if number:  # nothing could be read ahead for the first
            waited += time.perf_counter() - before
        else:
            began = time.perf_counter()
        step(images)
    return waited * 1000 / steps, (time.perf_counter() - began) * 1000 / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    shape = (options.images, options.side, options.side, 3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "images.npz", images=np.random.default_rng(0).integers(0, 256, shape, np.uint8))
        began = time.perf_counter()
        mapped = Npz(path=str(folder / "images.npz"), cache=str(folder / "cache")).load()
        prepared = time.perf_counter()
        Npz(path=str(folder / "images.npz"), cache=str(folder / "cache")).load()
        again = time.perf_counter()
        sources: dict[str, ImageSource] = {
            "memory": TensorImages(mapped.rows(torch.arange(options.images)), None),
            "mapped": NotAhead(mapped.images, None, key="", num_classes=0),
            "mapped, ahead": mapped,
        }
        step = make_step(options.step_ms, options.side)
        found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in sources}
        for _ in range(options.rounds):
            for kind, source in sources.items():
                found[kind].append(measure(source, step, batch=options.batch, steps=options.steps))
    result = {
        "prepare_s": round(prepared - began, 2),
        "load_again_s": round(again - prepared, 3),
        "wait_ms": {kind: round(statistics.median(w for w, _ in values), 3) for kind, values in found.items()},
        "step_ms": {kind: round(statistics.median(s for _, s in values), 3) for kind, values in found.items()},
        "settings": {name: value for name, value in vars(options).items() if name != "out"},
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
