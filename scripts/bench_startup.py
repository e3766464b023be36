"""What commands cost before they do anything: CPU time (user and system) and peak memory, beside `import torch`.

python scripts/bench_startup.py [--rounds 7]

Each reading is of a process of its own; a round starts every command once, so that a machine that slows down slows
all of them. Prints medians over the rounds, and of the ratios within a round.  `sample` draws from a run of two steps.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
TORCH = "import torch"
REFUSED = ("train", "dmd2/digits", "nonsense=3")


def cost(arguments: list[str], *, code: int = 0) -> tuple[float, float]:
    """CPU seconds and peak MiB of a command that ends with this exit code."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, *arguments], stdout=quiet, stderr=quiet, env=environment)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != code:
        raise SystemExit(f"{' '.join(arguments)}: ended with {process.returncode}, not {code}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as temporary:
        run = f"{temporary}/run"
        ours = ["-m", "diffdistill"]
        commands = {
            TORCH: (["-c", TORCH], 0),
            "--help": ([*ours, "--help"], 0),
            "methods": ([*ours, "methods"], 0),
            "train, a config that is refused": ([*ours, *REFUSED], 2),
            "sample, four images": ([*ours, "sample", run, "--count", "4", "--out", f"{temporary}/images.png"], 0),
        }
        cost([*ours, "pretrain", "pretrain/digits", f"run={run}", "train.steps=2", "train.device=cpu"])
        readings = [
            {name: cost(command[0], code=command[1]) for name, command in commands.items()} for _ in range(rounds)
        ]
    print(f"{'':34}{'CPU s':>8}{'of torch':>10}{'MiB':>8}")
    for name in commands:
        seconds, memory = (median(reading[name][i] for reading in readings) for i in (0, 1))
        ratio = median(reading[name][0] / reading[TORCH][0] for reading in readings)
        print(f"{name:34}{seconds:8.2f}{ratio:10.2f}{memory:8.0f}")


if __name__ == "__main__":
    main()
