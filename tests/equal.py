"""One run on one, two and four processes: how far apart its weights are at the end, for every method.

python tests/equal.py [METHOD ...]    prints the table, and without names writes it into docs/scaling.md; ends with 1
                                      where a number is above its tolerance.
"""

import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import SETTINGS, small_config
from numpy.typing import NDArray
from support.fleet import run_together
from torch import Tensor

from diffdistill.data.order import DataOrder
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distributed.sharded import whole
from diffdistill.training import assembly as assembly_module
from diffdistill.training.assembly import PREPARED, Assembly, assemble
from diffdistill.training.config import RunConfig
from diffdistill.training.objective import Replicas
from diffdistill.training.plan import plan
from diffdistill.training.trainer import Trainer

STEPS = 30
COUNTS = (2, 4)
BATCH = 8
SGD = "optimizers={{default: {{name: sgd, lr: {lr}, betas: [0, 0.999]}}}}"
RATES = {"sid": 1e-3, "scm": 1e-2}  # SiD sums over pixels and scales by 100; sCM derives its network by time
SIDA = ("method.gan_weight=0.01", "method.gan_fake_weight=1")
RUNS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    **{name: (name, ()) for name in SETTINGS},
    "sid (SiDA)": ("sid", SIDA),
}
"""Every method, and what has statistics of the whole batch besides f_distill: its config's overrides by name."""
PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- equality: python tests/equal.py -->", "<!-- equality ends -->"

Weights = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Way:
    """How a run is compared.

    is_wide: all numbers in float64.  is_sgd: in place of the settings' Adam.  has_equal_pieces: the one process takes
    micro-batches as large as a process's share.  is_sharded: the others share out the weights.
    tolerance: of the weights, relative to the largest one.
    """

    tolerance: float
    is_wide: bool = False
    is_sgd: bool = False
    has_equal_pieces: bool = False
    is_sharded: bool = False

    def overrides(self, method: str) -> tuple[str, ...]:
        return (SGD.format(lr=RATES.get(method, 0.1)),) if self.is_sgd else ()


WAYS = {
    "SGD": Way(1e-6, is_sgd=True),
    # It divides a gradient by its own size, so that those near zero, which are rounding's, count as much as any: a
    # single weight may go a part of the rate of 1e-3 another way. That it is rounding is seen in float64.
    "Adam": Way(1e-4),
    "Adam, equal pieces": Way(1e-4, has_equal_pieces=True),
    "Adam, float64": Way(1e-12, is_wide=True),
    "Adam, float64, sharded": Way(1e-12, is_wide=True, is_sharded=True),
}


def train(config: RunConfig, *, is_wide: bool, prepared: Path | None = None) -> Weights:
    """The weights of a run's players and averages after its last step; nothing is logged or saved.

    prepared: the file by which runs share what their method prepares, made by the first of them: it is one process's
    work, in float32, and its last bit depends on where numbers lie in memory.
    """
    folder = Path(config.run)
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / PREPARED
    if prepared and prepared.exists():
        assembly_module.prepare_once = lambda *_, **__: shutil.copy(prepared, own)  # in this process, a forked one
    assembly = assemble(plan(config), folder)
    if prepared and own.exists() and assembly.plan.processes.is_main:
        shutil.copy(own, prepared)
    trainer = Trainer(widened(assembly) if is_wide else assembly, quiet=True)
    for _ in range(config.train.steps):
        trainer.train_step()
    modules = (
        trainer.trained
        | trainer.assembly.plan.followers
        | {group: ema.module for group, ema in trainer.assembly.emas.items()}
    )
    return {
        f"{name}.{key}": whole(tensor).detach().numpy().copy()
        for name, module in modules.items()
        for key, tensor in module.state_dict().items()
    }


@dataclass(frozen=True)
class WideOrder:
    """A `DataOrder` whose images are in float64."""

    order: DataOrder

    def take(self, first: int, count: int, *, next_first: int) -> tuple[Tensor, Tensor | None]:
        images, labels = self.order.take(first, count, next_first=next_first)
        return wide(images), labels


def widened(assembly: Assembly) -> Assembly:
    """A run with all numbers in float64 from here on: networks, images, noise."""
    its, iteration = assembly.plan, assembly.iteration
    for module in (*iteration.players.values(), *(ema.module for ema in assembly.emas.values())):
        module.double()
    if its.mesh is None:  # whose buckets are made for a type
        assembly = replace(assembly, averaging=Replicas(its.processes, its.method.updates, its.trained))
    narrow_normals = StepRandom.normals
    StepRandom.normals = lambda self, names, shape, dtype=None: narrow_normals(self, names, shape, torch.float64)  # type: ignore[method-assign]
    return replace(
        assembly,
        plan=replace(its, order=WideOrder(its.order)),  # type: ignore[arg-type]
        iteration=replace(iteration, stored={name: wide(value) for name, value in iteration.stored.items()}),
    )


def wide(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def apart(first: Weights, second: Weights) -> float:
    """The largest difference of two weights, relative to the largest weight."""
    size = max(float(np.abs(value).max()) for value in first.values() if value.size)
    return max(float(np.abs(first[name] - second[name]).max()) for name in first if first[name].size) / size


def measure(name: str, way: Way, folder: Path, teacher: Path) -> dict[int, float]:
    """By number of processes: how far a run's end is from that of one process. Asserts that all ranks have the same."""
    method, overrides = RUNS[name]
    common = (f"train.steps={STEPS}", f"train.global_batch_size={BATCH}", *overrides, *way.overrides(method))

    def run(count: int, *more: str) -> list[Weights]:
        place = folder / "-".join([str(count), *more])
        folder.mkdir(parents=True, exist_ok=True)
        config = small_config(method, place, *common, *more, teacher=None if method == "pretrain" else teacher)
        return run_together(count, partial(train, config, is_wide=way.is_wide, prepared=folder / PREPARED))

    sharded = ("speed.shard=all",) if way.is_sharded else ()
    alone, found = [] if way.has_equal_pieces else run(1), {}
    for count in COUNTS:
        ends = run(count, *sharded)
        assert all(apart(ends[0], end) == 0 for end in ends[1:]), f"{name}: the processes have drifted apart"
        found[count] = apart((alone or run(1, f"train.micro_batch_size={BATCH // count}"))[0], ends[0])
    return found


def main() -> int:
    torch.set_num_threads(1)
    names = sys.argv[1:] or list(RUNS)
    heads = [f"{way}, {count}" for way in WAYS for count in COUNTS]
    lines, faults = ["| method | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        Trainer(small_config("pretrain", folder / "teacher", "train.steps=10"), quiet=True).run()
        for name in names:
            found = {
                label: measure(name, way, folder / name / label, folder / "teacher") for label, way in WAYS.items()
            }
            faults += [
                f"{name}, {label}: {found[label]}"
                for label in found
                if max(found[label].values()) > WAYS[label].tolerance
            ]
            cells = [f"{found[label][count]:.0e}" for label in WAYS for count in COUNTS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    for fault in faults:
        print(f"above its tolerance: {fault}")
    if not sys.argv[1:]:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(
            before + BEGIN + f"\nMeasured on {date.today()}.\n\n" + "\n".join(lines) + "\n" + END + after,
            encoding="utf-8",
        )
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
