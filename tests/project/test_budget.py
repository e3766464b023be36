"""The plans of `scripts/budget.py`: what they name exists, and a small one goes from its images to its records."""

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from diffdistill.eval.protocols.packaged import PROTOCOLS
from diffdistill.training.config import find_config, load_config

SCRIPTS = Path(__file__).parents[2] / "scripts"
PLANS = ("cifar10", "mnist")


@pytest.fixture(scope="module")
def budget() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("budget")
    sys.path.remove(str(SCRIPTS))


def test_these_are_all_plans(budget: ModuleType) -> None:
    assert set(budget.PLANS) == set(PLANS)


@pytest.mark.parametrize("images", PLANS)
def test_a_plan_s_recipes_and_protocols_exist_and_fit_one_another(budget: ModuleType, images: str) -> None:
    plan = budget.PLANS[images]
    teacher = load_config(find_config(f"pretrain/{images}_budget"))
    for method in plan.methods:
        config = load_config(find_config(f"{method}/{images}_budget"))
        assert config.method.name == method
        assert config.teacher == teacher.run
        assert config.data.name == teacher.data.name == images
    for name, label in plan.protocols.items():
        assert PROTOCOLS[name].reference.dataset == images
        assert {metric.features.label for metric in PROTOCOLS[name].metrics} == {label}


@pytest.mark.parametrize(("images", "share"), [("cifar10", 0.2), ("mnist", 0.35)])
def test_the_shares_of_a_budget_are_all_of_it_and_what_was_used_is_kept(
    budget: ModuleType, images: str, share: float, tmp_path: Path
) -> None:
    plan, methods = budget.PLANS[images], ["sid", "sim"]
    first = budget.Budget(tmp_path, plan, 10, methods)
    assert sum(first.shares.values()) == pytest.approx(1)
    assert first.left("sid") == pytest.approx(share * 600)
    first.charge("sid", 30)
    assert budget.Budget(tmp_path, plan, 10, methods).left("sid") == pytest.approx(share * 600 - 30)
    assert budget.Budget(tmp_path, plan, None, methods).total == 60 * plan.minutes


class Stub:
    """A slice whose runs take half a second a step by the plan's clock, or end with the slice."""

    def __init__(
        self, budget: ModuleType, folder: Path, images: str = "mnist", *, is_whole: bool = True, ends: bool = True
    ) -> None:
        self.budget, self.is_whole, self.ends = budget.Budget(folder, budget.PLANS[images], 10, ["sid"]), is_whole, ends

    def run(self, phase: str, command: str, config: str, *given: str) -> bool:
        if self.ends:
            found = load_config(config, given)
            steps = range(found.train.log_every, found.train.steps + 1, found.train.log_every)
            Path(found.run).mkdir(parents=True)
            other = {"seconds": "cpu_seconds", "cpu_seconds": "seconds"}[self.budget.clock]
            reports = [{"step": step, self.budget.clock: 3 + step / 2, other: 5 + 2 * step} for step in steps]
            lines = [json.dumps(report) + "\n" for report in reports]
            (Path(found.run) / "metrics.jsonl").write_text("".join(lines))
        return self.ends


@pytest.mark.parametrize("images", PLANS)
def test_the_steps_of_every_recipe_can_be_timed(budget: ModuleType, images: str, tmp_path: Path) -> None:
    for phase in (budget.TEACHER, *budget.PLANS[images].methods):
        config = find_config(f"{phase}/{images}_budget")
        part = Stub(budget, tmp_path, images)
        part.budget.shares[phase] = 0.4
        assert budget._affordable(phase, "train", config, [], tmp_path, part) == int(0.95 * 0.4 * 600 / 0.5)


def test_a_slice_s_tail_that_is_too_short_for_the_timing_ends_it_and_a_whole_one_is_an_error(
    budget: ModuleType, tmp_path: Path
) -> None:
    given = ("sid", find_config("sid/mnist_budget"), [], tmp_path)
    tail = Stub(budget, tmp_path, is_whole=False, ends=False)
    assert budget._train(*given, tail, steps=None) is False
    assert tail.budget.steps == {}
    with pytest.raises(SystemExit, match="30 steps do not fit into a slice"):
        budget._train(*given, Stub(budget, tmp_path, ends=False), steps=None)


@pytest.mark.full
def test_a_small_budget_is_spent_in_slices(tmp_path: Path) -> None:
    """Teacher, student and both of their records; a slice that is too short ends in the teacher."""
    numbers = np.random.default_rng(0)
    images = numbers.integers(0, 256, (300, 28, 28, 1), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(300) % 10)
    data = f"{{name: npz, path: {tmp_path}/images.npz, cache: {tmp_path}/cache}}"

    def said_in(minutes: str) -> str:
        script, folder = str(SCRIPTS / "budget.py"), str(tmp_path / "runs")
        options = ["--data", data, "--method", "sid", "--smoke", "--folder", folder, "--slice-minutes", minutes]
        return subprocess.run(
            [sys.executable, script, "mnist", *options], capture_output=True, text=True, check=True
        ).stdout

    assert said_in("0.02").startswith("this slice ended in pretrain; ")
    assert said_in("60").splitlines()[-1].startswith("all is done: ")
    records = [json.loads(line)["name"] for line in (tmp_path / "runs" / "records.jsonl").read_text().splitlines()]
    protocols = ("mnist-pixels", "mnist-efficientnet-lite0")
    assert records == [f"{name}, {protocol}" for protocol in protocols for name in ("pretrain", "sid")]
    assert Image.open(tmp_path / "runs" / "samples.png").height == 2 * (28 * 3 + 2)
