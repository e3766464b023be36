"""The reward of pairs: closed forms, its gradient, whose samples, and what is refused."""

import dataclasses
from typing import Any

import pytest
import torch
from support.closed_forms import random
from support.tiny_players import CLASSES, PATH, SHAPE, small_teacher
from torch import Tensor

from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Players, Problem
from diffdistill.distillation.pair_rewards import Embedding, pair_diversity
from diffdistill.methods.boot import Boot
from diffdistill.methods.diversity import Diversity
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.forget import Forget
from diffdistill.methods.sid import SiD
from diffdistill.settings.schema import UserError

BASE = DMD2(gan_weight=0)
EMPTY = Batch(torch.empty(0))


def problem(batch_size: int = 6, at_a_time: int = 0) -> Problem:
    teacher = small_teacher().float()
    return Problem(SHAPE, CLASSES, PATH, teacher=teacher, batch_size=batch_size, at_a_time=at_a_time)


def scene(method: Diversity, batch: int = 6) -> tuple[Players, dict[str, Tensor]]:
    setting = problem(batch)
    assert setting.teacher is not None
    players = Players(teacher=setting.teacher, **method.players(setting))
    return players, method.draw(StepRandom(0, 0, torch.arange(batch)), setting)


def test_the_mean_is_that_of_all_pairs_of_a_group() -> None:
    embeddings = random(12, 5)
    found = pair_diversity(embeddings, 4)
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    for i in range(12):
        others = [j for j in range(12) if j // 4 == i // 4 and j != i]
        assert float(found[i]) == pytest.approx(sum(1 - float(unit[i] @ unit[j]) for j in others) / 3, abs=1e-12)


def test_orthonormal_samples_have_1_and_equal_ones_0() -> None:
    torch.testing.assert_close(pair_diversity(torch.eye(6)[:4], 4), torch.ones(4))
    torch.testing.assert_close(pair_diversity(torch.ones(4, 6), 2), torch.zeros(4), atol=1e-6, rtol=0)


def test_the_gradient_is_the_closed_form() -> None:
    """Of a pair: d cos / d a = (b/|b| - cos a/|a|) / |a|, and the mean has each pair twice over n samples."""
    pair = random(2, 5).requires_grad_(True)
    [gradient] = torch.autograd.grad(pair_diversity(pair, 2).mean(), pair)
    a, b = pair.detach()
    cosine = (a @ b) / (a.norm() * b.norm())
    expected = -torch.stack(
        [(b / b.norm() - cosine * a / a.norm()) / a.norm(), (a / a.norm() - cosine * b / b.norm()) / b.norm()]
    )
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(
        (gradient * pair.detach()).sum(1), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0
    )


def test_what_has_collapsed_has_no_gradient() -> None:
    same = torch.ones(4, 6, dtype=torch.float64).requires_grad_(True)
    [gradient] = torch.autograd.grad(pair_diversity(same, 4).mean(), same)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


def test_the_small_spread_law() -> None:
    """e(x) = (x, 1) of x = th + tau z: E (1 - cos) = tau^2 / (1 + th^2)^2 for a small tau, whatever the group."""
    theta, tau = 0.8, 1e-3
    for size in (2, 5):
        x = theta + tau * random(100_000)
        found = pair_diversity(torch.stack([x, torch.ones_like(x)], 1), size).mean() / tau**2
        assert float(found) == pytest.approx(1 / (1 + theta**2) ** 2, rel=0.02)


def test_a_group_shares_its_condition_and_nothing_else() -> None:
    _, draw = scene(Diversity(base=BASE, samples_per_condition=3))
    labels = draw["pair label"].reshape(2, 3)
    assert (labels == labels[:, :1]).all()
    assert len({float(z.sum()) for z in draw["pair z"]}) == 6


def test_without_weight_it_is_the_base_bit_for_bit() -> None:
    method = Diversity(base=BASE, weight=0.0)
    players, draw = scene(method)
    alone = BASE.draw(StepRandom(0, 0, torch.arange(6)), problem())
    assert draw.keys() == alone.keys()
    assert all(torch.equal(draw[name], alone[name]) for name in alone)
    first, second = (one.call("generator_loss", players, draw, EMPTY).total for one in (method, BASE))
    assert torch.equal(first, second)


@pytest.mark.parametrize("base", [BASE, SiD(), SiD(steps=FewSteps(init_ratio=5, later_ratios=(1.0,)))])
def test_the_student_s_loss_has_the_reward_and_no_other_loss(base: Any) -> None:
    method = Diversity(base=base, weight=0.7)
    players, draw = scene(method)
    alone, made = (one.call("generator_loss", players, draw, EMPTY) for one in (base, method))
    reward = method.reward(players, draw).mean()
    torch.testing.assert_close(made.total, alone.total - 0.7 * reward)
    assert float(made.logs["diversity"]) == pytest.approx(float(reward.detach()))
    draw |= made.carry
    assert torch.equal(*(one.call("fake_loss", players, draw, EMPTY).total for one in (base, method)))


def test_the_gradient_reaches_the_generator_alone() -> None:
    method = Diversity(base=BASE)
    players, draw = scene(method)
    players.generator.requires_grad_(True)
    players.teacher.requires_grad_(False)
    players.fake.requires_grad_(True)
    method.reward(players, draw).mean().backward()
    assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in players.generator.parameters())
    assert all(p.grad is None for p in players.fake.parameters())


