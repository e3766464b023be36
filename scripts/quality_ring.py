"""Where DMD2 ends on the ring when its teacher is not the data: with a GAN, between the two.

    python scripts/quality_ring.py          # eight minutes of one core; writes results/quality-ring.jsonl

The teacher is a network fitted to the ring of radius 1, the data are the ring of radius 1.2. Both losses are the
library's; the student can be either ring, and starts from the teacher or from a network fitted to the data.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from quality_theory import BATCH, CLASSES, DIM, PATH, TIME_LAW, Drawn, fit, network, ring
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.sampling import FewSteps, Heun
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Players, Problem
from diffdistill.distillation.score_distillation import Features
from diffdistill.eval.records.environment import describe_environment
from diffdistill.methods.dmd2 import DMD2
from diffdistill.storage.atomic import write_text_atomically

RECORDS = Path(__file__).parents[1] / "results" / "quality-ring.jsonl"
TEACHER_RADIUS, DATA_RADIUS, STD = 1.0, 1.2, 0.12
INIT_RATIO, RATE, COUNT = 1.0, 1e-3, 8192
Start = Literal["teacher", "data"]
WEIGHTS = (0.0, 0.03, 0.2, 1.0)
CASES: tuple[tuple[float, Features, Start], ...] = (
    *((weight, "teacher", "teacher") for weight in WEIGHTS),
    *((weight, "teacher", "data") for weight in WEIGHTS),
    *((weight, "fake", "teacher") for weight in WEIGHTS[1:]),
)


@dataclass(frozen=True)
class OnTheRing:
    """Mean radii of a student's samples, half-way and at its end, of the fitted teacher's and of the data's.

    start: which network the student began as.  commit: of the code.
    """

    gan_weight: float
    features: Features
    start: Start
    seed: int
    steps: int
    half_way: float
    end: float
    teacher: float
    data: float
    commit: str | None


def student(
    gan_weight: float, features: Features, start: Start = "teacher", *, seed: int = 0, steps: int = 500
) -> OnTheRing:
    """Distil a ring with DMD2.  gan_weight: 0 for no GAN; the discriminator's loss has three times as much.
    steps: generator updates, each with three of the fake score; the teacher is fitted in three times as many.
    """
    torch.manual_seed(seed)
    real, law = ring(DATA_RADIUS, STD), ring(TEACHER_RADIUS, STD)
    teacher = network()
    fit(teacher, law, Drawn(seed), steps=3 * steps)
    teacher.requires_grad_(False)
    method = DMD2(
        steps=FewSteps(init_ratio=INIT_RATIO),
        fake_updates=3,
        gan_weight=gan_weight,
        gan_fake_weight=3 * gan_weight,
        gan_features=features,
        generator_time_law=TIME_LAW,
        fake_time_law=TIME_LAW,
        gan_time_law=TIME_LAW,
    )
    problem = Problem((DIM,), CLASSES, PATH, teacher=teacher, batch_size=BATCH)
    players = Players(teacher=teacher, **method.players(problem))
    if start == "data":
        fit(players.generator, real, Drawn(seed + 1), steps=3 * steps)
    half_way, end = _train(method, players, problem, real, seed=seed, steps=steps)
    own, other = _radius(_taught(teacher, law)), _radius(Drawn(99).batch(real, COUNT).images)
    commit = describe_environment(torch.device("cpu"), dtype="float32", wall_seconds=0.0).commit
    return OnTheRing(gan_weight, features, start, seed, steps, half_way, end, own, other, commit)


def _train(
    method: DMD2, players: Players, problem: Problem, real: Denoiser, *, seed: int, steps: int
) -> Iterator[float]:
    """The radius of the averaged student half-way and at the end."""
    names = {name for update in method.updates for name in update.players}
    optimizers = {n: torch.optim.Adam(players[n].parameters(), lr=RATE, betas=(0.0, 0.999)) for n in names}
    drawn, weights = Drawn(seed + 50), list(players.generator.parameters())
    average = [weight.detach().clone() for weight in weights]
    total = steps * max(update.every for update in method.updates)
    for step in range(total):
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = RATE * min(1.0, 2 * (1 - step / total))
        draw = method.draw(StepRandom(seed, step, torch.arange(step * BATCH, (step + 1) * BATCH)), problem)
        batch = replace(drawn.batch(real), stored={})
        for update in method.updates:
            if not update.is_due(step, step * BATCH):
                continue
            for name in names:
                players[name].requires_grad_(name in update.players)
            loss = method.call(update.loss, players, draw, batch)
            loss.total.backward()
            draw |= loss.carry
            for name in update.players:
                optimizers[name].step()
                optimizers[name].zero_grad()
            if "generator" in update.players:
                torch._foreach_lerp_(average, [weight.data for weight in weights], 0.02)
        if (step + 1) in (total // 2, total):
            yield _radius(_samples(players.generator, average))


@torch.no_grad()
def _taught(teacher: Denoiser, law: Denoiser) -> Tensor:
    """Samples of the fitted teacher by its ODE, from diffused samples of the law at the highest noise that it knows."""
    highest = TIME_LAW.ratio_max
    path = EDM(sigma_min=PATH.sigma_min, sigma_max=highest)
    known = Denoiser(teacher.net, path, teacher.predicts, sigma_data=teacher.sigma_data)
    drawn = Drawn(97)
    batch = drawn.batch(law, COUNT)
    return Heun(num_steps=18)(known, batch.images / highest + drawn.eps(COUNT), batch.cond)


@torch.no_grad()
def _samples(generator: Denoiser, average: list[Tensor]) -> Tensor:
    """Of the averaged weights, always from the same noise."""
    weights = dict(zip(dict(generator.named_parameters()), average, strict=True))
    t = torch.full((COUNT,), INIT_RATIO, dtype=torch.float64)
    cond = Cond(label=torch.arange(COUNT) % CLASSES)
    made: Tensor = torch.func.functional_call(generator, weights, (INIT_RATIO * Drawn(98).eps(COUNT), t, cond))
    return made


def _radius(points: Tensor) -> float:
    return round(float(points.norm(dim=1).mean()), 4)


def main() -> None:
    """Run all cases with two seeds and write their records."""
    torch.set_num_threads(1)
    rows = []
    for seed in range(2):
        for weight, features, start in CASES:
            rows.append(student(weight, features, start, seed=seed))
            print(rows[-1], flush=True)
    write_text_atomically(RECORDS, "".join(json.dumps(asdict(row)) + "\n" for row in rows))


if __name__ == "__main__":
    main()
