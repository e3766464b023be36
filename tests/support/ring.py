"""A 2-D mixture ring that a score-distillation method must learn in seconds, and the bars that tell right from wrong.

Eight modes of standard deviation 0.12 on the unit circle, modes 2c and 2c + 1 in class c; the teacher is exact.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.data.source import TensorImages
from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import Karras
from diffdistill.distillation.losses import denoising_loss
from diffdistill.distillation.method import Batch, Method, Players, Problem
from diffdistill.networks.analytic import Mixture, mixture_denoiser
from diffdistill.training.reports.distance import DistanceCurve

NUM_MODES, NUM_CLASSES, STD = 8, 4, 0.12
PATH = EDM(sigma_min=0.01, sigma_max=10.0)
TIME_LAW = Karras(ratio_min=0.05, ratio_max=3.0, rho=200.0)  # as good as log-uniform
INIT_RATIO = 1.0
BATCH = 256
NO_IMAGES = Batch(torch.zeros(0))


def ring_means() -> Tensor:
    angle = torch.arange(NUM_MODES, dtype=torch.float64) * (2 * math.pi / NUM_MODES)
    return torch.stack([angle.cos(), angle.sin()], 1)


def ring_teacher() -> Denoiser:
    variances = torch.full((NUM_MODES,), STD**2, dtype=torch.float64)
    classes = torch.arange(NUM_MODES) * NUM_CLASSES // NUM_MODES
    return mixture_denoiser(PATH, torch.ones(NUM_MODES), ring_means(), variances, classes)


class RingGenerator(nn.Module):
    """0.8 z + MLP(z, sin and cos of 2z and 5z, class): smooth features alone would be the limit, not the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.path = PATH
        self.layers = _mlp(10 + NUM_CLASSES, 96, 2)

    def forward(self, x: Tensor, t: Tensor, cond: Cond = NO_COND, **_: object) -> Tensor:
        z = x / t[:, None].float()
        waves = [wave(k * z) for k in (2, 5) for wave in (torch.sin, torch.cos)]
        return 0.8 * z + self.layers(torch.cat([z, *waves, _one_hot(cond)], 1))


