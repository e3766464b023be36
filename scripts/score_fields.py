"""What each score field makes of points: docs/images/score-fields.png and the table of docs/score-fields.md.

    python scripts/score_fields.py

Two classes of three Gaussians each, known exactly; the points of each class are a table of parameters that one field
moves, by `score_field`'s own loss. The fake score is exact as well: that of the points' own distribution, which
VSD's learns.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import Karras
from diffdistill.distillation.method import Batch, Players, Problem
from diffdistill.methods.score_field import ScoreField
from diffdistill.networks.analytic import Mixture, mixture_denoiser

ROOT = Path(__file__).parents[1]
PAGE, PICTURE = ROOT / "docs" / "score-fields.md", ROOT / "docs" / "images" / "score-fields.png"
MARKS = ("<!-- score fields: python scripts/score_fields.py -->\n", "<!-- score fields end -->")
PATH, RADIUS, STD = EDM(sigma_min=0.01, sigma_max=10.0), 1.5, 0.25
COLOURS = ("#1f5fa8", "#c8372d")
LAW = Karras(ratio_min=0.05, ratio_max=3.0)


def made(**settings: object) -> ScoreField:
    return ScoreField(time_law=LAW, weight="sigma/alpha", **settings)  # type: ignore[arg-type]


FIELDS: dict[str, ScoreField] = {
    "SDS": made(subtract="noise"),
    "VSD": made(subtract="fake"),
    "ESD, lambda 0.5": made(subtract="fake", fake_guidance=0.5),
    "ASD": made(subtract="noisier", gap=0.1),
    "CSD": made(subtract="no_class"),
    "CSM": made(subtract="no_class", noising="inverted"),
    "ISM": made(subtract="cleaner", noising="inverted", gap=0.08),
    "TSM": made(subtract="cleaner", noising="inverted", gap=0.08, gamma=0.3),
    "BSD, standard": made(pull="balanced", subtract="nothing", smoothing=1 / 18),
    "BSD, automatic": made(pull="balanced", subtract="noise", smoothing=1.25),
}
"""Each field, all unguided and with one weight, so that what differs is the field."""


@dataclass(frozen=True)
class Outcome:
    """points: [2, count, 2], by class.  spread: their standard deviation about the nearest mode, of the distribution's.
    near: share within 3 standard deviations of a mode of the own class.  distance: energy distance to the
    distribution."""

    points: Tensor
    spread: float
    near: float
    distance: float


def modes() -> Tensor:
    """[6, 2]; even ones are of class 0."""
    angle = torch.arange(6, dtype=torch.float64) * (math.pi / 3)
    return RADIUS * torch.stack([angle.cos(), angle.sin()], 1)


def teacher() -> Denoiser:
    return mixture_denoiser(
        PATH, torch.ones(6), modes(), torch.full((6,), STD**2, dtype=torch.float64), torch.arange(6) % 2
    )


class Points(nn.Module):
    """[2, count, 2] parameters; asked for all of them at once, class by class."""

    accepts, num_classes, has_null_condition, resolution_multiple = frozenset({"label"}), 2, False, 1

    def __init__(self, count: int) -> None:
        super().__init__()
        self.points = nn.Parameter(0.8 * StepRandom(1, 0, torch.arange(2 * count)).normal("start", (2,)).double())

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        return self.points + 0 * x

    def law(self) -> Denoiser:
        """The exact denoiser of the points' own distribution, by class and as a whole."""
        count, label = len(self.points), labels(len(self.points) // 2)
        return mixture_denoiser(PATH, torch.ones(count), self.points.detach(), torch.zeros(count).double(), label)


def labels(count: int) -> Tensor:
    return torch.arange(2).repeat_interleave(count)


def move(method: ScoreField, *, count: int, num_steps: int, rate: float = 0.03) -> Outcome:
    """Points moved by one field.  count: of a class; rate: of Adam, falling to zero."""
    net, target = Points(count), teacher()
    generator = Denoiser(net, PATH, "x0")  # type: ignore[arg-type]
    problem = Problem((2,), 2, PATH, teacher=target)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate, betas=(0.0, 0.99))
    for step in range(num_steps):
        draw = method.draw(StepRandom(0, step, torch.arange(2 * count)), problem) | {"label": labels(count)}
        players = Players(generator=generator, teacher=target, fake=net.law())
        optimizer.param_groups[0]["lr"] = rate * (1 - step / num_steps)
        optimizer.zero_grad()
        method.generator_loss(players, draw, Batch(torch.empty(0))).total.backward()
        optimizer.step()
    return judge(net.points.detach().reshape(2, count, 2))


