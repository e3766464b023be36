"""One run on one, two and four processes: how far apart its weights are at the end, for every method.

python tests/equal.py [METHOD ...]    prints the table, and without names writes it into docs/scaling.md.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import SETTINGS, small_config
from fleet import run_together
from numpy.typing import NDArray
from torch import Tensor

from diffdistill.config import RunConfig
from diffdistill.draws import Draws
from diffdistill.trainer import Trainer

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
    micro-batches as large as a process's share.  tolerance: of the weights, relative to the largest one.
    """

    tolerance: float
    is_wide: bool = False
    is_sgd: bool = False
    has_equal_pieces: bool = False

    def overrides(self, method: str) -> tuple[str, ...]:
        return (SGD.format(lr=RATES.get(method, 0.1)),) if self.is_sgd else ()


WAYS = {
    "SGD": Way(1e-6, is_sgd=True),
    # It divides a gradient by its own size, so that those near zero, which are rounding's, count as much as any.
    "Adam": Way(1e-5),
    "Adam, equal pieces": Way(1e-6, has_equal_pieces=True),
    "Adam, float64": Way(1e-12, is_wide=True),
}


def train(config: RunConfig, *, is_wide: bool) -> Weights:
    """The weights of a run's players and averages after its last step; nothing is logged or saved."""
    trainer = Trainer(config, quiet=True)
    trainer.folder.mkdir(parents=True, exist_ok=True)
    trainer._prepare()
    if is_wide:
        widen(trainer)
    for _ in range(config.train.steps):
        trainer.train_step()
    modules = trainer.trained | trainer.followers | {group: ema.module for group, ema in trainer.emas.items()}
    return {
        f"{name}.{key}": tensor.detach().numpy().copy()
        for name, module in modules.items()
        for key, tensor in module.state_dict().items()
    }


def widen(trainer: Trainer) -> None:
    """All numbers of a run in float64 from here on: networks, images, noise."""
    for module in (*trainer.players.values(), *(ema.module for ema in trainer.emas.values())):
        module.double()
    wide: Callable[[Tensor], Tensor] = lambda value: value.double() if value.is_floating_point() else value  # noqa: E731
    trainer.stored = {name: wide(value) for name, value in trainer.stored.items()}
    narrow_real, narrow_normals = trainer.real, Draws.normals

    def real(first: int, count: int) -> Any:
        images, cond = narrow_real(first, count)
        return wide(images), cond

    trainer.real = real  # type: ignore[method-assign]
    Draws.normals = lambda self, names, shape, dtype=None: narrow_normals(self, names, shape, torch.float64)  # type: ignore[method-assign]


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
        config = small_config(method, place, *common, *more, teacher=None if method == "pretrain" else teacher)
        return run_together(count, partial(train, config, is_wide=way.is_wide))

    alone, found = [] if way.has_equal_pieces else run(1), {}
    for count in COUNTS:
        ends = run(count)
        assert all(apart(ends[0], end) == 0 for end in ends[1:]), f"{name}: the processes have drifted apart"
        found[count] = apart((alone or run(1, f"train.micro_batch_size={BATCH // count}"))[0], ends[0])
    return found


def main() -> None:
    torch.set_num_threads(1)
    names = sys.argv[1:] or list(RUNS)
    heads = [f"{way}, {count}" for way in WAYS for count in COUNTS]
    lines = ["| method | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        Trainer(small_config("pretrain", folder / "teacher", "train.steps=10"), quiet=True).run()
        for name in names:
            cells = []
            for label, way in WAYS.items():
                found = measure(name, way, folder / name / label, folder / "teacher")
                cells += [f"{value:.0e}" for value in found.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    if not sys.argv[1:]:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
