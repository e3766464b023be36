"""BOOT: the signal ODE and its targets on an exact Gaussian, the reading of networks, whom the loss reaches."""

import math
from dataclasses import replace

import pytest
import torch
from support.closed_forms import numbers, on_every_path, random
from support.signal_gaussian import COVARIANCE, MEAN, draw_at, exact_signal, gaussian, inner_times
from support.tiny_players import CLASSES, SHAPE, small_teacher
from torch import Tensor, nn

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser, freeze
from diffdistill.diffusion.path import EDM, Flow, Path, VPCosine, expand
from diffdistill.diffusion.sampling import OneCall, transfer
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import Karras, LogNormal, Uniform
from diffdistill.distillation.method import Batch, Players, Problem
from diffdistill.methods.boot import Boot
from diffdistill.networks.analytic import gaussian_flow
from diffdistill.networks.mlp import MLPConfig
from diffdistill.networks.signal import SignalConfig, signal_config
from diffdistill.settings.schema import UserError

NO_BATCH = Batch(torch.empty(0))


class Exact(nn.Module):
    """The Gaussian's exact student."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def forward(self, eps: Tensor, t: Tensor, cond: Cond = NO_COND, guidance: float = 1.0) -> Tensor:
        return exact_signal(self.path, eps, t)


class Chain(nn.Module):
    """A student whose signal at each grid time is a learnable affine map of the noise."""

    def __init__(self, times: Tensor) -> None:
        super().__init__()
        self.times = times
        self.offset = nn.Parameter(torch.zeros(len(times), 3, dtype=torch.float64))
        self.gain = nn.Parameter(torch.zeros(len(times), 3, 3, dtype=torch.float64))

    def forward(self, eps: Tensor, t: Tensor, cond: Cond = NO_COND, guidance: float = 1.0) -> Tensor:
        index = (t[:, None] - self.times).abs().argmin(1)
        return self.offset[index] + torch.einsum("bde,be->bd", self.gain[index], eps)


# The signal ODE


@on_every_path
def test_the_exponential_target_is_ddim_read_as_a_signal(path):
    t = inner_times(path)
    s, students = path.time_of_ratio(0.7 * path.ratio(t)), Exact(path)
    draw = draw_at(path, s, t)
    x = path.diffuse(exact_signal(path, draw["eps"], t), draw["eps"], t)
    moved = transfer(path, x, gaussian(path)(x, t), t, s)
    signal = (moved - expand(path.sigma(s), x) * draw["eps"]) / expand(path.alpha(s), x)
    found = Boot().bootstrap(Players(teacher=gaussian(path), generator=students), draw)
    torch.testing.assert_close(found, signal, rtol=1e-9, atol=1e-9)


@on_every_path
@pytest.mark.parametrize("target", ["exponential", "euler"])
def test_no_step_leaves_the_signal_where_it_is(path, target):
    t = inner_times(path)
    draw = draw_at(path, t, t)
    found = Boot(target=target).bootstrap(Players(teacher=gaussian(path), generator=Exact(path)), draw)
    assert torch.equal(found, exact_signal(path, draw["eps"], t))


@pytest.mark.parametrize("path", [EDM(), VPCosine(), Flow()], ids=lambda path: path.name)
@pytest.mark.parametrize("target", ["exponential", "euler"])
def test_the_exact_student_s_bootstrap_error_falls_with_the_square_of_the_step(path, target):
    t = inner_times(path)

    def error(step: float) -> float:
        s = t - step * t
        draw = draw_at(path, s, t)
        found = Boot(target=target).bootstrap(Players(teacher=gaussian(path), generator=Exact(path)), draw)
        return float((found - exact_signal(path, draw["eps"], s)).abs().max())

    coarse, fine = error(2e-3), error(1e-3)
    assert coarse < 1e-3
    assert coarse / fine == pytest.approx(4, rel=0.1)


def test_on_edm_s_path_both_targets_are_the_same():
    path = EDM()
    t = inner_times(path)
    draw, players = draw_at(path, 0.8 * t, t), Players(teacher=gaussian(path), generator=Exact(path))
    exponential, euler = (Boot(target=target).bootstrap(players, draw) for target in ("exponential", "euler"))
    torch.testing.assert_close(exponential, euler, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", [VPCosine(), Flow()], ids=lambda path: path.name)
def test_the_signal_s_slope_is_minus_lambda_s_times_what_is_missing(path):
    t, eps, h = inner_times(path), random(9, 3), 1e-6
    slope = (exact_signal(path, eps, t + h) - exact_signal(path, eps, t - h)) / (2 * h)
    y = exact_signal(path, eps, t)
    missing = gaussian(path)(path.diffuse(y, eps, t), t) - y
    wanted = expand(path.log_ratio_derivative(t), y) * missing  # lambda = -log(alpha / sigma)
    torch.testing.assert_close(slope, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", [VPCosine(t_start=1e-9, t_end=1 - 1e-9), Flow(t_start=1e-9, t_end=1 - 1e-9)])
def test_the_exact_signal_ends_at_the_exact_sample_and_starts_at_the_mean(path):
    eps = random(5, 3)
    last, first = (torch.full((5,), t, dtype=torch.float64) for t in (path.t_min, path.t_max))
    values, vectors = torch.linalg.eigh(COVARIANCE)
    sample = MEAN + eps @ (vectors * values.sqrt()) @ vectors.T
    torch.testing.assert_close(exact_signal(path, eps, last), sample, rtol=1e-6, atol=1e-6)
    flown = gaussian_flow(path, MEAN, COVARIANCE, path.sigma(first)[:, None] * eps, first, last)
    torch.testing.assert_close(flown, sample, rtol=1e-6, atol=1e-6)
    start = gaussian(path)(path.sigma(first)[:, None] * eps, first)
    torch.testing.assert_close(exact_signal(path, eps, first), start, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(start, MEAN.expand(5, 3), rtol=1e-6, atol=1e-6)


@on_every_path
def test_bootstrapping_to_a_constant_estimate_forgets_the_start_by_the_product_of_the_ratios(path):
    class Constant(nn.Module):
        accepts, num_classes, has_null_condition = frozenset[str](), 0, False

        def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
            return MEAN.expand_as(x)

    times = inner_times(path).flip(0)
    y = start = random(1, 3, seed=3)
    for t, s in zip(times[:-1, None], times[1:, None], strict=True):
        players = Players(teacher=Denoiser(Constant(), path, "x0"), generator=lambda *_, y=y, **__: y)  # type: ignore[arg-type]
        y = Boot().bootstrap(players, draw_at(path, s, t))
    forgotten = path.ratio(times[-1:]) / path.ratio(times[:1])
    torch.testing.assert_close(y, MEAN + forgotten * (start - MEAN), rtol=1e-9, atol=1e-9)


# The fixed point


def chain_of_ddim(path: Path, times: Tensor) -> tuple[Chain, Tensor]:
    """The student that is DDIM along `times` (rising) from the teacher's estimate at the last, and its noise."""
    student, teacher, eps = Chain(times), gaussian(path), torch.cat([torch.zeros(1, 3), torch.eye(3)]).double()
    last = times[-1].expand(4)
    y = teacher(path.sigma(last)[:, None] * eps, last)
    for i in reversed(range(len(times))):
        student.offset.data[i] = y[0]
        student.gain.data[i] = (y[1:] - y[0]).T
        if i:
            t, s = times[i].expand(4), times[i - 1].expand(4)
            x = path.diffuse(y, eps, t)
            moved = transfer(path, x, teacher(x, t), t, s)
            y = (moved - path.sigma(s)[:, None] * eps) / path.alpha(s)[:, None]
    return student, eps


