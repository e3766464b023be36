"""Hyper-SD: consistency on an exact Gaussian, the identities of its special cases, whom it reaches, its stages."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.closed_forms import numbers, on_every_path, random
from support.tiny_players import BATCH, CLASSES, PATH, SHAPE, scene, small_teacher
from torch import Tensor, nn

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM, Path, expand
from diffdistill.diffusion.sampling import DDIM, TCD, transfer
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.losses import gan_discriminator_loss, gan_generator_loss
from diffdistill.distillation.method import Batch, Players, Problem
from diffdistill.distillation.rewards import Feedback, contrast
from diffdistill.distillation.segments import Stage, segment_of
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.hyper_sd import HyperSD
from diffdistill.networks.analytic import gaussian_denoiser
from diffdistill.settings.schema import UserError

N = 8
GRID = DDIM(num_steps=N)
ALL = Stage(segments=1)
MEAN, VARIANCES = numbers(0.7, -0.3, 0.1), numbers(0.04, 0.25, 1.5)


def one_stage(segments: int, **settings: object) -> HyperSD:
    """TSCD alone, on a grid of eight steps."""
    return HyperSD(
        stages=(Stage(segments=segments),),
        steps=TCD(num_steps=segments, eta=0, grid=GRID),
        **settings,  # type: ignore[arg-type]
    )


# A Gaussian teacher, of which N steps of DDIM are a product of gains


def ddim_gains(path: Path) -> Tensor:
    """What each grid step does to each centred eigenmode, [N + 1, D]: row n is the step from n to n - 1."""
    times = ALL.times(path, GRID)
    alpha, sigma = path.alpha(times)[:, None], path.sigma(times)[:, None]
    gain = alpha * VARIANCES / (alpha**2 * VARIANCES + sigma**2)
    ratio = sigma[:-1] / sigma[1:]
    steps = ratio + (alpha[:-1] - alpha[1:] * ratio) * gain[1:]
    return torch.cat([torch.ones(1, len(VARIANCES)), steps])


class FixedPoint(nn.Module):
    """The network whose jump from each grid time to its segment's end is the teacher's DDIM along the grid."""

    accepts = frozenset[str]()
    num_classes = 0
    has_null_condition = False
    resolution_multiple = 1

    def __init__(self, path: Path, num_segments: int) -> None:
        super().__init__()
        self.path, self.times = path, ALL.times(path, GRID)
        low = torch.cat([torch.zeros(1, dtype=torch.int64), segment_of(torch.arange(1, N + 1), N, num_segments).low])
        steps = ddim_gains(path)
        jumps = torch.stack([steps[low[n] + 1 : n + 1].prod(0) for n in range(N + 1)])
        alpha, sigma = path.alpha(self.times)[:, None], path.sigma(self.times)[:, None]
        ratio = sigma[low] / sigma
        self.gains = nn.Parameter((jumps - ratio) / (alpha[low] - alpha * ratio))

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        t = self.path.time_of_input(time_input)
        index = (t[:, None] - self.times).abs().argmin(1)
        return MEAN + self.gains[index] * (x - expand(self.path.alpha(t), x) * MEAN)


def fixed_point(path: Path, num_segments: int) -> Denoiser:
    return Denoiser(FixedPoint(path, num_segments), path, "x0")


def gaussian(path: Path) -> Denoiser:
    return gaussian_denoiser(path, MEAN, torch.diag(VARIANCES))


def on_gaussian(method: HyperSD, path: Path, student: Denoiser) -> tuple[Players, dict[str, Tensor], Batch]:
    """Players on a Gaussian teacher and the numbers of 500 jumps, float64."""
    players = Players(teacher=gaussian(path), generator=student, target=deepcopy(student), solver=gaussian(path))
    problem = Problem((3,), 0, path, teacher=players.teacher)
    draw = method.draw(StepRandom(0, 0, torch.arange(500)), problem)
    draw = {name: value.double() if value.is_floating_point() else value for name, value in draw.items()}
    return players, draw, Batch(random(500, 3, seed=2))


@on_every_path
@pytest.mark.parametrize("num_segments", [1, 2, 4, 8])
def test_ddim_cut_at_the_segments_is_a_fixed_point_whatever_their_number(path, num_segments):
    method = one_stage(num_segments, ends="fixed")
    players, draw, batch = on_gaussian(method, path, fixed_point(path, num_segments))
    jump, target = method.jumps(players, draw, batch)
    torch.testing.assert_close(jump, target, rtol=1e-9, atol=1e-9)
    assert len(set(draw["start"].tolist())) == N


@on_every_path
@pytest.mark.parametrize("num_segments", [1, 2, 4])
def test_the_fixed_point_s_few_calls_are_the_teacher_s_many(path, num_segments):
    noise = random(20, 3)
    few = one_stage(num_segments).steps(fixed_point(path, num_segments), noise)
    many = TCD(num_steps=N, eta=0, grid=GRID)(gaussian(path), noise)
    torch.testing.assert_close(few, many, rtol=1e-9, atol=1e-9)


def test_the_fixed_point_is_n_steps_of_ddim_and_not_the_exact_flow():
    path, noise = EDM(), random(20, 3)
    once = one_stage(1).steps(fixed_point(path, 1), noise)
    sigma = path.sigma(ALL.times(path, GRID))[-1]
    exact = MEAN + (VARIANCES / (VARIANCES + sigma**2)).sqrt() * (sigma * noise - MEAN)
    assert (once - exact).abs().max() > 0.01


def train_on_gaussian(stage_teacher: str, grid_steps: tuple[int, ...]) -> float:
    """The greatest error of one call against the closed form, after four segments, two and one."""
    path, images = EDM(sigma_min=0.1, sigma_max=5), MEAN + VARIANCES.sqrt() * random(32, 3)
    stages = tuple(Stage(segments=k, num_steps=150, grid_steps=n) for k, n in zip((4, 2, 1), grid_steps, strict=True))
    steps = TCD(num_steps=1, eta=0, grid=GRID)
    method = HyperSD(stages=stages, steps=steps, ends="fixed", target_decay=0.5, stage_teacher=stage_teacher)  # type: ignore[arg-type]
    player = fixed_point(path, N)  # the teacher's own gains
    players = Players(teacher=gaussian(path), generator=player, target=deepcopy(player), solver=deepcopy(player))
    problem = Problem((3,), 0, path, teacher=players.teacher)
    optimizer = torch.optim.Adam(players.generator.parameters(), lr=4e-2, betas=(0.5, 0.9))
    for step in range(450):
        draw = method.draw(StepRandom(0, step, torch.arange(32 * step, 32 * (step + 1))), problem)
        optimizer.param_groups[0]["lr"] = 4e-2 * (1 - step % 150 / 150)
        method.generator_loss(players, draw, Batch(images)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            method.after_step(players, {}, step + 1)
    noise = random(200, 3)
    made, wanted = (steps(student, noise) for student in (players.generator, fixed_point(path, 1)))
    return float((made - wanted).detach().abs().max())


def test_a_student_trained_in_stages_arrives_at_the_fixed_point():
    """The solver's step is a whole jump of the stage before: as in the paper, fewer steps in each stage."""
    assert train_on_gaussian("previous", (8, 4, 2)) < 0.02