def test_descending_the_loss_spreads_the_samples_of_a_condition() -> None:
    method = Diversity(base=BASE, samples_per_condition=3)
    players, draw = scene(method)
    players.teacher.requires_grad_(False)
    optimizer = torch.optim.Adam(players.generator.parameters(), lr=2e-3)
    found = []
    for _ in range(6):
        reward = method.reward(players, draw).mean()
        optimizer.zero_grad()
        (-reward).backward()
        optimizer.step()
        found.append(float(reward.detach()))
    assert found[-1] > 1.1 * found[0]


def test_other_features_see_pixels() -> None:
    pixels = Embedding(features="pixels")
    x, teacher = random(4, *SHAPE).float(), small_teacher().float()
    cond = teacher.class_cond(torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(pixels(x, x, cond, teacher), x.flatten(1))
    twice = small_teacher().float()
    twice.run_with(decode=lambda latents: 2 * latents)
    torch.testing.assert_close(pixels(x, x, cond, twice), 2 * x.flatten(1))
    assert Diversity(base=BASE, embedding=pixels).judges_pixels
    assert not Diversity(base=BASE).judges_pixels


def test_the_teacher_s_bottleneck_sees_the_samples_noised() -> None:
    teacher, x, noise = small_teacher().float(), random(4, *SHAPE).float(), random(4, *SHAPE, seed=1).float()
    cond = teacher.class_cond(torch.arange(4) % CLASSES)
    t = torch.full((4,), 0.6, dtype=torch.float64)
    expected = teacher.features(PATH.diffuse(x, noise, t), t, cond).flatten(2).mean(2)
    torch.testing.assert_close(Embedding()(x, noise, cond, teacher), expected)


def test_it_may_hold_one_that_forgets() -> None:
    method = Diversity(base=Forget(base=BASE, forgotten=(1,)))
    setting = dataclasses.replace(problem(), classes=(0, 2))
    draw = method.draw(StepRandom(0, 0, torch.arange(60)), setting)
    assert set(draw["pair label"].tolist()) == {0, 2}


def test_what_does_not_fit_is_refused() -> None:
    cases = [
        (Diversity(base=BASE, samples_per_condition=4), "method.samples_per_condition = 4: must divide"),
        (Diversity(base=Boot()), "its student does not sample in one or a few steps"),
        (
            Diversity(base=BASE, embedding=Embedding(features="timm")),
            "method.embedding: features = 'timm': takes settings",
        ),
    ]
    for method, said in cases:
        with pytest.raises(UserError, match=said):
            method.players(problem())
    method = Diversity(base=BASE)
    pieces = "must divide the images per process and micro-batch, 3: train.micro_batch_size"
    with pytest.raises(UserError, match=pieces):
        method.players(problem(at_a_time=3))
    players, _ = scene(method)
    draw = method.draw(StepRandom(0, 0, torch.arange(3)), problem())
    with pytest.raises(UserError, match="must divide the images per process and micro-batch, 3"):
        method.reward(players, draw)
