"""rCM: sCM and DMD2 where one of its parts is off, its own warm-up, and who is asked and learns."""

from dataclasses import replace

import pytest
import torch
from support.tiny_players import MULTI_STEP, due, learned, scene
from torch import Tensor

from diffdistill.distillation.levels import DrawnLevels
from diffdistill.distillation.method import Loss, Players
from diffdistill.distillation.trigflow import angle, consistency
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.rcm import RCM
from diffdistill.methods.scm import SCM

METHOD = RCM(steps=MULTI_STEP, guidance=2.0, warmup=10)
LATE = 50  # an iteration after the warm-up
CONSISTENCY = replace(METHOD, matching_weight=0.0, tangent_constant=0.3)
MATCHING = replace(METHOD, consistency_weight=0.0, warmup=0, matching_weight=0.5)  # the half of DMD2's loss


def gradients(loss: Loss, players: Players, player: str = "generator") -> list[Tensor]:
    return list(torch.autograd.grad(loss.total, list(players[player].parameters())))


def test_without_matching_after_the_warm_up_it_is_scm_with_an_even_weight() -> None:
    players, draw, batch = scene(CONSISTENCY, step=LATE)
    draw |= {"t": draw["data t"], "eps": draw["data eps"]}
    other = SCM(guidance=2.0, adaptive_weight=False, tangent_constant=0.3)
    found, expected = (method.generator_loss(players, draw, batch) for method in (CONSISTENCY, other))
    torch.testing.assert_close(found.total, expected.total, rtol=1e-12, atol=0)
    for a, b in zip(gradients(found, players), gradients(expected, players), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    assert set(players) == {"teacher", "generator"}
    assert CONSISTENCY.fake_updates > 1
    assert [update.every for update in CONSISTENCY.updates] == [1], "there is no fake score to wait for"


@pytest.mark.parametrize(
    "levels", [None, DrawnLevels(num_steps=(2, 3), order="capped")], ids=["the sampler's", "drawn"]
)
def test_without_consistency_it_is_dmd2_without_a_gan_bit_for_bit(levels: DrawnLevels | None) -> None:
    method = replace(MATCHING, levels=levels)
    other = DMD2(steps=MULTI_STEP, levels=levels, guidance=2.0, gan_weight=0.0)
    assert method.updates == other.updates
    assert not method.needs_images
    players, draw, batch = scene(method)
    assert scene(other)[1].keys() <= draw.keys()
    losses = [kind.generator_loss(players, draw, batch) for kind in (method, other)]
    assert torch.equal(losses[0].total, losses[1].total)
    assert all(map(torch.equal, *(gradients(loss, players) for loss in losses)))
    fakes = [kind.fake_loss(players, draw | dict(losses[0].carry), batch) for kind in (method, other)]
    assert torch.equal(fakes[0].total, fakes[1].total)
    assert all(map(torch.equal, *(gradients(loss, players, "fake") for loss in fakes)))


@pytest.mark.parametrize("step", [0, 3, 10])
def test_its_warm_up_is_the_released_code_s(step: int) -> None:
    """g = -cos sqrt(1 - k^2 sin^2) (F - F_T) - k (cos sin x + cos sin F'), F' by forward mode through F itself."""
    players, draw, batch = scene(CONSISTENCY, step=step)
    student, k, size = players.generator, min(1.0, step / 10), players.generator.sigma_data
    x_t = student.path.diffuse(batch.images, draw["data eps"], draw["data t"])
    tau = angle(student, draw["data t"])
    cos, sin = (value.reshape(-1, 1, 1, 1) for value in (tau.cos(), tau.sin()))

    def network(x: Tensor, tau: Tensor) -> Tensor:
        cos, sin = (value.reshape(-1, 1, 1, 1) for value in (tau.cos(), tau.sin()))
        return (cos * x - consistency(student, x, tau, batch.cond)) / (size * sin)

    x = x_t * cos
    teacher = (cos * x - players.teacher(x_t, draw["data t"], batch.cond, guidance=2.0)) / (size * sin)
    own, change = torch.func.jvp(network, (x, tau), (size * teacher, torch.ones_like(tau)))
    expected = -cos * (1 - k**2 * sin**2).sqrt() * size * (own - teacher) - k * cos * sin * (x + size * change)
    expected = expected / (expected.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) + 0.3)
    found = CONSISTENCY.tangent_of(players, draw, batch, x_t)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)  # k is kept in float32


def test_both_parts_add_up_by_their_weights() -> None:
    method = replace(METHOD, consistency_weight=0.7, matching_weight=0.2)
    players, draw, batch = scene(method, step=LATE)
    loss = method.generator_loss(players, draw, batch)
    torch.testing.assert_close(loss.total.detach(), 0.7 * loss.logs["tangent"] + 0.2 * loss.logs["matching"])


def test_matching_and_fake_score_begin_after_the_warm_up() -> None:
    for step, names in ((9, {"tangent"}), (10, {"tangent", "matching"})):
        players, draw, batch = scene(METHOD, step=step)
        assert set(METHOD.generator_loss(players, draw, batch).logs) == names
    generator, fake = METHOD.updates
    assert [update.is_due(5, 0) for update in (generator, fake)] == [True, False]
    assert [update.is_due(11, 0) for update in (generator, fake)] == [False, True]


def test_a_student_is_not_matched_by_a_fake_score_that_is_its_unguided_teacher() -> None:
    method = replace(METHOD, guidance=1.0)
    players, draw, batch = scene(method, step=LATE)
    players.fake.load_state_dict(players.teacher.state_dict())
    assert method.generator_loss(players, draw, batch).logs["matching"] == 0


def test_the_last_of_the_drawn_steps_learns_and_no_level_is_above_the_one_before() -> None:
    counts = set()
    for step in range(LATE, LATE + 8):
        _, draw, _ = scene(METHOD, step=step)
        counts.add(draw["times"].shape[1])
        assert int(draw["step"]) == draw["times"].shape[1] - 1
        assert bool((draw["times"].diff(dim=1) <= 0).all())
    assert len(counts) > 1
    assert counts <= {1, 2, 3, 4}


def test_each_loss_reaches_its_player_alone() -> None:
    players, draw, batch = scene(METHOD, step=LATE)
    due(players, "generator")
    loss = METHOD.generator_loss(players, draw, batch)
    loss.total.backward()
    assert learned(players) == {"generator"}
    for parameter in players.generator.parameters():
        parameter.grad = None
    due(players, "generator", "fake")
    METHOD.fake_loss(players, draw | dict(loss.carry), batch).total.backward()
    assert learned(players) == {"fake"}


def test_settings_that_leave_nothing_to_learn_are_refused() -> None:
    with pytest.raises(ValueError, match="matching_weight: with consistency_weight = 0 there is no loss"):
        replace(MATCHING, matching_weight=0.0)
    with pytest.raises(ValueError, match="warmup: is for the consistency loss, whose weight is 0; use 0"):
        replace(METHOD, consistency_weight=0.0)