def test_a_solver_that_stops_within_a_jump_of_the_stage_before_leaves_the_trajectory():
    """What the stage before has learned is right at its segments' ends only."""
    assert train_on_gaussian("previous", (8, 8, 8)) > 0.2


@pytest.mark.full
def test_a_student_that_follows_the_teacher_in_every_stage_arrives_too():
    assert train_on_gaussian("base", (8, 8, 8)) < 0.05


# Special cases


def test_one_segment_with_its_end_fixed_is_consistency_distillation():
    method = one_stage(1, ends="fixed")
    players, draw, batch = scene(method)
    jump, target = method.jumps(players, draw, batch)
    x = batch.images + draw["data eps"] * expand(draw["start"], batch.images)
    torch.testing.assert_close(jump, players.generator(x, draw["start"], batch.cond), rtol=1e-10, atol=1e-10)
    slope = (x - players.teacher(x, draw["start"], batch.cond)) / expand(draw["start"], x)
    following = x + expand(draw["next"] - draw["start"], x) * slope  # Euler's step of the ODE, as on EDM's path
    asked = draw["next"].clamp_min(PATH.t_min)
    expected = players.target(following, asked, batch.cond)
    inner = draw["next"] > 0
    assert int(inner.sum()) > 0
    torch.testing.assert_close(target[inner], expected[inner], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(target[~inner], following[~inner], rtol=1e-9, atol=1e-9)


def test_one_segment_with_a_random_end_jumps_as_a_consistency_trajectory_model():
    """(s / t) x + (1 - s / t) g: Kim et al. 2024, arXiv:2310.02279, on EDM's path."""
    method = one_stage(1)
    players, draw, batch = scene(method)
    t, s = (expand(draw[name], batch.images) for name in ("start", "end"))
    x = batch.images + draw["data eps"] * t
    g = players.generator(x, draw["start"], batch.cond)
    torch.testing.assert_close(method.jumps(players, draw, batch)[0], s / t * x + (1 - s / t) * g, rtol=1e-9, atol=1e-9)
    assert len(set(draw["end"].tolist())) > 1


def test_as_many_segments_as_steps_at_the_teacher_have_no_loss_at_all():
    method = one_stage(N)
    players, draw, batch = scene(method)
    same = Players(**{**players, "generator": players.teacher, "solver": players.teacher})
    jump, target = method.jumps(same, draw, batch)
    assert torch.equal(jump, target)
    assert method.generator_loss(same, draw, batch).total == 0


def test_as_many_segments_as_steps_aim_at_the_solver_s_step_and_ask_no_other():
    method = one_stage(N)
    players, draw, batch = scene(method)
    changed = deepcopy(players.target)
    for parameter in changed.parameters():
        parameter.data += 1
    other = Players(**{**players, "target": changed})
    assert torch.equal(method.jumps(players, draw, batch)[1], method.jumps(other, draw, batch)[1])


def test_a_target_with_the_student_s_weights_is_the_solver_s_step_and_the_student_s_own_jump():
    method = replace(one_stage(2), stage_teacher="base")
    players, draw, batch = scene(method)
    found = method.jumps(Players(**{**players, "target": players.generator}), draw, batch)[1]
    assert not found.requires_grad
    t, after, end = (draw[name] for name in ("start", "next", "end"))
    x = batch.images + expand(t, batch.images) * draw["data eps"]
    x = x + expand((after - t) / t, x) * (x - players.teacher(x, t, batch.cond))
    own = players.generator(x, torch.where(after > 0, after, t), batch.cond)
    expected = x + expand((end - after) / after.clamp_min(PATH.t_min), x) * (x - own)  # Euler on EDM's path, as DDIM
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-9)
    assert bool((end < after).any())
    assert bool((end > 0).any())


