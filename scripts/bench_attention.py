"""Attention on a CUDA GPU: builds the kernels, checks their numbers, then times every backend in turn in one process.

    python scripts/bench_attention.py --out attention.json --plot attention.png
    python scripts/bench_attention.py --table     # also writes what `auto` follows, diffdistill/attention/measured.json
    python scripts/bench_attention.py --dry-run   # on a CPU: the same script on tiny shapes, whose times mean nothing

A time is that of the GPU alone, from replays of a CUDA graph, interleaved; the times of plain calls stand beside it.
Ratios are baseline / ours, of medians. What has wrong numbers is named, is not timed, and makes the exit code 1.
"""

import json
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from itertools import product
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
from diffdistill.attention.kernels import Variant
from diffdistill.attention.launch import build_all

console = Console(width=150)
Timed = Callable[[], Any]
Shape = tuple[int, int, int, int, int]

MOVING: list[Shape] = [  # batch, heads, queries, keys, head size
    (4, 16, 4096, 4096, 72),
    (16, 16, 1024, 1024, 72),
    (32, 16, 256, 256, 72),
    (4, 10, 4096, 4096, 64),
    (8, 8, 4096, 4096, 40),
    (8, 8, 1024, 1024, 80),
]
STILL: list[Shape] = [(4, 10, 4096, 77, 64), (4, 16, 4096, 120, 72)]
DIFFERENCES: list[Shape] = [(8, 8, 4096, 77, 40), (4, 10, 4096, 77, 64), (8, 8, 1024, 77, 80)]
FORWARDS: list[Shape] = [
    (8, 8, 4096, 4096, 40),
    (8, 8, 1024, 1024, 80),
    (8, 8, 256, 256, 160),
    (8, 8, 4096, 77, 40),
    (16, 16, 1024, 1024, 72),
    (32, 16, 256, 256, 72),
    (4, 10, 4096, 4096, 64),
    (1, 24, 4608, 4608, 128),
]
TANGENT, TEXT, DIFFERENCE, FORWARD = "primal + tangent", "primal + tangent, text still", "two contexts", "forward"
TORCHS = ("cudnn", "flash", "efficient", "math")
WARM_UPS = 3


@dataclass
class Row:
    """One case. seconds: medians by backend, of the GPU alone; eager: with the call.  ratios: baseline / ours.
    extra_bytes: of a call, at its peak, above what was there.  skipped: backends that cannot do it, and why."""

    case: str
    shape: Shape
    error: float
    error_of_math: float
    repeats_bitwise: bool
    seconds: dict[str, float] = field(default_factory=dict)
    eager: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    extra_bytes: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def is_right(self) -> bool:
        return self.error <= 2 * self.error_of_math and self.repeats_bitwise


