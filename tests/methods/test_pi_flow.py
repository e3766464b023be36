"""pi-Flow: the released code's loss written out a second time, exact policies, the draws, and what is refused."""

from dataclasses import replace

import pytest
import torch
from support.closed_forms import on_every_path, random
from support.ring import NUM_CLASSES, PATH, ring_problem, ring_teacher, trained_generator
from support.tiny_players import CLASSES, small_teacher
from support.trajectory_ring import RingSignal
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser, Features, Network, Taps
from diffdistill.diffusion.dx_policy import DXPolicy, Segment
from diffdistill.diffusion.line import line_time
from diffdistill.diffusion.path import EDM, Flow, Path
from diffdistill.diffusion.sampling import DDIM
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Draw, Players, Problem
from diffdistill.methods.pi_flow import PiFlow
from diffdistill.networks.analytic import gaussian_denoiser, gaussian_flow
from diffdistill.networks.grid import Grid, GridConfig
from diffdistill.networks.mlp import MLPConfig
from diffdistill.settings.schema import UserError

SHAPE, BATCH, PLACES = (1, 4, 4), 6, 3
MEAN = random(3, seed=4) / 2
ROOT = random(3, 3, seed=5) / 2
COVARIANCE = ROOT @ ROOT.T + 0.05 * torch.eye(3, dtype=torch.float64)


def scene(method: PiFlow, path: Path | None = None, step: int = 0) -> tuple[Players, dict[str, Tensor], Batch]:
    """An MLP of N outputs, away from its teacher, in float64."""
    base, path = MLPConfig(width=16, blocks=2), path or EDM()
    predicts = "edm" if isinstance(path, EDM) else "x0"
    teacher = Denoiser(small_teacher().net.float(), path, predicts)
    student = Denoiser(GridConfig(base=base, places=method.places).build(SHAPE, CLASSES, 0.1), path, predicts)
    problem = Problem(SHAPE, CLASSES, path, teacher=teacher, network=student)
    generator = method.players(problem)["generator"].double()
    teacher.double().requires_grad_(False)
    noise = torch.Generator().manual_seed(1)
    for parameter in generator.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64)
    draw = method.draw(StepRandom(0, step, torch.arange(BATCH)), problem)
    draw = {name: value.double() if value.is_floating_point() else value for name, value in draw.items()}
    batch = Batch(random(BATCH, *SHAPE, seed=9), Cond(label=torch.tensor([0, 1, 2, 0, 1, 2])))
    return Players(teacher=teacher, generator=generator), draw, batch


def wide(value: Tensor) -> Tensor:
    return value.reshape(-1, 1, 1, 1)


