"""Score fields: each one's closed form on Gaussians and mixtures, and where they rest."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.closed_forms import (
    Affine,
    GaussianFixture,
    averaged_by,
    normal_nodes,
    numbers,
    one_gaussian,
    pairs,
    random,
)
from torch import Tensor, nn

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM, VPCosine, VPDiscrete
from diffdistill.diffusion.sampling import FewSteps, transfer
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Players, Problem
from diffdistill.distillation.score_fields import (
    inverted,
    noise_of,
    noisier_time,
    shortest_mix,
    way_from_clean,
)
from diffdistill.methods.score_field import ScoreField
from diffdistill.networks.analytic import gaussian_denoiser, gaussian_flow, mixture_denoiser

UNIT = FewSteps(init_noise="unit")
SDS = ScoreField(steps=UNIT, subtract="noise", weight="one")
VSD = ScoreField(steps=UNIT, subtract="fake", weight="one")
ASD = ScoreField(steps=UNIT, subtract="noisier", weight="one")
CSD = ScoreField(subtract="no_class", weight="one")
ISM = ScoreField(subtract="cleaner", noising="inverted", weight="one")
FIXTURE = GaussianFixture()
M, S, TH, TA, SIGMA, A, B = (getattr(FIXTURE, name) for name in ("m", "s", "theta", "tau", "sigma", "A", "B"))


class Given(nn.Module):
    """A fake score of the generator's law as a whole, and where it is told a condition, what `told` says."""

    accepts, num_classes, has_null_condition, resolution_multiple = frozenset({"label"}), 1, True, 1

    def __init__(self, whole: Denoiser, told: Tensor) -> None:
        super().__init__()
        self.whole, self.told = whole, told

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        whole = self.whole.net(x, time_input, NO_COND)
        told = self.told.repeat(len(x) // len(self.told), 1)
        return torch.where((cond.label == 0)[:, None], told, whole)


def at(count: int, sigma: float) -> Tensor:
    """One level for all samples, [count]."""
    return torch.full((count,), sigma, dtype=torch.float64)


def field_gradient(
    method: ScoreField, players: dict[str, Any], draw: dict[str, Tensor], *, theta: float = TH, tau: float = TA
) -> Tensor:
    """E v dx/d(theta, tau) of the samples theta + tau z."""
    x = theta + tau * FIXTURE.z
    teacher = players.pop("teacher", one_gaussian(M, S))
    draw = {"eps": FIXTURE.eps, "t": FIXTURE.t, "label": torch.zeros(len(x), dtype=torch.int64)} | draw
    v = method.field(Players(teacher=teacher, **players), draw, x)
    weights = FIXTURE.weights[:, None]
    return torch.stack([(weights * v).sum(), (weights * v * FIXTURE.z).sum()])


# A1: SDS and VSD


def test_sds_seeks_the_mean_and_takes_the_spread_to_nothing() -> None:
    torch.testing.assert_close(FIXTURE.gradient(SDS), SIGMA / A * numbers(TH - M, TA), rtol=1e-11, atol=0)


def test_vsd_of_a_single_particle_has_the_expectation_of_sds() -> None:
    x = TH + TA * FIXTURE.z
    fake = Denoiser(Given(one_gaussian(TH, TA), x), EDM(), "x0")
    torch.testing.assert_close(
        field_gradient(VSD, {"fake": with_label(fake)}, {}), FIXTURE.gradient(SDS), rtol=1e-11, atol=1e-13
    )


def test_vsd_is_the_difference_of_scores_and_rests_at_the_teacher() -> None:
    expected = SIGMA * numbers((TH - M) / A, TA / A - TA / B)
    torch.testing.assert_close(FIXTURE.gradient(VSD), expected, rtol=1e-11, atol=0)
    at_rest = GaussianFixture(M, S)
    assert at_rest.gradient(VSD).abs().max() < 1e-14
    assert at_rest.gradient(SDS).abs().max() > 0.1


@pytest.mark.parametrize(("method", "rest"), [(VSD, (M, S)), (SDS, (M, 0.0))], ids=["VSD", "SDS"])
def test_down_vsd_a_generator_goes_to_the_teacher_s_law_and_down_sds_to_its_mean(
    method: ScoreField, rest: tuple[float, float]
) -> None:
    at = numbers(TH, TA)
    for _ in range(60):
        fake = {"fake": one_gaussian(*at.tolist())} if method is VSD else {}
        at = at - numbers(0.5 * A, A) / SIGMA * field_gradient(method, fake, {}, theta=float(at[0]), tau=float(at[1]))
    torch.testing.assert_close(at, numbers(*rest), rtol=0, atol=1e-3)


def with_label(fake: Denoiser) -> Denoiser:
    """The same, always told its condition: the fixture's draws have no classes."""

    class Told(Denoiser):
        def __call__(self, x_t: Tensor, t: Tensor, cond: Cond = NO_COND, **options: Any) -> Tensor:
            return Denoiser.__call__(self, x_t, t, Cond(label=torch.zeros(len(x_t), dtype=torch.int64)), **options)

    return Told(fake.net, fake.path, "x0")


# A2 to A4: ESD


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0, 1.2])
def test_esd_of_one_condition_a_sample_and_where_it_rests(share: float) -> None:
    esd = replace(VSD, fake_guidance=1 - share)

    def found(theta: float, tau: float) -> Tensor:
        fake = Denoiser(Given(one_gaussian(theta, tau), theta + tau * FIXTURE.z), EDM(), "x0")
        return field_gradient(esd, {"fake": with_label(fake)}, {}, theta=theta, tau=tau)

    expected = SIGMA * numbers((TH - M) / A, TA / A - share * TA / B)
    torch.testing.assert_close(found(TH, TA), expected, rtol=1e-10, atol=1e-12)
    square = share * A - SIGMA**2
    if square > 0:
        assert found(M, math.sqrt(square)).abs().max() < 1e-12