def main(
    out: Annotated[Path, typer.Option(help="The JSON to write.")] = Path("attention.json"),
    plot: Annotated[Path | None, typer.Option(help="A picture of the ratios.")] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.", min=1)] = 50,
    table: Annotated[bool, typer.Option("--table", help="Write what `auto` follows.")] = False,
    sanitize: Annotated[bool, typer.Option("--sanitize", help="Run compute-sanitizer first, where it is.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tiny shapes, on a CPU.")] = False,
) -> None:
    """Build, check, time. The JSON is written anew after every case, so that a run cut short leaves what it had."""
    device = torch.device("cpu" if dry_run else "cuda")
    name = _machine(device, is_dry_run=dry_run)
    if not dry_run:
        begin = time.perf_counter()
        console.print(f"{build_all(_variants())} variants built in {time.perf_counter() - begin:.0f} s")
    if sanitize:
        _sanitize()
    rows: list[Row] = []
    about = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "rounds": rounds}
    for make, case, shape in _cases():
        row, timed = make(case, _small(shape) if dry_run else shape, device)
        rows.append(row)
        if row.is_right:
            _time(row, timed, rounds, device)
        else:
            why = f"error {row.error:.2e}, torch's math {row.error_of_math:.2e}, repeats: {row.repeats_bitwise}"
            console.print(f"[red]FAULT[/] {case} {row.shape}: {why}")
        out.write_text(json.dumps(about | {"is_dry_run": dry_run, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
        del timed
        torch.cuda.empty_cache()
    _show([row for row in rows if row.is_right])
    if plot:
        _plot([row for row in rows if row.is_right], plot, name)
    if table and not dry_run:
        _write_table([row for row in rows if row.is_right], name)
    if not all(row.is_right for row in rows):
        raise typer.Exit(1)


def _machine(device: torch.device, *, is_dry_run: bool) -> str:
    """The GPU's name; ends where our kernels cannot run on it, for else the reference would be timed in their place."""
    if is_dry_run:
        warnings.simplefilter("ignore")  # the reference stands in for our kernels, which it says
        return "dry run"
    missing = "torch finds no CUDA GPU" if not torch.cuda.is_available() else backends.no_kernels(device)
    if missing:
        console.print(f"nothing was measured: {missing}")
        raise typer.Exit(1)
    return torch.cuda.get_device_name()


def _cases() -> list[tuple[Callable[[str, Shape, torch.device], tuple[Row, dict[str, Timed]]], str, Shape]]:
    return [
        *((_tangent, TANGENT, shape) for shape in MOVING),
        *((_tangent, TEXT, shape) for shape in STILL),
        *((_difference, DIFFERENCE, shape) for shape in DIFFERENCES),
        *((_forward, FORWARD, shape) for shape in FORWARDS),
    ]


def _variants() -> list[tuple[Any, Variant]]:
    """All that the cases and `pytest -m gpu` use of a size."""
    sizes = {shape[4] for shape in (*MOVING, *STILL, *DIFFERENCES, *FORWARDS)}
    kinds = (("forward", True), ("difference", True), ("tangent", True), ("tangent", False))
    return [(kernel, Variant(size, False, moving)) for size, (kernel, moving) in product(sizes, kinds)]


def _small(shape: Shape) -> Shape:
    return 1, 1, min(shape[2], 48), min(shape[3], 40), shape[4]


def _inputs(shape: tuple[int, ...], count: int, device: torch.device, seed: int = 0) -> list[Tensor]:
    rng = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, generator=rng, device=device).bfloat16() for _ in range(count)]


def _by_math(*x: Tensor) -> Tensor:
    with sdpa_kernel([SDPBackend.MATH]):
        return scaled_dot_product_attention(*x)


def _row(case: str, shape: Shape, ours: Timed, math: Timed, right: Tensor) -> Row:
    """The case's numbers against float64 on a part of the batch."""

    def error(made: Tensor) -> float:
        return float((made[:1].double() - right).norm() / right.norm())

    first, second = ours(), ours()
    return Row(case, shape, error(first), error(math()), torch.equal(first, second))


def _tangent(case: str, shape: Shape, device: torch.device) -> tuple[Row, dict[str, Timed]]:
    batch, heads, queries, keys, size = shape
    q, tq = _inputs((batch, heads, queries, size), 2, device)
    k, v, tk, tv = _inputs((batch, heads, keys, size), 4, device, seed=1)
    is_moving = case == TANGENT
    primals, tangents = ((q, k, v), (tq, tk, tv)) if is_moving else ((q,), (tq,))

    def by(function: Callable[..., Tensor]) -> Timed:
        called = function if is_moving else lambda x: function(x, k, v)
        return lambda: jvp(called, primals, tangents)[1]

    wide = [x[:1].double() for x in (q, k, v, tq, tk, tv)]
    out, lse = exact.forward(*wide[:3], None, size**-0.5)
    moves = wide[4:] if is_moving else [None, None]
    right = exact.tangent(*wide[:3], out, lse, wide[3], *moves, None, size**-0.5)
    timed = {"ours": by(attention), "math": by(_by_math)}
    row = _row(case, shape, timed["ours"], timed["math"], right)
    if is_moving:
        _add_triton(row, timed, primals, tangents)
    return row, timed


def _add_triton(row: Row, timed: dict[str, Timed], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> None:
    """jvp_flash_attention, its head size padded to the next power of two."""
    size = row.shape[4]
    if not find_spec("jvp_flash_attention") or not primals[0].is_cuda:
        row.skipped["triton"] = "jvp_flash_attention is not installed, or there is no GPU"
        return
    from jvp_flash_attention.jvp_attention import JVPAttn

    width = 1 << (size - 1).bit_length()
    x, t = (tuple(pad(a, (0, width - size)) for a in s) for s in (primals, tangents))
    _add(row, timed, "triton", lambda: jvp(lambda *a: JVPAttn.fwd_dual(*a, sm_scale=size**-0.5), x, t)[1])


def _difference(case: str, shape: Shape, device: torch.device) -> tuple[Row, dict[str, Timed]]:
    batch, heads, queries, keys, size = shape
    (q,) = _inputs((batch, heads, queries, size), 1, device)
    contexts = _inputs((batch, heads, keys, size), 4, device, seed=1)
    wide, scale = [x[:1].double() for x in (q, *contexts)], size**-0.5
    right = exact.forward(*wide[:3], None, scale)[0] - 0.5 * exact.forward(wide[0], *wide[3:], None, scale)[0]

    def two(backend: str) -> Timed:
        def run() -> Tensor:
            with sdpa_kernel([backends.OF_TORCH[backend]]):
                other = scaled_dot_product_attention(q, *contexts[2:])
                return scaled_dot_product_attention(q, *contexts[:2]) - 0.5 * other

        return run

    timed: dict[str, Timed] = {"ours": lambda: attention_difference(q, *contexts, weight=0.5)}
    row = _row(case, shape, timed["ours"], two("math"), right)
    for name in TORCHS:
        _add(row, timed, name, two(name))
    return row, timed


def _forward(case: str, shape: Shape, device: torch.device) -> tuple[Row, dict[str, Timed]]:
    batch, heads, queries, keys, size = shape
    (q,) = _inputs((batch, heads, queries, size), 1, device)
    k, v = _inputs((batch, heads, keys, size), 2, device, seed=1)
    right = exact.forward(q[:1].double(), k[:1].double(), v[:1].double(), None, size**-0.5)[0]

    def by(backend: Any) -> Timed:
        return lambda: attention(q, k, v, backend=backend)

    timed = {"ours": by("cuda")}
    row = _row(case, shape, timed["ours"], by("math"), right)
    for name in (*TORCHS, "xformers"):
        _add(row, timed, name, by(name))
    return row, timed


def _add(row: Row, timed: dict[str, Timed], name: str, run: Timed) -> None:
    """Another backend, if it can do this."""
    try:
        run()
    except Exception as error:  # each has errors of its own for what it cannot do
        row.skipped[name] = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    else:
        timed[name] = run


def _time(row: Row, timed: dict[str, Timed], rounds: int, device: torch.device) -> None:
    """Every backend once a round; then each one's peak memory. On a GPU its own time, and that of a plain call."""
    row.eager = _medians(timed, rounds, device)
    graphs = {name: graph for name, run in timed.items() if (graph := _captured(row, name, run, device))}
    row.seconds = _medians(graphs, rounds, device) if "ours" in graphs else row.eager
    row.ratios = {name: s / row.seconds["ours"] for name, s in row.seconds.items() if name != "ours"}
    del graphs
    for name, run in timed.items() if device.type == "cuda" else ():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        row.extra_bytes[name] = torch.cuda.max_memory_allocated() - before
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row.ratios.items())
    console.print(f"{row.case} {row.shape}: {1e6 * row.seconds['ours']:.0f} us; {ratios}")


def _captured(row: Row, name: str, run: Timed, device: torch.device) -> Timed | None:
    """The call as a CUDA graph; None without a GPU, and where it cannot be captured, which is noted."""
    if device.type != "cuda":
        return None
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        with torch.cuda.stream(side):
            run()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=side):
            run()
    except Exception as error:  # of torch, or of the backend
        torch.cuda.synchronize()
        row.skipped[f"{name}, as a graph"] = f"{type(error).__name__}: {error}"[:160]
        return None
    return graph.replay


