"""A student whose first steps are its teacher's: the two ends to the bit, the Gaussians' spread in closed form."""

from itertools import pairwise

import pytest
import torch
from support.closed_forms import numbers, one_gaussian, random
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.guidance.check import check_guidance
from diffdistill.diffusion.guidance.first_steps import FirstSteps, on_path
from diffdistill.diffusion.guidance.policies import Recorder
from diffdistill.diffusion.path import EDM, Flow, VPCosine, VPDiscrete
from diffdistill.diffusion.sampling import DDIM, TCD, FewSteps, Heun
from diffdistill.networks.analytic import mixture_denoiser
from diffdistill.settings.schema import UserError

TEACHER, STUDENT = 1.5, 0.3  # standard deviations: the student has lost most of the spread
STEPS = FewSteps(init_ratio=20.0, later_ratios=(4.0, 1.0))
SAMPLERS = [STEPS, FewSteps(init_ratio=20.0, later_ratios=(4.0,), later_noise="ddim"), DDIM(num_steps=4), TCD(), Heun()]


def fresh(i: int) -> Tensor:
    return random(64, 1, seed=10 + i)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)
def test_no_first_call_is_the_student_and_all_of_them_the_teacher(sampler) -> None:
    teacher, student, noise = one_gaussian(0.5, TEACHER), one_gaussian(0.5, STUDENT), random(64, 1)
    calls = sampler.num_evaluations
    for count, alone in ((0, student), (calls, teacher)):
        made = sampler(student, noise, guidance=FirstSteps(count, teacher), fresh_noise=fresh)
        assert torch.equal(made, sampler(alone, noise, fresh_noise=fresh))
    between = sampler(student, noise, guidance=FirstSteps(1, teacher), fresh_noise=fresh)
    assert not torch.equal(between, sampler(student, noise, fresh_noise=fresh))


def spread(stds: list[float], steps: FewSteps) -> float:
    """The images' variance where call i is the exact denoiser of N(0, stds[i]^2): every estimate is g_i x."""
    ratios = (steps.init_ratio, *steps.later_ratios)
    gains = [std**2 / (std**2 + ratio**2) for std, ratio in zip(stds, ratios, strict=True)]
    variance = steps.init_ratio**2
    for gain, (ratio, following) in zip(gains, pairwise(ratios), strict=False):
        if steps.later_noise == "fresh":
            variance = gain**2 * variance + following**2
        else:
            variance *= (gain + following / ratio * (1 - gain)) ** 2
    return variance * gains[-1] ** 2


@pytest.mark.parametrize("later_noise", ["fresh", "ddim"])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_the_spread_of_gaussians_is_the_closed_form(later_noise, count) -> None:
    steps = FewSteps(init_ratio=20.0, later_ratios=(2.0, 0.5), later_noise=later_noise)
    teacher, student = one_gaussian(0.0, TEACHER), one_gaussian(0.0, STUDENT)
    draws = [random(200_000, 1, seed=seed) for seed in range(3)]
    policy = FirstSteps(count, teacher)
    made = steps(student, draws[0], guidance=policy, fresh_noise=lambda i: draws[1 + i])
    expected = spread([TEACHER] * count + [STUDENT] * (3 - count), steps)
    assert float(made.var()) == pytest.approx(expected, rel=0.02)  # 200,000 samples: 0.3 % of a variance, six times


def test_the_teacher_brings_the_spread_back() -> None:
    """A deterministic sampler: with each further call of the teacher's, the variance is nearer to the teacher's own."""
    steps = FewSteps(init_ratio=20.0, later_ratios=(2.0, 0.5), later_noise="ddim")
    found = [spread([TEACHER] * count + [STUDENT] * (3 - count), steps) for count in range(4)]
    assert found == sorted(found)
    assert found[3] > 10 * found[0]


def test_each_side_has_its_own_guidance_and_condition() -> None:
    classes, means = torch.arange(2), numbers(-2.0, 2.0)[:, None]
    two = mixture_denoiser(EDM(), torch.ones(2), means, numbers(0.5, 0.5), classes)
    seen, rest, noise = Recorder(3.0), Recorder(1.0), random(8, 1)
    cond = Cond(label=torch.zeros(8, dtype=torch.long))
    STEPS(two, noise, cond, guidance=FirstSteps(1, two, seen, rest), fresh_noise=lambda i: random(8, 1, seed=i))
    assert (len(seen.evaluations), len(rest.evaluations)) == (1, 2)
    first, second = seen.evaluations[0], rest.evaluations[0]
    assert torch.equal(first.x0, two(first.x, first.t, cond, guidance=3.0))
    assert torch.equal(second.x0, two(second.x, second.t, cond))


def test_a_teacher_without_classes_is_told_none() -> None:
    classes, means = torch.arange(2), numbers(-2.0, 2.0)[:, None]
    two = mixture_denoiser(EDM(), torch.ones(2), means, numbers(0.5, 0.5), classes)
    made = FirstSteps(1, one_gaussian(0.0, 1.0)).begin(two, Cond(label=torch.zeros(4, dtype=torch.long)))
    assert made(random(4, 1), torch.ones(4)).shape == (4, 1)


@pytest.mark.parametrize(
    "other", [EDM(sigma_max=40), VPCosine(), Flow(shift=3.0), VPDiscrete(), Flow(network_time="time")]
)
def test_another_path_is_asked_at_the_same_level(other) -> None:
    x, t = random(5, 3), numbers(0.4, 0.7, 1.0, 3.0, 9.0)
    there, time = on_path(x, t, EDM(), other)
    exact = torch.equal(other.whole(time + 0.0003), time + 0.0003)  # else it is told whole numbers, and those alone
    assert torch.equal(other.whole(time), time)
    torch.testing.assert_close(other.ratio(time), t, rtol=1e-9 if exact else 0.02, atol=0)
    torch.testing.assert_close(there / other.sigma(time)[:, None], x / t[:, None])


def test_the_same_path_is_the_identity() -> None:
    x, t = random(5, 3), numbers(0.4, 0.7, 1.0, 3.0, 9.0)
    there, time = on_path(x, t, EDM(), EDM())
    assert there is x
    assert time is t


def test_a_gaussian_teacher_on_another_path_gives_the_same_image() -> None:
    steps, noise = FewSteps(init_ratio=9.0, later_ratios=(1.0,), later_noise="ddim"), random(64, 1)
    here, there = (one_gaussian(0.5, TEACHER, path) for path in (EDM(), VPCosine()))
    student = one_gaussian(0.5, STUDENT)
    made = [steps(student, noise, guidance=FirstSteps(1, teacher)) for teacher in (here, there)]
    torch.testing.assert_close(*made)


def test_guidance_of_either_is_checked() -> None:
    gaussian = one_gaussian(0.0, 1.0)
    for policy, said in (
        (FirstSteps(1, gaussian, 2.0), r"--guidance \(of the first steps\): 2"),
        (FirstSteps(1, gaussian, 1.0, 2.0), "--guidance: 2"),
    ):
        with pytest.raises(UserError, match=said):
            check_guidance(gaussian, "--guidance", policy)
    check_guidance(gaussian, "--guidance", FirstSteps(1, gaussian))
