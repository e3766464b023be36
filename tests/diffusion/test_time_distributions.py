"""Time distributions against the quantiles of their closed forms."""

import math
from dataclasses import fields
from statistics import NormalDist

import pytest
import torch
from support.closed_forms import PATHS, STABLE_DIFFUSION, numbers, on_every_path

from diffdistill.diffusion.path import EDM, Flow, Path, VPDiscrete, karras_ratios
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.time_distributions import (
    Karras,
    KarrasIndex,
    LogitNormal,
    LogNormal,
    TimeDistribution,
    Uniform,
    UniformInteger,
    even_times,
    log_ratio_slope,
)
from diffdistill.distillation.method import METHODS, Method
from diffdistill.methods.hyper_sd import HyperSD
from diffdistill.settings.schema import UserError
from diffdistill.training.config import find_config, load_config

SHARES = (0.1, 0.5, 0.8)
QUANTILES = [NormalDist().inv_cdf(share) for share in SHARES]


@on_every_path
def test_log_normal_ratios_have_the_quantiles_of_a_log_normal_cut_off_at_the_path_s_ends(path: Path) -> None:
    law = NormalDist(-1.2, 1.2)
    low, high = (law.cdf(math.log(ratio)) for ratio in path.ratio(numbers(path.t_min, path.t_max)).tolist())
    expected = numbers(*(math.exp(law.inv_cdf(low + share * (high - low))) for share in SHARES))
    ratios = path.ratio(LogNormal(mean=-1.2, std=1.2)(numbers(*SHARES), path))
    torch.testing.assert_close(ratios, expected, rtol=1e-9, atol=0)


def test_a_law_without_ends_is_kept_within_the_path() -> None:
    path = EDM(sigma_min=0.1, sigma_max=1.0)
    assert LogNormal()(numbers(0.0, 1e-9, 1 - 1e-9, 1.0), path).tolist() == pytest.approx(
        [0.1, 0.1, 1.0, 1.0], rel=1e-6
    )


@on_every_path
@pytest.mark.parametrize("law", [LogNormal(), LogNormal(mean=1.0, std=0.8), LogNormal(mean=-4.0, std=0.5)])
def test_a_log_normal_law_ends_where_the_path_does(law: LogNormal, path: Path) -> None:
    """To the bit, as BOOT asks of its law, also where the share of what lies beyond rounds to nothing."""
    assert law(numbers(0.0, 1.0), path).tolist() == [path.t_min, path.t_max]
    assert bool(law(numbers(1e-300, 1 - 2.0**-53), path).isfinite().all())


@on_every_path
def test_a_karras_law_that_reaches_beyond_the_path_is_even_between_the_path_s_ends(path: Path) -> None:
    ends = path.ratio(numbers(path.t_min, path.t_max))
    ratios = path.ratio(Karras(ratio_min=1e-5, ratio_max=1e5, rho=5)(numbers(0.0, 0.25, 0.5, 0.75, 1.0), path))
    steps = (ratios ** (1 / 5)).diff()
    torch.testing.assert_close(steps, steps[:1].expand(4), rtol=1e-7, atol=0)
    torch.testing.assert_close(ratios[[0, -1]], ends, rtol=1e-9, atol=0)


def test_a_law_within_the_path_is_what_it_says_to_the_bit() -> None:
    shares = (torch.arange(999, dtype=torch.float64) + 0.5) / 999
    for law in (Karras(ratio_max=24.41), Karras()):
        expected = karras_ratios(shares, law.ratio_min, law.ratio_max, law.rho)
        assert torch.equal(law(shares, EDM()), expected.clamp(0.002, 80))
    index = (20 + (shares * 961).long()).double() / 999
    assert torch.equal(KarrasIndex(low=20, high=980)(shares, EDM()), karras_ratios(index, 0.002, 80, 7))


def test_karras_indices_beyond_the_path_are_left_out_and_the_others_drawn_alike() -> None:
    path = EDM(sigma_min=0.1, sigma_max=10)
    shares = (torch.arange(300_000, dtype=torch.float64) + 0.5) / 300_000
    levels = karras_ratios(torch.arange(1000, dtype=torch.float64) / 999, 0.002, 80, 7)
    found, counts = KarrasIndex()(shares, path).unique(return_counts=True)
    assert torch.equal(found, levels[(levels >= 0.1) & (levels <= 10)])
    assert int(counts.max() - counts.min()) <= 1


