"""What each divergence prefers, on the line: the pictures and numbers of docs/divergences.md.

    python scripts/divergences.py          # writes docs/images/divergences-*.png and the page's tables, in minutes

Everything but the students is exact: denoisers and densities of the noised laws in closed form.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from diffdistill.diffusion.cond import NO_COND
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.time_distributions import Karras, log_ratio_slope
from diffdistill.distillation.divergences import SLOPES, WEIGHTS, Divergence
from diffdistill.distillation.losses import field_loss
from diffdistill.distillation.score_distillation import matching_field, score_identity
from diffdistill.networks.analytic import Mixture, mixture_denoiser

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- numbers: python scripts/divergences.py -->", "<!-- numbers end -->"
PATH = EDM(sigma_min=0.02, sigma_max=20.0)
SHARES, MEANS, STD = (0.55, 0.40, 0.05), (-1.5, 0.6, 2.6), 0.25
GRID = torch.linspace(-6, 6, 4001, dtype=torch.float64)
F: Mapping[Divergence, Callable[[Tensor], Tensor]] = {
    "neyman": lambda log_r: torch.expm1(log_r) ** 2 * (-log_r).exp(),
    "rkl": lambda log_r: -log_r,
    "sf": lambda log_r: (log_r.exp() + 1) * (torch.nn.functional.softplus(log_r) - math.log(2) - log_r),
    "sh": lambda log_r: 1 - (log_r / 2).exp(),
    "js": lambda log_r: log_r.exp() * log_r - (log_r.exp() + 1) * (torch.nn.functional.softplus(log_r) - math.log(2)),
    "jf": lambda log_r: torch.expm1(log_r) * log_r,
    "kl": lambda log_r: log_r.exp() * log_r,
    "pearson": lambda log_r: torch.expm1(log_r) ** 2,
}
NAMES = {
    "neyman": "Neyman",
    "rkl": "reverse KL",
    "sf": "softened",
    "sh": "Hellinger",
    "js": "Jensen-Shannon",
    "jf": "Jeffreys",
    "kl": "forward KL",
    "pearson": "Pearson",
}
SEEDS, STEPS, BATCH = 4, 400, 192
STUDENT = 3.182  # the 97.5 % point of Student's law with SEEDS - 1 degrees of freedom


def teacher_log_density(x: Tensor) -> Tensor:
    parts = [math.log(w) + normal_log_density(x, m, STD) for w, m in zip(SHARES, MEANS, strict=True)]
    return torch.stack(parts).logsumexp(0)


def normal_log_density(x: Tensor, mean: float | Tensor, std: float | Tensor) -> Tensor:
    return -0.5 * ((x - mean) / std) ** 2 - torch.log(torch.as_tensor(std)) - 0.5 * math.log(2 * math.pi)


# A student that cannot be its teacher: one Gaussian


def best_gaussian(name: Divergence) -> tuple[float, float]:
    """The mean and width of the Gaussian with the least divergence, by a grid that is made finer around its best."""
    log_p = teacher_log_density(GRID)
    mean, log_std, reach = 0.0, math.log(0.6), torch.tensor([3.0, 1.1])  # narrower ones' ratios leave float64
    for _ in range(6):
        tried = torch.linspace(-1, 1, 25, dtype=torch.float64)
        means, log_stds = mean + reach[0] * tried, log_std + reach[1] * tried
        values = []
        for width in log_stds.exp():
            log_q = normal_log_density(GRID, means[:, None], width)
            terms = log_q.exp() * F[name]((log_p - log_q).clamp(-300, 300))
            values.append(torch.trapezoid(terms, GRID))
        row, column = divmod(int(torch.stack(values).argmin()), len(tried))
        mean, log_std, reach = float(means[column]), float(log_stds[row]), reach / 4
    return mean, math.exp(log_std)


def overlap(mean: float, std: float) -> tuple[float, float]:
    """Precision and coverage: the share of the one law within the densest 95 % of the other, of student and teacher."""
    p, q = teacher_log_density(GRID).exp(), normal_log_density(GRID, mean, std).exp()
    return share_within(q, p), share_within(p, q)


def share_within(law: Tensor, other: Tensor, share: float = 0.95) -> float:
    order = other.argsort(descending=True)
    inside = order[: int((other[order].cumsum(0) / other.sum() < share).sum()) + 1]
    return float(law[inside].sum() / law.sum())


def draw_gaussians(found: Mapping[Divergence, tuple[float, float]]) -> None:
    figure = Figure(figsize=(9, 4), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, (mean, std)) in zip(figure.subplots(2, 4).flat, found.items(), strict=True):
        axes.fill_between(GRID, teacher_log_density(GRID).exp(), color="0.8", linewidth=0)
        axes.plot(GRID, normal_log_density(GRID, mean, std).exp(), color="C0")
        precision, coverage = overlap(mean, std)
        axes.set_title(f"{NAMES[name]}\nprecision {precision:.2f}, coverage {coverage:.2f}", fontsize=9)
        axes.set(xlim=(-4, 4), yticks=[], xticks=[-3, 0, 3])
    figure.savefig(DOCS / "images" / "divergences-gaussian.png", metadata={"Software": None})


# A student that can: does it find the mode of 5 %?


class Student(nn.Module):
    """A network from noise to the line, which starts as a Gaussian in the middle of the two great modes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(1, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1))
        self.layers.double()

    def forward(self, z: Tensor) -> Tensor:
        return -0.5 + 0.8 * z + 0.3 * self.layers(z)