@on_every_path
def test_ddim_from_the_boundary_is_the_fixed_point_on_a_grid(path):
    times = torch.linspace(path.t_min, path.t_max, 12, dtype=torch.float64)
    student, _ = chain_of_ddim(path, times)
    players = Players(teacher=gaussian(path), generator=student)
    draw = draw_at(path, times[:-1], times[1:])
    loss = Boot().generator_loss(players, draw, NO_BATCH)
    assert loss.total < 1e-12  # alpha at t_max is about 0.002 on some paths: rounding is divided by it


@pytest.mark.parametrize("path", [EDM(sigma_min=0.05, sigma_max=8.0), Flow(t_start=0.02, t_end=0.98)])
def test_the_fixed_point_s_call_at_the_least_time_is_ddim_from_pure_noise_and_its_boundary(path):
    times = torch.linspace(path.t_min, path.t_max, 12, dtype=torch.float64)
    student, _ = chain_of_ddim(path, times)
    student.path = path  # type: ignore[assignment]
    eps, last = random(6, 3), times[-1].expand(6)
    teacher = gaussian(path)
    start = path.diffuse(teacher(path.sigma(last)[:, None] * eps, last), eps, last)
    x = start
    for i in range(11, 0, -1):
        t, s = times[i].expand(6), times[i - 1].expand(6)
        x = transfer(path, x, teacher(x, t), t, s)
    wanted = (x - path.sigma(times[:1])[:, None] * eps) / path.alpha(times[:1])[:, None]
    torch.testing.assert_close(OneCall()(student, eps), wanted, rtol=1e-9, atol=1e-9)  # type: ignore[arg-type]


