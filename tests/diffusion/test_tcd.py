"""The TCD sampler against diffusers' schedulers, DDIM, multistep consistency sampling and a Gaussian's moments."""

import pytest
import torch
from diffusers import DDIMScheduler, TCDScheduler
from support.closed_forms import PATHS, STABLE_DIFFUSION, numbers, on_every_path, random
from torch import Tensor

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM, Flow, Path, VPCosine, VPDiscrete, VPLinear
from diffdistill.diffusion.sampling import DDIM, TCD, FewSteps, OneCall, transfer
from diffdistill.networks.analytic import gaussian_denoiser

MEAN = numbers(0.7, -0.3, 0.1)
VARIANCES = numbers(0.04, 0.25, 1.5)


def gaussian(path: Path) -> Denoiser:
    return gaussian_denoiser(path, MEAN, torch.diag(VARIANCES))


def eps_of(denoiser: Denoiser, x: Tensor, t: int) -> Tensor:
    time = torch.full((len(x),), float(t), dtype=torch.float64)
    return denoiser.convert(denoiser(x, time), "eps", x, time)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd_is_diffusers_scheduler(num_steps, eta, monkeypatch):
    path = VPDiscrete(**STABLE_DIFFUSION)
    denoiser, noise = gaussian(path), random(5, 3)
    fresh = [random(5, 3, seed=10 + i) for i in range(num_steps)]
    scheduler = TCDScheduler(**STABLE_DIFFUSION)
    scheduler.set_timesteps(num_steps)
    given = iter(fresh)
    monkeypatch.setattr("diffusers.schedulers.scheduling_tcd.randn_tensor", lambda *_, **__: next(given))
    x = noise * path.sigma(numbers(999))
    for t in scheduler.timesteps:
        x = scheduler.step(eps_of(denoiser, x, int(t)), t, x, eta=eta).prev_sample
    ours = TCD(num_steps=num_steps, eta=eta)(denoiser, noise, fresh_noise=lambda i: fresh[i])
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)  # the scheduler keeps its alphas in float32


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_eta_zero_is_diffusers_ddim_that_ends_at_the_first_index(num_steps):
    path = VPDiscrete(**STABLE_DIFFUSION)
    denoiser, noise = gaussian(path), random(5, 3)
    scheduler = DDIMScheduler(
        **STABLE_DIFFUSION, set_alpha_to_one=False, clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(num_steps)
    sampler = TCD(num_steps=num_steps, eta=0, grid=DDIM(num_steps=num_steps))
    x = noise * path.sigma(numbers(999))
    times = scheduler.timesteps.tolist()
    assert times == sampler.times(path)[:-1].tolist()
    for t in times:
        x = scheduler.step(eps_of(denoiser, x, t), t, x).prev_sample
    torch.testing.assert_close(sampler(denoiser, noise), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", [EDM(), VPCosine(), VPLinear(), Flow()], ids=lambda path: path.name)
@pytest.mark.parametrize("spacing", ["time", "karras"])
def test_eta_zero_on_a_continuous_path_is_ddim(path, spacing):
    grid = DDIM(num_steps=6, spacing=spacing)
    noise = random(5, 3)
    tcd = TCD(num_steps=6, eta=0, grid=grid)(gaussian(path), noise)
    torch.testing.assert_close(tcd, grid(gaussian(path), noise), rtol=1e-12, atol=1e-12)


def test_eta_one_is_multistep_consistency_sampling():
    path, noise = EDM(), random(5, 3)
    sampler = TCD(num_steps=3, eta=1, grid=DDIM(num_steps=3, spacing="karras"))
    first, *later = path.ratio(sampler.times(path)[:-1]).tolist()
    few = FewSteps(init_ratio=first, later_ratios=tuple(later))

    def fresh(i: int) -> Tensor:
        return random(5, 3, seed=10 + i)

    ours = sampler(gaussian(path), noise, fresh_noise=fresh)
    torch.testing.assert_close(ours, few(gaussian(path), noise, fresh_noise=fresh), rtol=1e-12, atol=1e-12)


@on_every_path
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
def test_a_jump_and_its_noise_keep_the_variance_of_the_path(path, eta):
    """x_t and the exact x0 give alpha x0 + sigma eps at the next time, whatever eta: mean and variance by algebra."""
    t, following = path.time_of_ratio(numbers(5.0)), path.time_of_ratio(numbers(1.0))
    target = (1 - eta) * following
    x0, eps = numbers(0.8)[:, None], numbers(-1.3)[:, None]
    arrived = transfer(path, path.diffuse(x0, eps, t), x0, t, target)
    scale = path.alpha(following) / path.alpha(target)
    torch.testing.assert_close(scale * path.alpha(target) * x0[0], path.alpha(following) * x0[0])
    variance = path.renoise(torch.zeros(1, 1, dtype=torch.float64), numbers(1.0)[:, None], target, following)[0] ** 2
    noise = (scale * path.sigma(target)) ** 2 + variance
    torch.testing.assert_close(noise, path.sigma(following) ** 2, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(arrived, path.diffuse(x0, eps, target), rtol=1e-10, atol=1e-10)


@on_every_path
def test_the_roll_out_and_one_more_call_are_the_sampler(path):
    sampler, noise, denoiser = TCD(num_steps=4, grid=DDIM(num_steps=8)), random(5, 3), gaussian(path)

    def fresh(i: int) -> Tensor:
        return random(5, 3, seed=10 + i)

    start = sampler.roll_out(denoiser, noise, step=3, fresh_noise=fresh)
    end = transfer(path, start.x, denoiser(start.x, start.t), start.t, torch.zeros_like(start.t))
    assert torch.equal(sampler(denoiser, noise, fresh_noise=fresh), end)


@on_every_path
def test_the_calls_start_at_the_segments_edges_where_they_divide_the_grid(path):
    grid = DDIM(num_steps=8)
    rising = torch.cat([torch.zeros(1, dtype=torch.float64), grid.times(path).flip(0)])
    assert torch.equal(TCD(num_steps=4, grid=grid).times(path), rising[[8, 6, 4, 2, 0]])


def test_several_steps_without_fresh_noise_are_refused_unless_eta_is_zero():
    with pytest.raises(ValueError, match="fresh_noise"):
        TCD(num_steps=2)(gaussian(EDM()), random(2, 3))
    TCD(num_steps=2, eta=0)(gaussian(EDM()), random(2, 3))


def test_more_calls_than_the_grid_has_times_are_refused():
    with pytest.raises(ValueError, match="the grid has only 3 times"):
        TCD(num_steps=4, grid=DDIM(num_steps=3))


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_one_call_asks_for_the_signal_at_the_least_time_of_unit_noise(path):
    asked = []

    def student(x: Tensor, t: Tensor, cond: object, guidance: float) -> Tensor:
        asked.append((x, t.tolist()))
        return x

    student.path = path  # type: ignore[attr-defined]
    noise = random(2, 3)
    OneCall()(student, noise)  # type: ignore[arg-type]
    assert asked == [(noise, [path.t_min] * 2)]