def _medians(timed: dict[str, Timed], rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds of each, one after the other in every round."""
    found: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds + WARM_UPS):
        for name, run in timed.items():
            seconds = _seconds(run, device)
            if number >= WARM_UPS:
                found[name].append(seconds)
    return {name: median(values) for name, values in found.items()}


def _seconds(run: Timed, device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000


def _show(rows: list[Row]) -> None:
    table = Table(title="baseline / ours")
    for column in ("case", "shape", "ours, us", "with the call", "ratios", "extra MiB", "error / math's"):
        table.add_column(column)
    for row in rows:
        ratios = ", ".join(f"{name} {value:.2f}" for name, value in row.ratios.items())
        memory = ", ".join(f"{name} {value / 2**20:.0f}" for name, value in row.extra_bytes.items())
        ours = (f"{1e6 * s['ours']:.0f}" for s in (row.seconds, row.eager))
        errors = f"{row.error / row.error_of_math:.2f}"
        table.add_row(row.case, "x".join(map(str, row.shape)), *ours, ratios, memory, errors)
    console.print(table)


def _plot(rows: list[Row], file: Path, device: str) -> None:
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.ratios]
    figure = Figure(figsize=(8, 0.35 * len(shown) + 1.5), layout="constrained")
    axes = figure.subplots()
    names = [f"{row.case} {'x'.join(map(str, row.shape))}" for row in shown]
    axes.barh(names, [row.ratios["math"] if row.case == TANGENT else min(row.ratios.values()) for row in shown])
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel(f"time of the best other backend (tangents: of torch's math) / ours, {device}")
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
        if row.case == FORWARD
    ]
    file = Path(backends.__file__).parent / "measured.json"
    others = [row for row in json.loads(file.read_text()) if row["device"] != device]
    file.write_text(json.dumps(others + kept, indent=1) + "\n")


def _sanitize() -> None:
    """Every kernel once on ragged shapes, under each of the sanitizer's tools. Ends at a fault that it finds."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        console.print("compute-sanitizer: not here")
        return
    tests = str(Path(__file__).parents[1] / "tests" / "attention" / "test_attention_gpu.py")
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
        done = subprocess.run([*command, "-k", "ragged", tests], capture_output=True, text=True, check=False)
        console.print(f"compute-sanitizer, {tool}: {'no fault' if done.returncode == 0 else done.stdout[-3000:]}")
        if done.returncode:
            raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
