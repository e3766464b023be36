"""Memory and seconds a step of DMD2 on digits against batch, parameters, processes and students, as a table.

python scripts/bench_growth.py [FOLDER]    writes it into docs/scaling.md. Wants two cores that nobody else uses: one
thread a process. Ratios are to the first row of each part, measured in the same call.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from describe_machine import describe

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- growth: python scripts/bench_growth.py -->", "<!-- growth ends -->"
WIDTHS = {"small": (16, 48), "wide": (64, 192)}
SHARDED = "speed.shard=all"
BENCH = Path(__file__).with_name("bench_processes.py")

Row = dict[str, float]


def make_teacher(folder: Path, name: str) -> Path:
    """A teacher of so many channels: one step of training, as its weights do not matter."""
    place = folder / f"teacher-{name}"
    if not place.exists():
        shape = f"channels: {list(WIDTHS[name])}, attention: [false, true], head_channels: 48"
        network = f"model.network={{name: unet, {shape}}}"
        command = ["-m", "diffdistill", "pretrain", "pretrain/digits", f"run={place}", "train.steps=1", network]
        subprocess.run([sys.executable, *command, "train.preview_every=0"], check=True, capture_output=True)
    return place


def start(folder: Path, number: int, processes: int, *overrides: str) -> "subprocess.Popen[str]":
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    settings = (f"run={folder / f'run-{number}'}", "train.num_threads=1", "trackers=[]", *overrides)
    command = [sys.executable, *launcher, str(BENCH), "dmd2/digits", *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def measure(folder: Path, size: str, batch: int, processes: int, students: int, *more: str) -> Row:
    """The row of one run, or of several that share the machine: the largest of each number."""
    overrides = (f"teacher={make_teacher(folder, size)}", f"train.global_batch_size={batch}", *more)
    running = [start(folder, number, processes, *overrides) for number in range(students)]
    found = []
    for run in running:
        said, why = run.communicate()
        if run.returncode:
            sys.exit(f"{' '.join(map(str, run.args))}: {why}")  # type: ignore[arg-type]
        found.append(json.loads(said.splitlines()[-1]))
    return {key: max(row[key] for row in found) for key in found[0]}


PARTS: Sequence[tuple[str, Sequence[tuple[str, int, int, int, tuple[str, ...]]]]] = (
    ("batch", [("small", 32, 1, 1, ()), ("small", 128, 1, 1, ()), ("small", 512, 1, 1, ())]),
    ("parameters", [("small", 32, 1, 1, ()), ("wide", 32, 1, 1, ())]),
    ("processes", [("small", 512, 1, 1, ()), ("small", 512, 2, 1, ()), ("small", 512, 2, 1, (SHARDED,))]),
    ("processes", [("wide", 64, 1, 1, ()), ("wide", 64, 2, 1, ()), ("wide", 64, 2, 1, (SHARDED,))]),
    ("students", [("small", 128, 1, 1, ()), ("small", 128, 1, 2, ())]),
)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/growth")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "| | parameters | batch | processes | students | seconds a step | ratio | of ideal | peak memory, each |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for title, cases in PARTS:
        first: Row = {}
        for size, batch, processes, students, more in cases:
            row = measure(folder, size, batch, processes, students, *more)
            first = first or row
            seconds = row["least_seconds_per_step"]
            ratio = seconds / first["least_seconds_per_step"]
            ideal = f"{1 / (processes * ratio):.2f}" if processes > 1 else ""
            kind = f"{processes}, sharded" if more else f"{processes}"
            numbers = f"{row['parameters'] / 1e6:.2f} M | {batch} | {kind} | {students}"
            memory = f"{row['peak_MiB_per_process']:.0f} MiB"
            lines.append(
                f"| {title if row is first else ''} | {numbers} | {seconds:.3f} | {ratio:.2f} | {ideal} | {memory} |"
            )
            print(lines[-1], flush=True)
    page = PAGE.read_text(encoding="utf-8")
    table = "\n".join([f"Measured on {date.today()}, {describe()}.", "", *lines])
    PAGE.write_text(page.split(BEGIN)[0] + f"{BEGIN}\n{table}\n{END}" + page.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
