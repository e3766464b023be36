"""How fast and how exact is the Frechet distance? Ours beside clean-fid, torch-fidelity and torchmetrics, in one run.

python scripts/bench_frechet.py [--features 2048] [--rounds 1] [--cases "full rank" "condition 1e12"] [--out bench.json]

Each tool gets the same float64 means and covariances and has one thread. What counts is the process's CPU time, which
a busy machine changes little; the median of the rounds. The true values are known: S_a = M S_b M makes the trace of
the root tr(M S_b), a singular pair's comes from the nuclear norm of its samples, and a set is at 0 from itself.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import cleanfid.fid
import torch
import torch_fidelity.metric_fid
import torchmetrics.image.fid
from describe_machine import describe
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits
from torch import Tensor

from diffdistill.diffusion.gaussians import frechet_distance
from diffdistill.eval.metrics.distances import frechet_from_features

Gaussian = tuple[Tensor, Tensor]
"""Mean [d] and covariance [d, d]."""


@dataclass(frozen=True)
class Case:
    """Two Gaussians and their distance."""

    a: Gaussian
    b: Gaussian
    exact: float


def clean_fid(a: Gaussian, b: Gaussian) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return float(cleanfid.fid.frechet_distance(*(x.numpy() for x in (*a, *b))))


def torch_fidelity_fid(a: Gaussian, b: Gaussian) -> float:
    sides = ({"mu": mean.numpy(), "sigma": cov.numpy()} for mean, cov in (a, b))
    return torch_fidelity.metric_fid.fid_statistics_to_metric(*sides, False)["frechet_inception_distance"]


TOOLS: dict[str, Callable[[Gaussian, Gaussian], float]] = {
    "diffdistill": lambda a, b: frechet_distance(*a, *b),
    "clean-fid": clean_fid,
    "torch-fidelity": torch_fidelity_fid,
    "torchmetrics": lambda a, b: float(torchmetrics.image.fid._compute_fid(*a, *b)),
}


def linear_case(d: int, condition: float) -> Case:
    """Eigenvalues of S_b from 1 to 1/condition, and S_a = M S_b M."""
    cov_b, move = covariance(d, condition, seed=0), covariance(d, 10.0, seed=1)
    cov_a = move @ cov_b @ move
    exact = cov_a.trace() + cov_b.trace() - 2 * (move @ cov_b).trace()
    zero = torch.zeros(d, dtype=torch.float64)
    return Case((zero, (cov_a + cov_a.T) / 2), (zero, cov_b), float(exact))


def covariance(d: int, condition: float, seed: int) -> Tensor:
    basis = torch.linalg.qr(normal(d, d, seed=seed)).Q
    spectrum = condition ** -torch.linspace(0, 1, d, dtype=torch.float64)
    cov = basis * spectrum @ basis.T
    return (cov + cov.T) / 2


def singular_case(d: int) -> Case:
    """About half as many samples as features on either side."""
    samples = [(normal(d // 2 - 24 * (d > 48), d, seed=seed) + shift).relu() for seed, shift in ((0, 0.0), (1, 0.1))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact = frechet_from_features(*samples)
    a, b = ((x.mean(0), torch.cov(x.T)) for x in samples)
    return Case(a, b, exact)


def same_case(d: int) -> Case:
    side = singular_case(d).a
    return Case(side, side, 0.0)


CASES: dict[str, Callable[[int], Case]] = {
    "full rank": lambda d: linear_case(d, 10.0),
    "condition 1e12": lambda d: linear_case(d, 1e12),
    "singular": singular_case,
    "singular, with itself": same_case,
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measure(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """CPU and wall seconds, the value's error, and CPU seconds over ours, by tool."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in TOOLS}
    for _ in range(rounds):
        for name, tool in TOOLS.items():
            cpu, wall = time.process_time(), time.perf_counter()
            value = tool(case.a, case.b)
            found[name].append((time.process_time() - cpu, time.perf_counter() - wall, value - case.exact))
            print(f"{name}: {found[name][-1][0]:.2f} CPU-seconds, error {value - case.exact:+.1e}", flush=True)
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    ours = medians["diffdistill"][0]
    return {
        name: {"cpu_s": cpu, "wall_s": wall, "error": error, "cpu_over_ours": cpu / ours}
        for name, (cpu, wall, error) in medians.items()
    }


def print_table(results: dict[str, dict[str, dict[str, float]]], exact: dict[str, float], d: int) -> None:
    table = Table(title=f"Frechet distance, {d} features, one thread")
    for column in ("case", "exact", "tool", "CPU s", "x ours", "error"):
        table.add_column(column, justify="left" if column in ("case", "tool") else "right")
    for case, tools in results.items():
        for name, row in tools.items():
            is_first = name == "diffdistill"
            value = f"{exact[case]:.8g}"
            figures = f"{row['cpu_s']:.2f}", f"{row['cpu_over_ours']:.1f}", f"{row['error']:+.1e}"
            table.add_row(case if is_first else "", value if is_first else "", name, *figures)
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        measure(linear_case(16, 10.0), 1)  # what each library does once, before the clock counts
        cases = {name: CASES[name](options.features) for name in options.cases}
        results = {name: measure(case, options.rounds) for name, case in cases.items()}
    exact = {name: case.exact for name, case in cases.items()}
    print_table(results, exact, options.features)
    print(describe())
    if options.out:
        packages = ("numpy", "scipy", "torch", "clean-fid", "torch-fidelity", "torchmetrics")
        about = {"machine": describe(), "versions": {name: version(name) for name in packages}}
        settings = {"features": options.features, "rounds": options.rounds, "threads": 1}
        text = json.dumps(about | settings | {"exact": exact, "results": results}, indent=1)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