class ClassAffine(Affine):
    """offset_c + gain_c z."""

    def __init__(self, offset: list[float], gain: list[float], weights: Tensor) -> None:
        super().__init__(offset, 1.0, weights)
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        assert self.weights is not None
        return averaged_by(self.offset[cond.label][:, None] + self.gain[cond.label][:, None] * x, self.weights)


OFFSETS, GAINS, MEANS, STDS = [-0.3, 0.8], [0.9, 0.6], [-1.0, 1.2], [0.5, 0.3]
GRID = torch.linspace(-14, 14, 14001, dtype=torch.float64)


def two_classes(means: list[float], stds: list[float]) -> Denoiser:
    variances = numbers(*(std**2 for std in stds))
    return mixture_denoiser(EDM(), torch.ones(2), numbers(*means)[:, None], variances, torch.tensor([0, 1]))


def objective(offsets: list[float], gains: list[float], share: float) -> float:
    """E_c KL(q_c || p_c) - share I_q(x_t; c), on a grid."""
    made, teacher = two_classes(offsets, gains).net, two_classes(MEANS, STDS).net
    t, x = at(len(GRID), SIGMA), GRID[:, None]
    labels = [torch.full((len(GRID),), c) for c in (0, 1)]
    whole = made.log_prob(x, t, NO_COND)
    value = 0.0
    for label in labels:
        q, p = made.log_prob(x, t, Cond(label=label)), teacher.log_prob(x, t, Cond(label=label))
        value += 0.5 * float((q.exp() * (q - p - share * (q - whole))).sum() * (GRID[1] - GRID[0]))
    return value


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_esd_descends_the_divergence_less_what_a_sample_says_of_its_class(share: float) -> None:
    z, eps, weights = pairs(normal_nodes(), normal_nodes())
    net = ClassAffine(OFFSETS, GAINS, torch.cat([weights, weights]) / 2)
    label = torch.arange(2).repeat_interleave(len(z))
    draw = {"z": z.repeat(2)[:, None], "eps": eps.repeat(2)[:, None], "t": at(2 * len(z), SIGMA)}
    draw |= {"label": label, "step": torch.tensor(0)}
    players = Players(
        generator=Denoiser(net, EDM(), "x0"), teacher=two_classes(MEANS, STDS), fake=two_classes(OFFSETS, GAINS)
    )
    method = replace(VSD, fake_guidance=1 - share, weight="one")
    method.generator_loss(players, draw, Batch(torch.empty(0))).total.backward()
    expected = []
    for which, values in ((0, OFFSETS), (1, GAINS)):
        for c in (0, 1):
            ends = []
            for step in (1e-4, -1e-4):
                moved = [value + step * (number == c) for number, value in enumerate(values)]
                ends.append(objective(*((moved, GAINS) if which == 0 else (OFFSETS, moved)), share))
            expected.append((ends[0] - ends[1]) / 2e-4)
    found = torch.cat([net.offset.grad, net.gain.grad])
    torch.testing.assert_close(found / SIGMA, numbers(*expected), rtol=2e-6, atol=2e-6)