def judge(points: Tensor) -> Outcome:
    """See `Outcome`."""
    spreads, near, distances = [], [], []
    for c, mine in enumerate(points):
        gaps = torch.cdist(mine, modes()[c::2])
        closest = gaps.min(1)
        near.append(float((closest.values < 3 * STD).double().mean()))
        for mode in range(3):
            own = mine[closest.indices == mode]
            spreads.append(float((own - own.mean(0)).square().mean()) if len(own) > 1 else 0.0)
        distances.append(energy_distance(mine, truth(c, 2000)))
    spread = math.sqrt(sum(spreads) / len(spreads)) / STD
    return Outcome(points, spread, sum(near) / 2, sum(distances) / 2)


def truth(label: int, count: int) -> Tensor:
    """Samples of a class."""
    rng, law = StepRandom(2, label, torch.arange(count)), teacher().net
    assert isinstance(law, Mixture)
    return law.sample(rng.uniform("mode"), rng.normal("spread", (2,)), Cond(label=torch.full((count,), label)))


def energy_distance(first: Tensor, second: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| of all pairs, at least zero."""
    within = [torch.cdist(one, one).sum() / (len(one) * max(len(one) - 1, 1)) for one in (first, second)]
    return float((2 * torch.cdist(first, second).mean() - within[0] - within[1]).clamp_min(0))


def table(outcomes: Mapping[str, Outcome]) -> str:
    rows = [f"| {name} | {one.near:.0%} | {one.spread:.2f} | {one.distance:.3f} |\n" for name, one in outcomes.items()]
    head = (
        "| | near a mode of its class | spread in a mode, of the distribution's | "
        "energy distance to the distribution |\n"
    )
    return head + "|---|---|---|---|\n" + "".join(rows)


def draw_picture(outcomes: Mapping[str, Outcome], file: Path) -> None:
    """A panel for each, over the distribution's contours."""
    rows, columns = math.ceil(len(outcomes) / 4), 4
    figure = Figure(figsize=(2.1 * columns, 2.25 * rows), dpi=90, layout="constrained")
    side = torch.linspace(-2.6, 2.6, 80, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).reshape(-1, 2)
    law = teacher().net
    assert isinstance(law, Mixture)
    density = law.log_prob(grid, torch.full((len(grid),), PATH.t_min).double(), NO_COND).exp().reshape(80, 80)
    for axes, (name, one) in zip(figure.subplots(rows, columns).flat, outcomes.items(), strict=False):
        axes.contour(side, side, density, levels=3, colors="#c9ced6", linewidths=0.7)
        for mine, colour in zip(one.points, COLOURS, strict=True):
            axes.scatter(*mine.T, s=3, c=colour, linewidths=0)
        axes.set(title=name, xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=[], yticks=[], aspect="equal")
        axes.title.set_fontsize(9)
    for axes in figure.axes[len(outcomes) :]:
        axes.set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Software": None})


def main(*, count: int = 120, num_steps: int = 300) -> None:
    """Move the points by each field, and write picture and table."""
    given = {"the distribution": judge(torch.stack([truth(c, count) for c in (0, 1)]))}
    given["the start"] = judge(Points(count).points.detach().reshape(2, count, 2))
    outcomes = given | {name: move(method, count=count, num_steps=num_steps) for name, method in FIELDS.items()}
    draw_picture(outcomes, PICTURE)
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    PAGE.write_text(f"{before}{MARKS[0]}\n{table(outcomes)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
