"""Recipes of CDM, decoupled DMD and TDM: what their numbers mean on the published models' paths."""

from typing import Any

import pytest
import torch

from diffdistill.diffusion.path import Flow, Path, VPDiscrete
from diffdistill.training.config import RunConfig, find_config, load_config

STABLE_DIFFUSION = VPDiscrete(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
PIXART = VPDiscrete(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
EVEN = {number: [0.999, *(1 - i / number for i in range(1, number))] for number in (4, 8)}
LEVELS: dict[str, tuple[Path, list[float]]] = {
    "cdm/sd3": (Flow(shift=3), EVEN[4]),
    "cdm/longcat_image": (Flow(shift=3.158), EVEN[4]),
    "tdm/sd3": (Flow(shift=3), EVEN[4]),
    "tdm/pixart": (PIXART, [899, 674, 449, 224]),
    "tdm/sdxl": (STABLE_DIFFUSION, [999, 749, 499, 249]),
    "dmd2/sdxl-decoupled": (STABLE_DIFFUSION, [999, 749, 499, 249]),
    "dmd2/lumina2-decoupled": (Flow(shift=6), EVEN[4]),
    "dmd2/qwen_image-decoupled": (Flow(shift=2), EVEN[4]),
    "dmd2/z_image-decoupled": (Flow(shift=6), EVEN[8]),
}


def loaded(name: str) -> tuple[Any, RunConfig]:
    config = load_config(find_config(name))
    return config.method, config


@pytest.mark.parametrize(("name", "path", "times"), [(name, *levels) for name, levels in LEVELS.items()])
def test_calls_are_at_the_levels_that_the_recipe_says(name: str, path: Path, times: list[float]) -> None:
    method, _ = loaded(name)
    expected = torch.tensor(times, dtype=torch.float64)
    torch.testing.assert_close(method.steps.times(path), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "shift"), [("cdm/sd3", 3.0), ("cdm/longcat_image", 3.158)])
def test_cdm_s_levels_are_even_in_sigma_and_those_of_its_calls_before_the_shift(name: str, shift: float) -> None:
    method, _ = loaded(name)
    path, uniform = Flow(shift=shift), torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)
    low, high = path.sigma(torch.tensor([path.t_min, path.t_max], dtype=torch.float64)).tolist()
    for law in (method.time_law, method.fake_time_law, method.off_trajectory_law, method.decoupled.time_law):
        expected = low + uniform * (high - low)
        torch.testing.assert_close(path.sigma(law(uniform, path)), expected, rtol=0, atol=1e-5)
    assert method.levels is not None
    ends = method.levels.time_law(uniform[[0, -1]], path)
    torch.testing.assert_close(ends, torch.tensor([0.25, 0.95], dtype=torch.float64), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["cdm/sd3", "cdm/longcat_image"])
def test_cdm_s_average_and_its_fake_score_move_as_in_the_released_code(name: str) -> None:
    """By 0.001: the average after each update of the generator, the fake score after each of its own, two of them."""
    method, config = loaded(name)
    assert config.ema is not None
    between = config.train.global_batch_size * method.fake_updates  # images from one of the generator's to the next
    assert 0.5 ** (between / config.ema.halflife_images) == pytest.approx(0.999, rel=1e-8)
    assert method.fake_follows == pytest.approx(1 - 0.999**2, rel=1e-3)


@pytest.mark.parametrize("name", [name for name in LEVELS if name.endswith("-decoupled")])
def test_decoupled_dmd_guides_below_the_call_and_matches_everywhere(name: str) -> None:
    method, _ = loaded(name)
    assert method.decoupled is not None
    assert method.decoupled.range == "below_call"
    assert method.decoupled.time_law == method.generator_time_law  # before the call's level cuts it off
    method.decoupled.check(method.steps, LEVELS[name][0], method.levels)


def test_tdm_s_demo_trains_the_student_at_a_fifth_of_the_fake_score_s_rate() -> None:
    for name in ("tdm/pixart", "tdm/sdxl", "tdm/sd3"):
        _, config = loaded(name)
        assert config.optimizer("generator").lr == pytest.approx(config.optimizer("fake").lr / 5)
