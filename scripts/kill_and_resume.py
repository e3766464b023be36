"""Kill -9 a run at random moments, resume it each time, and compare its end with an undisturbed run, bit for bit.

python scripts/kill_and_resume.py [--kills 20] [--steps 120] [--seed 0]
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from diffdistill.storage.checkpoint import list_checkpoints, load_checkpoint

TINY = ["model.network.channels=[8, 16]", "model.network.head_channels=16"]


def command(verb: str, config: str, *overrides: str) -> list[str]:
    """The command line of one run."""
    return [sys.executable, "-c", "from diffdistill.commands.cli import main; main()", verb, config, *overrides]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = [
            f"train.steps={options.steps}",
            "train.preview_every=0",
            "train.log_every=10",
            "train.checkpoint_every=5",
        ]
        teacher = command("pretrain", "pretrain/digits", f"run={folder}/teacher", *TINY, *common)
        subprocess.run(teacher, check=True, capture_output=True)
        student = [f"teacher={folder}/teacher", *common, "train.global_batch_size=16"]
        undisturbed = command("train", "dmd2/digits", f"run={folder}/undisturbed", *student)
        start = time.perf_counter()
        subprocess.run(undisturbed, check=True, capture_output=True)
        seconds = time.perf_counter() - start
        expected = end_of(folder / "undisturbed")
        kills, runs, different = 0, 0, 0
        while kills < options.kills:
            run = folder / f"disturbed-{runs}"
            resuming = [*command("train", "dmd2/digits", f"run={run}", *student), "--resume"]
            kills += kill_until_done(resuming, run, rng, seconds, options.kills - kills)
            runs += 1
            found = end_of(run)
            unequal = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
            different += len(unequal)
            print(f"run {runs} ended: {len(expected) - len(unequal)} of {len(expected)} tensors bit-equal", flush=True)
        print(f"{kills} kills in {runs} runs, every resume went on; {different} tensors differ at the end")
        sys.exit(1 if different else 0)


def kill_until_done(resuming: list[str], run: Path, rng: random.Random, seconds: float, most: int) -> int:
    """Start, kill, resume until the run ends; at most `most` kills. Returns how many it took. Exits on a failure."""
    kills = 0
    while True:
        process = subprocess.Popen(resuming, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            _, errors = process.communicate(timeout=rng.uniform(0.2, 0.9) * seconds if kills < most else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            found = list_checkpoints(run / "checkpoints")
            print(f"  killed; newest checkpoint: {found[-1].name if found else 'none'}", flush=True)
            continue
        if process.returncode:
            sys.exit(f"--resume failed after {kills} kills: {errors}")
        return kills


def end_of(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's last checkpoint."""
    last = load_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    return {f"{group}/{key}": value for group, tensors in last.tensors.items() for key, value in tensors.items()}


if __name__ == "__main__":
    main()
