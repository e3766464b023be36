"""CDM: Decoupled DMD without its own parts, matching beside the trajectory, DP-DMD's anchor, who is reached."""

from dataclasses import replace

import pytest
import torch
from support.closed_forms import numbers, one_gaussian, random
from support.tiny_players import BATCH, MULTI_STEP, PATH, SHAPE, due, learned, scene, watch
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.sampling import DDIM, FewSteps
from diffdistill.distillation.decoupled import Decoupled
from diffdistill.distillation.levels import DrawnLevels
from diffdistill.distillation.losses import field_loss
from diffdistill.distillation.method import Players
from diffdistill.methods.cdm import CDM
from diffdistill.methods.dmd2 import DMD2
from diffdistill.networks.analytic import gaussian_flow
from diffdistill.settings.schema import UserError

STEPS = replace(MULTI_STEP, later_noise="ddim")
PLAIN = CDM(steps=STEPS, levels=None, guidance=3.0, off_trajectory_weight=0.0)
ANCHORED = replace(PLAIN, anchor_weight=0.05, anchor_sampler=DDIM(num_steps=12), anchor_steps=3)


def at_step(draw: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    return draw | {"step": torch.tensor(step)}


def gradients(loss: Tensor, players: Players) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(players.generator.parameters()), retain_graph=True))


@pytest.mark.parametrize("levels", [None, DrawnLevels(num_steps=(2, 3))], ids=["fixed", "drawn"])
def test_without_its_own_parts_it_is_dmd2_with_guidance_apart_bit_for_bit(levels: DrawnLevels | None) -> None:
    method = replace(PLAIN, levels=levels)
    other = DMD2(
        steps=STEPS,
        levels=levels,
        guidance=3.0,
        gan_weight=0.0,
        normaliser_minimum=method.normaliser_minimum,
        decoupled=Decoupled(),
        fake_updates=2,
    )
    assert method.updates == other.updates
    found = []
    for kind in (method, other):
        players, draw, batch = scene(kind)
        generator = kind.generator_loss(players, draw, batch)
        fake = kind.fake_loss(players, draw | dict(generator.carry), batch)
        found.append([generator.total, fake.total, *gradients(generator.total, players)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("step", [0, 2])
def test_beside_the_trajectory_the_student_is_matched_from_a_point_on_its_line(step: int) -> None:
    """x' = alpha' x0 + sigma' n of the drawn call's own x0 and n, and the unguided field at noise of its own."""
    method = replace(PLAIN, off_trajectory_weight=0.7)
    players, draw, batch = scene(method)
    draw, cond = at_step(draw, step), Cond(label=draw["label"])
    loss = method.generator_loss(players, draw, batch)
    with torch.no_grad():
        start = STEPS.roll_out(players.generator, draw["z"], cond, step=step)
        x0 = players.generator(start.x, start.t, cond)
        noise = (start.x - x0) / start.t[:, None, None, None]
        point = x0 + draw["point t"][:, None, None, None] * noise
    made = players.generator(point, draw["point t"], cond)
    y, t = PATH.diffuse(made.detach(), draw["beside eps"], draw["beside t"]), draw["beside t"]
    with torch.no_grad():
        fake, real = players.fake(y, t, cond), players.teacher(y, t, cond)
    nu = (made - real).abs().mean((1, 2, 3), keepdim=True).clamp_min(method.normaliser_minimum)
    beside = field_loss(made, (fake - real) / nu)
    torch.testing.assert_close(loss.logs["beside"], beside.detach(), rtol=1e-10, atol=0)
    alone = replace(method, off_trajectory_weight=0.0).generator_loss(players, draw, batch).total
    torch.testing.assert_close(loss.total, alone + 0.7 * beside, rtol=1e-10, atol=0)
    for a, b in zip(gradients(loss.total, players), gradients(alone + 0.7 * beside, players), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


def test_an_unguided_student_whose_fake_score_is_the_teacher_is_not_pushed() -> None:
    method = replace(PLAIN, guidance=1.0, off_trajectory_weight=1.0)
    players, draw, batch = scene(method)
    players.fake.load_state_dict(players.teacher.state_dict())
    assert method.generator_loss(players, draw, batch).total == 0


# DP-DMD's anchor


def test_the_anchor_is_the_image_whose_line_meets_the_teacher_s_ode() -> None:
    """Between Gaussians the ODE is known: with many steps of the teacher what is reached is its exact flow."""
    mean, std, first = 0.7, 0.5, 20.0
    method = replace(
        CDM(steps=FewSteps(init_ratio=first, later_noise="ddim"), anchor_weight=1.0),
        anchor_sampler=DDIM(num_steps=4000),
        anchor_steps=2500,
    )
    noise, teacher = first * random(16, 1), one_gaussian(mean, std)
    draw = {"label": torch.zeros(16, dtype=torch.int64)}
    found = method.anchor(Players(teacher=teacher), draw, noise)
    begin, end = (float(method.anchor_times(EDM())[i]) for i in (0, -1))
    times = [numbers(value).expand(16) for value in (begin, end)]
    reached = gaussian_flow(EDM(), numbers(mean), numbers(std)[None] ** 2, noise, *times)
    expected = (reached - end / begin * noise) / (1 - end / begin)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)  # DDIM's own error at these steps
    assert end < 0.5 * begin


def test_the_first_call_learns_the_anchor_and_the_later_ones_the_matching() -> None:
    players, draw, batch = scene(ANCHORED)
    first, later = (ANCHORED.generator_loss(players, at_step(draw, step), batch) for step in (0, 1))
    assert set(first.logs) == {"anchor"}
    assert set(later.logs) == {"matching", "field"}
    start = STEPS.roll_out(players.generator, draw["z"], Cond(label=draw["label"]), step=0)
    x = players.generator(start.x, start.t, Cond(label=draw["label"]))
    expected = 0.05 * (x - ANCHORED.anchor(players, draw, start.x)).square().mean()
    torch.testing.assert_close(first.total, expected, rtol=1e-12, atol=0)


def test_the_anchor_follows_the_guided_teacher() -> None:
    players, draw, _ = scene(ANCHORED)
    noise = 20.0 * draw["z"]
    plain, guided = (replace(ANCHORED, guidance=w).anchor(players, draw, noise) for w in (1.0, 3.0))
    assert (plain - guided).norm() > 1e-3 * plain.norm()


def test_an_anchor_that_ends_at_the_image_or_begins_above_the_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match="anchor_steps: must be fewer than"):
        replace(ANCHORED, anchor_steps=12)
    with pytest.raises(UserError, match=r"method\.anchor_steps = 11: only \d+ are below the first step"):
        scene(replace(ANCHORED, anchor_steps=11))


def test_a_trajectory_with_fresh_noise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"steps\.later_noise: the trajectory is deterministic; use ddim"):
        replace(PLAIN, steps=MULTI_STEP)