def test_training_reaches_the_gaussian_s_closed_form_student():
    """Without data, from zero, by the method's own draw and loss: within the discretisation of the exact sampler."""
    path = EDM(sigma_min=0.05, sigma_max=20.0)
    law = Karras(ratio_min=0.05, ratio_max=20.0, rho=7.0)
    times = law(torch.linspace(0, 1, 17, dtype=torch.float64), path)
    student = Chain(times)
    method = Boot(time_law=law, delta=1 / 16)
    players, problem = Players(teacher=gaussian(path), generator=student), Problem((3,), 0, path)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-2, betas=(0.0, 0.99))
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 3e-2 * min(1.0, 2 * (1 - step / 500))
        draw = method.draw(StepRandom(0, step, torch.arange(64)), problem)
        i = (draw["t"][:, None] - times).abs().argmin(1).clamp_min(1)  # the table knows these times alone
        draw |= {"t": times[i], "s": times[i - 1], "eps": draw["eps"].double()}
        method.generator_loss(players, draw, NO_BATCH).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    wanted, _ = chain_of_ddim(path, times)
    assert (student.gain[0] - wanted.gain[0]).abs().max() < 0.01
    assert (student.offset[0] - wanted.offset[0]).abs().max() < 0.01
    eps = random(500, 3)
    exact = exact_signal(path, eps, times[:1].expand(500))
    error = (student(eps, times[:1].expand(500)) - exact).square().mean().sqrt()
    assert error < 0.1 * exact.std()


# What the loss is made of


BASE = MLPConfig(width=16, blocks=2)
EDM_LAW = Karras()
FIRST_CLASS = Cond(label=torch.zeros(4, dtype=torch.int64))


def untrained(method: Boot, teacher: Denoiser) -> tuple[Denoiser, Problem]:
    """The student at its start, float64."""
    problem = Problem(SHAPE, CLASSES, teacher.path, teacher=teacher)
    network, predicts = method.student_model(BASE, teacher.predicts, problem)
    student = Denoiser(network.build(SHAPE, CLASSES, 0.1), teacher.path, predicts).double()
    problem = replace(problem, network=student)
    made = method.players(problem)["generator"]
    assert isinstance(made, Denoiser)
    return made, problem


def players_of(method: Boot, teacher: Denoiser) -> tuple[Players, Problem]:
    """The same, changed by a little."""
    student, problem = untrained(method, teacher)
    generator = torch.Generator().manual_seed(1)
    for parameter in student.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return Players(teacher=teacher, generator=student), problem


def drawn(method: Boot, problem: Problem, step: int = 0) -> dict[str, Tensor]:
    draw = method.draw(StepRandom(0, step, torch.arange(6)), problem)
    return {name: value.double() if value.is_floating_point() else value for name, value in draw.items()}


