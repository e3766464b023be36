"""Identities that tie BOOT and Hyper-SD to other methods, and Hyper-SD's published numbers."""

import pytest
import torch
from support.closed_forms import random
from support.signal_gaussian import COVARIANCE, MEAN, draw_at, exact_signal, gaussian, inner_times
from support.tiny_players import scene
from torch import Tensor, nn

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.path import Flow
from diffdistill.diffusion.sampling import DDIM, TCD
from diffdistill.distillation.method import Players
from diffdistill.distillation.segments import Stage
from diffdistill.methods.boot import Boot
from diffdistill.methods.hyper_sd import HyperSD
from diffdistill.networks.analytic import gaussian_flow

FLOW = Flow(t_start=1e-6, t_end=1 - 1e-9)


class ByAverageVelocity(nn.Module):
    """eps - u(eps; t, 1), u being MeanFlow's average velocity of the exact flow from time 1 to t."""

    def forward(self, eps: Tensor, t: Tensor, cond: Cond = NO_COND, guidance: float = 1.0) -> Tensor:
        arrived = gaussian_flow(FLOW, MEAN, COVARIANCE, eps, torch.ones_like(t), t)
        return eps - (eps - arrived) / (1 - t)[:, None]


def test_boot_s_signal_on_a_flow_is_the_noise_less_mean_flow_s_average_velocity() -> None:
    t, eps = inner_times(FLOW), random(9, 3)
    torch.testing.assert_close(ByAverageVelocity()(eps, t), exact_signal(FLOW, eps, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("target", ["exponential", "euler"])
def test_a_student_of_mean_flow_s_average_velocity_is_a_fixed_point_of_boot(target: str) -> None:
    t, student = inner_times(FLOW), ByAverageVelocity()
    players = Players(teacher=gaussian(FLOW), generator=student)

    def error(step: float) -> float:
        draw = draw_at(FLOW, t - step * t, t)
        found = Boot(target=target).bootstrap(players, draw)  # type: ignore[arg-type]
        return float((found - student(draw["eps"], draw["s"])).abs().max())

    assert error(1e-3) < 1e-3
    assert error(2e-3) / error(1e-3) == pytest.approx(4, rel=0.1)  # of second order in the step


def test_with_a_decay_of_zero_the_target_is_the_student_itself_as_in_pcm() -> None:
    method = HyperSD(stages=(Stage(segments=2),), steps=TCD(num_steps=2, grid=DDIM(num_steps=8)), target_decay=0.0)
    players, _, _ = scene(method)
    with torch.no_grad():
        method.after_step(players, {}, 1)
    for followed, own in zip(players.target.parameters(), players.generator.parameters(), strict=True):
        assert torch.equal(followed, own)
        assert followed is not own


def test_hyper_sd_goes_from_eight_segments_to_one_and_from_squares_to_the_discriminator() -> None:
    stages = HyperSD().stages
    assert [stage.segments for stage in stages] == [8, 4, 2, 1]
    assert [stage.mse_weight for stage in stages] == [1, 1, 0.5, 0.1]
    assert [stage.adversarial_weight for stage in stages] == [0, 0.1, 0.5, 1]


def test_tcd_s_default_noise_is_the_authors() -> None:
    assert TCD().eta == 0.3
