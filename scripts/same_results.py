"""Does a refactor change a result? Short runs of every method on digits, as hashes of all tensors, images and metrics.

    python scripts/same_results.py record before.json        # at the commit before
    python scripts/same_results.py record after.json         # at the commit after
    python scripts/same_results.py compare before.json after.json

Runs take 20 steps on one thread of a CPU, by the command line alone, so that any commit can be asked. Hashes are of
numbers, never of dates, paths or code; they compare on one machine.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

METHODS = (
    *("dmd2", "sid", "sim", "f_distill", "hyper_sd", "boot", "agd", "guidance_distill", "tsm", "regression", "scm"),
    *("mean_flow", "disback", "msd"),
)
SHORT = (
    *("train.num_threads=1", "train.log_every=10", "train.preview_every=10", "train.device=cpu"),
    *("train.steps=20", "train.checkpoint_every=10"),
)
FEWER = {"agd": ("method.trajectories=64",), "regression": ("method.pairs=64",)}
WAYS = {
    "in pieces": ("dmd2", "train.micro_batch_size=16"),
    "with LoRA": ("dmd2", "lora.default={rank: 4}"),
    "with SiDA": ("sid", "method.gan_weight=0.01", "method.fake_augment=0", "train.micro_batch_size=32"),
    "in two calls": ("dmd2", "method.steps={init_ratio: 4, later_ratios: [1]}", "method.guidance=2"),
}
ALONE = (sys.executable,)
TWICE = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2")
CAPTION_ROWS = 40  # where times are written


@dataclass(frozen=True)
class Recorder:
    """home: where runs are written.  file: where hashes go, as they come."""

    home: Path
    file: Path
    found: dict[str, Any] = field(default_factory=dict)

    def note(self, name: str, value: Any) -> None:
        self.found[name] = value
        print(f"{name}: {str(value)[:16]}", flush=True)
        self.file.write_text(json.dumps(self.found, indent=1) + "\n")

    def train(self, name: str, method: str, *overrides: str, launcher: tuple[str, ...] = ALONE) -> Path:
        """A short run, its checkpoint and previews noted. Returns its folder."""
        folder, verb = self.home / name, "pretrain" if method == "pretrain" else "train"
        teacher = () if method == "pretrain" else (f"teacher={self.home / 'pretrain'}",)
        options = (f"run={folder}", *teacher, *SHORT, *FEWER.get(method, ()), *overrides)
        run(verb, f"{method}/digits", *options, launcher=launcher)
        self.note(name, tensors_of(newest(folder)))
        self.note(f"{name} previews", images_of(folder / "previews"))
        return folder


def record(file: Path) -> int:
    """Run everything and write the hashes."""
    with tempfile.TemporaryDirectory() as place:
        recorder = Recorder(Path(place), file)
        for method in ("pretrain", *METHODS):
            recorder.train(method, method)
        recorder.train("dmd2 on two processes", "dmd2", launcher=TWICE)
        for way, (method, *overrides) in WAYS.items():
            recorder.train(f"{method} {way}", method, *overrides)
        record_uses(recorder, recorder.train("dmd2 half-way", "dmd2"))
    return 0


def record_uses(recorder: Recorder, folder: Path) -> None:
    """Go on with a run from half-way, then sample, evaluate and export it."""
    home = recorder.home
    again = (f"teacher={home / 'pretrain'}", f"run={folder}", *SHORT, "--resume", "--checkpoint", "step-00000010")
    run("train", "dmd2/digits", *again)
    recorder.note("dmd2 resumed", tensors_of(newest(folder)))
    picture, exported, records = home / "sample.png", home / "exported", home / "records.jsonl"
    drawing = ("--count", "20", "--device", "cpu", "--out", str(picture))
    run("sample", str(folder), "--teacher", *drawing)
    recorder.note("sample", pixels_below_captions(picture))
    run("eval", str(folder), "--device", "cpu", "--records", str(records), "--repeats", "1")
    recorder.note("eval", [metrics_of(json.loads(line)) for line in records.read_text().splitlines()])
    run("export", str(folder), "--out", str(exported))
    recorder.note("export", tensors_of(exported))
    run("sample", str(exported), "--trust-code", *drawing)
    recorder.note("sample of the export", pixels_below_captions(picture))


def run(*arguments: str, launcher: tuple[str, ...] = ALONE) -> None:
    """One command of diffdistill, in a process of its own. Raises CalledProcessError."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*launcher, "-m", "diffdistill", *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step-*"))


def tensors_of(folder: Path) -> str:
    """A hash of the numbers, names, types and shapes in all safetensors of a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            digest.update(f"{file.name} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def images_of(folder: Path) -> str:
    """A hash of the pixels of all PNGs of a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.png")):
        with Image.open(file) as image:
            digest.update(f"{file.name} {image.mode} {image.size}".encode() + image.tobytes())
    return digest.hexdigest()


def pixels_below_captions(file: Path) -> str:
    with Image.open(file) as image:
        lower = image.crop((0, CAPTION_ROWS, image.width, image.height))
        return hashlib.sha256(f"{lower.size}".encode() + lower.tobytes()).hexdigest()


def metrics_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record's numbers and protocol, without its clock, machine and paths."""
    return {key: record[key] for key in ("metrics", "protocol")}


def compare(before: Path, after: Path) -> int:
    """Name what differs. Returns the exit code."""
    old, new = json.loads(before.read_text()), json.loads(after.read_text())
    differing = [name for name in old if new.get(name) != old[name]]
    for name in differing:
        print(f"differs: {name}\n  before {old[name]}\n  after  {new.get(name)}")
    print(f"{len(old) - len(differing)} of {len(old)} are equal to the bit")
    return int(bool(differing) or not old)


if __name__ == "__main__":
    verb, *files = sys.argv[1:]
    sys.exit(record(Path(files[0])) if verb == "record" else compare(Path(files[0]), Path(files[1])))
