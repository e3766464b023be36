"""Attention on a CUDA GPU: builds the kernels, checks their numbers, then times every backend in turn in one process.

    python scripts/bench_attention.py --out attention.json --plot attention.png
    python scripts/bench_attention.py --table     # also writes what `auto` follows, diffdistill/attention/measured.json

Ratios are baseline / ours, of medians over interleaved rounds. Nothing is measured where a check of the numbers fails.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from diffdistill.attention import attention, attention_difference, backends
from diffdistill.attention import reference as exact

console = Console()
Timed = Callable[[], Any]

TANGENTS = [  # batch, heads, queries, keys, head size, do keys move
    (4, 16, 4096, 4096, 72, True),
    (16, 16, 1024, 1024, 72, True),
    (32, 16, 256, 256, 72, True),
    (4, 10, 4096, 4096, 64, True),
    (8, 8, 4096, 4096, 40, True),
    (8, 8, 1024, 1024, 80, True),
    (4, 10, 4096, 77, 64, False),
    (4, 16, 4096, 120, 72, False),
]
DIFFERENCES = [(8, 8, 4096, 77, 40), (4, 10, 4096, 77, 64), (8, 8, 1024, 77, 80)]
FORWARDS = [
    (8, 8, 4096, 4096, 40),
    (8, 8, 1024, 1024, 80),
    (8, 8, 256, 256, 160),
    (8, 8, 4096, 77, 40),
    (16, 16, 1024, 1024, 72),
    (32, 16, 256, 256, 72),
    (4, 10, 4096, 4096, 64),
    (1, 24, 4608, 4608, 128),
]
TORCHS = ("cudnn", "flash", "efficient", "math")


@dataclass
class Row:
    """One case. seconds: medians by backend; ratios: baseline / ours; extra_bytes: peak above what was there."""

    case: str
    shape: tuple[int, ...]
    error: float
    error_of_math: float
    repeats_bitwise: bool
    seconds: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    extra_bytes: dict[str, int] = field(default_factory=dict)


def main(
    out: Annotated[Path, typer.Option(help="The JSON to write.")] = Path("attention.json"),
    plot: Annotated[Path | None, typer.Option(help="A picture of the ratios.")] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.", min=1)] = 50,
    table: Annotated[bool, typer.Option("--table", help="Write what `auto` follows.")] = False,
    sanitize: Annotated[bool, typer.Option("--sanitize", help="Run compute-sanitizer first, where it is.")] = False,
) -> None:
    """Check, then time."""
    if not torch.cuda.is_available():
        console.print("no CUDA GPU: nothing was measured")
        raise typer.Exit(1)
    if sanitize:
        _sanitize()
    rows = [*map(_tangent, TANGENTS), *map(_difference, DIFFERENCES), *map(_forward, FORWARDS)]
    for row, timed in rows:
        _time(row, timed, rounds)
        console.print(f"{row.case} {row.shape}: {', '.join(f'{k} {v:.2f}' for k, v in row.ratios.items())}")
    found = [row for row, _ in rows]
    device = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "driver_device": device}
    out.write_text(json.dumps({"versions": versions, "rounds": rounds, "rows": [asdict(r) for r in found]}, indent=1))
    _show(found)
    if plot:
        _plot(found, plot, device)
    if table:
        _write_table(found, device)


def _inputs(shape: tuple[int, ...], count: int, seed: int = 0) -> list[Tensor]:
    rng = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(shape, generator=rng, device="cuda").bfloat16() for _ in range(count)]


def _by_math(*x: Tensor) -> Tensor:
    with sdpa_kernel([SDPBackend.MATH]):
        return scaled_dot_product_attention(*x)


def _error(made: Tensor, right: Tensor) -> float:
    return float((made.double() - right).norm() / right.norm())


def _row(case: str, shape: tuple[int, ...], ours: Timed, math: Timed, right: Tensor) -> Row:
    """The case's numbers against float64 on a part of the batch; stops if they are wrong."""
    first, second = ours(), ours()
    row = Row(case, shape, _error(first[:1], right), _error(math()[:1], right), torch.equal(first, second))
    if not row.error <= 2 * row.error_of_math or not row.repeats_bitwise:
        console.print(f"FAULT {case} {shape}: error {row.error:.2e}, torch's math {row.error_of_math:.2e}")
        sys.exit(1)
    return row


def _tangent(case: tuple[int, int, int, int, int, bool]) -> tuple[Row, dict[str, Timed]]:
    batch, heads, queries, keys, size, moving = case
    q, tq = _inputs((batch, heads, queries, size), 2)
    k, v, tk, tv = _inputs((batch, heads, keys, size), 4, seed=1)
    primals, tangents = ((q, k, v), (tq, tk, tv)) if moving else ((q,), (tq,))

    def by(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return function if moving else lambda x: function(x, k, v)

    wide = [x[:1].double() for x in (q, k, v, tq, tk, tv)]
    out, lse = exact.forward(*wide[:3], None, size**-0.5)
    still = (None, None) if not moving else tuple(wide[4:])
    right = exact.tangent(*wide[:3], out, lse, wide[3], *still, None, size**-0.5)
    timed: dict[str, Timed] = {
        "ours": lambda: jvp(by(attention), primals, tangents)[1],
        "math": lambda: jvp(by(_by_math), primals, tangents)[1],
    }
    if moving and queries == keys and find_spec("jvp_flash_attention"):
        timed["triton"] = _triton(primals, tangents, size)
    case_name = "primal + tangent" if moving else "primal + tangent, text still"
    return _row(case_name, case[:5], timed["ours"], timed["math"], right), timed


def _triton(primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], size: int) -> Timed:
    """jvp_flash_attention, its head size padded to the next power of two."""
    from jvp_flash_attention.jvp_attention import JVPAttn

    width = 1 << (size - 1).bit_length()
    x, t = ([pad(a, (0, width - size)) for a in s] for s in (primals, tangents))
    return lambda: jvp(lambda *a: JVPAttn.fwd_dual(*a, sm_scale=size**-0.5), tuple(x), tuple(t))[1]


