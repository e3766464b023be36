"""A step of DMD2 on one device: its time against a bare loop, the waits for the device, and memory against the plan.

python scripts/bench_gpu_step.py --out FILE [--device cuda|cpu] [--rounds 8]

fp32, bf16 and compiled steps, each beside the same step in a bare loop (scripts/bench_training_step.py) of the same
precision, interleaved; ratios of medians. Waits are what CUDA's sync debug mode says of a step, by line. Memory is the
allocator's peak of a cycle over what `diffdistill doctor` predicts. The networks are those of cifar10_budget, on made
images; on a CPU small ones, whose figures mean nothing.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_training_step import BareLoop
from describe_machine import describe

from diffdistill.training.assembly import Assembly, assemble
from diffdistill.training.config import find_config, load_config
from diffdistill.training.memory.prediction import plan_memory, rehearse
from diffdistill.training.plan import plan
from diffdistill.training.trainer import Trainer

CYCLE = 2  # steps from one generator update to the next
SMALL = "model.network={name: ddpmpp, channels: 8, multipliers: [1, 1], blocks: 1, dropout: 0}"
KINDS = {"fp32": ("train.precision=fp32",), "bf16": (), "bf16, compiled": ("speed.compile=inductor",)}
"""Settings over dmd2/cifar10_budget, which is in bf16."""


def make_run(folder: Path, device: str, *overrides: str) -> Assembly:
    """From an untrained teacher, on made images: neither speed nor memory depends on either."""
    images = folder / "images.npz"
    if not images.exists():
        made = np.random.default_rng(0).integers(0, 256, (1024, 32, 32, 3), dtype=np.uint8)
        np.savez(images, images=made, labels=np.arange(1024) % 10)
    common = [f"data={{name: npz, path: {images}, cache: {folder}/cache}}", "train.preview_every=0"]
    common += [] if device == "cuda" else ["train.device=cpu", "train.global_batch_size=2", "train.num_threads=1"]
    if not (folder / "teacher").exists():
        tiny = [] if device == "cuda" else [SMALL, "train.precision=fp32"]
        given = [f"run={folder}/teacher", *common, *tiny, "train.steps=1"]
        Trainer(load_config(find_config("pretrain/cifar10_budget"), given), quiet=True).run()
    given = [f"run={folder}/student", f"teacher={folder}/teacher", *common, "train.steps=1000000", *overrides]
    return assemble(plan(load_config(find_config("dmd2/cifar10_budget"), given)))


def seconds_of(loop: Trainer | BareLoop, device: str) -> float:
    """Of one cycle."""
    began = time.perf_counter()
    for _ in range(CYCLE):
        loop.train_step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / CYCLE


def step_times(folder: Path, device: str, rounds: int) -> dict[str, Any]:
    """Medians of seconds a step, ours and bare, and their ratio, by kind."""
    found = {}
    for kind, overrides in KINDS.items():
        chosen = overrides
        if device == "cpu":  # few are fast in bf16, and inductor compiles for minutes
            chosen = (*(text.replace("inductor", "aot_eager") for text in overrides), "train.precision=fp32")
        ours = Trainer(make_run(folder, device, *chosen), quiet=True)
        bare = BareLoop(Trainer(make_run(folder, device, *chosen), quiet=True))
        taken: dict[str, list[float]] = {"ours": [], "bare": []}
        for number in range(rounds + 2):  # the first two warm up: a generator's step and one without, compiled
            for name, loop in (("ours", ours), ("bare", bare)):
                seconds = seconds_of(loop, device)
                if number > 1:
                    taken[name].append(seconds)
        medians = {name: statistics.median(values) for name, values in taken.items()}
        found[kind] = medians | {"ratio": medians["ours"] / medians["bare"]}
        print(kind, found[kind], flush=True)
    return found


def waits(folder: Path, device: str) -> dict[str, int] | None:
    """How often a cycle waits for the device, by line of ours; None on a CPU."""
    if device == "cpu":
        return None
    trainer = Trainer(make_run(folder, device), quiet=True)
    seconds_of(trainer, device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for _ in range(CYCLE):
            trainer.train_step()
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
    return dict(places.most_common())


def memory(folder: Path, device: str) -> dict[str, float | None]:
    """Bytes predicted and allocated, and their ratio."""
    assembly = make_run(folder, device)
    predicted = plan_memory(assembly.plan, assembly.iteration).total
    peak = rehearse(assembly, CYCLE).device_peak
    return {"predicted": predicted, "peak": peak, "ratio": peak / predicted if peak else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": describe(), "device": options.device, "rounds": options.rounds}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, measure in {
            "memory": lambda: memory(folder, options.device),
            "waits": lambda: waits(folder, options.device),
            "seconds": lambda: step_times(folder, options.device, options.rounds),
        }.items():
            result[name] = measure()
            options.out.write_text(json.dumps(result, indent=1) + "\n")  # what is cut off later keeps what it has


if __name__ == "__main__":
    main()
