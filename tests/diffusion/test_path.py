"""Paths against closed forms, autograd and diffusers: schedules, inverses, conversions, re-noising."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from support.closed_forms import PATHS, STABLE_DIFFUSION, on_every_path
from torch import Tensor

from diffdistill.diffusion.path import EDM, Flow, Path, Prediction, VPCosine, VPDiscrete, VPLinear, karras_ratios
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import Karras, KarrasIndex
from diffdistill.distillation.losses import DenoisingWeight, denoising_weight
from diffdistill.settings.schema import UserError

ROUND_OFF = 1e-12  # a handful of float64 operations on numbers of order one


def inner_times(path: Path, count: int = 7) -> Tensor:
    """Times spread over the path's range, its ends left out."""
    return path.t_min + torch.linspace(0.02, 0.97, count, dtype=torch.float64) * (path.t_max - path.t_min)


def noised(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0, eps, t and x_t for seven small images."""
    rng = StepRandom(0, 0, torch.arange(7))
    x0, eps = (rng.normal(name, (2, 3), torch.float64) for name in ("x0", "eps"))
    t = inner_times(path)
    return x0, eps, t, path.diffuse(x0, eps, t)


def linear_beta_integral(t: Tensor) -> Tensor:
    """The integral of 0.1 + 19.9 s over 0 .. t; the trapezoid is exact for a straight line."""
    return t * (0.1 + (0.1 + 19.9 * t)) / 2


@pytest.mark.parametrize(
    ("path", "alpha", "sigma"),
    [
        (EDM(), torch.ones_like, lambda t: t),
        (VPCosine(), lambda t: torch.cos(math.pi * t / 2), lambda t: torch.sin(math.pi * t / 2)),
        (
            VPLinear(),
            lambda t: torch.exp(-0.5 * linear_beta_integral(t)),
            lambda t: torch.sqrt(1 - torch.exp(-linear_beta_integral(t))),
        ),
        (Flow(), lambda t: 1 - t, lambda t: t),
        (Flow(shift=3.0), lambda t: (1 - t) / (1 + 2 * t), lambda t: 3 * t / (1 + 2 * t)),
    ],
    ids=["edm", "vp_cosine", "vp_linear", "flow", "shifted flow"],
)
def test_alpha_and_sigma_have_their_closed_forms(path, alpha, sigma):
    t = inner_times(path)
    torch.testing.assert_close(path.alpha(t), alpha(t), rtol=ROUND_OFF, atol=0)
    torch.testing.assert_close(path.sigma(t), sigma(t), rtol=ROUND_OFF, atol=0)


@pytest.mark.parametrize("name", ["vp_cosine", "vp_linear", "vp_discrete"])
def test_variance_preserving_paths_keep_alpha_squared_plus_sigma_squared_at_one(name):
    path = PATHS[name]
    t = inner_times(path, 50)
    total = path.alpha(t) ** 2 + path.sigma(t) ** 2
    torch.testing.assert_close(total, torch.ones_like(t), rtol=ROUND_OFF, atol=0)


@pytest.mark.parametrize("name", ["edm", "vp_cosine", "vp_linear", "flow"])
def test_log_ratio_derivative_is_what_autograd_finds(name):
    path = PATHS[name]
    t = inner_times(path).requires_grad_()
    (expected,) = torch.autograd.grad((path.alpha(t) / path.sigma(t)).log().sum(), t)
    torch.testing.assert_close(path.log_ratio_derivative(t).detach(), expected, rtol=1e-10, atol=0)


def test_log_ratio_derivative_of_a_discrete_path_is_the_difference_quotient_within_a_piece():
    path, t, h = VPDiscrete(), torch.tensor([0.5, 100.3, 998.5], dtype=torch.float64), 0.1
    quotient = -(path.ratio(t + h).log() - path.ratio(t - h).log()) / (2 * h)
    # Straight within a piece, so only the cancellation of two logarithms (1e-15 / h) is left.
    torch.testing.assert_close(path.log_ratio_derivative(t), quotient, rtol=1e-9, atol=0)


@on_every_path
def test_time_of_ratio_undoes_ratio(path):
    t = inner_times(path, 50)
    torch.testing.assert_close(path.time_of_ratio(path.ratio(t)), t, rtol=1e-9, atol=1e-9)


@on_every_path
def test_time_of_input_undoes_time_input(path):
    t = inner_times(path, 50)
    torch.testing.assert_close(path.time_of_input(path.time_input(t)), t, rtol=ROUND_OFF, atol=0)


@on_every_path
def test_noise_grows_with_time(path):
    assert bool((path.ratio(inner_times(path, 50)).diff() > 0).all())


@pytest.mark.parametrize(
    "options",
    [{"beta_schedule": "linear"}, STABLE_DIFFUSION, {"beta_schedule": "squaredcos_cap_v2"}],
    ids=["linear", "scaled_linear", "squaredcos_cap_v2"],
)
def test_a_discrete_path_has_the_alphas_cumprod_of_diffusers(options):
    expected = DDPMScheduler(**options).alphas_cumprod.double()
    found = VPDiscrete(**options).alpha(torch.arange(1000)) ** 2
    # diffusers multiplies a thousand factors in float32: an error of about sqrt(1000) x 6e-8.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "scheduler", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler]
)
def test_from_scheduler_reads_the_schedule_of_any_diffusers_scheduler(scheduler):
    path = VPDiscrete.from_scheduler(scheduler(**STABLE_DIFFUSION).config)
    t = torch.arange(1000)
    torch.testing.assert_close(path.alpha(t), VPDiscrete(**STABLE_DIFFUSION).alpha(t), rtol=ROUND_OFF, atol=0)


def test_from_scheduler_reads_trained_betas():
    betas = torch.linspace(0.001, 0.2, 20, dtype=torch.float64)
    path = VPDiscrete.from_scheduler(DDPMScheduler(num_train_timesteps=20, trained_betas=betas.tolist()).config)
    # diffusers holds betas in float32.
    torch.testing.assert_close(path.alpha(torch.arange(20)) ** 2, (1 - betas).cumprod(0), rtol=1e-6, atol=0)


def test_a_schedule_that_ends_without_signal_keeps_what_diffusers_keeps():
    """Of networks that predict v; eps says nothing there."""
    asked = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    zero = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **asked).config
    path, t = VPDiscrete.from_scheduler(zero), torch.tensor([999.0, 998.0, 500.0], dtype=torch.float64)
    kept = EulerDiscreteScheduler.from_config(zero).alphas_cumprod.double()
    torch.testing.assert_close(path.alpha(t)[0] ** 2, kept[-1], rtol=1e-6, atol=0)
    torch.testing.assert_close(path.alpha(t) ** 2, kept[t.long()], rtol=1e-3, atol=1e-9)  # its table is in float32
    x, v = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    x0 = path.to_x0(v, "v", x, t[:1])
    torch.testing.assert_close(x0, -v, rtol=0, atol=2.5e-4 * float(x.abs().max()))
    assert torch.isfinite(path.from_x0(x0, "score", x, t[:1])).all()
    assert float(path.time_of_ratio(path.ratio(t[:1]))) == pytest.approx(999)
    steep = VPDiscrete.from_scheduler(DDPMScheduler(**asked).config)
    assert (steep.ratio(torch.arange(1000)).diff() > 0).all()
    with pytest.raises(UserError, match="rescale_betas_zero_snr leaves no signal at the last step"):
        VPDiscrete.from_scheduler(DDPMScheduler(rescale_betas_zero_snr=True).config)


@pytest.mark.parametrize(("options", "index"), [({}, 440), (STABLE_DIFFUSION, 625)], ids=["ddpm", "stable_diffusion"])
def test_the_noise_level_2_5_has_its_known_index(options, index):
    time = VPDiscrete(**options).time_of_ratio(torch.tensor(2.5, dtype=torch.float64))
    assert round(time.item()) == index


@pytest.mark.parametrize(
    ("options", "index", "ratio"),
    [
        *[({}, i, r) for i, r in [(38, 0.1373), (440, 2.5023), (712, 13.1073)]],
        *[
            (STABLE_DIFFUSION, i, r)
            for i, r in [
                (20, 0.1380),
                (249, 0.6932),
                (399, 1.1606),
                (499, 1.6129),
                (625, 2.5017),
                (749, 4.0817),
                (899, 8.3028),
                (980, 13.0431),
                (999, 14.6146),
            ]
        ],
    ],
)
def test_discrete_paths_have_their_known_noise_levels(options, index, ratio):
    assert VPDiscrete(**options).ratio(torch.tensor(index)).item() == pytest.approx(ratio, abs=6e-5)  # four digits


def test_karras_indices_have_their_known_noise_levels():
    levels = EDM().karras_times(1000).flip(0)[torch.tensor([0, 2, 20, 980, 998, 999])]
    expected = torch.tensor([0.002, 0.0021, 0.0032, 72.0539, 79.5638, 80], dtype=torch.float64)
    torch.testing.assert_close(levels, expected, rtol=0, atol=6e-5)  # four digits


def test_the_karras_index_law_stays_between_its_known_ends():
    law, ends = KarrasIndex(low=20, high=980), torch.tensor([1e-9, 1 - 1e-9], dtype=torch.float64)
    expected = torch.tensor([0.0032, 72.0539], dtype=torch.float64)
    torch.testing.assert_close(law(ends, EDM()), expected, rtol=0, atol=6e-5)  # four digits


def test_sid_noise_levels_are_karras_levels_up_to_24_41():
    share = torch.tensor([0, 0.4, 0.8], dtype=torch.float64)
    levels = karras_ratios(share, 0.002, 80, 7)
    torch.testing.assert_close(levels, torch.tensor([0.002, 0.96542, 24.40834]).double(), rtol=0, atol=6e-6)
    law = Karras(ratio_max=levels[-1].item())
    torch.testing.assert_close(law(share / 0.8, EDM()), levels, rtol=1e-10, atol=0)


@on_every_path
def test_karras_times_start_at_the_noisiest_and_end_at_the_cleanest_time(path):
    times = path.karras_times(18)
    ends = torch.tensor([path.t_max, path.t_min], dtype=torch.float64)
    # atol: a discrete path finds its index 0 by interpolating logarithms.
    torch.testing.assert_close(times[[0, -1]], ends, rtol=1e-9, atol=1e-9)
    assert bool((times.diff() < 0).all())


@on_every_path
@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_reading_x0_undoes_every_prediction(path: Path, kind: Prediction):
    x0, _, t, x_t = noised(path)
    restored = path.to_x0(path.from_x0(x0, kind, x_t, t), kind, x_t, t)
    # At the largest noise x0 is read off a number some 1e5 times larger.
    torch.testing.assert_close(restored, x0, rtol=1e-9, atol=1e-9)


@on_every_path
def test_predictions_of_the_true_x0_are_the_true_eps_v_flow_and_conditional_score(path):
    x0, eps, t, x_t = noised(path)
    alpha, sigma = path.alpha(t)[:, None, None], path.sigma(t)[:, None, None]
    truths = {"eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0, "score": -eps / sigma}
    for kind, truth in truths.items():
        torch.testing.assert_close(path.from_x0(x0, kind, x_t, t), truth, rtol=1e-9, atol=1e-9)


@on_every_path
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
def test_denoising_weights_turn_the_x0_error_into_the_error_of_each_prediction(path: Path, kind: DenoisingWeight):
    x0, _, t, x_t = noised(path)
    estimate = x0 + StepRandom(1, 0, torch.arange(7)).normal("error", (2, 3), torch.float64)
    error = path.from_x0(estimate, kind, x_t, t) - path.from_x0(x0, kind, x_t, t)
    weighted = denoising_weight(kind, path, t, 0.5)[:, None, None] * (estimate - x0) ** 2
    torch.testing.assert_close(weighted, error**2, rtol=1e-8, atol=0)


def test_the_eps_weight_is_alpha_over_sigma_squared():
    t = inner_times(VPCosine())
    expected = 1 / torch.tan(math.pi * t / 2) ** 2
    torch.testing.assert_close(denoising_weight("eps", VPCosine(), t, 0.5), expected, rtol=1e-10, atol=0)


def test_the_v_weight_on_a_variance_preserving_path_is_one_over_sigma_squared():
    t = inner_times(VPCosine())
    expected = 1 / torch.sin(math.pi * t / 2) ** 2
    torch.testing.assert_close(denoising_weight("v", VPCosine(), t, 0.5), expected, rtol=1e-10, atol=0)


def test_the_flow_weight_on_the_flow_path_is_one_over_t_squared():
    t = inner_times(Flow())
    torch.testing.assert_close(denoising_weight("flow", Flow(), t, 0.5), 1 / t**2, rtol=1e-10, atol=0)


def test_the_edm_weight_makes_the_preconditioned_network_s_error_count_evenly():
    t, sigma_data = inner_times(EDM()), 0.7
    output_scale = t * sigma_data / (t**2 + sigma_data**2).sqrt()  # Karras et al. 2022, table 1
    expected = 1 / output_scale**2
    torch.testing.assert_close(denoising_weight("edm", EDM(), t, sigma_data), expected, rtol=1e-10, atol=0)


def test_the_snr5_weight_is_the_signal_to_noise_ratio_capped_at_five():
    t = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    expected = torch.tensor([5, 4, 0.25], dtype=torch.float64)
    torch.testing.assert_close(denoising_weight("snr5", EDM(), t, 0.5), expected, rtol=ROUND_OFF, atol=0)


@on_every_path
def test_noising_in_two_hops_has_the_moments_of_noising_in_one(path):
    # Three pixels hold the coefficients of x0, the first noise and the second noise.
    x0, first, second = torch.eye(3, dtype=torch.float64)[:, None]
    early, late = inner_times(path)[2:3], inner_times(path)[5:6]
    twice = path.renoise(path.diffuse(x0, first, early), second, early, late)[0]
    assert twice[0].item() == pytest.approx(path.alpha(late).item(), rel=1e-10)
    assert (twice[1:] ** 2).sum().item() == pytest.approx((path.sigma(late) ** 2).item(), rel=1e-10)


@on_every_path
def test_renoising_to_the_same_time_changes_nothing(path):
    _, eps, t, x_t = noised(path)
    torch.testing.assert_close(path.renoise(x_t, eps, t, t), x_t, rtol=0, atol=0)


@on_every_path
def test_renoising_to_a_cleaner_time_is_refused(path):
    _, eps, t, x_t = noised(path)
    with pytest.raises(ValueError, match="t_to is cleaner than t_from"):
        path.renoise(x_t, eps, t, t - 0.01 * (path.t_max - path.t_min))


def test_diffuse_refuses_times_that_are_not_one_per_sample():
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"t must be \[B\] = \(3,\), not \(1,\)"):
        EDM().diffuse(x, x, torch.ones(1))


def test_diffuse_returns_the_type_of_its_images():
    x = torch.ones(3, 2, dtype=torch.bfloat16)
    assert EDM().diffuse(x, x, torch.ones(3)).dtype == torch.bfloat16


def test_the_ends_of_a_path_must_be_in_order():
    with pytest.raises(ValueError, match=r"sigma_min = 2.0 must be below sigma_max = 1.0"):
        EDM(sigma_min=2.0, sigma_max=1.0)