def push_of_images(name: Divergence, x: Tensor, x_t: Tensor, t: Tensor, uniform: Tensor, law: Karras) -> Tensor:
    """`uni_instruct`'s loss, with the student's own noised law in the place of the learned networks."""
    teacher, fake, log_ratio = judged(x, x_t, t)
    ratio = log_ratio.clamp(math.log(0.02), math.log(50)).exp()
    is_free = log_ratio.detach() == ratio.detach().log()
    alpha = (1 + SLOPES[name](ratio) * is_free) / 2
    h = WEIGHTS[name](ratio)
    weight = log_ratio_slope(law, uniform, PATH) / t**2
    return (weight * h / h.detach().mean() * score_identity(x, teacher, fake, fake, alpha=alpha)).mean()


def push_of_noised(name: Divergence, x: Tensor, x_t: Tensor, t: Tensor, uniform: Tensor, law: Karras) -> Tensor:
    """`f_distill`'s; with reverse KL `dmd2`'s."""
    with torch.no_grad():
        teacher, fake, log_ratio = judged(x, x_t, t)
        h = WEIGHTS[name](log_ratio.clamp(math.log(0.02), math.log(50)).exp())
        field = (h / h.mean())[:, None] * matching_field(x, fake, teacher, minimum=1e-2)
    return field_loss(x, field)


def judged(x: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's estimate and the student's own at x_t, and ln p_t/q_t: q_t of the batch itself, but for the sample
    that x_t was made of, which would know its own noise."""
    real = mixture_denoiser(PATH, torch.tensor(SHARES).double(), centres(), torch.full((3,), STD**2).double())
    assert isinstance(real.net, Mixture)
    log_p = real.net.log_prob(x_t, t, NO_COND)
    distance = -0.5 * ((x_t - x.detach().T) / t[:, None]) ** 2
    distance = distance.masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf)
    share = distance.softmax(1)
    log_q = distance.logsumexp(1) - math.log(len(x) - 1) - t.log() - 0.5 * math.log(2 * math.pi)
    return real(x_t, t), share @ x.detach(), log_p - log_q


def centres() -> Tensor:
    return torch.tensor(MEANS).double()[:, None]


Push = Callable[[Divergence, Tensor, Tensor, Tensor, Tensor, Karras], Tensor]
PUSHES: Mapping[str, Push] = {"of the images": push_of_images, "of the noised laws": push_of_noised}


def train(push: Push, name: Divergence, seed: int) -> Tensor:
    """Samples of a trained student, [20000]."""
    student, rng = Student(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-3, betas=(0.0, 0.99))
    law = Karras(ratio_min=0.1, ratio_max=5.0, rho=200.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1.0, 2 * (1 - step / STEPS))
        z, eps = torch.randn(2, BATCH, 1, dtype=torch.float64, generator=rng)
        uniform = torch.rand(BATCH, dtype=torch.float64, generator=rng)
        t, x = law(uniform, PATH), student(z)
        optimizer.zero_grad()
        push(name, x, x + t[:, None] * eps, t, uniform, law).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        return student(torch.randn(20000, 1, dtype=torch.float64, generator=rng)).flatten()


def measured(samples: Tensor) -> tuple[float, float]:
    """The share of the mode of 5 %, and precision: the share within three standard deviations of a mode."""
    near = (samples[:, None] - centres().T).abs() < 3 * STD
    return float(near[:, 2].double().mean()), float(near.any(1).double().mean())


def interval(values: list[float]) -> str:
    """The mean over seeds and Student's interval of 95 %."""
    mean, spread = float(torch.tensor(values).mean()), float(torch.tensor(values).std())
    half = STUDENT * spread / math.sqrt(len(values))
    return f"{mean:.3f} ({mean - half:.3f} to {mean + half:.3f})"


def draw_students(found: Mapping[str, Tensor]) -> None:
    figure = Figure(figsize=(9, 2.4), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, samples) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        axes.fill_between(GRID, teacher_log_density(GRID).exp(), color="0.8", linewidth=0)
        axes.hist(samples.numpy(), bins=120, range=(-4, 4), density=True, histtype="step", color="C0")
        share, precision = measured(samples)
        axes.set_title(f"{title}\nprecision {precision:.2f}, small mode {share:.3f}", fontsize=9)
        axes.set(xlim=(-4, 4), yticks=[], xticks=[-3, 0, 3])
    figure.savefig(DOCS / "images" / "divergences-students.png", metadata={"Software": None})


def main() -> None:
    torch.set_num_threads(1)
    gaussians = {name: best_gaussian(name) for name in F}
    draw_gaussians(gaussians)
    rows = ["| the best Gaussian by | mean | width | precision | coverage |", "|---|---|---|---|---|"]
    for name, (mean, std) in gaussians.items():
        precision, coverage = overlap(mean, std)
        rows.append(f"| {NAMES[name]} | {mean:.2f} | {std:.2f} | {precision:.3f} | {coverage:.3f} |")
    rows += ["", "| divergence | of what | share of the mode of 5 % | precision |", "|---|---|---|---|"]
    shown = {}
    for of_what, push in PUSHES.items():
        for name in ("rkl", "kl"):
            made = [train(push, name, seed) for seed in range(SEEDS)]
            shares, precisions = zip(*map(measured, made), strict=True)
            rows.append(f"| {NAMES[name]} | {of_what} | {interval(list(shares))} | {interval(list(precisions))} |")
            print(rows[-1], flush=True)
            shown[f"{NAMES[name]} {of_what}"] = made[0]
    draw_students(shown)
    page = DOCS / "divergences.md"
    text = page.read_text(encoding="utf-8")
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    page.write_text(text[:start] + "\n\n" + "\n".join(rows) + "\n\n" + text[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
