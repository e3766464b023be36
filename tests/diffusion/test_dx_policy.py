"""The DX policy against diffusers' PiflowScheduler, DDIM, and the probability-flow ODE of a Gaussian."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from support.closed_forms import PATHS, on_every_path, random
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser, Features, Network, Taps
from diffdistill.diffusion.dx_policy import DXPolicy, Segment, line_scale
from diffdistill.diffusion.line import line_time
from diffdistill.diffusion.path import EDM, Flow, Path, expand
from diffdistill.diffusion.sampling import ddim
from diffdistill.diffusion.steps import with_steps
from diffdistill.exported.first_steps import as_model
from diffdistill.inference.image_generator import ModelImageGenerator
from diffdistill.networks.analytic import gaussian_denoiser, gaussian_flow
from diffdistill.settings.schema import UserError

MEAN = random(3, seed=4) / 2
ROOT = random(3, 3, seed=5) / 2
COVARIANCE = ROOT @ ROOT.T + 0.05 * torch.eye(3, dtype=torch.float64)
HIGH = torch.tensor([1.0, 0.7, 0.5, 0.2], dtype=torch.float64)
LENGTH = torch.tensor([0.4, 0.3, 0.2, 0.2], dtype=torch.float64)


class Table(Network):
    """N outputs for one image, of a random linear map: flow's velocities."""

    accepts, num_classes, has_null_condition, resolution_multiple = frozenset[str](), 0, False, 1

    def __init__(self, channels: int, places: int) -> None:
        super().__init__()
        self.channels, self.places = channels, places
        self.register_buffer("map", 0.4 * random(places * channels, channels, seed=8))
        self.told: list[Tensor] = []

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        self.told.append(time_input)
        copies = x.unflatten(1, (self.places, self.channels))
        assert torch.equal(copies, copies[:, :1].expand_as(copies))
        assert isinstance(self.map, Tensor)
        return torch.einsum("oc,bc...->bo...", self.map.to(x.dtype), x[:, : self.channels] * (1 + time_input[0] / 1000))

    def features(self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None) -> Features:
        raise NotImplementedError

    def forward_with_features(
        self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None
    ) -> tuple[Tensor, Features]:
        raise NotImplementedError


@pytest.mark.parametrize("shift", [1.0, 3.2])
@pytest.mark.parametrize("places", [1, 2, 5])
def test_a_roll_out_is_diffusers_policy_s_to_rounding(shift: float, places: int) -> None:
    """Between any two times of a segment, of substeps in another number for each sample."""
    from diffusers.schedulers.scheduling_piflow import DXPolicy as Theirs
    from diffusers.schedulers.scheduling_piflow import policy_rollout_fm

    output, x, z = random(4, places, 6, 3), random(4, 6, 3, seed=1), random(4, 6, 3, seed=2)
    low = (HIGH - LENGTH).clamp_min(0)
    starts = HIGH - LENGTH * torch.tensor([0.0, 0.2, 0.5, 0.1], dtype=torch.float64)
    ends = low + LENGTH * torch.tensor([0.0, 0.3, 0.49, 0.0], dtype=torch.float64)
    segment = Segment(torch.empty(0), HIGH, low, 64, shift)
    level, first = segment.level(HIGH), segment.level(starts)
    theirs = Theirs(output, x, level, LENGTH, shift=shift)
    expected, _, _ = policy_rollout_fm(z, first[:, None, None], starts, ends, 64, theirs)
    ours = Segment(x[:, None] - level.reshape(-1, 1, 1, 1) * output, HIGH, low, 64, shift)
    torch.testing.assert_close(ours.carry(z, starts, ends), expected, rtol=1e-13, atol=1e-13)
    velocity = (z - ours.mean_x0(starts, starts)) / first[:, None, None]
    torch.testing.assert_close(velocity, theirs.pi(z, first), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("num_steps", "last"), [(1, 1.0), (4, 0.5)])
def test_all_steps_are_those_of_diffusers_piflow_scheduler(num_steps: int, last: float) -> None:
    """Theirs begins at sigma 1 with channels last, and computes in float32."""
    from diffusers import PiflowScheduler

    channels, places, shift = 3, 4, 3.2
    scheduler = PiflowScheduler(shift=shift, n_grid=places, final_step_size_scale=last, eps=1e-9)
    scheduler.set_timesteps(num_steps)
    net = Table(channels, places)
    noise = random(2, channels, 2, 3).float()
    sampler = DXPolicy(num_steps=num_steps, shift=shift, last_segment=last)
    ours = sampler(Denoiser(net, Flow(t_end=1 - 1e-7), "flow"), noise)
    sample = noise
    for told, time in zip(list(net.told), scheduler.timesteps, strict=True):
        torch.testing.assert_close(told, time.expand(2), rtol=1e-6, atol=0)
        copies = sample.repeat(1, places, 1, 1)
        output = net(copies, time.expand(2), Cond()).movedim(1, -1)
        sample = scheduler.step(output, time, sample.movedim(1, -1)).prev_sample.movedim(-1, 1)
    torch.testing.assert_close(ours, sample, rtol=1e-5, atol=1e-5)


