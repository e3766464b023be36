"""Peak memory of LoRA players over one base, to that of three networks that each carry LoRA: whole runs, from loading.

python scripts/bench_shared_base.py [--method sid] [--width 768] [--depth 12] [--rank 16] [--batch 2] [--steps 2]

Each arrangement is a process of its own: it trains a tiny run first, notes its resident memory (the baseline), then
loads a DiT teacher from disk and trains. Peaks are the kernel's (VmHWM), so whatever loading needs for a moment counts.
On a GPU they are the allocator's, of the device. The gradients' equality is in tests/networks/test_lora.py.
"""

import argparse
import gc
import subprocess
import sys
import tempfile
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch

from diffdistill.distillation import method
from diffdistill.models.load import load_model
from diffdistill.networks.dit import DiTConfig
from diffdistill.networks.lora import with_lora
from diffdistill.settings.values import dump
from diffdistill.storage.checkpoint import Checkpoint, flatten, save_checkpoint
from diffdistill.training.config import find_config, load_config
from diffdistill.training.memory.prediction import show_bytes
from diffdistill.training.trainer import Trainer

ARRANGEMENTS = ("shared", "copies")
LIMIT = 0.45
ON_GPU = torch.cuda.is_available()


def make_teacher(folder: Path, network: DiTConfig) -> Path:
    """A checkpoint of random weights: memory does not depend on them."""
    config = load_config(find_config("pretrain/digits"), [f"run={folder / 'start'}", "train.steps=1"])
    Trainer(config, quiet=True).run()
    spec = load_model(folder / "start").spec
    spec = replace(spec, model=replace(spec.model, network=network))
    state = {"student": "teacher", "model": dump(spec), "teacher": None}
    tensors = {"players": flatten({"teacher": spec.build().state_dict()})}
    return save_checkpoint(folder / "teacher" / "checkpoints", Checkpoint(1, tensors, state), keep=1)


def train(arrangement: str, folder: Path, teacher: Path, options: argparse.Namespace) -> None:
    """A run of `options.steps` on a teacher, its players' bases shared or each a copy."""
    if arrangement == "copies":
        method.with_lora = lambda origin, settings: with_lora(deepcopy(origin), settings)
    overrides = [
        f"run={tempfile.mkdtemp(dir=folder)}",
        f"teacher={teacher}",
        f"lora.default={{rank: {options.rank}}}",
        f"train.steps={options.steps}",
        f"train.global_batch_size={options.batch}",
        "train.preview_every=0",
        "train.log_every=1",
        "health=null",
        "eval=null",
    ]
    Trainer(load_config(find_config(f"{options.method}/digits"), overrides), quiet=True).run()


def memory(line: str) -> int:
    """VmRSS (now) or VmHWM (the most since the last reset), in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(row.split()[1] for row in status.splitlines() if row.startswith(line)))


def measure(arrangement: str, folder: Path, options: argparse.Namespace) -> int:
    """The peak above the baseline, in this process."""
    torch.set_num_threads(1)
    train(arrangement, folder, folder / "start", options)
    gc.collect()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
    train(arrangement, folder, folder / "teacher", options)
    return (torch.cuda.max_memory_allocated() if ON_GPU else memory("VmHWM")) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="sid")
    for name, value in (("width", 768), ("depth", 12), ("rank", 16), ("batch", 2), ("steps", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--measure", nargs=2, metavar=("ARRANGEMENT", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(measure(options.measure[0], Path(options.measure[1]), options))
        return
    with tempfile.TemporaryDirectory() as folder:
        network = DiTConfig(width=options.width, depth=options.depth, heads=options.width // 64)
        make_teacher(Path(folder), network)
        peaks = {}
        for arrangement in ARRANGEMENTS:
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", arrangement, folder]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            peaks[arrangement] = int(done.stdout.split()[-1])
            print(f"{arrangement}: {show_bytes(peaks[arrangement])} above the baseline")
        weights = next((Path(folder) / "teacher" / "checkpoints").glob("step-*/players.safetensors")).stat().st_size
    ratio = peaks["shared"] / peaks["copies"]
    print(f"weights: {show_bytes(weights)}; ratio {ratio:.3f}, at most {LIMIT} wanted")
    sys.exit(ratio > LIMIT)


if __name__ == "__main__":
    main()