def test_the_distances_are_the_mean_square_and_pcm_s_huber_of_every_value():
    gap = random(4, 3)
    players, draw, batch = scene(one_stage(2))
    jump, target = one_stage(2).jumps(players, draw, batch)
    gap = jump - target
    mse = one_stage(2).generator_loss(players, draw, batch).total
    torch.testing.assert_close(mse, (gap**2).mean())
    huber = one_stage(2, distance="huber", huber_width=0.1).generator_loss(players, draw, batch).total
    torch.testing.assert_close(huber, ((gap**2 + 0.01) ** 0.5 - 0.1).mean())


def test_guidance_is_in_the_solver_s_step_alone():
    method = one_stage(2, guidance=(2.0, 4.0), stage_teacher="base")
    players, draw, batch = scene(method)
    assert bool(((draw["w"] >= 2) & (draw["w"] <= 4)).all())
    jump, target = method.jumps(players, draw, batch)
    plain_jump, plain_target = method.jumps(players, {k: v for k, v in draw.items() if k != "w"}, batch)
    assert torch.equal(jump, plain_jump)
    assert not torch.equal(target, plain_target)
    for i in range(BATCH):  # each sample by a scale of its own
        alone = method.jumps(players, draw | {"w": torch.full((BATCH,), draw["w"][i].item())}, batch)[1]
        torch.testing.assert_close(alone[i], target[i])