def test_the_loss_is_bootstrap_and_boundary_by_their_weights():
    teacher = small_teacher()
    method = Boot(time_law=EDM_LAW, bootstrap_weight=3.0, boundary_weight=0.5)
    players, problem = players_of(method, teacher)
    draw = drawn(method, problem)
    cond = Cond(label=draw["label"])
    last = torch.full_like(draw["s"], 80.0)
    bootstrap = ((players.generator(draw["eps"], draw["s"], cond) - method.bootstrap(players, draw)) ** 2).mean()
    start = teacher(80 * draw["eps"], last, cond)
    boundary = ((players.generator(draw["eps"], last, cond) - start) ** 2).mean()
    torch.testing.assert_close(method.generator_loss(players, draw, NO_BATCH).total, 3 * bootstrap + boundary / 2)


def test_the_gradient_is_that_of_the_calls_at_s_and_t_max_alone():
    teacher = small_teacher()
    method = Boot(time_law=EDM_LAW, boundary_weight=0.0)
    players, problem = players_of(method, teacher)
    draw = drawn(method, problem)
    fixed = method.bootstrap(players, draw)
    assert not fixed.requires_grad
    parameters = [*players.generator.parameters()]
    found = torch.autograd.grad(method.generator_loss(players, draw, NO_BATCH).total, parameters)
    gap = players.generator(draw["eps"], draw["s"], Cond(label=draw["label"])) - fixed.clone()
    for one, other in zip(found, torch.autograd.grad((gap**2).mean(), parameters), strict=True):
        torch.testing.assert_close(one, other)


def test_the_loss_reaches_the_generator_alone():
    teacher = small_teacher()
    method = Boot(time_law=EDM_LAW)
    players, problem = players_of(method, teacher)
    freeze(teacher)
    method.generator_loss(players, drawn(method, problem), NO_BATCH).total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(bool(p.grad.any()) for p in players.generator.parameters())


def test_times_are_a_step_of_the_law_apart_and_cover_the_whole_path():
    method = Boot(delta=0.25)
    draw = method.draw(StepRandom(0, 0, torch.arange(4000)), Problem((1,), 0, Flow(t_start=0.01, t_end=0.99)))
    apart = draw["t"] - draw["s"]
    inner = draw["t"] < 0.99
    torch.testing.assert_close(apart[inner], torch.full_like(apart[inner], 0.25 * 0.98))
    assert bool((apart >= 0).all())
    assert draw["s"].min() < 0.015
    assert draw["s"].max() > 0.985


# Guidance


def test_targets_are_guided_and_the_student_is_not_told_by_default():
    teacher = small_teacher()
    method = Boot(time_law=EDM_LAW, guidance=(2.0, 4.0))
    players, problem = players_of(method, teacher)
    draw = drawn(method, problem)
    assert bool(((draw["w"] >= 2) & (draw["w"] <= 4)).all())
    y = players.generator(draw["eps"], draw["t"], Cond(label=draw["label"]))
    x, cond = y + expand(draw["t"], y) * draw["eps"], Cond(label=draw["label"])
    with_cond, without = (teacher(x, draw["t"], cond, guidance=w) for w in (1, 0))
    f = without + expand(draw["w"], y) * (with_cond - without)
    share = expand(draw["s"] / draw["t"], y)
    torch.testing.assert_close(method.bootstrap(players, draw), (1 - share) * f + share * y)


def test_a_student_that_takes_w_starts_as_one_that_does_not_and_is_told_w_in_training_and_sampling():
    teacher = small_teacher()
    method = Boot(time_law=EDM_LAW, guidance=(2.0, 4.0), takes_guidance=True)
    players, problem = players_of(method, teacher)
    eps, t, cond = random(4, *SHAPE), torch.full((4,), 2.0, dtype=torch.float64), FIRST_CLASS
    low, high = (players.generator(eps, t, cond, guidance=w) for w in (2.0, 4.0))
    assert not torch.equal(low, high)
    made = OneCall()(players.generator, eps, cond, guidance=3.0)
    told = Cond(label=cond.label, guidance_input=torch.full((4,), 3.0, dtype=torch.float64))
    assert torch.equal(made, players.generator(eps, torch.full((4,), 0.002, dtype=torch.float64), told))
    draw = drawn(method, problem)
    seen = Cond(label=draw["label"])
    y = players.generator(draw["eps"], draw["t"], seen, guidance=draw["w"])
    f = teacher(y + expand(draw["t"], y) * draw["eps"], draw["t"], seen, guidance=draw["w"])
    share = expand(draw["s"] / draw["t"], y)
    torch.testing.assert_close(method.bootstrap(players, draw), (1 - share) * f + share * y)


