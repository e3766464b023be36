"""Guidance policies: against plain guidance, their own equations and closed forms, and in how much they ask."""

from collections.abc import Callable

import pytest
import torch
from support.closed_forms import numbers, on_every_path, random
from support.two_gaussians import MEANS, VARIANCES, TwoGaussians
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.guidance.policies import (
    CFG,
    AdaptiveGuidance,
    CFGPlusPlus,
    Interval,
    Policy,
    Recorder,
    alignment,
    evaluate_pair,
)
from diffdistill.diffusion.linear_ag import LinearAG, fit_linear_ag, least_squares
from diffdistill.diffusion.path import EDM, VPCosine
from diffdistill.diffusion.sampling import DDIM, TCD, FewSteps, Heun, OneCall, Sampler
from diffdistill.networks.analytic import gaussian_flow
from diffdistill.networks.mlp import MLPConfig

BATCH = 6
SCALE = 2.5
SAMPLERS: list[Sampler] = [
    Heun(num_steps=5),
    DDIM(num_steps=6, spacing="karras"),
    FewSteps(init_ratio=10.0, later_ratios=(2.0, 0.5)),
    TCD(num_steps=3, grid=DDIM(num_steps=6, spacing="karras")),
    OneCall(),
]
with_every_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)


ONES = Cond(label=torch.ones(BATCH, dtype=torch.int64))


def mlp() -> tuple[Denoiser, Cond]:
    """Estimates that depend on everything."""
    net = MLPConfig(width=16, blocks=2).build((3,), 4, 0.1)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data.normal_(0, 0.4, generator=generator)
    return Denoiser(net.double(), EDM(), "edm"), Cond(label=torch.arange(BATCH) % 4)


def fresh(i: int) -> Tensor:
    return random(BATCH, 3, seed=100 + i)


def sample(sampler: Sampler, denoiser: Denoiser, cond: Cond, guidance: float | Tensor | Policy) -> Tensor:
    return sampler(denoiser, random(BATCH, 3), cond, guidance=guidance, fresh_noise=fresh)


def rows_of(denoiser: Denoiser) -> list[int]:
    """How many samples every later call of the network has."""
    rows: list[int] = []
    denoiser.net.register_forward_hook(lambda _, arguments, __: rows.append(len(arguments[0])))
    return rows


# Plain guidance


@with_every_sampler
def test_the_policy_cfg_is_the_number_bit_for_bit(sampler):
    denoiser, cond = mlp()
    assert torch.equal(sample(sampler, denoiser, cond, CFG(scale=SCALE)), sample(sampler, denoiser, cond, SCALE))


@with_every_sampler
def test_each_sample_may_have_a_scale_of_its_own(sampler):
    denoiser, cond = mlp()
    scales = torch.linspace(0, 4, BATCH, dtype=torch.float64)
    expected = torch.cat([sample(sampler, denoiser, cond, float(w))[i : i + 1] for i, w in enumerate(scales)])
    torch.testing.assert_close(sample(sampler, denoiser, cond, scales), expected, rtol=1e-9, atol=1e-9)