# Who is asked and who learns


@pytest.mark.parametrize("method", [replace(ANCHORED, off_trajectory_weight=1.0), CDM(steps=STEPS, guidance=2.0)])
@pytest.mark.parametrize("step", [0, 1])
def test_each_loss_reaches_its_player_alone(method: CDM, step: int) -> None:
    players, draw, batch = scene(method)
    if "times" in draw and draw["times"].shape[1] <= step:
        draw["times"] = torch.cat([draw["times"], draw["times"] / 2], 1)
    draw = at_step(draw, step)
    due(players, "generator")
    loss = method.generator_loss(players, draw, batch)
    loss.total.backward()
    assert learned(players) == {"generator"}
    for parameter in players.generator.parameters():
        parameter.grad = None
    due(players, "generator", "fake")
    method.fake_loss(players, draw | dict(loss.carry), batch).total.backward()
    assert learned(players) == {"fake"}


def test_the_fake_score_follows_the_student_after_the_student_s_update_alone() -> None:
    method = replace(PLAIN, fake_follows=0.25)
    players, draw, batch = scene(method)
    start = [p.detach().clone() for p in players.fake.parameters()]
    method.after_update(players, method.fake_loss(players, draw, batch).carry)
    assert all(torch.equal(a, b) for a, b in zip(start, players.fake.parameters(), strict=True))
    method.after_update(players, method.generator_loss(players, draw, batch).carry)
    for before, now, student in zip(start, players.fake.parameters(), players.generator.parameters(), strict=True):
        torch.testing.assert_close(now, before + 0.25 * (student - before))


def test_no_network_is_called_twice_on_the_same_input() -> None:
    method = replace(PLAIN, off_trajectory_weight=1.0)
    players, draw, batch = scene(method)
    calls = watch(players)
    carry = method.generator_loss(players, draw, batch).carry
    method.fake_loss(players, draw | dict(carry), batch)
    assert len(set(calls)) == len(calls)


def test_levels_are_drawn_by_default_one_number_of_steps_for_the_batch() -> None:
    counts = {scene(CDM(guidance=2.0), step=step)[1]["times"].shape for step in range(6)}
    assert {shape[0] for shape in counts} == {BATCH}
    assert len(counts) > 1
    assert scene(CDM(guidance=2.0))[1]["z"].shape[1:] == SHAPE
