"""PSO: what it is at the reference, its likelihoods and their clip, ties, whom it reaches, where it moves."""

import math
from dataclasses import replace

import pytest
import torch
from support.closed_forms import LearnedGaussian, random
from support.tiny_players import BATCH, CLASSES, PATH, SHAPE, due, learned, scene
from torch import Tensor
from torch.distributions import Normal

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Players, Problem
from diffdistill.distillation.rewards import REWARDS, register
from diffdistill.methods.pso import PSO
from diffdistill.settings.schema import UserError

TWO = FewSteps(init_ratio=3.0, later_ratios=(0.8,))
OFFLINE = PSO(steps=TWO)
ONLINE = PSO(steps=TWO, form="online", beta=50.0)

if "test: the largest mean" not in REWARDS.names():
    register("test: the largest mean", lambda images, cond: images.flatten(1).mean(1))
    register("test: all alike", lambda images, cond: 0 * images.flatten(1).mean(1))


def at_reference(method: PSO) -> tuple[Players, dict[str, Tensor], Batch]:
    players, draw, batch = scene(method)
    players.reference.load_state_dict(players.generator.state_dict())
    return players, draw, batch


@pytest.mark.parametrize("winners", ["images", "reward"])
def test_at_the_reference_the_loss_is_log_2_and_its_gradient_that_of_the_gap(winners: str) -> None:  # B2
    method = replace(OFFLINE, winners=winners, loser_weight=0.7)  # type: ignore[arg-type]
    players, draw, batch = at_reference(method)
    loss = method.generator_loss(players, draw, batch).total
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-12)
    loss.backward()
    found = [p.grad.clone() for p in players.generator.parameters() if p.grad is not None]
    players.generator.zero_grad()
    cond = batch.cond if winners == "images" else players.generator.class_cond(draw["label"])
    made = {w: method.roll_out(players.reference, draw, cond, w)[-1].detach() for w in ("a ", "b ")}
    winner, loser = batch.images, made["b "]
    if winners == "reward":
        is_first = (made["a "].flatten(1).std(1) > made["b "].flatten(1).std(1)).reshape(-1, 1, 1, 1)
        winner, loser = torch.where(is_first, made["a "], made["b "]), torch.where(is_first, made["b "], made["a "])
    gap = 0.0
    t = TWO.times(PATH)[draw["call"]]
    for x, weight in ((winner, 1.0), (loser, -0.7)):
        error = (players.generator(PATH.diffuse(x, draw["eps"], t), t, cond) - x).square().flatten(1).mean(1)
        gap = gap + weight * (1 / t**2 + 4) * error
    (method.beta / 2 * gap).mean().backward()  # type: ignore[attr-defined]
    for gradient, parameter in zip(found, players.generator.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-12)


def test_the_likelihood_of_a_step_is_that_of_its_gaussian() -> None:
    players, draw, _ = scene(ONLINE)
    cond = players.generator.class_cond(draw["label"])
    states = ONLINE.roll_out(players.generator, draw, cond, "a ")
    first, second, image = states
    torch.testing.assert_close(
        image, TWO(players.generator, draw["a z"], cond, fresh_noise=lambda i: draw[f"a fresh {i}"])
    )
    t = torch.full((BATCH,), 3.0, dtype=torch.float64)
    means = [players[who](first, t, cond) for who in ("generator", "reference")]
    log_probs = [Normal(mean, 0.8).log_prob(second).flatten(1).mean(1) for mean in means]
    found = ONLINE.log_ratios(players, states, cond)
    assert found.shape == (BATCH, 1)
    torch.testing.assert_close(found[:, 0], log_probs[0] - log_probs[1])