# Whom a loss reaches

EVERYTHING = HyperSD(
    stages=(Stage(segments=2, adversarial_weight=1.0, score_weight=1.0),),
    steps=TCD(num_steps=2, grid=GRID),
    guidance=(2.0, 2.0),
    feedback=(Feedback(reward="contrast", threshold=10.0),),
)


def due(players: Players, *names: str) -> None:
    for name, module in players.items():
        module.requires_grad_(name in names)


def learned(players: Players) -> set[str]:
    return {
        name
        for name, module in players.items()
        if any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())
    }


@pytest.mark.parametrize("player", ["generator", "discriminator", "fake"])
def test_each_loss_reaches_its_own_player_alone(player):
    players, draw, batch = scene(EVERYTHING)
    due(players, "generator")
    loss = EVERYTHING.generator_loss(players, draw, batch)
    if player == "generator":
        loss.total.backward()
    else:
        due(players, player)
        getattr(EVERYTHING, f"{player}_loss")(players, draw | dict(loss.carry), batch).total.backward()
    assert learned(players) == {player}
    assert all(p.grad is None for name in players if name != player for p in players[name].parameters())


def test_what_is_carried_over_has_no_graph():
    players, draw, batch = scene(EVERYTHING)
    carry = EVERYTHING.generator_loss(players, draw, batch).carry
    assert set(carry) == {"jump", "target", "x"}
    assert not any(value.requires_grad for value in carry.values())


def test_players_and_updates_are_those_that_the_weights_ask_for():
    problem = Problem(SHAPE, CLASSES, PATH, teacher=small_teacher().float())
    plain = one_stage(2, stage_teacher="base")
    assert set(plain.players(problem)) == {"generator", "target"}
    assert [update.players for update in plain.updates] == [("generator",)]
    assert set(EVERYTHING.players(problem)) == {"generator", "target", "solver", "discriminator", "fake"}
    assert [update.players for update in EVERYTHING.updates] == [("generator",), ("discriminator",), ("fake",)]


def test_a_critic_learns_from_the_first_stage_on_that_has_its_weight():
    stages = (
        Stage(segments=4, num_steps=5),
        Stage(segments=2, num_steps=3, adversarial_weight=1.0),
        Stage(segments=1, num_steps=2, score_weight=1.0),
        Stage(segments=1),
    )
    method = replace(EVERYTHING, stages=stages, feedback=())
    first = {update.players[0]: min(i for i in range(20) if update.is_due(i, 0)) for update in method.updates}
    assert first == {"generator": 0, "discriminator": 5, "fake": 8}
    players, draw, batch = scene(method)
    made = ["x" in method.generator_loss(players, draw | {"stage": torch.tensor(i)}, batch).carry for i in range(4)]
    assert made == [False, False, True, True]


# The discriminator


def logits(players: Players, draw: dict[str, Tensor], x: Tensor, eps: Tensor, cond: Cond) -> Tensor:
    """A reference: from the end of the jump to `judged` on EDM's path, then teacher's features and head."""
    end, judged = (expand(draw[name], x) for name in ("end", "judged"))
    noised = x + (judged**2 - end**2).sqrt() * eps
    return players.discriminator(players.teacher.features(noised, draw["judged"], cond))


def test_the_adversarial_loss_judges_jumps_against_their_targets_at_a_level_of_the_segment():
    method = replace(EVERYTHING, stages=(Stage(segments=2, adversarial_weight=1.0),), feedback=())
    players, draw, batch = scene(method)
    loss = method.generator_loss(players, draw, batch)
    jump, target = method.jumps(players, draw, batch)
    fake = logits(players, draw, jump, draw["gan eps"], batch.cond)
    torch.testing.assert_close(loss.total, ((jump - target) ** 2).mean() + gan_generator_loss(fake))
    real = logits(players, draw, target, draw["gan real eps"], batch.cond)
    discrimination = method.discriminator_loss(players, draw | dict(loss.carry), batch).total
    torch.testing.assert_close(discrimination, gan_discriminator_loss(real, fake))