def _difference(case: tuple[int, int, int, int, int]) -> tuple[Row, dict[str, Timed]]:
    batch, heads, queries, keys, size = case
    (q,) = _inputs((batch, heads, queries, size), 1)
    contexts = _inputs((batch, heads, keys, size), 4, seed=1)
    wide = [x[:1].double() for x in (q, *contexts)]
    scale = size**-0.5
    right = exact.forward(*wide[:3], None, scale)[0] - 0.5 * exact.forward(wide[0], *wide[3:], None, scale)[0]

    def two(backend: str) -> Timed:
        def run() -> Tensor:
            with sdpa_kernel([backends.OF_TORCH[backend]]):
                other = scaled_dot_product_attention(q, *contexts[2:])
                return scaled_dot_product_attention(q, *contexts[:2]) - 0.5 * other

        return run

    timed: dict[str, Timed] = {"ours": lambda: attention_difference(q, *contexts, weight=0.5)}
    timed |= {name: two(name) for name in TORCHS if _works(two(name))}
    return _row("difference of contexts", case, timed["ours"], two("math"), right), timed


def _forward(case: tuple[int, int, int, int, int]) -> tuple[Row, dict[str, Timed]]:
    batch, heads, queries, keys, size = case
    (q,) = _inputs((batch, heads, queries, size), 1)
    k, v = _inputs((batch, heads, keys, size), 2, seed=1)
    right = exact.forward(q[:1].double(), k[:1].double(), v[:1].double(), None, size**-0.5)[0]

    def by(backend: Any) -> Timed:
        return lambda: attention(q, k, v, backend=backend)

    others = [name for name in (*TORCHS, *(["xformers"] if find_spec("xformers") else [])) if _works(by(name))]
    timed = {"ours": by("cuda")} | {name: by(name) for name in others}
    return _row("forward", case, timed["ours"], by("math"), right), timed


def _works(run: Timed) -> bool:
    try:
        run()
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return True


def _time(row: Row, timed: dict[str, Timed], rounds: int) -> None:
    """Every backend once a round, by events of the GPU; then each one's peak memory."""
    found: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds + 3):  # the first three warm up
        for name, run in timed.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if number >= 3:
                found[name].append(begin.elapsed_time(end) / 1000)
    row.seconds = {name: median(values) for name, values in found.items()}
    row.ratios = {name: s / row.seconds["ours"] for name, s in row.seconds.items() if name != "ours"}
    for name, run in timed.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        row.extra_bytes[name] = torch.cuda.max_memory_allocated() - before


def _show(rows: list[Row]) -> None:
    table = Table(title="baseline / ours")
    for column in ("case", "shape", "ours, us", "ratios", "extra MB", "error / math's"):
        table.add_column(column)
    for row in rows:
        ratios = ", ".join(f"{name} {value:.2f}" for name, value in row.ratios.items())
        memory = ", ".join(f"{name} {value / 2**20:.0f}" for name, value in row.extra_bytes.items())
        errors = f"{row.error / row.error_of_math:.2f}"
        table.add_row(row.case, str(row.shape), f"{1e6 * row.seconds['ours']:.0f}", ratios, memory, errors)
    console.print(table)


def _plot(rows: list[Row], file: Path, device: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.35 * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots()
    names = [f"{row.case} {'x'.join(map(str, row.shape))}" for row in rows]
    best = [min(row.ratios.values()) if row.case != "primal + tangent" else row.ratios["math"] for row in rows]
    axes.barh(names, best)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel(f"best other backend's time / ours, {device}")
    figure.savefig(file, dpi=150)


def _write_table(rows: list[Row], device: str) -> None:
    kept = [
        {
            "device": device,
            "dtype": "bfloat16",
            "head_size": row.shape[4],
            "queries": row.shape[2],
            "keys": row.shape[3],
            "ratio": round(min(row.ratios.values()), 3),
        }
        for row in rows
        if row.case == "forward"
    ]
    file = Path(backends.__file__).parent / "measured.json"
    others = [row for row in json.loads(file.read_text()) if row["device"] != device]
    file.write_text(json.dumps(others + kept, indent=1) + "\n")


def _sanitize() -> None:
    program = shutil.which("compute-sanitizer")
    if program is None:
        console.print("compute-sanitizer: not here")
        return
    command = [program, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    tests = str(Path(__file__).parents[1] / "tests" / "test_attention_gpu.py")
    subprocess.run([*command, tests], check=True)


if __name__ == "__main__":
    typer.run(main)
