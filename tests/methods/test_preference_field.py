"""The repaired preference field: dmd2 without it, the gradient of the log-odds, where it moves, what critics learn."""

import math
from dataclasses import replace

import pytest
import torch
from support.closed_forms import normal_nodes, numbers, one_gaussian, pairs
from support.tiny_players import BATCH, due, learned, scene
from torch import Tensor, nn

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM
from diffdistill.distillation.losses import denoising_loss
from diffdistill.distillation.method import Players
from diffdistill.distillation.rewards import REWARDS, register
from diffdistill.distillation.score_distillation import generate
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.preference_field import PreferenceField
from diffdistill.settings.schema import UserError

METHOD = PreferenceField()
if "test: alike" not in REWARDS.names():
    register("test: alike", lambda images, cond: 0 * images.flatten(1).mean(1))
M, S, SIGMA = 0.7, 0.5, 1.3


class Half(nn.Module):
    """The exact denoiser of the larger (or smaller) of two samples of N(mean, std^2), by a sum over nodes."""

    def __init__(self, sign: float, mean: float = M, std: float = S, count: int = 2001) -> None:
        super().__init__()
        u = torch.linspace(-8, 8, count, dtype=torch.float64)
        self.x = mean + std * u
        self.share = torch.exp(-u * u / 2) * (1 + sign * torch.erf(u / math.sqrt(2)))
        self.path = EDM()

    def forward(self, y: Tensor, t: Tensor, cond: Cond = NO_COND) -> Tensor:
        weights = self.share * torch.exp(-((y - self.x) ** 2) / (2 * t[:, None] ** 2))
        return (weights * self.x).sum(1, keepdim=True) / weights.sum(1, keepdim=True)

    def log_density(self, y: Tensor) -> Tensor:
        return (self.share * torch.exp(-((y[:, None] - self.x) ** 2) / (2 * SIGMA**2))).sum(1).log()


def test_without_strength_and_with_equal_critics_it_is_dmd2() -> None:
    players, draw, batch = scene(METHOD)
    other = DMD2(gan_weight=0.0)
    wanted = other.generator_loss(players, draw, batch).total
    same = Players(**{**players, "losers": players.winners})
    for found in (
        replace(METHOD, strength=0.0).generator_loss(players, draw, batch),
        METHOD.generator_loss(same, draw, batch),
    ):
        assert torch.equal(found.total, wanted)
    plain = replace(METHOD, strength=0.0)
    torch.testing.assert_close(plain.fake_loss(players, draw, batch).total, other.fake_loss(players, draw, batch).total)
    assert not torch.equal(METHOD.generator_loss(players, draw, batch).total, wanted)


def published(mean: float, std: float) -> Tensor:
    """The gradient by (mean, std) of Distillation-DPO as its text reads, of winners less of losers."""
    teacher, total = one_gaussian(M, S), torch.zeros(2, dtype=torch.float64)
    for sign in (1.0, -1.0):
        critic = Half(sign, mean, std, count=241)
        u = (critic.x - mean) / std
        x, eps, weights = pairs((critic.x, critic.share / critic.share.sum()), normal_nodes(24))
        x_t, t = (x + SIGMA * eps)[:, None], torch.full_like(x, SIGMA)
        field = (critic(x_t, t) - teacher(x_t, t))[:, 0] / SIGMA**2
        by_node = (weights * field).reshape(len(u), -1).sum(1)
        total += sign * torch.stack([by_node.sum(), (by_node * u).sum()])
    return total


def divergence(mean: float, std: float) -> float:
    """KL(winners || teacher) - KL(losers || teacher) of noised samples, on a grid."""
    y = torch.linspace(-9, 9, 1201, dtype=torch.float64)
    total = 0.0
    for sign in (1.0, -1.0):
        q = Half(sign, mean, std, count=241).log_density(y).softmax(0)
        total += sign * float((q * (q.log() + (y - M) ** 2 / (2 * (S**2 + SIGMA**2)))).sum())
    return total


def test_the_published_field_leaves_the_teacher_and_goes_away_from_the_winners() -> None:  # B1
    mean, std, step = -0.4, 0.9, 1e-3
    found = published(mean, std)
    by_mean = (divergence(mean + step, std) - divergence(mean - step, std)) / (2 * step)
    by_std = (divergence(mean, std + step) - divergence(mean, std - step)) / (2 * step)
    torch.testing.assert_close(found, torch.tensor([by_mean, by_std], dtype=torch.float64), rtol=0, atol=2e-5)
    away = 2 * std / (math.sqrt(math.pi) * (S**2 + SIGMA**2))  # whatever the teacher's mean: descended, the mean falls
    assert float(found[0]) == pytest.approx(away, rel=1e-6)
    assert abs(float(published(M, S)[0])) > 0.1  # no rest at the teacher's own law


