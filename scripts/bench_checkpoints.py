"""What a checkpoint costs beside the least that it could: safetensors' save_file, fsync and a SHA-256 of each file.

python scripts/bench_checkpoints.py [--megabytes 128] [--rounds 7] [--folder PLACE]

A checkpoint as of a run with an average: players, an optimiser's moments and an average, in tensors of a megabyte and
small ones; each way removes the checkpoint before. Rounds go A B, B A, as whatever else the machine does slows both.
Prints medians of wall and CPU time and of the ratios within a round.
"""

import argparse
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffdistill.storage.checkpoint import Checkpoint, save_checkpoint

SHARES = {"players": 2, "optimizers": 2, "ema": 1}
"""Of the bytes, in fifths."""


def make_groups(megabytes: int) -> dict[str, dict[str, Tensor]]:
    """Tensors of a megabyte, each with a bias beside it."""
    rng = torch.Generator().manual_seed(0)
    groups: dict[str, dict[str, Tensor]] = {}
    for group, share in SHARES.items():
        count = max(1, megabytes * share // sum(SHARES.values()))
        groups[group] = {f"{number}.weight": torch.randn(512, 512, generator=rng) for number in range(count)}
        groups[group] |= {f"{number}.bias": torch.randn(512, generator=rng) for number in range(count)}
    return groups


def write_plainly(folder: Path, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
    """The least: each file is written, synced and hashed."""
    folder.mkdir()
    for group, tensors in groups.items():
        file = folder / f"{group}.safetensors"
        save_file(dict(tensors), file)
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        with file.open("rb") as handle:
            hashlib.file_digest(handle, "sha256").hexdigest()
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other)


def cost(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, used = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary one")
    asked = parser.parse_args()
    groups, readings = make_groups(asked.megabytes), []
    with tempfile.TemporaryDirectory(dir=asked.folder) as temporary:
        plain, run = Path(temporary, "plain"), Path(temporary, "run")
        plain.mkdir()
        for number in range(asked.rounds + 1):
            ways = [
                partial(write_plainly, plain / str(number), groups),
                partial(save_checkpoint, run, Checkpoint(number, groups, {}), keep=1),
            ]
            turn = 1 if number % 2 else -1
            readings.append([cost(way) for way in ways[::turn]][::turn])
    print(f"{asked.megabytes} MB in {len(groups)} groups, {asked.rounds} rounds    wall    CPU")
    for name, pick in (("save_file, fsync, hash", 0), ("save_checkpoint", 1)):
        wall, used = (median(reading[pick][kind] for reading in readings[1:]) for kind in (0, 1))
        print(f"{name:32s} {wall:8.3f} {used:6.3f} s")
    ratios = [median(reading[1][kind] / reading[0][kind] for reading in readings[1:]) for kind in (0, 1)]
    print(f"{'ratio':32s} {ratios[0]:8.2f} {ratios[1]:6.2f}")


if __name__ == "__main__":
    main()