def test_a_scale_of_one_less_lambda_mixes_both_estimates_of_the_fake_score() -> None:  # A4
    fake, x = two_classes(OFFSETS, GAINS), random(7, 1)
    t, cond = at(7, SIGMA), Cond(label=torch.arange(7) % 2)
    with_class, without = (fake(x, t, cond, guidance=w) for w in (1.0, 0.0))
    torch.testing.assert_close(fake(x, t, cond, guidance=0.6), 0.6 * with_class + 0.4 * without, rtol=1e-12, atol=1e-14)


# A5: ASD


@pytest.mark.parametrize("sigma", [0.2, 1.3])
def test_asd_collapses_at_large_noise_and_repels_at_small(sigma: float) -> None:
    later = 1.25 * sigma
    k = sigma / (S**2 + sigma**2) - later / (S**2 + later**2)
    draw = {"t": torch.full_like(FIXTURE.t, sigma), "noisier t": torch.full_like(FIXTURE.t, later)}
    torch.testing.assert_close(field_gradient(ASD, {}, draw), k * numbers(TH - M, TA), rtol=1e-9, atol=1e-12)
    assert (k > 0) == (sigma > S)


def test_asd_without_a_gap_is_the_guidance_alone() -> None:
    teacher, x = two_classes(MEANS, STDS), random(6, 1)
    t = at(6, 0.7)
    draw = {"t": t, "noisier t": t, "eps": random(6, 1, seed=1), "label": torch.arange(6) % 2}
    found = replace(ASD, guidance=4.0).field(Players(teacher=teacher), draw, x)
    torch.testing.assert_close(found, 3 * CSD.field(Players(teacher=teacher), draw, x), rtol=1e-9, atol=1e-11)


def test_the_noisier_time_lies_beyond_by_a_share_and_within_the_path() -> None:
    path = VPCosine()
    t = torch.tensor([0.2, 0.9, 0.95], dtype=torch.float64)
    found = noisier_time(path, t, numbers(0.1, 0.0, 1.0))
    torch.testing.assert_close(found, numbers(0.2 + 0.1 * (0.2 - path.t_min), 0.9, path.t_max))
    assert float(noisier_time(EDM(), numbers(3.0), numbers(0.1))) > 3
    assert float(noisier_time(VPDiscrete(), numbers(500.0), numbers(0.0999))) == 550  # whole


# A6: CSD and CSM


def test_csd_is_the_classifier_s_gradient() -> None:
    teacher, x = two_classes(MEANS, STDS), torch.linspace(-3, 3, 41, dtype=torch.float64)[:, None]
    t, label = at(41, SIGMA), torch.zeros(41, dtype=torch.int64)
    moved = x.clone().requires_grad_()
    posterior = teacher.net.log_prob(moved, t, Cond(label=label)) - teacher.net.log_prob(moved, t, NO_COND)
    (gradient,) = torch.autograd.grad(posterior.sum(), moved)
    draw = {"t": t, "eps": torch.zeros_like(x), "label": label}
    found = CSD.field(Players(teacher=teacher), draw, x)
    torch.testing.assert_close(found, -SIGMA * gradient, rtol=1e-9, atol=1e-11)


class TwoMeans(Denoiser):
    """N(1.1, S^2) with the class, N(0.2, S^2) without."""

    def __init__(self) -> None:
        pair = mixture_denoiser(EDM(), torch.ones(2), numbers(1.1, 0.2)[:, None], numbers(S**2, S**2), torch.arange(2))
        super().__init__(pair.net, EDM(), "x0")

    def unconditional(self, cond: Cond) -> Cond:
        return Cond(label=torch.ones_like(cond.label))