def test_the_online_loss_prefers_the_winner_s_steps_and_the_clip_stops_the_gradient() -> None:
    players, draw, batch = scene(ONLINE)
    cond = players.generator.class_cond(draw["label"])
    wide = replace(ONLINE, clip=0.999)
    ratios, rewards = [], []
    for who in ("a ", "b "):
        states = wide.roll_out(players.generator, draw, cond, who)
        ratios.append(wide.log_ratios(players, states, cond)[:, 0])
        rewards.append(states[-1].flatten(1).std(1))
    margin = torch.where(rewards[0] > rewards[1], ratios[0] - ratios[1], ratios[1] - ratios[0])
    expected = torch.nn.functional.softplus(-50 * margin).mean()
    loss = wide.generator_loss(players, draw, batch)
    torch.testing.assert_close(loss.total, expected)
    assert loss.logs["clipped"] == 0
    tight = replace(ONLINE, clip=1e-9).generator_loss(players, draw, batch)
    assert tight.logs["clipped"] == 1
    tight.total.backward()
    assert learned(players) == set()


@pytest.mark.parametrize("method", [ONLINE, replace(OFFLINE, winners="reward")], ids=["online", "offline"])
def test_ties_have_no_gradient(method: PSO) -> None:
    method = replace(method, reward="test: all alike", clip=0.9)
    players, draw, batch = scene(method)
    loss = method.generator_loss(players, draw, batch).total
    assert float(loss.detach()) == pytest.approx(math.log(2))
    loss.backward()
    assert learned(players) == set()


@pytest.mark.parametrize("method", [OFFLINE, replace(ONLINE, clip=0.9)], ids=["offline", "online"])
def test_the_loss_reaches_the_generator_alone(method: PSO) -> None:
    players, draw, batch = scene(method)
    due(players, *players)
    method.generator_loss(players, draw, batch).total.backward()
    assert learned(players) == {"generator"}


def test_the_reference_is_the_start_and_stays() -> None:
    from support.tiny_players import small_teacher

    start = small_teacher()
    next(start.parameters()).data += 0.1
    problem = Problem(SHAPE, CLASSES, PATH, teacher=small_teacher(), initial={"generator": start})
    players = OFFLINE.players(problem)
    for mine, theirs in zip(players["reference"].parameters(), start.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert not mine.requires_grad
    assert all(p.requires_grad for p in players["generator"].parameters())
    assert {name for update in OFFLINE.updates for name in update.players} == {"generator"}


def test_what_has_no_likelihood_is_refused() -> None:
    with pytest.raises(ValueError, match="one step has none: use offline"):
        PSO(form="online")
    with pytest.raises(ValueError, match="online needs fresh noise between the steps, not ddim"):
        PSO(form="online", steps=replace(TWO, later_noise="ddim"))
    with pytest.raises(UserError, match="'beauty' is unknown"):
        scene(replace(ONLINE, reward="beauty"))


@pytest.mark.parametrize("form", ["online", "offline"])
def test_samples_move_to_what_the_reward_prefers(form: str) -> None:
    """On the line: a student whose mean is 0, and larger is better."""
    torch.manual_seed(0)
    method = PSO(steps=TWO, form=form, winners="reward", reward="test: the largest mean", beta=5.0, clip=0.5)  # type: ignore[arg-type]
    nets = [LearnedGaussian([0.0, 0.0], 0.25) for _ in range(2)]
    players = Players(
        **{n: Denoiser(net, EDM(), "x0") for n, net in zip(("generator", "reference"), nets, strict=True)}
    )
    players.reference.requires_grad_(False)
    nets[0].variance.requires_grad_(False)
    optimizer = torch.optim.Adam([nets[0].mean], lr=0.02)
    for step in range(60):
        draw = method.draw(StepRandom(0, step, torch.arange(64)), Problem((1,), 1, EDM()))
        draw = {name: value.double() if value.is_floating_point() else value for name, value in draw.items()}
        optimizer.zero_grad()
        method.generator_loss(players, draw, Batch(torch.empty(0))).total.backward()
        optimizer.step()
    assert float(nets[0].mean[0].detach()) > 0.1
    assert float(random(1)[0]) != 0  # `random` leaves torch's own generator alone