# The one-step stage


def test_the_score_stage_pushes_as_dmd2_does_on_the_student_s_own_images():
    stage, steps = Stage(segments=1, mse_weight=0.0, score_weight=0.5), TCD(num_steps=1, grid=GRID)
    method = HyperSD(stages=(stage,), steps=steps, guidance=(2.0, 2.0))
    players, draw, batch = scene(method)
    x = method.steps(players.generator, draw["z"], Cond(label=draw["label"]))
    push = DMD2(guidance=2.0, gan_weight=0.0).field(players, draw, x)
    wanted = torch.autograd.grad(0.5 * (push * x).sum() / x.numel(), [*players.generator.parameters()])
    loss = method.generator_loss(players, draw, batch)
    found = torch.autograd.grad(loss.total, [*players.generator.parameters()], allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_fake_score_that_is_the_unguided_teacher_pushes_nothing():
    method = replace(EVERYTHING, guidance=(1.0, 1.0))
    players, draw, _ = scene(method)
    same = Players(**{**players, "fake": players.teacher})
    assert not method.field(same, draw, random(BATCH, *SHAPE)).any()


def test_the_fake_score_learns_on_the_student_s_own_images():
    players, draw, batch = scene(EVERYTHING)
    carry = EVERYTHING.generator_loss(players, draw, batch).carry
    x = carry["x"]
    noised = PATH.diffuse(x, draw["fake eps"], draw["fake t"])
    estimate = players.fake(noised, draw["fake t"], Cond(label=draw["label"]))
    weight = 1 / draw["fake t"] ** 2 + 1 / players.fake.sigma_data**2
    expected = (expand(weight, x) * (estimate - x) ** 2).mean()
    torch.testing.assert_close(EVERYTHING.fake_loss(players, draw | dict(carry), batch).total, expected)


# Feedback


def test_feedback_adds_what_is_missing_to_the_threshold_of_the_student_s_own_images():
    rewarded = (Feedback(reward="contrast", threshold=0.5, weight=3.0),)
    method = replace(one_stage(1), feedback=rewarded)
    players, draw, batch = scene(method)
    x = method.steps(players.generator, draw["z"], Cond(label=draw["label"]))
    plain = one_stage(1).generator_loss(players, draw, batch).total
    missing = (0.5 - contrast(x, NO_COND)).clamp_min(0).mean()
    assert missing > 0
    torch.testing.assert_close(method.generator_loss(players, draw, batch).total, plain + 3 * missing)


def test_an_unknown_reward_is_refused_before_training():
    method = replace(one_stage(1), feedback=(Feedback(reward="beauty", threshold=0.5),))
    with pytest.raises(UserError, match=r"'beauty' is unknown; choose from .*contrast, .*sharpness"):
        method.players(Problem(SHAPE, CLASSES, PATH, teacher=small_teacher()))


# Stages


def stages_scene() -> tuple[HyperSD, Players, Problem]:
    method = HyperSD(
        stages=(Stage(segments=4, num_steps=2), Stage(segments=1)),
        steps=TCD(num_steps=1, grid=GRID),
        guidance=(3.0, 3.0),
        target_decay=0.75,
    )
    players, _, _ = scene(method)
    return method, players, Problem(SHAPE, CLASSES, PATH, teacher=players.teacher)


def test_the_target_follows_the_student_by_the_decay():
    method, players, _ = stages_scene()
    before = [p.clone() for p in players.target.parameters()]
    with torch.no_grad():
        method.after_step(players, {}, 1)
    for old, new, own in zip(before, players.target.parameters(), players.generator.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * own)


def test_a_new_stage_s_solver_is_what_the_stage_before_has_learned():
    method, players, _ = stages_scene()
    start = deepcopy(players.solver.state_dict())
    for step in (1, 2, 3):
        with torch.no_grad():
            method.after_step(players, {}, step)
        if step == 1:
            assert all(torch.equal(value, start[name]) for name, value in players.solver.state_dict().items())
        if step == 2:
            learnt = deepcopy(players.target.state_dict())
    assert all(torch.equal(value, learnt[name]) for name, value in players.solver.state_dict().items())


def solver_of(method: HyperSD, players: Players, problem: Problem, step: int) -> tuple[str, float]:
    """Whose step the target begins with, and its guidance."""
    draw = method.draw(StepRandom(0, step, torch.arange(BATCH)), problem)
    asked = []

    def recorded(name: str) -> Denoiser:
        copied = deepcopy(players[name])
        forward = copied.forward

        def call(x: Tensor, t: Tensor, cond: Cond = NO_COND, guidance: float | Tensor = 1.0, **more: object) -> Any:
            asked.append((name, float(torch.as_tensor(guidance).max())))
            return forward(x, t, cond, guidance=guidance, **more)

        copied.forward = call  # type: ignore[method-assign]
        return copied

    watched = Players(**{**players, "teacher": recorded("teacher"), "solver": recorded("solver")})
    draw = {name: value.double() if value.is_floating_point() else value for name, value in draw.items()}
    method.jumps(watched, draw, Batch(random(BATCH, *SHAPE), Cond(label=torch.zeros(BATCH, dtype=torch.int64))))
    assert len(asked) == 1
    return asked[0]


def test_the_first_stage_asks_the_guided_teacher_and_the_next_the_student_of_the_stage_before():
    method, players, problem = stages_scene()
    assert solver_of(method, players, problem, 0) == ("teacher", 3.0)
    assert solver_of(method, players, problem, 1) == ("teacher", 3.0)
    assert solver_of(method, players, problem, 2) == ("solver", 1.0)


def test_the_base_can_stay_the_solver_of_every_stage():
    method, players, problem = stages_scene()
    base = replace(method, stage_teacher="base")
    assert [solver_of(base, players, problem, step) for step in (0, 2)] == [("teacher", 3.0)] * 2


def test_a_run_that_starts_from_an_earlier_one_has_its_student_for_a_solver():
    method, players, problem = stages_scene()
    earlier = deepcopy(players.generator)
    problem = replace(problem, initial={"generator": earlier})
    made = method.players(problem)
    for name in ("generator", "target", "solver"):
        assert all(torch.equal(value, earlier.state_dict()[key]) for key, value in made[name].state_dict().items())
    assert solver_of(method, players, problem, 0) == ("solver", 1.0)


def test_a_stage_may_have_a_grid_of_its_own():
    method = HyperSD(stages=(Stage(segments=1, grid_steps=2),), steps=TCD(num_steps=1, grid=GRID))
    draw = method.draw(StepRandom(0, 0, torch.arange(200)), Problem(SHAPE, CLASSES, PATH, teacher=small_teacher()))
    assert sorted(set(draw["start"].tolist())) == ALL.times(PATH, GRID)[[4, 8]].tolist()


def test_a_stage_with_more_segments_than_steps_and_a_falling_range_are_refused():
    with pytest.raises(ValueError, match="9 segments need a grid"):
        HyperSD(stages=(Stage(segments=9),), steps=TCD(num_steps=1, grid=GRID))
    with pytest.raises(ValueError, match="must be increasing"):
        one_stage(1, guidance=(2.0, 1.0))


def test_guidance_needs_a_teacher_that_knows_no_class():
    teacher = small_teacher()
    teacher.net.has_null_condition = False
    with pytest.raises(UserError, match="class_dropout"):
        one_stage(1, guidance=(1.0, 2.0)).players(Problem(SHAPE, CLASSES, PATH, teacher=teacher))


def test_transfer_to_time_zero_of_an_estimate_is_the_estimate():
    x, x0, t = random(4, 3), random(4, 3, seed=1), numbers(0.1, 1, 3, 9)
    assert torch.equal(transfer(PATH, x, x0, t, torch.zeros_like(t)), x0)
