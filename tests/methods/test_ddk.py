"""DDK: the law follows the gap and keeps its floor, labels are of it, and it is saved and resumed to the bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_players import CLASSES, PATH, SHAPE, small_teacher
from torch import Tensor

from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Players, Problem
from diffdistill.methods import ddk
from diffdistill.methods.ddk import DDK, LabelLaw
from diffdistill.methods.diversity import Diversity
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.forget import Forget
from diffdistill.methods.regression import Regression
from diffdistill.methods.sid import SiD
from diffdistill.methods.sim import SIM
from diffdistill.settings.schema import UserError
from diffdistill.storage.checkpoint import list_checkpoints, load_checkpoint
from diffdistill.training.config import RunConfig
from diffdistill.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]
BASE = DMD2(gan_weight=0)
EMPTY = Batch(torch.empty(0))


def problem(**changes: Any) -> Problem:
    return Problem(SHAPE, CLASSES, PATH, **{"teacher": small_teacher().float(), "batch_size": 6, **changes})


def players_of(method: DDK) -> Players:
    setting = problem()
    assert setting.teacher is not None
    return Players(teacher=setting.teacher, **method.players(setting))


def law(*shares: float) -> LabelLaw:
    made = LabelLaw(torch.tensor([2, 5, 7]), SHAPE)
    made.shares.copy_(torch.tensor(shares))
    return made


def test_labels_have_the_law_s_shares_and_every_class_its_floor() -> None:
    uniform = StepRandom(0, 0, torch.arange(200_000)).uniform("a")
    label = law(1.0, 0.0, 0.0).draw(uniform, floor=0.3)
    found = [float((label == c).double().mean()) for c in (2, 5, 7)]
    assert found == pytest.approx([0.8, 0.1, 0.1], abs=4e-3)
    assert set(law(1.0, 0.0, 0.0).draw(uniform, floor=0.0).tolist()) == {2}


def test_the_ends_of_the_numbers_are_classes() -> None:
    ends = torch.tensor([2.0**-33, 1 - 2.0**-33], dtype=torch.float64)
    assert law(0.2, 0.3, 0.5).draw(ends, 0.0).tolist() == [2, 7]


def test_while_all_gaps_are_one_it_is_the_base() -> None:
    """An even law draws the base's labels, of the same numbers."""
    method, setting = DDK(base=BASE), problem()
    players, draw = players_of(method), method.draw(StepRandom(0, 3, torch.arange(6)), setting)
    assert torch.equal(method._by_law(players, draw)["label"], draw["label"])
    first, second = (one.call("generator_loss", players, draw, EMPTY).total for one in (method, BASE))
    assert torch.equal(first, second)


def test_the_loss_is_of_the_law_s_labels_for_all_roles() -> None:
    method, setting = DDK(base=BASE, floor=0.0), problem()
    players = players_of(method)
    players.label_law.shares.copy_(torch.tensor([0.0, 1.0, 0.0]))
    draw = method.draw(StepRandom(0, 0, torch.arange(6)), setting)
    told = {**draw, "label": torch.ones(6, dtype=torch.int64)}
    for loss in ("generator_loss", "fake_loss"):
        assert torch.equal(
            *(one.call(loss, players, given, EMPTY).total for one, given in ((method, draw), (BASE, told)))
        )


def test_what_was_dropped_stays_dropped() -> None:
    players = players_of(DDK(base=BASE, floor=0.0))
    players.label_law.shares.copy_(torch.tensor([0.0, 1.0, 0.0]))
    draw = {"label": torch.tensor([0, 2]), "label for fake loss": torch.tensor([CLASSES, 2])}
    draw["label uniform"] = torch.tensor([0.1, 0.9], dtype=torch.float64)
    changed = DDK(base=BASE, floor=0.0)._by_law(players, draw)
    assert changed["label"].tolist() == [1, 1]
    assert changed["label for fake loss"].tolist() == [CLASSES, 1]


def test_groups_stay_of_one_condition() -> None:
    method = DDK(base=SIM(samples_per_condition=3), floor=0.0)
    players = players_of(method)
    players.label_law.shares.copy_(torch.tensor([0.4, 0.3, 0.3]))
    labels = method._by_law(players, method.draw(StepRandom(0, 0, torch.arange(60)), problem()))["label"].reshape(-1, 3)
    assert (labels == labels[:, :1]).all()
    assert len(set(labels[:, 0].tolist())) == 3


