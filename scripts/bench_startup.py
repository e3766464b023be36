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
PEAK = "peak bytes: "
AT_EXIT = f"""
import atexit, runpy, sys
from peak import peak_bytes
atexit.register(lambda: print("{PEAK}", peak_bytes(), sep="", file=sys.stderr))
kind, what, *sys.argv[1:] = sys.argv[1:]
exec(what) if kind == "-c" else runpy.run_module(what, run_name="__main__", alter_sys=True)
"""  # a program, or a module, and then its own peak on stderr
REFUSED = ("train", "dmd2/digits", "nonsense=3")


def cost(arguments: list[str], *, code: int = 0) -> tuple[float, float]:
    """CPU seconds and peak MiB of a command that ends with this exit code."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"}
    quiet = subprocess.DEVNULL
    command = [sys.executable, "-c", AT_EXIT, *arguments]
    process = subprocess.Popen(command, stdout=quiet, stderr=subprocess.PIPE, env=environment, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != code:
        raise SystemExit(f"{' '.join(arguments)}: ended with {process.returncode}, not {code}")
    return used.ru_utime + used.ru_stime, int(said.rpartition(PEAK)[2]) / 2**20


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