def test_csd_on_gaussians_of_one_spread_never_stops() -> None:
    x = torch.linspace(-3, 3, 41, dtype=torch.float64)[:, None]
    draw = {"t": at(41, SIGMA), "eps": torch.zeros_like(x), "label": torch.zeros(41).long()}
    found = CSD.field(Players(teacher=TwoMeans()), draw, x)
    torch.testing.assert_close(found, torch.full_like(x, -SIGMA * 0.9 / A), rtol=1e-9, atol=0)


def test_guidance_adds_csd_to_any_field() -> None:
    teacher, x = two_classes(MEANS, STDS), random(6, 1)
    draw = {"t": at(6, 0.7), "eps": random(6, 1, seed=1), "label": torch.arange(6) % 2}
    players = Players(teacher=teacher)
    added = replace(SDS, guidance=7.5).field(players, draw, x) - SDS.field(players, draw, x)
    torch.testing.assert_close(added, 6.5 * CSD.field(players, draw, x), rtol=1e-9, atol=1e-11)


def test_csm_is_csd_where_inversion_arrives() -> None:
    teacher, x = two_classes(MEANS, STDS), random(4, 1)
    method = replace(CSD, noising="inverted", inversion_steps=3)
    draw = method.draw(StepRandom(0, 0, torch.arange(4)), Problem((1,), 2, EDM(), teacher=teacher))
    draw |= {"eps": random(4, 1, seed=2)}
    way = draw["way"].unbind(1)
    assert torch.equal(way[-1], draw["t"])
    cond = Cond(label=draw["label"])
    x_t = x + way[0][:, None] * draw["eps"]
    for t, s in pairwise(way):
        x_t = transfer(EDM(), x_t, teacher(x_t, t, cond, guidance=0.0), t, s)
    expected = noise_of(teacher, x_t, draw["t"], cond) - noise_of(teacher, x_t, draw["t"], cond, guidance=None)
    torch.testing.assert_close(method.field(Players(teacher=teacher), draw, x), expected, rtol=1e-9, atol=1e-11)


# A7: ISM and TSM

VARIANCES, CENTRE, START = numbers(0.25, 2.0), numbers(0.3, -0.5), numbers(1.1, 0.4)[None]


def vp_teacher() -> Denoiser:
    return gaussian_denoiser(VPCosine(), CENTRE, torch.diag(VARIANCES))


def angle(*values: float) -> list[Tensor]:
    """Times of VPCosine at which alpha and sigma are cosine and sine of these."""
    return [numbers(value) * (2 / math.pi) for value in values]


def test_noise_along_inversion_is_the_whitened_image_and_ism_collapses_to_the_mean() -> None:
    teacher, path = vp_teacher(), VPCosine()
    whitened = (START - CENTRE) / VARIANCES.sqrt()

    def h(t: Tensor) -> Tensor:
        return path.sigma(t) / (path.alpha(t) ** 2 * VARIANCES + path.sigma(t) ** 2).sqrt()

    first, s, t = angle(2e-3, 0.5, 0.8)
    way = [first + (s - first) * step / 400 for step in range(401)]
    rest = [s + (t - s) * step / 400 for step in range(401)]
    x_s = inverted(teacher, path.alpha(first) * START, way, NO_COND)
    x_t = inverted(teacher, x_s, rest, NO_COND)
    exact = gaussian_flow(path, CENTRE, torch.diag(VARIANCES), path.alpha(first) * START, first, t)
    torch.testing.assert_close(x_t, exact, rtol=3e-3, atol=3e-3)
    noises = [noise_of(teacher, x, time, NO_COND) for x, time in ((x_s, s), (x_t, t))]
    torch.testing.assert_close(noises[1], h(t) * whitened, rtol=3e-3, atol=3e-3)
    torch.testing.assert_close(noises[1] - noises[0], (h(t) - h(s)) * whitened, rtol=5e-3, atol=5e-3)
    assert bool((h(t) > h(s)).all())


