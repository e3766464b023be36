"""Which lines split the graphs of a run's compiled players, and how many graphs a step has.

python scripts/graph_breaks.py CONFIG [SETTING=VALUE ...] [--steps 3]

Trains some steps of a config in a temporary folder with `speed.compile: eager`, unless the settings say another one:
breaks are found before a backend sees a graph. Prints each break once, with its reason and the line of ours that it
comes from. A graph is made for each network, kind of call, and set of live gradients, so that there are several without
any break; what the last step still had to compile is a recompilation.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._dynamo.utils import counters, graph_break_reasons

import diffdistill
from diffdistill.training.config import find_config, load_config
from diffdistill.training.trainer import Trainer

HOMES = tuple(Path(place).resolve() for place in diffdistill.__path__)


@dataclass(frozen=True)
class Breaks:
    """num_graphs: compiled in all.  late: of those, in the last call.  reasons: each break's line and reason, with how
    many graphs ended there."""

    num_graphs: int
    late: int
    reasons: Counter[str]

    def __str__(self) -> str:
        head = f"{self.num_graphs} graphs, {self.late} of them in the last step; {len(self.reasons)} breaks"
        return "\n".join([head, *(f"{count:5d} {what}" for what, count in self.reasons.most_common())])


def find_breaks(step: Callable[[], object], times: int) -> Breaks:
    """Call a step some times, with nothing compiled before."""
    torch._dynamo.reset()
    counters.clear()
    graph_break_reasons.clear()
    before = 0
    for _ in range(times):
        before = _num_graphs()
        step()
    reasons = Counter(f"{_line_of(one.user_stack)}  {one.reason.splitlines()[0]}" for one in graph_break_reasons)
    return Breaks(_num_graphs(), _num_graphs() - before, reasons)


def _num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def _line_of(stack: list) -> str:
    """The innermost line of ours, else the innermost."""
    ours = [one for one in stack if any(home in Path(one.filename).resolve().parents for home in HOMES)]
    found = (ours or stack)[-1]
    return f"{Path(found.filename).name}:{found.lineno}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--steps", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        settings = ["speed.compile=eager", *asked.settings, f"run={temporary}/run", "train.preview_every=0"]
        trainer = Trainer(load_config(find_config(asked.config), settings), quiet=True)
        print(find_breaks(trainer.train_step, asked.steps))


if __name__ == "__main__":
    main()
