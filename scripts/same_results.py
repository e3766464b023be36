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
from pathlib import Path
from typing import Any

METHODS = (
    *("dmd2", "sid", "sim", "f_distill", "hyper_sd", "boot", "agd", "guidance_distill", "tsm", "regression", "scm"),
    *("mean_flow", "disback", "msd"),
)
TRAIN = ("train.num_threads=1", "train.log_every=10", "train.preview_every=10", "train.device=cpu")
SHORT = {
    "agd": ("method.trajectories=64", "train.steps=20", "train.checkpoint_every=10"),
    "regression": ("method.pairs=64", "train.steps=20", "train.checkpoint_every=10"),
}
RUNNER = "from diffdistill.__main__ import main; main()"


def run(*arguments: str, launcher: tuple[str, ...] = (sys.executable,)) -> None:
    """One command of diffdistill, in a process of its own. Raises CalledProcessError with what it said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*launcher, "-m", "diffdistill", *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)


def tensors_of(folder: Path) -> str:
    """A hash of the numbers, names, types and shapes in all safetensors of a folder."""
    from safetensors.torch import load_file

    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            digest.update(f"{file.name} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(__import__("torch").uint8).numpy().tobytes())
    return digest.hexdigest()


def images_of(folder: Path) -> str:
    """A hash of the pixels of all PNGs of a folder, or of one PNG."""
    from PIL import Image

    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.png")) if folder.is_dir() else [folder]:
        if file.name in ("curves.png",):  # drawn with run times
            continue
        with Image.open(file) as image:
            digest.update(f"{file.name} {image.mode} {image.size}".encode() + image.tobytes())
    return digest.hexdigest()


def newest(folder: Path) -> Path:
    return sorted((folder / "checkpoints").glob("step-*"))[-1]


def without_dates(record: Any) -> Any:
    """A record's numbers that do not depend on the clock, the machine's paths or the package's version."""
    kept = ("metrics", "values", "fd_pixels", "protocol", "num_images", "evaluations")
    found = json.dumps(record, sort_keys=True)
    data = json.loads(found)
    return {key: data[key] for key in kept if key in data}


def record(file: Path) -> None:
    """Run everything and write the hashes."""
    found: dict[str, Any] = {}

    def note(name: str, value: Any) -> None:
        found[name] = value
        print(f"{name}: {str(value)[:16]}", flush=True)
        file.write_text(json.dumps(found, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        teacher, twice = home / "teacher", (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2")
        short = (*TRAIN, "train.steps=20", "train.checkpoint_every=10")
        run("pretrain", "pretrain/digits", f"run={teacher}", *short)
        note("pretrain", tensors_of(newest(teacher)))
        note("pretrain previews", images_of(teacher / "previews"))

        def train(name: str, method: str, *overrides: str, launcher: tuple[str, ...] = (sys.executable,)) -> Path:
            folder, steps = home / name, SHORT.get(method, short)
            options = (f"teacher={teacher}", f"run={folder}", *TRAIN, *steps, *overrides)
            run("train", f"{method}/digits", *options, launcher=launcher)
            note(name, tensors_of(newest(folder)))
            note(f"{name} previews", images_of(folder / "previews"))
            return folder

        for method in METHODS:
            train(method, method)
        train("dmd2 on two processes", "dmd2", launcher=twice)
        train("dmd2 in pieces", "dmd2", "train.micro_batch_size=16")
        train("dmd2 with LoRA", "dmd2", "lora.default={rank: 4}")
        train("sid with SiDA", "sid", "method.gan_weight=0.01", "method.fake_augment=0", "train.micro_batch_size=32")
        train("dmd2 in two calls", "dmd2", "method.steps={init_ratio: 4, later_ratios: [1]}", "method.guidance=2")
        resumed = train("dmd2 half-way", "dmd2")
        run(
            "train",
            "dmd2/digits",
            f"teacher={teacher}",
            f"run={resumed}",
            *short,
            "--resume",
            "--checkpoint",
            "step-00000010",
        )
        note("dmd2 resumed", tensors_of(newest(resumed)))
        run("sample", str(resumed), "--count", "20", "--teacher", "--out", str(home / "sample.png"), "--device", "cpu")
        note("sample", _without_captions(home / "sample.png"))
        records = home / "records.jsonl"
        run("eval", str(resumed), "--device", "cpu", "--records", str(records), "--repeats", "1")
        note("eval", [without_dates(json.loads(line)) for line in records.read_text().splitlines()])
        run("export", str(resumed), "--out", str(home / "exported"))
        note("export", tensors_of(home / "exported"))
        run(
            "sample",
            str(home / "exported"),
            "--count",
            "20",
            "--trust-code",
            "--device",
            "cpu",
            "--out",
            str(home / "out.png"),
        )
        note("sample of the export", _without_captions(home / "out.png"))


def _without_captions(file: Path) -> str:
    """The pixels below the first 40 rows, where times are written."""
    from PIL import Image

    with Image.open(file) as image:
        lower = image.crop((0, 40, image.width, image.height))
        return hashlib.sha256(f"{lower.size}".encode() + lower.tobytes()).hexdigest()


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
