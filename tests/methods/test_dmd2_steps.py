"""DMD2 in several steps: what the generator is given, and that numbers belong to samples, not to batches."""

from dataclasses import replace

import pytest
import torch
from support.tiny_players import BATCH, CLASSES, EVERYTHING, MULTI_STEP, PATH, SHAPE, scene
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Players, Problem
from diffdistill.methods.dmd2 import DMD2


def inputs_of_generator(method: DMD2, step: int) -> tuple[list[tuple[Tensor, Tensor]], Players, dict[str, Tensor]]:
    """What the generator is given, call by call, when `step` was drawn."""
    players, draw, batch = scene(method)
    draw["step"] = torch.tensor(step)
    calls: list[tuple[Tensor, Tensor]] = []
    original = players.generator.forward

    def recorded(x: Tensor, t: Tensor, *rest, **named):
        calls.append((x, t))
        return original(x, t, *rest, **named)

    players.generator.forward = recorded
    method.generator_loss(players, draw, batch)
    return calls, players, draw


@pytest.mark.parametrize("init_noise", ["sigma", "unit"])
def test_the_first_step_s_input_is_pure_noise(init_noise):
    steps = replace(MULTI_STEP, init_noise=init_noise)
    calls, _, draw = inputs_of_generator(DMD2(steps=steps, gan_weight=0.0), 0)
    ((x, t),) = calls
    scale = 20 if init_noise == "sigma" else 1
    torch.testing.assert_close(x, scale * draw["z"], rtol=1e-12, atol=0)
    assert t.tolist() == [20.0] * BATCH


@pytest.mark.parametrize("step", [1, 2])
def test_a_later_step_s_input_is_the_generator_s_own_image_noised_afresh(step):
    calls, players, draw = inputs_of_generator(DMD2(steps=MULTI_STEP, gan_weight=0.0), step)
    assert len(calls) == step + 1
    assert [t[0].item() for _, t in calls] == [20.0, 5.0, 1.0][: step + 1]
    before, now = calls[-2:]
    own = players.generator(*before, Cond(label=draw["label"]))
    expected = own + now[1].reshape(-1, 1, 1, 1) * draw[f"fresh {step - 1}"]
    torch.testing.assert_close(now[0], expected.detach(), rtol=1e-12, atol=1e-12)


def test_only_the_drawn_step_has_a_gradient():
    calls, _, _ = inputs_of_generator(DMD2(steps=MULTI_STEP, gan_weight=0.0), 2)
    assert not any(x.requires_grad for x, _ in calls)


def test_training_on_the_last_step_makes_the_image_of_sampling():
    method = DMD2(steps=MULTI_STEP, gan_weight=0.0)
    players, draw, batch = scene(method)
    draw["step"] = torch.tensor(2)
    trained_on = method.generator_loss(players, draw, batch).carry["x"]
    sampled = method.sampler(Problem(SHAPE, CLASSES, PATH))(
        players.generator, draw["z"], Cond(label=draw["label"]), fresh_noise=lambda i: draw[f"fresh {i}"]
    )
    torch.testing.assert_close(trained_on, sampled.detach(), rtol=0, atol=0)


def test_all_parts_of_a_batch_share_the_step_and_all_steps_occur():
    method, problem = DMD2(steps=MULTI_STEP, gan_weight=0.0), Problem(SHAPE, CLASSES, PATH)
    seen = []
    for step in range(30):
        parts = [method.draw(StepRandom(0, step, index), problem)["step"] for index in torch.arange(BATCH).split(2)]
        assert len({part.item() for part in parts}) == 1
        seen.append(parts[0].item())
    assert set(seen) == {0, 1, 2}  # of 30 fair draws one value is missing once in 60,000


def test_backward_simulation_with_one_step_is_the_one_step_method():
    several = DMD2(steps=FewSteps(init_ratio=20.0, later_ratios=()), gan_weight=0.0)
    players, draw, batch = scene(several)
    assert draw["step"].item() == 0
    found = several.generator_loss(players, draw, batch).carry["x"]
    t = torch.full((BATCH,), 20.0, dtype=torch.float64)
    direct = players.generator(20 * draw["z"], t, Cond(label=draw["label"]))
    torch.testing.assert_close(found, direct.detach(), rtol=0, atol=0)


def test_a_sample_s_numbers_do_not_depend_on_its_batch():
    problem = Problem(SHAPE, CLASSES, PATH)
    method = replace(EVERYTHING, steps=MULTI_STEP)
    whole = method.draw(StepRandom(0, 4, torch.arange(BATCH)), problem)
    parts = [method.draw(StepRandom(0, 4, index), problem) for index in torch.arange(BATCH).split(2)]
    for name, value in whole.items():
        joined = parts[0][name] if value.ndim == 0 else torch.cat([part[name] for part in parts])
        assert torch.equal(value, joined), name


def test_the_numbers_of_a_step_are_all_different():
    draw = EVERYTHING.draw(StepRandom(0, 0, torch.arange(BATCH)), Problem(SHAPE, CLASSES, PATH))
    drawn = [value.double().numpy().tobytes() for value in draw.values() if value.is_floating_point()]
    assert len(set(drawn)) == len(drawn)


def test_the_losses_of_two_halves_average_to_that_of_the_whole():
    method = replace(EVERYTHING, steps=MULTI_STEP)
    players, draw, batch = scene(method)
    halves = [slice(0, BATCH // 2), slice(BATCH // 2, BATCH)]
    for name in ("generator_loss", "fake_loss"):
        whole = getattr(method, name)(players, draw, batch).total
        parts = [
            getattr(method, name)(
                players,
                {key: value if value.ndim == 0 else value[half] for key, value in draw.items()},
                Batch(batch.images[half], batch.cond[half], batch.stored),
            ).total
            for half in halves
        ]
        torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-12, atol=0)
