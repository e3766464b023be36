"""Solved exactly by score distillation: an affine generator, a fake score that is learned, a Gaussian teacher."""

import pytest
import torch
from support.closed_forms import Affine, LearnedGaussian

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import LogNormal
from diffdistill.distillation.method import Batch, Method, Players, Problem
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.sid import SiD
from diffdistill.methods.sim import SIM
from diffdistill.networks.analytic import mixture_denoiser

PATH = EDM()
UNIT_STEPS = FewSteps(init_noise="unit")
LAW = LogNormal(mean=-0.5, std=0.7)
MEAN, STD = 0.7, 0.5
SIZE = 64  # in few dimensions the normaliser would correlate with the field


def arrival(method: Method, *, num_steps: int = 400) -> tuple[float, float]:
    """Mean and width of the generator after the method's own updates, from N(-0.4, 0.9^2)."""
    identity = torch.eye(SIZE, dtype=torch.float64)
    teacher = mixture_denoiser(PATH, torch.ones(1), torch.full((1, SIZE), MEAN), STD**2 * identity[None])
    generator = Denoiser(Affine([-0.4], 0.9), PATH, "x0")
    fake = Denoiser(LearnedGaussian([0.0, 0.0], 1.0), PATH, "x0")
    fake.net.accepts, fake.net.num_classes = frozenset(), 0
    players = Players(teacher=teacher, generator=generator, fake=fake)
    rates = {"generator": 0.02, "fake": 0.05}
    optimisers = {name: torch.optim.Adam(players[name].parameters(), betas=(0.0, 0.999)) for name in rates}
    problem, total = Problem((SIZE,), 0, PATH, teacher=teacher), num_steps * max(u.every for u in method.updates) // 2
    for step in range(total):
        draw = method.draw(StepRandom(0, step, torch.arange(32)), problem)
        for update in method.updates:
            if not update.is_due(step, 0):
                continue
            [name] = update.players
            for player in rates:
                players[player].requires_grad_(player == name)
            optimisers[name].param_groups[0]["lr"] = rates[name] * (1 - step / total)
            optimisers[name].zero_grad()
            loss = method.call(update.loss, players, draw, Batch(torch.empty(0)))
            loss.total.backward()
            optimisers[name].step()
            draw = draw | loss.carry
    return generator.net.offset.item(), abs(generator.net.gain.item())


@pytest.mark.parametrize(
    "method",
    [
        DMD2(steps=UNIT_STEPS, gan_weight=0.0, fake_updates=2, generator_time_law=LAW),
        SIM(steps=UNIT_STEPS, fake_updates=2, time_law=LAW),
        *(
            pytest.param(SiD(steps=UNIT_STEPS, fake_updates=2, alpha=alpha, time_law=LAW), marks=pytest.mark.full)
            for alpha in (0.5, 1.0, 1.2)
        ),
    ],
    ids=lambda method: f"{method.name} {getattr(method, 'alpha', '')}".strip(),
)
def test_alternating_updates_carry_the_generator_to_the_teacher(method: Method) -> None:
    assert arrival(method) == pytest.approx((MEAN, STD), abs=0.03)  # 2,048 noisy numbers a step
