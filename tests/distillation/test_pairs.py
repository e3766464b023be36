"""Stored pairs in shards: the same pairs, made once, resumed, and refused where they are something else's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_players import CLASSES, PATH, SHAPE, small_teacher
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.prompt_table import PromptTable
from diffdistill.diffusion.sampling import Heun
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation import pairs
from diffdistill.distillation.method import Batch, Players, Problem
from diffdistill.distillation.pairs import teacher_pairs
from diffdistill.methods.rectified_flow import RectifiedFlow
from diffdistill.methods.regression import Regression
from diffdistill.settings.schema import UserError
from diffdistill.training.config import RunConfig

MakeConfig = Callable[..., RunConfig]
SAMPLER = Heun(num_steps=2)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "CHUNK", 4)
    monkeypatch.setattr(pairs, "SHARD", 8)


def problem() -> Problem:
    return Problem(SHAPE, CLASSES, PATH, teacher=small_teacher().float())


def made(folder: Path | None, count: int = 20, seed: int = 0, guidance: float = 1.0) -> dict[str, Tensor]:
    place = None if folder is None else str(folder)
    return teacher_pairs(problem(), seed, count, SAMPLER, guidance=guidance, folder=place)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_pairs_in_shards_are_those_of_one_piece(tmp_path: Path) -> None:
    whole = made(None)
    assert same(made(tmp_path), whole)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "pairs-000000.safetensors",
        "pairs-000001.safetensors",
        "pairs-000002.safetensors",
        "pairs.json",
    ]
    assert same(made(tmp_path), whole)


def test_what_is_there_is_not_made_again_and_what_is_missing_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(tmp_path, count=28)
    asked: list[range] = []
    original = pairs._made
    monkeypatch.setattr(pairs, "_made", lambda *args: asked.append(args[3]) or original(*args))
    (tmp_path / "pairs-000001.safetensors").unlink()
    assert same(made(tmp_path, count=28), whole)
    fewer = made(tmp_path, count=9)
    assert asked == [range(8, 16)]
    assert same(fewer, {name: value[:9] for name, value in whole.items()})
    made(tmp_path, count=30)  # the last shard was cut short
    assert asked == [range(8, 16), range(24, 30)]


@pytest.mark.parametrize(
    ("changed", "named"), [({"seed": 1}, "seed"), ({"guidance": 2.0}, "guidance"), ({}, "teacher")]
)
def test_pairs_of_something_else_are_refused(
    tmp_path: Path, changed: dict[str, float], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path)
    if not changed:
        other = small_teacher().float()
        next(other.parameters()).data += 1
        monkeypatch.setitem(globals(), "small_teacher", lambda: other)
    with pytest.raises(UserError, match=rf"pairs_folder = .*: holds pairs with another {named}; name another folder"):
        made(tmp_path, **changed)  # type: ignore[arg-type]


def test_pairs_of_other_prompts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A label is the number of a prompt; the same teacher knows other prompts by the same numbers."""
    one = {"noise": torch.zeros(4), "image": torch.zeros(4), "label": torch.zeros(4, dtype=torch.int64)}
    monkeypatch.setattr(pairs, "_made", lambda *args: one)

    def pairs_of(*prompts: float) -> dict[str, Tensor]:
        teacher = small_teacher().float()
        if prompts:
            rows = Cond(text=torch.tensor(prompts)[:, None, None])
            teacher.run_with(conditions=PromptTable([rows], Cond(text=torch.zeros(1, 1, 1))))
        told = Problem(SHAPE, CLASSES, PATH, teacher=teacher)
        return teacher_pairs(told, 0, 4, SAMPLER, guidance=1.0, folder=str(tmp_path))

    assert same(pairs_of(1, 2), pairs_of(1, 2))
    for others in ((2, 1), (1, 3), ()):
        with pytest.raises(UserError, match="holds pairs with another conditions; name another folder"):
            pairs_of(*others)
    assert "conditions" not in pairs._facts(small_teacher(), problem(), 0, SAMPLER, 1.0)


@pytest.mark.parametrize(
    ("method", "setting"),
    [("regression", "pair_sampler"), ("rectified_flow", "pair_sampler"), ("dmd2", "regression_sampler")],
)
def test_a_sampler_with_fresh_noise_is_refused_by_the_config(
    make_config: MakeConfig, method: str, setting: str
) -> None:
    def ask(sampler: str, weight: int = 1) -> None:
        pairs_of = (f"method.regression_weight={weight}",) if method == "dmd2" else ()
        make_config(method, *pairs_of, f"method.{setting}={sampler}")

    several = "{name: few_steps, later_ratios: [1.0], later_noise: %s}"
    for sampler in (several % "fresh", "{name: tcd}"):
        with pytest.raises(UserError, match=rf"method.*{setting}: (few_steps|tcd) adds fresh noise"):
            ask(sampler)
    for sampler in ("{name: few_steps}", several % "fixed", several % "ddim", "{name: tcd, eta: 0}", "{name: ddim}"):
        ask(sampler)
    ask("{name: tcd, num_steps: 1}")
    if method == "dmd2":
        ask("{name: tcd}", weight=0)  # it makes no pairs


def test_a_damaged_shard_and_a_folder_that_is_none_are_named(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / "pairs-000001.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"pairs-000001\.safetensors: cannot be read"):
        made(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"pairs_folder = .*file.*: cannot be used"):
        made(tmp_path / "file")


@pytest.mark.parametrize("kind", [Regression, RectifiedFlow])
def test_held_out_pairs_stand_behind_the_others_which_are_as_without_them(kind: type, tmp_path: Path) -> None:
    alone, both = (kind(pairs=6, held_out=n, pair_sampler=SAMPLER).prepare(problem(), seed=3) for n in (0, 5))
    kept = kind(pairs=6, held_out=5, pair_sampler=SAMPLER, pairs_folder=str(tmp_path)).prepare(problem(), seed=3)
    assert same({name: value[:6] for name, value in both.items()}, alone)
    assert same(kept, both)
    assert len(both["label"]) == 11
    drawn = kind(pairs=6, held_out=5).draw(StepRandom(0, 0, torch.arange(500)), problem())
    assert set(drawn["pair"].tolist()) == set(range(6))  # those held out are never trained on


def test_memorisation_is_the_loss_on_held_out_pairs_over_that_on_stored_ones() -> None:
    method, setting = Regression(pairs=6, held_out=5, pair_sampler=SAMPLER), problem()
    assert setting.teacher is not None
    players = Players(generator=setting.teacher)
    stored = method.prepare(setting, seed=0)
    batch, rng = Batch(torch.empty(0), stored=stored), StepRandom(0, 4, torch.arange(8))
    with torch.no_grad():
        found = method.signals(players, rng, setting, batch)["memorisation"]
        made_of = method.steps(setting.teacher, stored["noise"], setting.teacher.class_cond(stored["label"]))
    errors = (made_of - stored["image"]).square().flatten(1).mean(1)
    drawn = method.draw(StepRandom(0, 4, torch.arange(6, 11)), setting)["pair"]
    assert found == pytest.approx(float(errors[6:].mean() / errors[drawn].mean()), rel=1e-5)
    before = {name: value[:6] for name, value in stored.items()}  # a checkpoint that holds none
    assert method.signals(players, rng, setting, Batch(torch.empty(0), stored=before)) == {}