def test_winners_less_losers_is_the_gradient_of_the_log_odds_and_both_average_to_all() -> None:  # B1b
    winners, losers = Half(1.0), Half(-1.0)
    y = torch.linspace(-3, 4, 200, dtype=torch.float64)
    t = torch.full_like(y, SIGMA)
    scores = [(half(y[:, None], t)[:, 0] - y) / SIGMA**2 for half in (winners, losers)]
    step = 1e-4
    ends = [winners.log_density(y + h) - losers.log_density(y + h) for h in (step, -step)]
    torch.testing.assert_close(scores[0] - scores[1], (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-7)
    share = torch.sigmoid(winners.log_density(y) - losers.log_density(y))
    whole = -(y - M) / (S**2 + SIGMA**2)
    torch.testing.assert_close(share * scores[0] + (1 - share) * scores[1], whole, rtol=1e-7, atol=1e-8)


def test_at_the_teacher_s_law_it_moves_the_mean_to_the_winners_alone() -> None:  # B1b
    z, eps, weights = pairs(normal_nodes(20), normal_nodes(20))
    teacher = one_gaussian(M, S)
    players = Players(teacher=teacher, fake=teacher, winners=Half(1.0), losers=Half(-1.0))
    draw = {"eps": eps[:, None], "t": torch.full_like(z, SIGMA), "label": torch.zeros(len(z), dtype=torch.int64)}
    field = replace(METHOD, normaliser_minimum=1e3).field(players, draw, (M + S * z)[:, None])[:, 0]
    mean = float((weights * field).sum()) * 1e3 / SIGMA**2
    y = torch.linspace(-7, 8, 3001, dtype=torch.float64)
    odds = Half(1.0).log_density(y) - Half(-1.0).log_density(y)
    q = torch.exp(-((y - M) ** 2) / (2 * (S**2 + SIGMA**2)))
    push = float((q[1:-1] * (odds[2:] - odds[:-2]) / (y[2] - y[0])).sum() / q.sum())
    assert push > 0.1
    assert mean == pytest.approx(-push, rel=1e-4)
    assert not replace(METHOD, strength=0.0).field(players, draw, (M + S * z)[:, None]).any()


def test_down_the_field_it_rests_where_the_match_holds_the_winners_back() -> None:
    """On Gaussians with exact critics: at M + strength A E[s_winners - s_losers], with the teacher's spread."""
    z, eps, weights = pairs(normal_nodes(16), normal_nodes(16))
    variance, strength = S**2 + SIGMA**2, 0.5
    draw = {"eps": eps[:, None], "t": torch.full_like(z, SIGMA), "label": torch.zeros(len(z), dtype=torch.int64)}

    def gradient(mean: float, std: float) -> Tensor:
        critics = {"winners": Half(1.0, mean, std, 401), "losers": Half(-1.0, mean, std, 401)}
        players = Players(teacher=one_gaussian(M, S), fake=one_gaussian(mean, std), **critics)
        method = replace(METHOD, strength=strength, normaliser_minimum=1e3)
        field = method.field(players, draw, (mean + std * z)[:, None])[:, 0] * 1e3 / SIGMA**2
        return torch.stack([(weights * field).sum(), (weights * field * z).sum()])

    push = -float(gradient(M, S)[0])  # strength times that of the critics: the match is at rest here
    assert variance * push > 0.1
    at = numbers(-0.4, 0.9)
    for _ in range(40):
        at = at - numbers(0.5 * variance, 2.0) * gradient(*at.tolist())
    torch.testing.assert_close(at, numbers(M + variance * push, S), rtol=0, atol=1e-5)


def test_each_critic_learns_its_own_and_ties_teach_neither() -> None:
    players, draw, batch = scene(METHOD)
    x, other = (generate(players, draw, METHOD.steps, s).detach() for s in ("", "other "))
    is_first = (x.flatten(1).std(1) > other.flatten(1).std(1)).reshape(-1, 1, 1, 1)
    cond = players.teacher.class_cond(draw["label"])
    expected = 0.0
    for name, sample in {
        "fake": x,
        "winners": torch.where(is_first, x, other),
        "losers": torch.where(is_first, other, x),
    }.items():
        loss = denoising_loss(players[name], sample, draw["fake eps"], draw["fake t"], cond, weight="edm")
        expected = expected + loss
    torch.testing.assert_close(METHOD.fake_loss(players, draw, batch).total, expected)
    tied = replace(METHOD, reward="test: alike")
    due(players, *players)
    tied.fake_loss(players, draw, batch).total.backward()
    assert learned(players) == {"fake"}


def test_each_loss_reaches_its_own_players() -> None:
    for loss, names in (("generator_loss", {"generator"}), ("fake_loss", {"fake", "winners", "losers"})):
        players, draw, batch = scene(METHOD)
        due(players, *players)
        METHOD.call(loss, players, draw, batch).total.backward()
        assert learned(players) == names


def test_two_samples_of_a_pair_have_one_condition_and_noise_of_their_own() -> None:
    _, draw, _ = scene(METHOD)
    assert torch.equal(draw["label"], draw["other label"])
    assert not torch.equal(draw["z"], draw["other z"])
    assert len(draw["label"]) == BATCH


def test_the_teacher_is_guided_and_an_unknown_reward_refused() -> None:
    players, draw, _ = scene(METHOD)
    x = generate(players, draw, METHOD.steps).detach()
    assert not torch.equal(METHOD.field(players, draw, x), replace(METHOD, guidance=2.0).field(players, draw, x))
    assert isinstance(players.winners, Denoiser)
    with pytest.raises(UserError, match="'beauty' is unknown"):
        scene(replace(METHOD, reward="beauty"))
