"""Levels that are drawn anew in every iteration: which, for whom, and what the generator is given at them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig
from support.closed_forms import on_every_path
from support.tiny_players import BATCH, CLASSES, MULTI_STEP, PATH, SHAPE, scene
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.path import Path as NoisePath
from diffdistill.diffusion.path import VPDiscrete
from diffdistill.diffusion.sampling import DDIM, TCD, FewSteps
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import Karras
from diffdistill.distillation.levels import DrawnLevels
from diffdistill.distillation.method import Problem
from diffdistill.distillation.score_distillation import generate
from diffdistill.methods.dmd2 import DMD2
from diffdistill.training.trainer import Trainer

LEVELS = DrawnLevels(num_steps=(2, 5), time_law=Karras(ratio_max=50.0))
METHOD = DMD2(steps=MULTI_STEP, levels=LEVELS, gan_weight=0.0)


def times_of(step: int, path: NoisePath = PATH, levels: DrawnLevels = LEVELS, size: int = BATCH) -> Tensor:
    return levels.draw(StepRandom(0, step, torch.arange(size)), path, MULTI_STEP)


def test_every_number_of_steps_in_the_range_occurs_and_all_parts_of_a_batch_share_it() -> None:
    seen = []
    for step in range(40):
        parts = [LEVELS.draw(StepRandom(0, step, i), PATH, MULTI_STEP) for i in torch.arange(BATCH).split(2)]
        assert torch.equal(torch.cat(parts), times_of(step))
        seen.append(parts[0].shape[1])
    assert set(seen) == {2, 3, 4, 5}  # of 40 fair draws one value is missing once in 25,000


@on_every_path
def test_levels_fall_from_the_sampler_s_first_and_are_each_sample_s_own(path: NoisePath) -> None:
    times = times_of(3, path, DrawnLevels(num_steps=(5, 5)))
    assert torch.equal(times[:, 0], MULTI_STEP.times(path)[:1].expand(BATCH))
    assert bool((times.diff(dim=1) <= 0).all())
    assert len(times[:, 1:].unique(dim=0)) == BATCH
    assert bool(((times >= path.t_min) & (times <= path.t_max)).all())
    if isinstance(path, VPDiscrete):
        assert torch.equal(times, times.round())


def test_the_inner_levels_have_the_law_s_quantiles() -> None:
    """Sorted they are one law's again when they are put together; the first level clamps those above it."""
    times = times_of(0, levels=DrawnLevels(num_steps=(3, 3), time_law=LEVELS.time_law), size=20_000)
    expected = LEVELS.time_law(torch.tensor([0.25, 0.5], dtype=torch.float64), PATH)
    found = times[:, 1:].flatten().quantile(torch.tensor([0.25, 0.5], dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0)
    above = (LEVELS.time_law(torch.linspace(0, 1, 9999, dtype=torch.float64), PATH) >= 20).double().mean()
    torch.testing.assert_close((times[:, 1:] == 20).double().mean(), above, rtol=0.05, atol=0)


@pytest.mark.parametrize("noise", ["fresh", "fixed", "ddim"])
def test_the_generator_s_image_is_that_of_a_sampler_with_the_drawn_levels(noise: str) -> None:
    steps = replace(MULTI_STEP, later_noise=noise)
    below = DrawnLevels(num_steps=(2, 4), time_law=Karras(ratio_max=19.0))  # no two levels the same
    players, draw, _ = scene(replace(METHOD, steps=steps, levels=below), step=2)
    count = draw["times"].shape[1]
    draw["step"] = torch.tensor(count - 1)
    made = generate(players, draw, steps)
    for i, times in enumerate(draw["times"]):
        one = slice(i, i + 1)
        alone = replace(steps, later_ratios=tuple(times[1:].tolist()))  # a time of EDM's path is its ratio
        cond, fresh = Cond(label=draw["label"][one]), [draw[f"fresh {k}"][one] for k in range(count - 1)]
        expected = alone(players.generator, draw["z"][one], cond, fresh_noise=fresh.__getitem__)
        torch.testing.assert_close(made[one], expected, rtol=1e-9, atol=1e-9)


def test_the_trained_call_is_any_of_those_that_were_drawn() -> None:
    problem = Problem(SHAPE, CLASSES, PATH)
    draws = [METHOD.draw(StepRandom(0, step, torch.arange(1)), problem) for step in range(300)]
    chosen = {(draw["times"].shape[1], int(draw["step"])) for draw in draws}
    assert {step for _, step in chosen} == {0, 1, 2, 3, 4}
    assert all(step < count for count, step in chosen)


def test_a_trajectory_sampler_takes_times_as_well() -> None:
    players, draw, _ = scene(METHOD)
    sampler = TCD(num_steps=3, eta=0.0, grid=DDIM(num_steps=3))
    times = sampler.times(PATH)[:-1].expand(BATCH, -1)
    cond = Cond(label=draw["label"])
    given = sampler.roll_out(players.generator, draw["z"], cond, step=2, times=times)
    own = sampler.roll_out(players.generator, draw["z"], cond, step=2)
    assert torch.equal(given.x, own.x)
    assert torch.equal(given.t, own.t)


def test_without_levels_nothing_of_them_is_drawn() -> None:
    plain, problem, rng = replace(METHOD, levels=None), Problem(SHAPE, CLASSES, PATH), StepRandom(0, 1, torch.arange(4))
    draw, other = plain.draw(rng, problem), METHOD.draw(rng, problem)
    assert "times" not in draw
    assert all(torch.equal(draw[name], other[name]) for name in draw if name != "step" and name in other)


def test_a_range_of_steps_rises() -> None:
    with pytest.raises(ValueError, match="num_steps: must be increasing"):
        DrawnLevels(num_steps=(3, 2))


def test_a_run_in_pieces_ends_as_the_whole(make_config: MakeConfig, tmp_path: Path) -> None:
    ends = []
    for size in (8, 4):
        options = ("method.gan_weight=0", "method.levels={num_steps: [1, 3]}", f"train.micro_batch_size={size}")
        trainer = Trainer(make_config("dmd2", *options, f"run={tmp_path / str(size)}"), quiet=True)
        trainer.run()
        ends.append(trainer.trained["generator"].state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=1e-5)  # float32 sums in another order


def test_a_student_of_drawn_levels_samples_as_its_sampler_says() -> None:
    assert METHOD.sampler(Problem(SHAPE, CLASSES, PATH)) == FewSteps(init_ratio=20.0, later_ratios=(5.0, 1.0))
