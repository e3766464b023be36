"""Samplers against diffusers, the exact flow of a Gaussian, and themselves."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from support.closed_forms import STABLE_DIFFUSION, on_every_path, random
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser, freeze
from diffdistill.diffusion.path import EDM, Flow, Path, VPCosine, VPDiscrete
from diffdistill.diffusion.sampling import DDIM, FewSteps, Heun, Sampler, ddim, transfer
from diffdistill.networks.analytic import gaussian_denoiser, gaussian_flow, mixture_denoiser
from diffdistill.networks.diffusers_unet import DiffusersUNet

MEAN = torch.tensor([0.7, -0.3, 0.1], dtype=torch.float64)
VARIANCES = torch.tensor([0.04, 0.25, 1.5], dtype=torch.float64)


def gaussian(path: Path) -> Denoiser:
    return gaussian_denoiser(path, MEAN, torch.diag(VARIANCES))


def times_of_ratios(path: Path, *ratios: float) -> Tensor:
    return path.time_of_ratio(torch.tensor(ratios, dtype=torch.float64))


def calls_of(denoiser: Denoiser) -> list[tuple[Tensor, Tensor]]:
    """The image and the time input of every later call of the network."""
    seen: list[tuple[Tensor, Tensor]] = []
    denoiser.net.register_forward_hook(lambda _, arguments, __: seen.append(arguments[:2]))
    return seen


def fresh(shape: tuple[int, ...]) -> Callable[[int], Tensor]:
    return lambda i: random(*shape, seed=100 + i)


# The transfer operator


@on_every_path
def test_transfer_to_its_own_time_is_the_identity(path):
    x, x0, t = random(4, 3), random(4, 3, seed=1), times_of_ratios(path, 0.1, 0.5, 2, 10)
    torch.testing.assert_close(transfer(path, x, x0, t, t), x, rtol=1e-12, atol=1e-12)  # cancels alpha_t x0


@on_every_path
def test_transfer_is_affine_in_the_estimate(path):
    x, first, second = random(4, 3), random(4, 3, seed=1), random(4, 3, seed=2)
    t, s = times_of_ratios(path, 0.2, 1, 4, 10), times_of_ratios(path, 0.1, 0.5, 2, 3)
    ends = [transfer(path, x, estimate, t, s) for estimate in (first, second)]
    mixed = transfer(path, x, first + 2.5 * (second - first), t, s)
    torch.testing.assert_close(mixed, ends[0] + 2.5 * (ends[1] - ends[0]), rtol=1e-11, atol=1e-11)


@on_every_path
def test_transfer_of_the_true_image_lands_on_its_own_noising(path):
    x0, eps = random(4, 3), random(4, 3, seed=1)
    t, s = times_of_ratios(path, 0.2, 1, 4, 10), times_of_ratios(path, 0.1, 0.5, 2, 3)
    found = transfer(path, path.diffuse(x0, eps, t), x0, t, s)
    torch.testing.assert_close(found, path.diffuse(x0, eps, s), rtol=1e-11, atol=1e-11)


# DDIM


@pytest.mark.parametrize("options", [{}, STABLE_DIFFUSION], ids=["linear", "scaled_linear"])
def test_ddim_gives_the_images_of_diffusers(options):
    torch.manual_seed(0)  # diffusers initialises from the global generator
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).double()
    denoiser = freeze(Denoiser(DiffusersUNet(model), VPDiscrete(**options), "eps"))
    scheduler = DDIMScheduler(**options, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)
    scheduler.set_timesteps(10)
    noise = random(2, 1, 8, 8)
    # The project starts from sigma_T times the noise, diffusers from the noise itself.
    sigma = denoiser.path.sigma(torch.tensor([999]))
    x = noise * sigma
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t, return_dict=False)[0], t, x, return_dict=False)[0]
    torch.testing.assert_close(DDIM(num_steps=10)(denoiser, noise), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 4, 10, 50, 1000])
def test_ddim_takes_the_trailing_indices_of_diffusers(num_steps):
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps)
    assert DDIM(num_steps=num_steps).times(VPDiscrete()).tolist() == scheduler.timesteps.tolist()


@on_every_path
@pytest.mark.parametrize("spacing", ["time", "karras"])
def test_ddim_on_a_gaussian_multiplies_its_modes_by_the_closed_form(path, spacing):
    sampler = DDIM(num_steps=12, spacing=spacing)
    times = sampler.times(path)
    alpha, sigma = path.alpha(times)[:, None], path.sigma(times)[:, None]
    gain = alpha * VARIANCES / (alpha**2 * VARIANCES + sigma**2)
    step = (alpha[1:] - alpha[:-1] * sigma[1:] / sigma[:-1]) * gain[:-1] + sigma[1:] / sigma[:-1]
    noise = random(5, 3)
    centred = noise * sigma[0] - alpha[0] * MEAN
    expected = MEAN + gain[-1] * step.prod(0) * centred
    torch.testing.assert_close(sampler(gaussian(path), noise), expected, rtol=1e-9, atol=1e-9)


@on_every_path
def test_the_error_of_ddim_halves_when_its_steps_double(path):
    errors = []
    t, s = times_of_ratios(path, 20, 0.05)
    x = random(5, 3) * path.sigma(t)
    exact = gaussian_flow(path, MEAN, torch.diag(VARIANCES), x, t.expand(5), s.expand(5))
    for num_steps in (100, 200):
        times = times_of_ratios(path, *torch.logspace(math.log10(20), math.log10(0.05), num_steps + 1).tolist())
        found = x
        for now, then in pairwise(times):
            t_now = now.expand(5)
            found = transfer(path, found, gaussian(path)(found, t_now), t_now, then.expand(5))
        errors.append((found - exact).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)  # the next order is 1 / 100


@on_every_path
def test_one_step_of_ddim_is_the_estimate_at_the_noisiest_time(path):
    noise, t = random(5, 3), torch.full((5,), path.t_max, dtype=torch.float64)
    direct = gaussian(path)(noise * path.sigma(t)[:, None], t)
    torch.testing.assert_close(DDIM(num_steps=1)(gaussian(path), noise), direct, rtol=1e-12, atol=1e-12)


# Heun


@on_every_path
def test_heun_with_18_steps_makes_35_evaluations(path):
    denoiser, sampler = gaussian(path), Heun()
    calls = calls_of(denoiser)
    sampler(denoiser, random(2, 3))
    assert len(calls) == sampler.num_evaluations == 35


@on_every_path
def test_the_error_of_heun_falls_to_a_quarter_when_its_steps_double(path):
    noise, errors = random(5, 3), []
    start = torch.full((5,), path.t_max, dtype=torch.float64)
    # Heun starts from pure noise without its alpha mean; so does the exact flow.
    last = torch.full((5,), path.t_min, dtype=torch.float64)
    x = path.alpha(start)[:, None] * path.ratio(start)[:, None] * noise
    cleanest = gaussian_flow(path, MEAN, torch.diag(VARIANCES), x, start, last)
    exact = gaussian(path)(cleanest, last)  # its last step goes from t_min to the estimate
    for num_steps in (40, 80):
        errors.append((Heun(num_steps=num_steps)(gaussian(path), noise) - exact).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)  # the next order is 1 / 40 times a constant
    assert errors[1] < 0.02


def test_heun_is_the_same_on_every_path_from_the_same_noise_level():
    edm = Heun(num_steps=12)(gaussian(EDM(sigma_min=0.01, sigma_max=50.0)), random(5, 3))
    path = Flow(t_start=0.01 / 1.01, t_end=50 / 51)
    torch.testing.assert_close(Heun(num_steps=12)(gaussian(path), random(5, 3)), edm, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sampler", [Heun(num_steps=6), DDIM(num_steps=6), FewSteps()], ids=lambda s: s.name)
def test_a_guided_sample_of_a_gaussian_is_a_sample_of_the_guided_gaussian(sampler: Sampler):
    means = torch.stack([MEAN, random(3, seed=1)])
    covariances = torch.diag(VARIANCES).expand(2, 3, 3)

    class FirstIsNoClass(Denoiser):
        def unconditional(self, cond: Cond) -> Cond:
            return Cond(label=torch.zeros_like(cond.label))

    pair = mixture_denoiser(EDM(), torch.ones(2), means, covariances, torch.tensor([0, 1]))
    found = sampler(FirstIsNoClass(pair.net, EDM(), "x0"), random(5, 3), Cond(label=torch.ones(5).long()), guidance=2.5)
    guided = gaussian_denoiser(EDM(), means[0] + 2.5 * (means[1] - means[0]), torch.diag(VARIANCES))
    torch.testing.assert_close(found, sampler(guided, random(5, 3)), rtol=1e-9, atol=1e-9)


# Few steps


@on_every_path
@pytest.mark.parametrize("init_noise", ["sigma", "unit"])
def test_one_step_is_the_direct_call_at_the_initial_level(path, init_noise):
    sampler, noise = FewSteps(init_noise=init_noise), random(5, 3)
    t = sampler.times(path).expand(5)
    start = noise * path.sigma(t)[:, None] if init_noise == "sigma" else noise
    torch.testing.assert_close(sampler(gaussian(path), noise), gaussian(path)(start, t), rtol=0, atol=0)


@on_every_path
def test_the_initial_level_is_the_same_noise_to_signal_ratio_on_every_path(path):
    ratio = path.ratio(FewSteps().times(path)).item()
    # A discrete path has whole numbers only, which are 0.4 % apart here.
    assert ratio == pytest.approx(2.5, rel=0.004 if isinstance(path, VPDiscrete) else 1e-12)


@pytest.mark.parametrize(("options", "index"), [({}, 440), (STABLE_DIFFUSION, 625)], ids=["ddpm", "stable_diffusion"])
def test_the_initial_level_has_its_known_index_on_discrete_paths(options, index):
    assert FewSteps().times(VPDiscrete(**options)).tolist() == [index]


@on_every_path
def test_the_input_of_each_step_is_the_last_image_noised_afresh(path):
    sampler, noise = FewSteps(init_ratio=10.0, later_ratios=(2.0, 0.5)), random(5, 3)
    denoiser, times = gaussian(path), sampler.times(path)[:, None].expand(3, 5)
    x = noise * path.sigma(times[0])[:, None]
    for i in range(2):
        x = path.diffuse(denoiser(x, times[i]), fresh((5, 3))(i), times[i + 1])
    expected = denoiser(x, times[2])
    found = sampler(denoiser, noise, fresh_noise=fresh((5, 3)))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@on_every_path
@pytest.mark.parametrize("kind", ["fixed", "ddim"])
def test_noise_between_steps_is_the_first_again_or_what_x_t_held(path, kind):
    denoiser, noise = gaussian(path), random(5, 3)
    sampler = FewSteps(init_ratio=10.0, later_ratios=(2.0,), later_noise=kind)
    first, last = sampler.times(path)[:, None].expand(-1, 5)
    x = path.sigma(first)[:, None] * noise
    x0 = denoiser(x, first)
    held = noise if kind == "fixed" else path.from_x0(x0, "eps", x, first)
    expected = denoiser(path.alpha(last)[:, None] * x0 + path.sigma(last)[:, None] * held, last)
    torch.testing.assert_close(sampler(denoiser, noise), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_rolling_out_to_a_step_repeats_the_first_steps_of_sampling(step):
    sampler, denoiser = FewSteps(init_ratio=10.0, later_ratios=(2.0, 0.5)), gaussian(VPCosine())
    calls = calls_of(denoiser)
    sampler(denoiser, random(5, 3), fresh_noise=fresh((5, 3)))
    whole = list(calls)
    calls.clear()
    start = sampler.roll_out(denoiser, random(5, 3), step=step, fresh_noise=fresh((5, 3)))
    assert len(calls) == step
    assert len(whole) == sampler.num_evaluations == 3
    for (x, t), (other_x, other_t) in zip(calls, whole, strict=False):
        assert torch.equal(x, other_x)
        assert torch.equal(t, other_t)
    assert torch.equal(start.x, whole[step][0])
    assert torch.equal(denoiser.path.time_input(start.t), whole[step][1])


def test_several_steps_without_fresh_noise_are_refused():
    with pytest.raises(ValueError, match="need fresh_noise"):
        FewSteps(later_ratios=(1.0,))(gaussian(EDM()), random(2, 3))


def test_levels_that_do_not_decrease_are_refused():
    with pytest.raises(ValueError, match="must decrease"):
        FewSteps(init_ratio=1.0, later_ratios=(2.0,))


def test_ddim_may_start_from_any_time():
    path, x = VPCosine(), random(5, 3)
    times = times_of_ratios(path, 1.0, 0.3)
    t, s = times[0].expand(5), times[1].expand(5)
    moved = transfer(path, x, gaussian(path)(x, t), t, s)
    torch.testing.assert_close(ddim(gaussian(path), x, times), gaussian(path)(moved, s), rtol=0, atol=0)
