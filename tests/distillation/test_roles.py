"""A condition for each role, and groups of samples with one condition."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from support.tiny_players import BATCH, CLASSES, PATH, SHAPE, scene, small_teacher
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Draw, Loss, Method, Players, Problem, Update
from diffdistill.distillation.score_distillation import condition, generate, matching_field
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.f_distill import FDistill
from diffdistill.methods.sid import SiD
from diffdistill.methods.sim import SIM
from diffdistill.settings.schema import UserError, schema
from diffdistill.training.trainer import Trainer

ROLES = ("generator", "teacher", "fake", "fake loss")
METHODS = {"dmd2": DMD2(), "f_distill": FDistill(), "sid": SiD(), "sim": SIM()}


@schema
class AskedOtherwise(DMD2):
    """DMD2 whose teacher is asked about the next class: a method from outside, of one function."""

    def draw(self, rng: StepRandom, problem: Problem) -> dict[str, Tensor]:
        numbers = super().draw(rng, problem)
        return numbers | {"label for teacher": (numbers["label"] + 1) % problem.num_classes}


def test_a_teacher_can_be_asked_another_condition_than_the_sample_is_made_from() -> None:
    method = AskedOtherwise(gan_weight=0.0)
    players, draw, _ = scene(method)
    own, next_class = (Cond(label=label) for label in (draw["label"], (draw["label"] + 1) % CLASSES))
    x = generate(players, draw, method.steps).detach()
    x_t = players.teacher.path.diffuse(x, draw["eps"], draw["t"])
    expected = matching_field(
        x, players.fake(x_t, draw["t"], own), players.teacher(x_t, draw["t"], next_class), minimum=1e-5
    )
    torch.testing.assert_close(method.field(players, draw, x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(x, generate(players, {**draw, "label for teacher": draw["label"]}, method.steps))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("role", ["teacher", "fake"])
def test_each_role_s_label_reaches_its_network_alone(method: Any, role: str) -> None:
    players, draw, batch = scene(method)
    draw[f"label for {role}"] = torch.full((BATCH,), CLASSES)
    told: dict[str, list[Tensor]] = {}
    for name in ("generator", "teacher", "fake"):
        note_labels(players, name, told)
    method.generator_loss(players, draw, batch)
    for name, seen in told.items():
        dropped = [bool((label == CLASSES).all()) for label in seen]
        assert seen
        assert all(dropped) if name == role else not any(dropped), name


def test_what_is_learned_from_a_sample_may_be_told_otherwise() -> None:
    method = DMD2(gan_weight=0.0)
    players, draw, batch = scene(method)
    whole = method.fake_loss(players, draw, batch).total
    same = method.fake_loss(players, {**draw, "label for fake loss": draw["label"]}, batch).total
    other = method.fake_loss(players, {**draw, "label for fake loss": torch.full((BATCH,), CLASSES)}, batch).total
    assert torch.equal(whole, same)
    assert not torch.equal(whole, other)


def test_a_discriminator_is_told_what_the_network_is_whose_features_it_reads() -> None:
    method = DMD2(gan_features="fake")
    players, draw, batch = scene(method)
    told: dict[str, list[Tensor]] = {}
    note_labels(players, "fake", told)
    draw["label for fake"] = torch.full((BATCH,), CLASSES)
    method.fake_loss(players, draw, batch)
    denoising, both = told["fake"]
    assert torch.equal(denoising, draw["label"])
    assert torch.equal(both, torch.cat([batch.cond.label, draw["label for fake"]]))  # type: ignore[list-item]


def test_without_a_label_of_its_own_each_role_is_told_the_sample_s() -> None:
    players, draw, _ = scene(SIM())
    for sample in ("", "fake "):
        told = [condition(players, draw, sample, role=role).label for role in ROLES]  # type: ignore[arg-type]
        assert all(torch.equal(label, draw[f"{sample}label"]) for label in told)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_samples_of_a_group_share_their_class_whatever_the_pieces(size: int) -> None:
    method, problem = SIM(samples_per_condition=3), Problem(SHAPE, 1000, PATH)
    whole = method.draw(StepRandom(0, 5, torch.arange(24)), problem)
    parts = [method.draw(StepRandom(0, 5, index), problem) for index in torch.arange(24).split(size)]
    for name in ("label", "fake label"):
        groups = whole[name].reshape(8, 3)
        assert bool((groups == groups[:, :1]).all())
        assert len(groups[:, 0].unique()) > 5  # eight of a thousand classes: two pairs the same once in 2,000
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts]))
    assert len(whole["z"].unique(dim=0)) == 24


def test_groups_change_labels_alone() -> None:
    rng, problem = StepRandom(0, 5, torch.arange(24)), Problem(SHAPE, 1000, PATH)
    alone, grouped = (SIM(samples_per_condition=k).draw(rng, problem) for k in (1, 4))
    changed = {name for name in alone if not torch.equal(alone[name], grouped[name])}
    assert changed == {"label", "fake label"}
    assert torch.equal(rng.grouped(1).uniform("a"), rng.uniform("a"))


def test_a_group_may_not_reach_into_the_next_batch() -> None:
    problem = Problem(SHAPE, CLASSES, PATH, teacher=small_teacher().float(), batch_size=8)
    with pytest.raises(UserError, match=r"method.samples_per_condition = 3: must divide train.global_batch_size = 8"):
        SIM(samples_per_condition=3).players(problem)


@schema
class GroupRelative(SIM):
    """A reward relative to its group's mean, as GRPO's: brightness, of which only what a group differs in counts."""

    @property
    def updates(self) -> tuple[Update, ...]:
        return (Update(("generator",), "reward_loss", statistics="judged"),)

    def judged(self, players: Players, draw: Draw, batch: Batch) -> Mapping[str, Tensor]:
        return {"reward": generate(players, draw, self.steps).mean((1, 2, 3)), "number": draw["z"][:, 0, 0, 0]}

    def reward_loss(self, players: Players, draw: Draw, batch: Batch) -> Loss:
        own = self.judged(players, draw, batch)
        everyone = draw.get("all reward", own["reward"]).detach()
        k = self.samples_per_condition
        mean = everyone.reshape(-1, k).mean(1).repeat_interleave(k)
        index = (draw.get("all number", own["number"])[None] == own["number"][:, None]).long().argmax(1)
        advantage = everyone[index] - mean[index]
        return Loss(-(advantage * own["reward"]).mean(), carry={"advantage": advantage})


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_group_s_statistics_are_those_of_the_whole_whatever_the_micro_batch(
    make_config: MakeConfig, tmp_path: Path, size: int
) -> None:
    ends = []
    for micro in (8, size):
        config = make_config("sim", f"train.micro_batch_size={micro}", f"run={tmp_path / str(micro)}")
        method: Method = GroupRelative(samples_per_condition=4, steps=config.method.steps)  # type: ignore[attr-defined]
        object.__setattr__(config, "method", method)
        trainer = Trainer(config, quiet=True)
        trainer.train_step()
        ends.append(trainer.trained["generator"].state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=1e-5)  # float32 sums in another order


def note_labels(players: Players, name: str, told: dict[str, list[Tensor]]) -> None:
    """Every later call of a player, by the labels that it is given."""
    original, seen = players[name].forward, told.setdefault(name, [])

    def recorded(x: Tensor, t: Tensor, cond: Cond, *rest: Any, **named: Any) -> Any:
        assert cond.label is not None
        seen.append(cond.label)
        return original(x, t, cond, *rest, **named)

    players[name].forward = recorded  # type: ignore[method-assign]