def test_the_gap_is_that_of_the_fake_score_and_the_teacher() -> None:
    method = DDK(base=BASE, samples=30)
    players = players_of(method)
    assert torch.equal(method.gaps(players, 5), torch.zeros(CLASSES, dtype=torch.float64))  # they start alike

    class Off(type(players.fake)):  # type: ignore[misc]
        def forward(self, x_t: Tensor, t: Tensor, cond: Any, **options: Any) -> Any:
            return super().forward(x_t, t, cond, **options) + 2.0 * (cond.label == 1)[:, None, None, None]

    players.fake.__class__ = Off
    expected = torch.tensor([0.0, 2.0 * 4.0, 0.0], dtype=torch.float64)  # of 16 values, the norm
    torch.testing.assert_close(method.gaps(players, 5), expected, rtol=1e-5, atol=1e-5)


def test_the_law_follows_and_only_when_it_is_due() -> None:
    method = DDK(base=BASE, every=4, decay=0.25)
    players = players_of(method)
    gaps = torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64)
    object.__setattr__(method, "gaps", lambda *_: gaps)
    with torch.no_grad():
        method.after_step(players, {}, 3)
        assert players.label_law.shares.tolist() == pytest.approx([1 / 3] * 3)
        method.after_step(players, {}, 4)
    expected = [0.25 / 3 + 0.75 * share for share in (0.25, 0.75, 0.0)]
    assert players.label_law.shares.tolist() == pytest.approx(expected)
    object.__setattr__(method, "gaps", lambda *_: torch.zeros(3, dtype=torch.float64))
    method.after_step(players, {}, 8)
    assert float(players.label_law.shares.sum()) == pytest.approx(1.0)


def test_a_resumed_run_has_the_same_law_to_the_bit(make_config: MakeConfig) -> None:
    config = make_config("ddk", "train.steps=4", "train.checkpoint_every=2", "method.every=1")
    found = []
    for resume in (False, "step-00000002"):
        trainer = Trainer(config, resume=resume, quiet=True)
        trainer.run()
        found.append(load_checkpoint(list_checkpoints(trainer.folder / "checkpoints")[-1]).tensors["players"])
    whole, resumed = found
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    shares = whole["label_law.shares"]
    assert float(shares.sum()) == pytest.approx(1.0)
    assert len(set(shares.tolist())) > 1  # it has moved


def test_what_does_not_fit_is_refused() -> None:
    cases: list[tuple[Any, Problem, str]] = [
        (DDK(base=Regression(pairs=2)), problem(), "has no fake score"),
        (DDK(base=DMD2()), problem(), "compares with real images"),
        (
            DDK(base=DMD2(gan_weight=0, fake_guidance=2.0)),
            problem(),
            "method.base.fake_guidance: its unconditional estimate",
        ),
        (Forget(base=DDK(base=BASE), forgotten=(1,)), problem(), "'ddk': tells its teacher no class of its own"),
    ]
    for method, setting, said in cases:
        with pytest.raises(UserError, match=said):
            method.players(setting)


def test_it_can_be_rewarded_for_diversity() -> None:
    method = Diversity(base=DDK(base=SiD()))
    setting = problem()
    assert setting.teacher is not None
    players = Players(teacher=setting.teacher, **method.players(setting))
    draw = method.draw(StepRandom(0, 0, torch.arange(6)), setting)
    assert "diversity" in method.call("generator_loss", players, draw, EMPTY).logs


@pytest.mark.parametrize("gaps", [(0.0, 0.0, 0.0), (1.0, float("nan"), 1.0), (1.0, float("inf"), 1.0)])
def test_a_measurement_that_says_nothing_leaves_the_law_as_it_is(
    monkeypatch: pytest.MonkeyPatch, gaps: tuple[float, ...]
) -> None:
    method = DDK(base=BASE, every=1, decay=0.0)
    players = players_of(method)
    players.label_law.shares.copy_(torch.tensor([0.2, 0.3, 0.5]))
    monkeypatch.setattr(DDK, "gaps", lambda self, players, step: torch.tensor(gaps, dtype=torch.float64))
    method.after_step(players, {}, 1)
    assert players.label_law.shares.tolist() == pytest.approx([0.2, 0.3, 0.5], abs=1e-7)


def test_many_samples_are_measured_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With prompts there are as many classes, which are no batch that fits a device."""
    method, asked = DDK(base=BASE, samples=10), list[int]()
    players = players_of(method)
    whole = method.gaps(players, 5)
    monkeypatch.setattr(ddk, "AT_ONCE", 4)
    players.teacher.net.register_forward_pre_hook(lambda _, given: asked.append(len(given[0])))
    torch.testing.assert_close(method.gaps(players, 5), whole)
    assert asked == [4, 4, 2]
