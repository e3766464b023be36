"""Time distributions against the quantiles of their closed forms."""

import math
from statistics import NormalDist

import pytest
import torch
from support.closed_forms import STABLE_DIFFUSION, numbers, on_every_path

from diffdistill.diffusion.path import EDM, Flow, Path, VPDiscrete
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.time_distributions import LogitNormal, LogNormal, Uniform, UniformInteger
from diffdistill.distillation.method import Method
from diffdistill.training.config import find_config, load_config

SHARES = (0.1, 0.5, 0.8)
QUANTILES = [NormalDist().inv_cdf(share) for share in SHARES]


@on_every_path
def test_log_normal_ratios_have_the_quantiles_of_a_log_normal(path: Path) -> None:
    ratios = path.ratio(LogNormal(mean=-1.2, std=1.2)(numbers(*SHARES), path))
    expected = numbers(*(math.exp(-1.2 + 1.2 * n) for n in QUANTILES))
    torch.testing.assert_close(ratios, expected, rtol=1e-9, atol=0)


def test_a_law_without_ends_is_kept_within_the_path() -> None:
    path = EDM(sigma_min=0.1, sigma_max=1.0)
    assert LogNormal()(numbers(1e-9, 1 - 1e-9), path).tolist() == [0.1, 1.0]


def test_logit_normal_times_have_the_quantiles_of_a_logit_normal() -> None:
    path = Flow(t_start=0.1, t_end=0.9)
    times = LogitNormal(mean=0.7, std=1.6)(numbers(*SHARES), path)
    expected = numbers(*(0.1 + 0.8 / (1 + math.exp(-0.7 - 1.6 * n)) for n in QUANTILES))
    torch.testing.assert_close(times, expected, rtol=1e-9, atol=0)


def test_a_uniform_law_is_even_over_its_part_of_the_range() -> None:
    times = Uniform(low=0.25, high=0.75)(numbers(0.0, 0.5, 1.0), Flow(t_start=0.1, t_end=0.9))
    torch.testing.assert_close(times, numbers(0.3, 0.5, 0.7), rtol=1e-12, atol=0)


def test_uniform_integers_are_the_indices_from_low_to_high_alike() -> None:
    shares = (torch.arange(3000, dtype=torch.float64) + 0.5) / 3000
    times = UniformInteger(low=20, high=979)(shares, VPDiscrete())
    assert times.unique().tolist() == [*range(20, 980)]
    assert set(torch.bincount(times.long())[20:].tolist()) <= {3, 4}


# Those of the recipes for real teachers


def method_of(recipe: str) -> Method:
    return load_config(find_config(recipe)).method


@pytest.mark.parametrize(
    ("recipe", "indices"),
    [
        ("dmd2/sd15", [999]),
        ("dmd2/sdxl", [999, 749, 499, 249]),
        ("f_distill/sd15", [999]),
        ("f_distill/sdxl", [999, 749, 499, 249]),
        ("sid/sd15", [625]),
        ("sid/sdxl", [999, 749, 499, 249]),
        ("sim/sd15", [625]),
        ("sim/sdxl", [625]),
    ],
)
def test_a_recipe_for_stable_diffusion_calls_its_student_at_the_published_indices(
    recipe: str, indices: list[int]
) -> None:
    steps = method_of(recipe).steps  # type: ignore[attr-defined]
    assert isinstance(steps, FewSteps)
    assert steps.times(VPDiscrete(**STABLE_DIFFUSION)).tolist() == indices


def test_sid_on_stable_diffusion_3_has_the_published_sigmas_before_the_flow_s_shift() -> None:
    path, method = Flow(shift=3.0, t_start=1e-6, t_end=1 - 1e-6), method_of("sid/sd3")
    sigmas = path.sigma(method.steps.times(path))  # type: ignore[attr-defined]
    torch.testing.assert_close(sigmas, 0.999 * numbers(1, 0.75, 0.5, 0.25), rtol=5e-4, atol=0)  # ratios to three digits
    for law in (method.time_law, method.fake_time_law):  # type: ignore[attr-defined]
        sigma = path.sigma(law(numbers(*SHARES), path))
        expected = numbers(*(1 / (1 + math.exp(-math.log(2) - 1.6 * n)) for n in QUANTILES))
        torch.testing.assert_close(sigma, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("recipe", "shape"),
    [
        ("cifar10", (3, 32, 32)),
        ("sd15", (4, 64, 64)),
        ("sdxl", (4, 128, 128)),
        ("pixart", (4, 64, 64)),
        ("sd3", (16, 128, 128)),
        ("dit256", (4, 32, 32)),
    ],
)
def test_sim_s_c_grows_with_the_root_of_the_number_of_values(recipe: str, shape: tuple[int, ...]) -> None:
    found = method_of(f"sim/{recipe}").huber_c  # type: ignore[attr-defined]
    assert found == pytest.approx(0.00054 * math.prod(shape) ** 0.5, rel=3e-3)  # to three digits
