"""scripts/graph_breaks.py counts what splits a compiled step, and names the line."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import small_config
from torch import Tensor

from diffdistill.training.trainer import Trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def with_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    sys.modules.pop("graph_breaks", None)


def test_a_break_is_counted_with_its_line_and_reason() -> None:
    from graph_breaks import find_breaks

    def broken(x: Tensor) -> Tensor:
        y = x + 1
        return y * y.sum().item()

    whole, split = torch.compile(lambda x: x * 2, backend="eager"), torch.compile(broken, backend="eager")
    assert find_breaks(lambda: whole(torch.ones(2)), 2).reasons.total() == 0
    found = find_breaks(lambda: split(torch.ones(2)), 2)
    assert (found.num_graphs, found.late) == (2, 0)
    [told] = found.reasons
    assert told.startswith("test_graph_breaks.py:")
    assert "Tensor.item()" in told


@pytest.mark.parametrize("method", ["dmd2", "sid", "pi_flow"])
def test_a_compiled_step_has_no_break_and_compiles_nothing_after_the_first_cycle(method: str, tmp_path: Path) -> None:
    from graph_breaks import find_breaks

    discrete = ("model.path={name: vp_discrete, beta_end: 0.0203}", "model.predicts=v", "train.steps=1")
    teacher = Trainer(small_config("pretrain", tmp_path / "teacher", *discrete), quiet=True).run()
    trainer = Trainer(small_config(method, tmp_path / "run", "speed.compile=eager", teacher=teacher), quiet=True)
    found = find_breaks(trainer.train_step, 4)
    assert not found.reasons, str(found)
    assert found.num_graphs > 0
    assert found.late == 0, str(found)
