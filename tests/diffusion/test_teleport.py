"""Gaussian teleportation: exact where the data is Gaussian, grid-exact, low rank equal to full, guided, refused."""

from itertools import pairwise

import pytest
import torch
from support.closed_forms import PATHS, numbers, random
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.guidance.policies import CFG
from diffdistill.diffusion.path import EDM, Path, VPDiscrete
from diffdistill.diffusion.sampling import DDIM, TCD, FewSteps, Heun, OneCall
from diffdistill.diffusion.teleport import LowRankGaussian, Teleport
from diffdistill.networks.analytic import gaussian_denoiser, gaussian_flow, mixture_denoiser
from diffdistill.settings.schema import UserError

CONTINUOUS = {name: path for name, path in PATHS.items() if name != "vp_discrete"}
on_continuous_paths = pytest.mark.parametrize("path", CONTINUOUS.values(), ids=CONTINUOUS.keys())
ROOT = random(4, 2, seed=3) / 2
MEAN = random(4, seed=4) / 2
COVARIANCE = ROOT @ ROOT.T  # of rank 2


def exact(means: Tensor | None = None) -> LowRankGaussian:
    values, vectors = torch.linalg.eigh(COVARIANCE)
    return LowRankGaussian((MEAN if means is None else means).reshape(-1, 4), values[2:], vectors[:, 2:])


