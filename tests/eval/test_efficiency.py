"""The efficiency tool counts and times what it says: nothing of the warm-up, guidance twice, weights and tensors."""

import pytest
import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.sampling import FewSteps, FreshNoise, Heun
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.eval.evaluation import efficiency
from diffdistill.eval.evaluation.efficiency import measure_efficiency
from diffdistill.networks.mlp import MLPConfig
from diffdistill.settings.schema import UserError

SHAPE = (1, 8, 8)


class Clock:
    """A clock that only the sampler moves: 100 s in each of the first `slow` calls, then a second an image."""

    num_evaluations = 1

    def __init__(self, slow: int = 0) -> None:
        self.now, self.slow, self.sizes = 0.0, slow, list[int]()

    def perf_counter(self) -> float:
        return self.now

    def __call__(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        cond: Cond = NO_COND,
        *,
        guidance: float = 1.0,
        fresh_noise: FreshNoise | None = None,
    ) -> Tensor:
        assert fresh_noise is not None
        fresh_noise(0)
        self.sizes.append(len(noise))
        self.now += 100 if len([n for n in self.sizes if n == len(noise)]) <= self.slow else len(noise)
        return denoiser(noise, torch.ones(len(noise)), cond, guidance=guidance)


@pytest.fixture
def denoiser() -> Denoiser:
    network = MLPConfig(width=16, blocks=1).build(SHAPE, 10, 0.1)
    return Denoiser(network, EDM(), "edm").requires_grad_(False)


def test_the_median_leaves_out_the_warm_up(denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(slow=3)
    monkeypatch.setattr(efficiency, "time", clock)
    found = measure_efficiency(denoiser, clock, SHAPE, batch=7, warm_up=3, repeats=4)
    assert found.latency_ms == 1000
    assert found.throughput == 1
    assert (found.throughput_batch, found.warm_up, found.repeats) == (7, 3, 4)
    assert (clock.sizes.count(1), clock.sizes.count(7)) == (3 + 4 + 1, 3 + 4 + 1)


def test_a_single_slow_repeat_does_not_move_the_median(denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(slow=2)
    monkeypatch.setattr(efficiency, "time", clock)
    assert measure_efficiency(denoiser, clock, SHAPE, batch=7, warm_up=1, repeats=3).latency_ms == 1000


@pytest.mark.parametrize(("guidance", "times"), [(1.0, 1), (0.0, 1), (2.0, 2)])
def test_guidance_counts_twice_and_heuns_steps_as_the_sampler_says(
    denoiser: Denoiser, guidance: float, times: int
) -> None:
    found = measure_efficiency(denoiser, Heun(num_steps=3), SHAPE, guidance=guidance, batch=2, warm_up=1, repeats=1)
    assert found.num_evaluations == 5 * times


def test_parameters_device_and_dtype_are_named(denoiser: Denoiser) -> None:
    found = measure_efficiency(
        denoiser, FewSteps(), SHAPE, batch=2, warm_up=1, repeats=1, beside={"decoder": nn.Linear(2, 2)}
    )
    assert found.parameters == sum(p.numel() for p in denoiser.parameters())
    assert (found.dtype, found.compile, found.includes) == ("float32", False, ("decoder",))
    assert "cores of" in found.device
    assert found.threads == torch.get_num_threads()


class Spread(nn.Module):
    """A network that makes a tensor of `size` numbers beside its output."""

    accepts, num_classes, has_null_condition, resolution_multiple = frozenset[str](), 0, False, 1

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.size = nn.Parameter(torch.zeros(1000), requires_grad=False), size

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        wide = torch.ones(self.size)
        return x * wide[0]


def test_peak_memory_is_the_weights_and_what_is_alive_at_the_worst_moment() -> None:
    peaks = []
    for size in (10**6, 2 * 10**6):
        net = Denoiser(Spread(size), EDM(), "x0")
        found = measure_efficiency(net, FewSteps(), SHAPE, batch=2, warm_up=1, repeats=1)
        assert found.peak_memory_bytes is not None
        peaks.append(found.peak_memory_bytes)
    assert peaks[1] - peaks[0] == 4 * 10**6
    assert 4 * (10**6 + 1000) < peaks[0] < 4 * (10**6 + 1000) + 10_000


def test_drawing_noise_is_not_timed(denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    class SlowDraws(StepRandom):
        def normal(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
            clock.now += 1000
            return super().normal(name, shape, dtype)

    monkeypatch.setattr(efficiency, "time", clock)
    monkeypatch.setattr(efficiency, "StepRandom", SlowDraws)
    assert measure_efficiency(denoiser, clock, SHAPE, batch=2, warm_up=1, repeats=2).latency_ms == 1000
    assert clock.now > 4000  # the first and a later step's noise, for either batch


def test_no_images_cannot_be_timed(denoiser: Denoiser) -> None:
    with pytest.raises(UserError, match="batch = 0"):
        measure_efficiency(denoiser, FewSteps(), SHAPE, batch=0)