@on_every_path
@pytest.mark.parametrize("kind", ["eps", "v", "flow", "score"])
def test_guiding_one_form_of_the_estimate_guides_all(path, kind):
    denoiser, x, t = TwoGaussians(path), random(BATCH, 3), path.time_of_ratio(numbers(0.05, 0.3, 1.0, 2.5, 10.0, 40.0))
    without, with_cond, guided = (
        denoiser.convert(denoiser(x, t, ONES, guidance=w), kind, x, t) for w in (0.0, 1.0, SCALE)
    )
    torch.testing.assert_close(guided, with_cond + (SCALE - 1) * (with_cond - without), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", [EDM(sigma_min=0.01, sigma_max=40.0), VPCosine(t_end=0.985)], ids=["edm", "vp_cosine"])
def test_a_guided_run_on_gaussians_follows_the_exact_flow_of_the_guided_gaussian(path):
    sampler, denoiser, seen = Heun(num_steps=400), TwoGaussians(path), Recorder(SCALE)
    sampler(denoiser, random(BATCH, 3), ONES, guidance=seen)
    first, last = seen.evaluations[0], seen.evaluations[-1]
    mean = MEANS[0] + SCALE * (MEANS[1] - MEANS[0])
    exact = gaussian_flow(path, mean, torch.diag(VARIANCES), first.x, first.t, last.t)
    torch.testing.assert_close(last.x, exact, rtol=0, atol=2e-4)  # second order: a quarter of it with 800 steps


# Limited intervals


@with_every_sampler
def test_an_interval_that_covers_every_level_is_plain_guidance_bit_for_bit(sampler):
    denoiser, cond = mlp()
    policy = Interval(scale=SCALE, ratio_low=0.0, ratio_high=1e9)
    assert torch.equal(sample(sampler, denoiser, cond, policy), sample(sampler, denoiser, cond, SCALE))


def test_an_interval_guides_above_its_low_end_up_to_its_high_end_and_asks_once_elsewhere():
    denoiser, cond = mlp()
    guided = Interval(scale=SCALE, ratio_low=0.5, ratio_high=2.0).begin(denoiser, cond)
    rows = rows_of(denoiser)
    x = random(BATCH, 3)
    for ratio, is_inside in ((0.4, False), (0.5, False), (0.51, True), (2.0, True), (2.1, False)):
        t = torch.full((BATCH,), ratio, dtype=torch.float64)
        rows.clear()
        found = guided(x, t)
        assert rows == [2 * BATCH if is_inside else BATCH]
        assert torch.equal(found, denoiser(x, t, cond, guidance=SCALE if is_inside else 1.0))


def test_an_interval_without_width_is_refused():
    with pytest.raises(ValueError, match=r"ratio_low = 2\.0 must be below ratio_high = 2\.0"):
        Interval(scale=2.0, ratio_low=2.0, ratio_high=2.0)


# CFG++


@on_every_path
def test_ddim_under_cfg_plus_plus_keeps_the_unconditional_noise(path):
    """x_s = alpha_s D_lambda + sigma_s eps_u, step by step, and D_lambda in the end."""
    denoiser, sampler, share = TwoGaussians(path), DDIM(num_steps=7), 0.6
    times = sampler.times(path)[:, None].expand(-1, BATCH)
    x = random(BATCH, 3) * path.sigma(times[0])[:, None]
    for i, t in enumerate(times):
        without = denoiser(x, t, ONES, guidance=0.0)
        mixed = without + share * (denoiser(x, t, ONES) - without)
        if i + 1 < len(times):
            eps = denoiser.convert(without, "eps", x, t)
            x = path.diffuse(mixed, eps, times[i + 1])
    found = sampler(denoiser, random(BATCH, 3), ONES, guidance=CFGPlusPlus(scale=share))
    torch.testing.assert_close(found, mixed, rtol=1e-8, atol=1e-8)


def test_the_equivalent_scale_of_cfg_plus_plus_is_the_closed_form():
    path, share = VPCosine(), 0.7
    denoiser, t, s = TwoGaussians(path), numbers(*[0.8] * BATCH), numbers(*[0.7] * BATCH)
    alpha, sigma, alpha_s, sigma_s = path.alpha(t)[0], path.sigma(t)[0], path.alpha(s)[0], path.sigma(s)[0]
    scale = float(share * alpha_s / (alpha_s - sigma_s * alpha / sigma))
    x = random(BATCH, 3)
    found = CFGPlusPlus(scale=share).begin(denoiser, ONES)(x, t, s)
    torch.testing.assert_close(found, denoiser(x, t, ONES, guidance=scale), rtol=1e-10, atol=1e-10)


def test_cfg_plus_plus_with_scale_0_is_unconditional_and_asks_once():
    denoiser, cond = mlp()
    rows = rows_of(denoiser)
    found = sample(Heun(num_steps=5), denoiser, cond, CFGPlusPlus(scale=0.0))
    assert rows == [BATCH] * 9
    assert torch.equal(found, sample(Heun(num_steps=5), denoiser, cond, 0.0))


# Adaptive Guidance


@with_every_sampler
def test_adaptive_guidance_with_a_threshold_above_1_is_plain_guidance_bit_for_bit(sampler):
    denoiser, cond = mlp()
    policy = AdaptiveGuidance(scale=SCALE, threshold=1.1, armed_below_ratio=1e9)
    assert torch.equal(sample(sampler, denoiser, cond, policy), sample(sampler, denoiser, cond, SCALE))


@with_every_sampler
def test_adaptive_guidance_with_a_threshold_of_minus_1_is_the_condition_alone(sampler):
    denoiser, cond = mlp()
    rows = rows_of(denoiser)
    policy = AdaptiveGuidance(scale=SCALE, threshold=-1.0, armed_below_ratio=1e9)
    found = sample(sampler, denoiser, cond, policy)
    assert rows == [2 * BATCH, *[BATCH] * (sampler.num_evaluations - 1)]  # the first cosine costs one
    torch.testing.assert_close(found, sample(sampler, denoiser, cond, 1.0), rtol=1e-12, atol=1e-12)


def test_a_sample_that_is_done_costs_one_evaluation_a_call_and_stays_done():
    denoiser, cond = mlp()
    policy, sampler = (
        AdaptiveGuidance(scale=SCALE, threshold=0.997, metric="x0", armed_below_ratio=1e9),
        Heun(num_steps=8),
    )
    run = policy.begin(denoiser, cond)
    rows, guided = rows_of(denoiser), [BATCH]

    class Watching:
        def begin(self, denoiser: Denoiser, cond: Cond) -> Callable[..., Tensor]:
            def estimate(x: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
                x0 = run(x, t, s)
                guided.append(int(run.guided.sum()))
                return x0

            return estimate

    sample(sampler, denoiser, cond, Watching())
    assert rows == [BATCH + still for still in guided[:-1]]
    assert guided == sorted(guided, reverse=True)
    assert any(0 < still < BATCH for still in guided)  # or this test would show nothing


def test_a_sample_under_adaptive_guidance_does_not_depend_on_its_batch():
    denoiser, cond = mlp()
    policy, sampler = (
        AdaptiveGuidance(scale=SCALE, threshold=0.997, metric="x0", armed_below_ratio=1e9),
        Heun(num_steps=8),
    )
    together = sample(sampler, denoiser, cond, policy)
    noise = random(BATCH, 3)
    alone = torch.cat([sampler(denoiser, noise[i : i + 1], cond[i : i + 1], guidance=policy) for i in range(BATCH)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


def cosines(metric, *times: float) -> list[float]:
    """Between the two estimates of guided Gaussians on a cosine path, mean over guided x_t."""
    path = VPCosine(t_start=0.01)
    denoiser, mean = TwoGaussians(path), MEANS[0] + 4 * (MEANS[1] - MEANS[0])
    count, found = 4000, []
    for time in times:
        t = torch.full((count,), time, dtype=torch.float64)
        alpha, sigma = path.alpha(t)[:, None], path.sigma(t)[:, None]
        x = alpha * mean + (alpha**2 * VARIANCES + sigma**2).sqrt() * random(count, 3, seed=3)
        cond = Cond(label=torch.ones(count, dtype=torch.int64))
        pair = evaluate_pair(denoiser, x, t, cond, denoiser.unconditional(cond), torch.ones(count, dtype=torch.bool))
        found.append(float(alignment(denoiser, pair, metric).mean()))
    return found


def test_the_cosine_of_eps_is_near_1_at_both_ends_and_that_of_x0_only_rises():
    high, middle, low = cosines("eps", 0.99, 0.5, 0.05)
    assert (high, middle, low) == pytest.approx((0.9994, 0.9979, 0.9997), abs=1e-4)  # the first would end guidance
    in_x0 = cosines("x0", 0.99, 0.7, 0.5, 0.3, 0.05)
    assert in_x0 == sorted(in_x0)


def test_adaptive_guidance_is_armed_by_a_fall_of_the_cosine_or_below_its_ratio():
    path = VPCosine()
    denoiser, x = TwoGaussians(path), random(BATCH, 3)
    level = {ratio: path.time_of_ratio(numbers(*[ratio] * BATCH)) for ratio in (1000.0, 100.0, 3.0, 1.9)}

    def guided_after(*ratios: float, threshold: float = 0.0) -> bool:
        run = AdaptiveGuidance(scale=SCALE, threshold=threshold, metric="eps").begin(denoiser, ONES)
        for ratio in ratios:
            run(x * float(path.sigma(level[ratio])[0]), level[ratio])
        return bool(run.guided.all())

    assert guided_after(1000.0)  # the cosine is above any threshold, but not armed
    assert not guided_after(1000.0, 3.0)  # has fallen
    assert not guided_after(1.9)  # late enough
    assert guided_after(1000.0, 3.0, threshold=1.1)


def test_guidance_that_looks_at_both_estimates_needs_a_network_that_has_both():
    denoiser, cond = mlp()
    denoiser.net.accepts = frozenset({"label", "guidance_input"})
    with pytest.raises(ValueError, match="takes the scale as input, at 1 NFE per step; give a number"):
        AdaptiveGuidance(scale=2.0).begin(denoiser, cond)


# LinearAG


def test_least_squares_finds_the_weights_that_made_the_target():
    features = random(3, 20, 4)
    weights, intercept = numbers(0.5, -1.0, 2.0), random(4, seed=1)
    fit = least_squares(features, torch.tensordot(weights, features, 1) + intercept, has_intercept=True)
    torch.testing.assert_close(fit.weights, weights, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fit.intercept, intercept, rtol=1e-10, atol=1e-10)


def test_the_residual_of_least_squares_is_orthogonal_to_its_features():
    features, target = random(3, 20, 4), random(20, 4, seed=1)
    residual = target - least_squares(features, target, has_intercept=False).predict(features)
    products = torch.einsum("mbp,bp->m", features, residual)
    torch.testing.assert_close(products, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-10)


def linear(
    *, has_intercept: bool, evaluations: range | None = None, threshold: float = 1.1
) -> tuple[Denoiser, LinearAG]:
    """Fitted on other noise than the tests'."""
    denoiser = TwoGaussians(EDM(sigma_min=0.02, sigma_max=20.0))
    cond = Cond(label=torch.ones(32, dtype=torch.int64))
    adaptive = AdaptiveGuidance(scale=SCALE, threshold=threshold, metric="x0")
    noise = random(32, 3, seed=5)
    fitted = fit_linear_ag(
        denoiser,
        Heun(num_steps=6),
        noise,
        cond,
        adaptive=adaptive,
        evaluations=evaluations,
        has_intercept=has_intercept,
    )
    return denoiser, fitted


def test_linear_ag_with_an_intercept_is_exact_on_gaussians_of_one_covariance():
    denoiser, policy = linear(has_intercept=True, evaluations=range(1, 11))
    rows = rows_of(denoiser)
    found = sample(Heun(num_steps=6), denoiser, ONES, policy)
    assert rows == [2 * BATCH, *[BATCH] * 10]
    torch.testing.assert_close(found, sample(Heun(num_steps=6), denoiser, ONES, SCALE), rtol=1e-6, atol=1e-6)


def test_linear_ag_predicts_every_other_call_of_the_first_half():
    denoiser, policy = linear(has_intercept=False)
    rows = rows_of(denoiser)
    sample(Heun(num_steps=6), denoiser, ONES, policy)
    assert rows == [BATCH if number in (1, 3) else 2 * BATCH for number in range(11)]


def test_linear_ag_comes_closer_to_guidance_than_the_condition_alone():
    denoiser, policy = linear(has_intercept=False)
    target = sample(Heun(num_steps=6), denoiser, ONES, SCALE)
    found, unguided = (sample(Heun(num_steps=6), denoiser, ONES, guidance) for guidance in (policy, 1.0))
    assert (found - target).norm() < 0.2 * (unguided - target).norm()


def test_linear_ag_ends_guidance_as_adaptive_guidance_does():
    denoiser, policy = linear(has_intercept=True, threshold=-1.0)
    rows = rows_of(denoiser)
    sample(Heun(num_steps=6), denoiser, ONES, policy)
    assert rows[-1] == BATCH
    assert sum(rows) < 2 * BATCH * 11 - 2 * BATCH


@pytest.mark.parametrize("evaluations", [[0], [11]])
def test_a_call_that_cannot_be_predicted_is_refused(evaluations):
    with pytest.raises(ValueError, match="must be among 1 to 10"):
        linear(has_intercept=False, evaluations=evaluations)


# All of them


@with_every_sampler
@pytest.mark.parametrize(
    "policy",
    [
        CFG(scale=SCALE),
        Interval(scale=SCALE, ratio_low=0.2, ratio_high=20.0),
        CFGPlusPlus(scale=0.5),
        AdaptiveGuidance(scale=SCALE),
        LinearAG(AdaptiveGuidance(scale=SCALE), {}),
    ],
    ids=["cfg", "interval", "cfg++", "adaptive", "linear_ag"],
)
def test_every_sampler_takes_every_policy_and_it_changes_the_image(sampler, policy):
    denoiser, cond = mlp()
    found, unguided = (sample(sampler, denoiser, cond, guidance) for guidance in (policy, 1.0))
    assert found.shape == (BATCH, 3)
    assert bool(found.isfinite().all())
    assert not torch.equal(found, unguided) or sampler.name == "one_call"