def test_before_training_w_changes_nothing():
    teacher, method = small_teacher(), Boot(time_law=EDM_LAW, takes_guidance=True)
    made, _ = untrained(method, teacher)
    eps, t, cond = random(4, *SHAPE), torch.full((4,), 2.0, dtype=torch.float64), FIRST_CLASS
    plain = teacher.net(eps * 80 / math.sqrt(80**2 + 0.25), teacher.path.time_input(t), cond) * 0.5
    torch.testing.assert_close(made(eps, t, cond, guidance=7.0), plain)


# How a network is read


def test_an_edm_student_s_output_at_the_least_time_is_not_its_input():
    teacher = small_teacher()
    players, _ = players_of(Boot(time_law=EDM_LAW), teacher)
    eps, t = random(4, *SHAPE), torch.full((4,), 0.002, dtype=torch.float64)
    torch.testing.assert_close(teacher(eps, t, FIRST_CLASS), eps, rtol=0, atol=0.02)  # the trap: EDM's own reading
    assert (players.generator(eps, t, FIRST_CLASS) - eps).abs().mean() > 0.3


@pytest.mark.parametrize(
    ("path", "kind"), [(EDM(), "edm"), (EDM(), "x0"), (VPCosine(), "v"), (VPCosine(), "x0"), (Flow(), "flow")]
)
def test_a_student_starts_at_the_teacher_s_estimate_from_pure_noise(path, kind):
    teacher = Denoiser(small_teacher().net, path, kind)
    student, _ = untrained(Boot(), teacher)
    eps, last, cond = random(4, *SHAPE), torch.full((4,), path.t_max, dtype=torch.float64), FIRST_CLASS
    start = teacher(expand(path.sigma(last), eps) * eps, last, cond)
    # EDM's skip is left out: it is sigma_data^2 sigma / (sigma^2 + sigma_data^2), 0.003 of the noise here.
    torch.testing.assert_close(student(eps, last, cond), start, rtol=0, atol=0.015 if kind == "edm" else 1e-10)


def test_a_teacher_that_predicts_noise_is_refused():
    teacher = Denoiser(small_teacher().net, VPCosine(), "eps")
    with pytest.raises(UserError, match="predicts eps"):
        signal_config(teacher, MLPConfig())


@pytest.mark.parametrize("law", [Uniform(high=0.9), Karras(ratio_max=20.0), Karras(ratio_min=0.1)])
def test_a_law_that_leaves_out_an_end_of_the_path_is_refused(law):
    with pytest.raises(UserError, match=r"method.time_law: must go from 0.002 to 80"):
        players_of(Boot(time_law=law), small_teacher())


def test_a_law_with_infinite_tails_reaches_both_ends():
    players, _ = players_of(Boot(time_law=LogNormal()), small_teacher())
    assert "generator" in players


def test_guidance_needs_a_teacher_that_knows_no_class():
    teacher = small_teacher()
    teacher.net.has_null_condition = False
    with pytest.raises(UserError, match="class_dropout"):
        players_of(Boot(time_law=EDM_LAW, guidance=(1.0, 2.0)), teacher)


def test_features_of_a_signal_network_are_its_base_s():
    config = SignalConfig(base=BASE, input_scale=0.5, output_scale=-2.0, skip=0.25)
    net = config.build(SHAPE, CLASSES, 0.1).double()
    x, time_input, cond = random(4, *SHAPE), numbers(0.1, 0.2, 0.3, 0.4), FIRST_CLASS
    raw, features = net.base.forward_with_features(0.5 * x, time_input, cond)
    made, tapped = net.forward_with_features(x, time_input, cond)
    torch.testing.assert_close(made, 0.25 * x - 2 * raw)
    assert torch.equal(made, net(x, time_input, cond))
    assert torch.equal(tapped, features)
    assert torch.equal(net.features(x, time_input, cond), features)