class Written:
    """The released loss, on a flow path without shift: raw times are sigmas, and roll-outs are loops over substeps."""

    def __init__(self, x0: Tensor, high: Tensor, low: Tensor, substeps: int) -> None:
        self.x0, self.high, self.low, self.substeps = x0, high, low, substeps

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        place = ((t - self.low) / (self.high - self.low)).clamp(0, 1) * (self.x0.shape[1] - 1)
        below = place.floor().long().clamp(0, self.x0.shape[1] - 2)
        rows = torch.arange(len(t))
        share = wide(place - below)
        x0 = (1 - share) * self.x0[rows, below] + share * self.x0[rows, below + 1]
        return (x - x0) / wide(t)

    def roll_out(self, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        made = []
        for row in range(len(x)):
            one = Written(self.x0[row : row + 1], self.high[row : row + 1], self.low[row : row + 1], self.substeps)
            count = max(1, round(float((start[row] - end[row]) * self.substeps)))
            z, size = x[row : row + 1], (start[row] - end[row]) / count
            for number in range(count):
                z = z - size * one.velocity(z, (start[row] - number * size)[None])
            made.append(z)
        return torch.cat(made)

    def mean_velocity(self, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        short = ((start - end) * self.substeps).round() < 2
        mean = (x - self.roll_out(x, start, end)) / wide((start - end).clamp_min(1e-12))
        return torch.where(wide(short).bool(), self.velocity(x, start), mean)


def written_loss(method: PiFlow, players: Players, draw: Draw, batch: Batch) -> Tensor:
    path, steps = players.teacher.path, method.steps
    cond = Cond(label=draw["label"]) if method.start == "noise" else batch.cond
    edges = torch.cat([path.sigma(steps.times(path)), torch.zeros(1)])

    def policy(z: Tensor, number: Tensor) -> Written:
        high, low = edges[number], edges[number + 1]
        copies = z.repeat(1, method.places, 1, 1)
        x0 = players.generator(copies, high, cond).unflatten(1, (method.places, SHAPE[0]))
        return Written(x0, high, low, steps.substeps)

    number = draw["segment"]
    if method.start == "data":
        x = path.diffuse(batch.images, draw["eps"], edges[number])
    else:
        with torch.no_grad():
            starts = [draw["eps"] * edges[0]]
            for i in range(steps.num_steps - 1):
                one = policy(starts[-1], torch.full((BATCH,), i))
                starts.append(one.roll_out(starts[-1], one.high, one.low))
        x = torch.stack(starts, 1)[torch.arange(BATCH), number]
    learned = policy(x, number)
    frozen = Written(learned.x0.detach(), learned.high, learned.low, steps.substeps)
    size = learned.high - learned.low
    window = (method.window * size / (size * steps.substeps).round()).minimum(size)
    t, losses = learned.high, []
    for i in range(method.states):
        t_a = t - draw["own ways"][:, i] * (size - window)
        x_a = frozen.roll_out(x, t, t_a)
        with torch.no_grad():
            u = (x_a - players.teacher(x_a, t_a, cond, guidance=method.guidance)) / wide(t_a)
        t_b = t_a - draw["teacher's ways"][:, i] * (size - window)
        losses.append((learned.mean_velocity(x_a, t_a, t_b - window) - u).square().mean())
        x, t = x_a + u * wide(t_b - t_a), t_b
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("method", "step"),
    [
        (PiFlow(places=PLACES, steps=DXPolicy(substeps=20), window=0), 0),
        (PiFlow(places=PLACES, steps=DXPolicy(substeps=20), window=4, mixing_steps=4, guidance=2.0), 1),
        (PiFlow(places=PLACES, steps=DXPolicy(num_steps=2, substeps=20, last_segment=0.5), states=3), 0),
        (PiFlow(places=PLACES, steps=DXPolicy(num_steps=3, substeps=30), start="data", mixing_steps=2), 1),
    ],
    ids=["one step", "window and mixing", "two steps from noise", "three steps from data"],
)
def test_the_loss_and_its_gradient_are_the_released_code_s(method: PiFlow, step: int) -> None:
    players, draw, batch = scene(method, Flow(), step)
    parameters = list(players.generator.parameters())
    loss = method.generator_loss(players, draw, batch)
    expected = written_loss(method, players, draw, batch)
    torch.testing.assert_close(loss.total, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(loss.logs["velocity"], expected.detach(), rtol=1e-10, atol=0)
    found, wanted = (torch.autograd.grad(one, parameters, allow_unused=True) for one in (loss.total, expected))
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


class Fixed(Network):
    """N estimates that are parameters, whatever it is asked."""

    accepts, num_classes, has_null_condition, resolution_multiple = frozenset[str](), 0, False, 1

    def __init__(self, estimates: Tensor) -> None:
        super().__init__()
        self.places = estimates.shape[1]
        self.estimates = nn.Parameter(estimates)

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        return self.estimates.flatten(1, 2)

    def features(self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None) -> Features:
        raise NotImplementedError

    def forward_with_features(
        self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None
    ) -> tuple[Tensor, Features]:
        raise NotImplementedError


def on_a_gaussian(method: PiFlow, path: Path, estimates: Tensor) -> tuple[Players, dict[str, Tensor]]:
    teacher = gaussian_denoiser(path, MEAN, COVARIANCE)
    players = Players(teacher=teacher, generator=Denoiser(Fixed(estimates), path, "x0"))
    draw = method.draw(StepRandom(0, 0, torch.arange(len(estimates))), Problem((3,), 0, path))
    return players, draw | {"eps": random(len(estimates), 3)}


@on_every_path
def test_the_gradient_by_each_estimate_is_its_weight_times_the_gap_over_s_squared(path: Path) -> None:
    method = PiFlow(places=4, states=1, window=5, steps=DXPolicy(substeps=40))
    players, draw = on_a_gaussian(method, path, random(5, 4, 3, seed=7))
    method.generator_loss(players, draw, Batch(torch.empty(0))).total.backward()
    estimates = players.generator.net.estimates
    edges = method.steps.edges(path)
    high, low = edges[:1].expand(5), edges[1:].expand(5)
    segment = Segment(estimates.detach(), high, low, 40)
    raw = high - draw["own ways"][:, 0] * (high - 5 * high / (high * 40).round())
    z = segment.carry(random(5, 3) * high[:, None], high, raw)
    level = raw[:, None]
    x0 = gaussian_denoiser(Flow(), MEAN, COVARIANCE)(z, raw)
    weights = segment.weights(raw, raw - 5 * high / (high * 40).round())
    gap = torch.einsum("bn,bnd->bd", weights, estimates.detach()) - x0
    expected = 2 * torch.einsum("bn,bd->bnd", weights, gap / level**2) / gap.numel()
    torch.testing.assert_close(estimates.grad, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mixing_steps", [0, 3])
def test_the_loss_is_zero_where_the_policy_has_the_teacher_s_velocity(mixing_steps: int) -> None:
    """All of whose images are one: its x0 is that image, wherever it is asked."""
    method = PiFlow(places=4, mixing_steps=mixing_steps, steps=DXPolicy(num_steps=2))
    players, draw = on_a_gaussian(method, EDM(), MEAN.expand(5, 4, 3).clone())
    players = Players(
        teacher=gaussian_denoiser(EDM(), MEAN, torch.zeros(3, 3, dtype=torch.float64)), generator=players.generator
    )
    assert method.generator_loss(players, draw, Batch(torch.empty(0))).total.item() < 1e-24
    players.generator.net.estimates.data[:, 2] += 0.1
    assert method.generator_loss(players, draw, Batch(torch.empty(0))).total.item() > 1e-4


def test_the_exact_estimates_loss_falls_by_the_fourth_power_of_their_number() -> None:
    """In the limit of small substeps: what is left is x0 between two places, which is linear there."""
    path = Flow(t_start=0.2)
    losses = []
    for places in (5, 9, 17):
        method = PiFlow(places=places, window=0, steps=DXPolicy(substeps=2000))
        high = method.steps.edges(path)[:1].expand(20)
        x = random(20, 3) * high[:, None]
        raw = torch.linspace(0, 1, places, dtype=torch.float64)[:, None] * high
        teacher = gaussian_denoiser(path, MEAN, COVARIANCE)
        exact = [teacher(gaussian_flow(path, MEAN, COVARIANCE, x, high, t.clamp_min(1e-6)), t) for t in raw]
        players, draw = on_a_gaussian(method, path, torch.stack(exact, 1))
        losses.append(method.generator_loss(players, draw, Batch(torch.empty(0))).total.item())
    assert losses[0] / losses[2] > 0.5 * 16**2


def test_the_teacher_s_share_falls_from_one_to_none() -> None:
    method = PiFlow(states=3, mixing_steps=4)
    problem = Problem(SHAPE, CLASSES, EDM())
    for step, share in ((0, 1.0), (1, 0.75), (4, 0.0), (9, 0.0)):
        draw = method.draw(StepRandom(0, step, torch.arange(50)), problem)
        torch.testing.assert_close(draw["teacher's ways"].sum(1), torch.full((50,), share, dtype=torch.float64))
        own = draw["own ways"]
        assert bool((own >= 0).all() and (own.sum(1) <= 1 - share).all())
        assert share == 1 or float(own.sum(1).max()) > 0.9 * (1 - share)


def test_segments_are_drawn_by_their_lengths() -> None:
    method = PiFlow(steps=DXPolicy(num_steps=3, last_segment=0.5))
    draw = method.draw(StepRandom(0, 0, torch.arange(20_000)), Problem(SHAPE, CLASSES, Flow()))
    shares = torch.bincount(draw["segment"], minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.4, 0.4, 0.2]), rtol=0, atol=0.01)


def test_later_segments_start_where_the_student_comes_to() -> None:
    method = PiFlow(places=PLACES, steps=DXPolicy(num_steps=2))
    players, draw, batch = scene(method)
    draw["segment"] = torch.tensor([0, 1, 0, 1, 1, 0])
    cond = method.condition(players, draw, batch)
    found = method.start_of(players, draw, batch, cond)
    first, second, _ = method.steps.roll_out(players.generator, draw["eps"], cond)
    assert torch.equal(found, torch.where(wide(draw["segment"] == 0), first, second))
    assert not found.requires_grad
    level = line_time(EDM().ratio(torch.tensor([EDM().t_max])))
    torch.testing.assert_close(first, draw["eps"] * wide(level))


def test_the_loss_reaches_the_generator_alone_all_of_its_estimates_at_once() -> None:
    method = PiFlow(places=PLACES)
    players, draw, batch = scene(method)
    players.teacher.requires_grad_(True)
    method.generator_loss(players, draw, batch).total.backward()
    assert all(p.grad is None for p in players.teacher.parameters())
    head = players.generator.net.head
    assert all(bool(part.any()) for part in head.weight.grad.chunk(PLACES))


def test_it_looks_at_images_only_where_it_starts_from_them() -> None:
    assert PiFlow(start="data").needs_images
    assert not PiFlow().needs_images


def test_guidance_without_a_meaning_and_another_number_of_places_are_refused() -> None:
    teacher, base = small_teacher(0), MLPConfig(width=16, blocks=2)
    student = Denoiser(GridConfig(base=base, places=4).build(SHAPE, 0, 0.0), EDM(), "edm")
    problem = Problem(SHAPE, 0, EDM(), teacher=teacher, network=student)
    with pytest.raises(UserError, match=r"method\.guidance: 2\.0 .*class_dropout > 0"):
        PiFlow(places=4, guidance=2.0).players(problem)
    with pytest.raises(UserError, match=r"init: its generator gives 4 estimates per NFE, and method.places is 10"):
        PiFlow().players(problem)
    with pytest.raises(UserError, match=r"teacher: this method distils one"):
        PiFlow().players(replace(problem, teacher=None))


class RingEnd(RingSignal):
    @property
    def last_layer(self) -> nn.Module:
        return self.layers[-1]


@pytest.mark.full
def test_one_call_arrives_where_the_teacher_s_ode_does() -> None:
    """On the mixture ring: RMS distance from 256 steps of the exact teacher, in units of a mode's width."""
    steps = DXPolicy(substeps=64)
    method = PiFlow(steps=steps, places=8, window=0)
    torch.manual_seed(0)
    student = Denoiser(Grid(RingEnd(), 2, 8), PATH, "x0")  # type: ignore[arg-type]
    problem = replace(ring_problem(method), network=student, initial={"generator": student})
    trained = trained_generator(method, num_steps=600, lr=4e-3, problem=problem)
    noise, cond = random(2000, 2), Cond(label=torch.arange(2000) % NUM_CLASSES)
    with torch.no_grad():
        made = steps(trained, noise.float(), cond)  # type: ignore[arg-type]
        wanted = DDIM(num_steps=256, spacing="karras")(ring_teacher(), noise, cond)
    assert float((made - wanted).square().mean().sqrt()) < 0.12