@on_every_path
def test_with_one_estimate_a_call_a_segment_is_ddim_s_step(path: Path) -> None:
    sampler, denoiser, noise = DXPolicy(num_steps=3), gaussian_denoiser(path, MEAN, COVARIANCE), random(5, 3)
    times = sampler.times(path)
    start = noise * path.sigma(times[:1])
    torch.testing.assert_close(sampler(denoiser, noise), ddim(denoiser, start, times), rtol=1e-12, atol=1e-12)


def exact(path: Path, places: int, substeps: int) -> tuple[Segment, Tensor, Tensor]:
    """The Gaussian's own estimates along its flow from raw time 0.9 to 0.1, z at the one end and at the other."""
    high, low = torch.full((5,), 0.9, dtype=torch.float64), torch.full((5,), 0.1, dtype=torch.float64)
    z, raw = random(5, 3), torch.linspace(0.1, 0.9, places, dtype=torch.float64)
    denoiser = gaussian_denoiser(path, MEAN, COVARIANCE)

    def time(level: Tensor) -> Tensor:
        return path.time_of_ratio(level / (1 - level))

    x = z * line_scale(path, time(high))[:, None]
    estimates, ends = [], []
    for t in (time(one.expand(5)) for one in raw):
        x_t = gaussian_flow(path, MEAN, COVARIANCE, x, time(high), t)
        estimates.append(denoiser(x_t, t))
        ends.append(x_t / expand(line_scale(path, t), x_t))
    return Segment(torch.stack(estimates, 1), high, low, substeps), z, ends[0]


@pytest.mark.parametrize("path", [PATHS["flow"], PATHS["edm"], PATHS["vp_cosine"]], ids=["flow", "edm", "vp_cosine"])
def test_with_exact_estimates_a_roll_out_tends_to_the_ode_s_end(path: Path) -> None:
    """Of the second order in the distance of the places, and of the first in Euler's substeps."""

    def error(places: int, substeps: int) -> float:
        segment, z, end = exact(path, places, substeps)
        return float((segment.carry(z, segment.high, segment.low) - end).abs().max())

    by_places = [error(places, 20_000) for places in (3, 5, 9)]
    by_substeps = [error(129, substeps) for substeps in (80, 160, 320)]
    assert [a / b for a, b in pairwise(by_places)] == pytest.approx([4, 4], rel=0.25)
    assert [a / b for a, b in pairwise(by_substeps)] == pytest.approx([2, 2], rel=0.05)
    assert by_substeps[-1] < 0.01


def test_weights_are_a_mean_and_end_where_the_place_is() -> None:
    segment = Segment(random(4, 5, 2), HIGH, HIGH - LENGTH, 50)
    raw = segment.low + 0.3 * LENGTH
    for end in (segment.low, raw, raw - 0.01):
        weights = segment.weights(raw, end)
        assert bool((weights >= 0).all())
        torch.testing.assert_close(weights.sum(1), torch.ones(4, dtype=torch.float64))
    at_a_place = segment.weights(segment.low + LENGTH / 2, segment.low + LENGTH / 2)
    torch.testing.assert_close(at_a_place, torch.eye(5, dtype=torch.float64)[2].expand(4, 5), rtol=0, atol=1e-12)


@on_every_path
def test_segments_are_even_in_raw_time_from_the_path_s_end_to_the_image(path: Path) -> None:
    sampler = DXPolicy(num_steps=4, shift=2.0, last_segment=0.5)
    edges, times = sampler.edges(path), sampler.times(path)
    assert edges[-1] == 0
    assert bool((times >= path.t_min).all() and (times <= path.t_max).all())
    assert torch.equal(times, path.whole(times))
    expected = torch.tensor([1.0, 5 / 7, 3 / 7, 1 / 7, 0.0], dtype=torch.float64)
    last = line_time(path.ratio(torch.tensor([path.t_max], dtype=torch.float64)))
    expected[0] = last / (2 - last)
    torch.testing.assert_close(edges, expected, rtol=0, atol=2e-3)  # whole times of a discrete path


def test_its_number_of_segments_is_the_trained_one() -> None:
    with pytest.raises(UserError, match="num_steps = 2: this student was trained for 4 segments"):
        with_steps(DXPolicy(num_steps=4), EDM(), 2)
    assert with_steps(DXPolicy(num_steps=4), EDM(), 4) == DXPolicy(num_steps=4)


def test_its_calls_are_not_shown_or_taken_over_one_by_one() -> None:
    student = object.__new__(ModelImageGenerator)
    student.model = SimpleNamespace(spec=SimpleNamespace(sampler=DXPolicy(num_steps=4)))  # type: ignore[assignment]
    with pytest.raises(UserError, match="--estimates: one NFE of this student covers a whole segment"):
        as_model(student, "--estimates")