class RingScore(nn.Module):
    """An MLP of (x, log sigma, class): a `Network`."""

    accepts = frozenset({"label"})
    num_classes = NUM_CLASSES
    has_null_condition = True
    resolution_multiple = 1

    def __init__(self) -> None:
        super().__init__()
        self.layers = _mlp(3 + NUM_CLASSES, 128, 2)

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        return self.forward_with_features(x, time_input, cond)[0]

    def features(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """The last hidden layer, [B, 128]."""
        hidden: Tensor = self.layers[:-1](torch.cat([x, 4 * time_input[:, None], _one_hot(cond)], 1))
        return hidden

    def forward_with_features(self, x: Tensor, time_input: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        features = self.features(x, time_input, cond)
        return self.layers[-1](features), features


@dataclass(frozen=True)
class RingResult:
    """coverage: modes hit.  accuracy: of the class.  quality: share within 3 standard deviations of a mode.
    energy, class_energy: unbiased energy distances to the truth, of all and the mean over classes."""

    coverage: int
    accuracy: float
    quality: float
    energy: float
    class_energy: float

    @property
    def passes(self) -> bool:
        """The bars: every right run of four methods met them, and the planted faults did not."""
        sharp = self.coverage == NUM_MODES and self.accuracy >= 0.99 and self.quality >= 0.95
        return sharp and self.energy <= 0.0015 and self.class_energy <= 0.006


def train_ring(
    method: Method, *, seed: int = 0, num_steps: int = 400, lr: float = 2e-3, curve: DistanceCurve | None = None
) -> RingResult:
    """Run a method's own losses and updates from a Gaussian generator; num_steps generator updates."""
    return measure_ring(trained_generator(method, seed=seed, num_steps=num_steps, lr=lr, curve=curve))


def ring_curve(count: int = 1024) -> DistanceCurve:
    """The distance of students to the ring, from as many of its samples."""
    return DistanceCurve(ring_samples(count))


def ring_samples(count: int, name: str = "teacher") -> Tensor:
    """[count, 2], classes in turn."""
    rng, mixture = StepRandom(7, 0, torch.arange(count)), ring_teacher().net
    assert isinstance(mixture, Mixture)
    cond = Cond(label=torch.arange(count) % NUM_CLASSES)
    return mixture.sample(rng.uniform(name), rng.normal(f"{name} normal", (2,)), cond).float()


def _samples(generator: nn.Module, average: list[Tensor], count: int = 1024) -> Tensor:
    """Of the averaged generator, always of the same noise."""
    rng = StepRandom(98, 0, torch.arange(count))
    weights = dict(zip(dict(generator.named_parameters()), average, strict=True))
    t = torch.full((count,), INIT_RATIO, dtype=torch.float64)
    args = (rng.normal("z", (2,)) * INIT_RATIO, t, Cond(label=torch.arange(count) % NUM_CLASSES))
    made: Tensor = torch.func.functional_call(generator, weights, args)
    return made


def trained_generator(
    method: Method,
    *,
    seed: int = 0,
    num_steps: int = 400,
    lr: float = 2e-3,
    problem: Problem | None = None,
    curve: DistanceCurve | None = None,
) -> nn.Module:
    """The average of the generator's weights after `num_steps` of its updates.  problem: by default `ring_problem`.
    curve: takes 16 readings of the average on its way."""
    torch.manual_seed(seed)
    problem = problem or ring_problem(method)
    players = Players(teacher=problem.teacher, **method.players(problem))  # type: ignore[arg-type]
    stored = method.prepare(problem, seed)
    with torch.no_grad():
        method.initialise(players, stored)
    trained = {name for update in method.updates for name in update.players}
    optimizers = {name: torch.optim.Adam(players[name].parameters(), lr=lr, betas=(0.0, 0.999)) for name in trained}
    average = [p.detach().clone() for p in players.generator.parameters()]
    total = num_steps * max(update.every for update in method.updates)
    for step in range(total):
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / total))
        rng = StepRandom(seed, step, torch.arange(step * BATCH, (step + 1) * BATCH))
        draw = method.draw(rng, problem)
        batch = replace(_real_batch(rng, players.teacher) if method.needs_images else NO_IMAGES, stored=stored)
        for update in method.updates:
            if not update.is_due(step, step * BATCH):
                continue
            for name in trained:
                players[name].requires_grad_(name in update.players)
            loss = method.call(update.loss, players, draw, batch)
            loss.total.backward()
            draw |= loss.carry
            for name in update.players:
                optimizers[name].step()
                optimizers[name].zero_grad()
            if "generator" in update.players:
                torch._foreach_lerp_(average, [p.data for p in players.generator.parameters()], 0.02)
        with torch.no_grad():
            method.after_step(players, stored, step + 1)
            if curve and (step + 1) % (total // 16) == 0:
                curve.read(step + 1, _samples(players.generator, average))
    for parameter, value in zip(players.generator.parameters(), average, strict=True):
        parameter.data.copy_(value)
    return players.generator


def ring_problem(method: Method) -> Problem:
    """The exact teacher, and players that can be trained where a run has copies of its teacher."""
    teacher, generator, score = ring_teacher(), RingGenerator(), Denoiser(RingScore(), PATH, "edm")
    _fit_to_teacher(score, teacher)
    initial: dict[str, Any] = {"generator": generator, "fake": score}
    problem = Problem((2,), NUM_CLASSES, PATH, teacher=teacher, initial=initial, batch_size=BATCH)
    labels = torch.arange(NUM_CLASSES)
    source = TensorImages(ring_means()[:: NUM_MODES // NUM_CLASSES].float(), labels)
    return replace(problem, classes=method.classes(problem, source))


@torch.no_grad()
def measure_ring(generator: nn.Module, count: int = 4000) -> RingResult:
    """Compare the generator's samples with the truth's."""
    rng = StepRandom(99, 0, torch.arange(count))
    label = torch.arange(count) % NUM_CLASSES
    cond = Cond(label=label)
    t = torch.full((count,), INIT_RATIO, dtype=torch.float64)
    x = generator(rng.normal("z", (2,)) * INIT_RATIO, t, cond).double()
    if not bool(torch.isfinite(x).all()):
        return RingResult(0, 0.0, 0.0, math.inf, math.inf)
    mixture = ring_teacher().net
    assert isinstance(mixture, Mixture)
    real = mixture.sample(rng.uniform("real"), rng.normal("real normal", (2,)), cond)
    distance, nearest = torch.cdist(x, ring_means()).min(1)
    close = distance < 3 * STD
    hits = torch.bincount(nearest[close], minlength=NUM_MODES)
    per_class = [energy_distance(x[label == c], real[label == c]) for c in range(NUM_CLASSES)]
    return RingResult(
        coverage=int((hits > count / NUM_MODES / 10).sum()),
        accuracy=float((nearest * NUM_CLASSES // NUM_MODES == label).double().mean()),
        quality=float(close.double().mean()),
        energy=energy_distance(x, real),
        class_energy=sum(per_class) / NUM_CLASSES,
    )


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'|, unbiased."""

    def inside(x: Tensor) -> Tensor:
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))

    return float(2 * torch.cdist(a, b).mean() - inside(a) - inside(b))


def _fit_to_teacher(score: Denoiser, teacher: Denoiser, num_steps: int = 200) -> None:
    """Start the fake score where distillation starts it: at the ring's teacher. Once for each start."""
    start = b"".join(parameter.detach().numpy().tobytes() for parameter in score.parameters())
    if start not in _FITTED:
        _fit(score, teacher, num_steps)
        _FITTED[start] = {name: tensor.clone() for name, tensor in score.state_dict().items()}
    score.load_state_dict(_FITTED[start])


_FITTED: dict[bytes, dict[str, Tensor]] = {}


def _fit(score: Denoiser, teacher: Denoiser, num_steps: int) -> None:
    optimizer = torch.optim.Adam(score.parameters(), lr=2e-3)
    for step in range(num_steps):
        rng = StepRandom(7, step, torch.arange(BATCH))
        batch = _real_batch(rng, teacher)
        t, eps = TIME_LAW(rng.uniform("t"), PATH), rng.normal("eps", (2,))
        optimizer.zero_grad()
        denoising_loss(score, batch.images, eps, t, batch.cond, weight="edm").backward()
        optimizer.step()


def _real_batch(rng: StepRandom, teacher: Denoiser) -> Batch:
    cond = Cond(label=rng.integers("real label", NUM_CLASSES))
    mixture = teacher.net
    assert isinstance(mixture, Mixture)
    return Batch(mixture.sample(rng.uniform("real"), rng.normal("real normal", (2,)), cond).float(), cond)


def _one_hot(cond: Cond) -> Tensor:
    assert cond.label is not None
    return F.one_hot(cond.label, NUM_CLASSES + 1)[:, :NUM_CLASSES].float()


def _mlp(size_in: int, width: int, size_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in (size_in, width, width):
        layers += [nn.Linear(size, width), nn.SiLU()]
    last = nn.Linear(width, size_out)
    nn.init.normal_(last.weight, std=1e-3)
    return nn.Sequential(*layers, last)