@on_continuous_paths
def test_low_rank_is_the_full_formula_with_zero_eigenvalues_and_composes(path: Path) -> None:
    t, s, u = (path.time_of_ratio(numbers(ratio)).expand(7) for ratio in (9.0, 2.0, 0.3))
    x, mean = random(7, 4), MEAN.expand(7, -1)
    moved = exact().carry(path, x, mean, t, s)
    torch.testing.assert_close(moved, gaussian_flow(path, MEAN, COVARIANCE, x, t, s), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(exact().carry(path, moved, mean, s, u), exact().carry(path, x, mean, t, u))
    torch.testing.assert_close(exact().carry(path, x, mean, t, t), x)


@on_continuous_paths
def test_on_gaussian_data_only_the_rest_s_own_error_is_left(path: Path) -> None:
    teacher, noise = gaussian_denoiser(path, MEAN, COVARIANCE), random(9, 4)
    top = torch.full((9,), path.t_max, dtype=torch.float64)
    x = noise * path.sigma(top)[:, None]
    wanted = gaussian_flow(path, MEAN, COVARIANCE, x, top, torch.full_like(top, path.t_min)) / path.alpha(
        numbers(path.t_min)
    )
    gaps = [
        float((sampler(teacher, noise) - wanted).abs().max())
        for sampler in (Heun(num_steps=12), Teleport(Heun(num_steps=12), 0.8, exact()))
    ]
    assert gaps[1] < gaps[0] / 3


@on_continuous_paths
def test_a_few_steps_that_begin_at_the_ratio_or_above_are_taken(path: Path) -> None:
    teacher, noise = gaussian_denoiser(path, MEAN, COVARIANCE), random(9, 4)
    later = (2.5, 1.0, 0.5, 0.2)
    made = [
        Teleport(FewSteps(init_ratio=first, later_ratios=later, later_noise="ddim"), 5.0, exact())(teacher, noise)
        for first in (5.0, 80.0)
    ]
    torch.testing.assert_close(made[0], made[1])


def test_with_a_level_of_the_grid_the_rest_is_the_rest_of_the_grid() -> None:
    """k steps are left out of N, and nothing else changes, where the Gaussian is the data."""
    path, num_steps, k = EDM(), 18, 5
    grid = path.karras_times(num_steps)
    rest = Teleport(Heun(num_steps=num_steps - k), float(grid[k]), exact())
    lower = EDM(sigma_max=float(grid[k]))
    torch.testing.assert_close(lower.karras_times(num_steps - k), grid[k:], rtol=1e-12, atol=0)
    assert rest.num_evaluations == 2 * (num_steps - k) - 1
    assert float(grid[k]) == pytest.approx(12.9, abs=0.05)  # the paper's table


def test_a_guided_mean_is_the_guided_trajectory_s() -> None:
    """Two classes with one covariance: guided by w, the ODE is that of the Gaussian with the mean mu_w.

    "No class" is here the first of the two, since a mixture is no Gaussian.
    """
    means = torch.stack([MEAN, MEAN + 1.0])
    teacher = mixture_denoiser(EDM(), torch.ones(2), means, torch.stack([COVARIANCE] * 2), torch.arange(2))
    gaussian = LowRankGaussian(torch.stack([means[0], means[1], means[0]]), exact().values, exact().vectors)
    noise, ones = random(5, 4), torch.ones(5, dtype=torch.int64)

    class Guided:
        num_evaluations = 40

        def __call__(self, denoiser, noise, cond, *, guidance, fresh_noise):  # type: ignore[no-untyped-def]
            def estimate(x, t, *_):  # type: ignore[no-untyped-def]
                without = denoiser(x, t, Cond(label=0 * ones))
                return without + guidance * (denoiser(x, t, cond) - without)

            estimate.path = denoiser.path  # type: ignore[attr-defined]
            x, times = noise * denoiser.path.t_max, denoiser.path.karras_times(120)
            for t, s in pairwise(times):
                x = x + (s - t) * (x - estimate(x, t.expand(5))) / t
            return estimate(x, times[-1].expand(5))

    plain = Guided()(teacher, noise, Cond(label=ones), guidance=3.0, fresh_noise=None)
    jumped = Teleport(Guided(), 5.0, gaussian)(teacher, noise, Cond(label=ones), guidance=3.0)
    torch.testing.assert_close(jumped, plain, rtol=0, atol=0.06)
    assert (
        jumped - Teleport(Guided(), 5.0, exact())(teacher, noise, Cond(label=ones), guidance=3.0)
    ).abs().max() > 0.05


def test_a_fit_finds_mean_and_covariance_and_classes() -> None:
    label = torch.arange(4000) % 2
    images = (MEAN + label[:, None] * 2.0 + random(4000, 2, seed=5) @ ROOT.T).reshape(4000, 1, 2, 2)
    found = LowRankGaussian.fit(images, label)
    torch.testing.assert_close(found.means[0], MEAN, rtol=0, atol=0.05)
    torch.testing.assert_close(found.means[2], MEAN + 1.0, rtol=0, atol=0.05)
    covariance = found.vectors @ torch.diag(found.values) @ found.vectors.T
    torch.testing.assert_close(covariance, COVARIANCE, rtol=0, atol=0.03)
    assert len(found.values) == 2
    assert len(LowRankGaussian.fit(images, rank=1).values) == 1


def test_what_cannot_be_is_refused() -> None:
    teacher, noise = gaussian_denoiser(EDM(), MEAN, COVARIANCE), random(2, 4)
    with pytest.raises(UserError, match="a policy changes the scale during sampling"):
        Teleport(DDIM(), 2.0, exact())(teacher, noise, guidance=CFG(scale=2.0))
    with pytest.raises(UserError, match="edm cannot start at the ratio 100"):
        Teleport(DDIM(), 100.0, exact())(teacher, noise)
    with pytest.raises(UserError, match="vp_discrete cannot start at the ratio 2"):
        Teleport(DDIM(), 2.0, exact())(gaussian_denoiser(VPDiscrete(), MEAN, COVARIANCE), noise)
    for sampler, said in (
        (FewSteps(init_ratio=2.5), "few_steps starts at the ratio 2.5, not at 5; "),
        (FewSteps(init_ratio=5.0, init_noise="unit"), "few_steps with init_noise: unit .* use init_noise: sigma"),
        (TCD(init_noise="unit"), "tcd with init_noise: unit .* use init_noise: sigma"),
        (OneCall(), "one_call does not start at a noise level"),
    ):
        with pytest.raises(UserError, match=said):
            Teleport(sampler, 5.0, exact())(teacher, noise)
    with pytest.raises(UserError, match="at least 2 images, not 1"):
        LowRankGaussian.fit(noise[:1])


def test_samples_have_their_class_s_mean_and_the_covariance() -> None:
    other = LowRankGaussian(torch.stack([MEAN, MEAN + 3.0, MEAN + 1.5]), exact().values, exact().vectors)
    noise = random(20_000, len(other.values))
    made = other.sample(noise, torch.ones(len(noise), dtype=torch.int64))
    torch.testing.assert_close(made.mean(0), MEAN + 3.0, rtol=0, atol=0.06)
    torch.testing.assert_close(made.T.cov(), COVARIANCE, rtol=0, atol=0.15)