def test_tsm_with_gamma_one_is_ism_and_with_gamma_zero_has_no_field() -> None:
    teacher = vp_teacher()
    first, s, t = angle(2e-3, 0.5, 0.8)
    draw = {"t": t, "way": torch.stack([first, s], 1), "eps": random(1, 2), "label": torch.zeros(1).long()}
    players = Players(teacher=teacher)
    x_s = inverted(teacher, VPCosine().diffuse(START, draw["eps"], first), [first, s], NO_COND)
    x_t = inverted(teacher, x_s, [s, t], NO_COND)
    expected = noise_of(teacher, x_t, t, NO_COND) - noise_of(teacher, x_s, s, NO_COND)
    assert torch.equal(ISM.field(players, draw, START), expected)
    assert not replace(ISM, gamma=0.0).field(players, draw, START).any()
    between = replace(ISM, gamma=0.3).field(players, draw, START)
    assert between.norm() < 0.2 * expected.norm()


def test_the_way_begins_nearly_clean_in_even_steps_and_ends_before_t() -> None:
    path, t = VPDiscrete(), numbers(500.0, 90.0, 999.0)
    way = torch.stack(way_from_clean(path, t, gap=80 / 999, num_steps=5, stride=40 / 999), 1)
    assert way[0].tolist() == [220, 260, 300, 340, 380, 420]
    assert way[1].tolist() == [0, 2, 4, 6, 8, 10]
    assert way[2, -1] == 919
    assert torch.equal(way_from_clean(path, t, gap=0.0, num_steps=2, stride=0.2)[-1], t)


# A8: BSD


def test_the_shortest_mix_is_the_shortest_of_the_segment_and_agrees_with_both() -> None:
    first, second = random(2000, 6), random(2000, 6, seed=1)
    v = shortest_mix(first, second)
    square = (v * v).sum(1)
    for one in (first, second):
        assert bool(((v * one).sum(1) >= square - 1e-12).all())
    shares = torch.linspace(0, 1, 401, dtype=torch.float64)[:, None, None]
    least = (shares * first + (1 - shares) * second).norm(dim=2).amin(0)
    assert bool((v.norm(dim=1) <= least + 1e-9).all())


def test_the_shortest_mix_of_opposed_fields_is_zero_and_a_loud_one_is_dropped_or_projected_out() -> None:
    g, loud = random(1, 6), random(1, 6, seed=3)
    assert shortest_mix(g, -2 * g).abs().max() < 1e-12
    loud = loud * torch.sign((g * loud).sum())
    assert torch.equal(shortest_mix(1e6 * loud, g), g)
    left = g - (g * loud).sum() / (loud * loud).sum() * loud
    torch.testing.assert_close(shortest_mix(-1e6 * loud, g), left, rtol=0, atol=1e-5)
    assert torch.equal(shortest_mix(g, g), g)


def test_bsd_mixes_the_class_with_the_smoothing() -> None:
    teacher, x = two_classes(MEANS, STDS), random(6, 1)
    draw = {"t": at(6, 0.7), "eps": random(6, 1, seed=1), "label": torch.arange(6) % 2}
    players, cond = Players(teacher=teacher), Cond(label=draw["label"])
    x_t = x + 0.7 * draw["eps"]
    free = noise_of(teacher, x_t, draw["t"], cond, guidance=0.0)
    first = noise_of(teacher, x_t, draw["t"], cond) - free
    for subtract, second in (("nothing", free / 18), ("noise", (free - draw["eps"]) / 18)):
        method = ScoreField(pull="balanced", subtract=subtract, weight="alpha", smoothing=1 / 18)  # type: ignore[arg-type]
        torch.testing.assert_close(method.field(players, draw, x), shortest_mix(first, second), rtol=1e-9, atol=1e-11)


# A9: TAID carried over to scores


def test_a_teacher_between_the_laws_has_the_same_field_but_for_its_length() -> None:
    teacher, fake = one_gaussian(M, S), one_gaussian(TH, TA)

    class Between(nn.Module):
        path, num_classes = EDM(), 0
        class_cond, convert = staticmethod(teacher.class_cond), staticmethod(teacher.convert)

        def forward(self, x: Tensor, t: Tensor, cond: Cond, **_: object) -> Tensor:
            return 0.3 * teacher(x, t, cond) + 0.7 * fake(x, t, cond)

    between = field_gradient(VSD, {"teacher": Between(), "fake": fake}, {})
    torch.testing.assert_close(between, 0.3 * FIXTURE.gradient(VSD), rtol=1e-9, atol=1e-12)