@pytest.mark.parametrize(
    ("law", "path", "message"),
    [
        (Karras(ratio_min=20, ratio_max=30), EDM(sigma_max=10), "karras from 20 to 30 is not in the path's range"),
        (KarrasIndex(low=990), EDM(sigma_max=10), "none of karras_index 990 to 999 is in the path's range"),
        (LogNormal(mean=9, std=0.1), EDM(sigma_max=10), "lognormal around 8103.08 has no ratio in the path's range"),
        (UniformInteger(), Flow(), "uniform_integer 0 to 999 is for discrete paths, not for flow"),
        (
            UniformInteger(low=990),
            VPDiscrete(num_steps=900),
            "uniform_integer 990 to 999: vp_discrete has the indices 0 to 899, none of these",
        ),
        (UniformInteger(low=5, high=3), VPDiscrete(num_steps=9), "uniform_integer 5 to 3: low is above high"),
    ],
)
def test_a_law_that_the_path_has_nothing_of_is_refused(law: TimeDistribution, path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message):
        law(numbers(0.5), path)


def test_uniform_integers_of_a_shorter_path_do_not_pile_up_at_its_end() -> None:
    times = UniformInteger(low=20, high=999)(
        (torch.arange(8800, dtype=torch.float64) + 0.5) / 8800, VPDiscrete(num_steps=900)
    )
    assert torch.equal(torch.bincount(times.long())[20:], torch.full((880,), 10))


@pytest.mark.parametrize("path", [EDM(), Flow(), VPDiscrete()], ids=["edm", "flow", "vp_discrete"])
@pytest.mark.parametrize("law", [LogNormal(), Karras(ratio_min=0.03, ratio_max=6.0), KarrasIndex()])
def test_weighed_by_its_slope_every_law_is_even_in_the_logarithm_of_the_ratio(
    law: TimeDistribution, path: Path
) -> None:
    """The integral over ln r of a bump between ratios that each law has."""
    shares = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000
    log_ratio = path.ratio(law(shares, path)).log()
    bump = torch.exp(-0.5 * ((log_ratio + 0.5) / 0.5) ** 2)
    found = float((log_ratio_slope(law, shares, path) * bump).mean())
    assert found == pytest.approx(0.5 * math.sqrt(2 * math.pi), rel=5e-3)


# The methods' own, on every path

EVEN = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
ALL_PATHS = {**PATHS, "stable_diffusion": VPDiscrete(**STABLE_DIFFUSION)}


def default_laws() -> dict[str, TimeDistribution | None]:
    """Every law that a method has by default, by method and setting; None: the path's."""
    laws = {}
    for name in METHODS.own:
        made = METHODS.find(name)()
        laws |= {f"{name}.{f.name}": getattr(made, f.name) for f in fields(made) if f.name.endswith("time_law")}
    return laws


@pytest.mark.parametrize("path", ALL_PATHS.values(), ids=ALL_PATHS.keys())
@pytest.mark.parametrize("law", default_laws().values(), ids=default_laws().keys())
def test_a_method_s_own_law_piles_up_nowhere_and_has_low_noise(law: TimeDistribution | None, path: Path) -> None:
    """All are of losses that compare images or train denoisers, so all need low noise: a quarter below ratio 1."""
    times = (law or even_times(path))(EVEN, path)
    _, counts = times.unique(return_counts=True)
    nearby = 0.5 if isinstance(path, VPDiscrete) else 1e-6 * path.t_max  # what rounds to the end's index
    at_ends = [float(((times - end).abs() <= nearby).double().mean()) for end in (path.t_min, path.t_max)]
    assert max(*at_ends, int(counts.max()) / len(times)) < 0.0205  # iCT's is the widest: 0.0203 on Stable Diffusion
    assert float((path.ratio(times) < 1).double().mean()) >= 0.249  # even on Flow(shift=3): 0.2495


@pytest.mark.parametrize("path", ALL_PATHS.values(), ids=ALL_PATHS.keys())
def test_hyper_sd_s_own_grid_has_low_noise(path: Path) -> None:
    times = HyperSD().steps.grid.times(path)
    below = int((path.ratio(times) < 1).sum())
    assert (below + 1) / len(times) >= 0.25  # a quarter of the range to within one of the times


def test_every_method_s_laws_are_looked_at() -> None:
    assert {
        "dmd2",
        "sid",
        "sim",
        "f_distill",
        "uni_instruct",
        "cdm",
        "rcm",
        "hyper_sd",
        "boot",
        "free_flow",
        "scm",
        "consistency",
        "tdm",
        "rectified_flow",
        "preference_field",
        "mean_flow",
        "disback",
        "pretrain",
        "tsm",
    } <= {name.partition(".")[0] for name in default_laws()}


def test_what_clamping_would_put_on_stable_diffusion_s_ends() -> None:
    """What is cut off, and once lay on t = 999 and on t = 0: more than a quarter, and an eighth."""
    path, law = VPDiscrete(**STABLE_DIFFUSION), Karras()
    levels = karras_ratios(EVEN, law.ratio_min, law.ratio_max, law.rho)
    low, high = path.ratio(numbers(path.t_min, path.t_max)).tolist()
    assert float((levels > high).double().mean()) == pytest.approx(0.276, abs=1e-3)
    assert float((levels < low).double().mean()) == pytest.approx(0.132, abs=1e-3)


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
