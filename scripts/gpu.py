"""All that wants a GPU, in one command: kernels, tests, times, memory, and a first CIFAR-10 student, then a page of it.

    make gpu MINUTES=12              # on the first CUDA GPU
    make gpu MINUTES=1 DEVICE=cpu    # the same in small, to see that every part works; its figures mean nothing

The parts run in this order, each with a share of the minutes and what those before it left over. Each writes its result
as it ends, so that a command that is cut off loses one part; called again, it does what is not done yet on this commit
and this machine. `--data` names CIFAR-10 (or a part of it); without it that part is left out, and the page says so.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from describe_machine import describe

from diffdistill.storage.atomic import write_text_atomically

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
GRACE = 20.0
"""Seconds that a part gets to end by itself once its time is over."""
LEAST_ON_CPU = 900.0
"""Seconds of a part on a CPU at least: the minutes are a GPU's, and here every part has to be seen through."""


@dataclass(frozen=True)
class Setup:
    """What all parts know.  results: where each one's files go."""

    device: str
    results: Path
    runs: Path
    data: str | None
    weights: Path | None

    @property
    def is_small(self) -> bool:
        return self.device == "cpu"


Command = Callable[[Setup, float], list[str] | None]
"""What a part runs, given the seconds that it has; None where it cannot run."""


@dataclass(frozen=True)
class Part:
    """title: on the page.  share: of the minutes.  shown: its result as Markdown, of the file that it wrote."""

    title: str
    share: float
    command: Command
    result: str
    shown: Callable[[Path], str]


def _python(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(SCRIPTS / script), *map(str, arguments)]


def _tests(setup: Setup, seconds: float) -> list[str]:
    """On a CPU every test of a GPU is collected, none run."""
    given = ["--collect-only"] if setup.is_small else []
    report = setup.results / "tests.xml"
    return [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu",
        f"--junitxml={report}",
        *given,
        str(ROOT / "tests"),
    ]


def _attention(setup: Setup, seconds: float) -> list[str]:
    small = ["--dry-run", "--rounds", 1] if setup.is_small else ["--table"]
    return _python("bench_attention.py", "--out", setup.results / "attention.json", *small)


def _steps(setup: Setup, seconds: float) -> list[str]:
    rounds = 1 if setup.is_small else 8
    return _python(
        "bench_gpu_step.py", "--device", setup.device, "--rounds", rounds, "--out", setup.results / "steps.json"
    )


def _cifar10(setup: Setup, seconds: float) -> list[str] | None:
    if setup.data is None:
        return None
    given = ["--data", setup.data, "--folder", setup.runs / "cifar10", "--slice-minutes", seconds / 60]
    given += ["--minutes", seconds / 60] if not setup.is_small else ["--smoke", "--method", "sid"]
    given += ["--weights", setup.weights] if setup.weights else []
    for method in () if setup.is_small else ("sid", "dmd2", "f_distill", "regression"):
        given += ["--method", method]
    return _python("budget.py", "cifar10", *given)


def _show_tests(file: Path) -> str:
    found = re.search(
        r'errors="(\d+)" failures="(\d+)" skipped="(\d+)" tests="(\d+)"', file.read_text(encoding="utf-8")
    )
    if found is None:
        return ""
    errors, failures, skipped, tests = map(int, found.groups())
    return f"`pytest -m gpu`: {tests} tests, {failures + errors} failed, {skipped} skipped."


def _show_attention(file: Path) -> str:
    rows = json.loads(file.read_text())["rows"]
    lines = ["| case | shape | error (torch's math) | ratio to ours |", "|---|---|---|---|"]
    for row in rows:
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items())
        shape = " x ".join(map(str, row["shape"]))
        lines.append(f"| {row['case']} | {shape} | {row['error']:.1e} ({row['error_of_math']:.1e}) | {ratios} |")
    return "\n".join(lines)


def _show_steps(file: Path) -> str:
    found = json.loads(file.read_text())
    lines = ["| step | ours, seconds | bare loop | ratio |", "|---|---|---|---|"]
    for kind, row in found.get("seconds", {}).items():
        lines.append(f"| {kind} | {row['ours']:.4f} | {row['bare']:.4f} | {row['ratio']:.2f} |")
    if found.get("waits") is not None:
        total, where = sum(found["waits"].values()), ", ".join(f"{k} ({n})" for k, n in found["waits"].items())
        lines += ["", f"Waits for the device in two steps: {total}{f': {where}' if where else ''}."]
    if memory := found.get("memory"):
        ratio = f"; the allocator's peak is {memory['ratio']:.3f} of it" if memory["ratio"] else ""
        lines += ["", f"Memory predicted: {memory['predicted'] / 2**20:.0f} MiB{ratio}."]
    return "\n".join(lines)


def _show_cifar10(file: Path) -> str:
    lines = ["| model, protocol | values |", "|---|---|"]
    for line in file.read_text().splitlines() if file.exists() else ():
        record = json.loads(line)
        values = ", ".join(f"{name} {held['mean']:.4g}" for name, held in record["metrics"].items())
        lines.append(f"| {record['name']} | {values} |")
    return "\n".join(lines)


PARTS = (
    Part("Tests that want a GPU", 0.25, _tests, "tests.xml", _show_tests),
    Part("Attention", 0.2, _attention, "attention.json", _show_attention),
    Part("A step, its waits and its memory", 0.15, _steps, "steps.json", _show_steps),
    Part("CIFAR-10", 0.4, _cifar10, "records.jsonl", _show_cifar10),
)


def main(
    minutes: Annotated[float, typer.Option(help="Of all parts together.", min=0.1)] = 12.0,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    data: Annotated[str | None, typer.Option(help="CIFAR-10, as under `data` of a config.")] = None,
    weights: Annotated[Path | None, typer.Option(help="The ResNet-20's file, resnet20.th.")] = None,
    results: Annotated[Path | None, typer.Option(help="Default: results/gpu, on a CPU runs/gpu-small.")] = None,
    page: Annotated[Path | None, typer.Option(help="Default: docs/gpu.md, on a CPU RESULTS/gpu.md.")] = None,
    only_page: Annotated[bool, typer.Option("--only-page", help="Run nothing: the page of what is there.")] = False,
) -> None:
    """Every part in turn, then the page."""
    if device not in ("cuda", "cpu"):
        sys.exit(f"error: --device {device}: choose from cuda, cpu")
    small = device == "cpu"
    results = results or (ROOT / "runs" / "gpu-small" if small else ROOT / "results" / "gpu")
    results.mkdir(parents=True, exist_ok=True)
    runs = ROOT / "runs" / "gpu" if not small else results / "runs"
    setup = Setup(device, results, runs, data, weights)
    if small and data is None:
        setup = replace(setup, data=_made_images(results))
    failed, left = [], 60 * minutes
    parts = () if only_page else PARTS
    for i, part in enumerate(parts):
        share = left * part.share / sum(other.share for other in parts[i:])
        began = time.monotonic()
        status = _run(part, setup, max(share, LEAST_ON_CPU) if small else share)
        left = max(left - (time.monotonic() - began), 0.0)
        print(f"{part.title}: {status['ended']}, {status['seconds']:.0f} s", flush=True)
        failed += [part.title] if status["ended"] == "failed" else []
    page = page or (results / "gpu.md" if small else ROOT / "docs" / "gpu.md")
    write_text_atomically(page, _page(setup))
    print(f"{page} is written")
    if failed:
        sys.exit(f"error: {', '.join(failed)}: failed; see {results}/*.log")


def _run(part: Part, setup: Setup, seconds: float) -> dict[str, Any]:
    """Run a part that is not done yet, within its seconds; writes and returns its status."""
    stem = Path(part.result).stem
    file, about = setup.results / f"{stem}.status.json", {"commit": _commit(), "machine": describe()}
    kept = json.loads(file.read_text()) if file.exists() else {}
    if kept.get("ended") == "done" and {key: kept[key] for key in about} == about:
        return {**kept, "ended": "done before", "seconds": 0.0}
    command = part.command(setup, seconds)
    began = time.monotonic()
    ended = "left out" if command is None else _limited(command, seconds, setup.results / f"{stem}.log")
    if ended == "done" and stem == "records":
        source = setup.runs / "cifar10" / part.result
        if source.exists():
            write_text_atomically(setup.results / part.result, source.read_text())
        is_whole = "all is done" in (setup.results / f"{stem}.log").read_text()
        ended = "done" if is_whole else "cut off"
    status = {"ended": ended, "seconds": round(time.monotonic() - began, 1), "command": command, **about}
    write_text_atomically(file, json.dumps(status, indent=1) + "\n")
    return status


def _limited(command: list[str], seconds: float, log: Path) -> str:
    """Run a command, its output into the log. done, failed, or cut off: it is asked to end, and then made to."""
    environment: Mapping[str, str] = os.environ | {"PYTHONPATH": f"{ROOT}:{SCRIPTS}"}
    with log.open("w", encoding="utf-8") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment, cwd=ROOT, start_new_session=True)
        try:
            return "done" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            return "cut off"


def _page(setup: Setup) -> str:
    """The results of every part, and what is missing."""
    lines = ["# On a GPU", "", "Written by `make gpu` (`scripts/gpu.py`), from the files in `results/gpu`.", ""]
    if setup.is_small:
        lines += ["**On a CPU, in small: the figures mean nothing.**", ""]
    for part in PARTS:
        file = setup.results / part.result
        said, status = setup.results / f"{file.stem}.status.json", None
        if said.exists():
            status = json.loads(said.read_text())
        told = f"{status['machine']}, commit {status['commit']}: {status['ended']}." if status else "**Not run yet.**"
        lines += [f"## {part.title}", "", told, ""]
        if file.exists():
            lines += [part.shown(file), ""]
    return "\n".join(lines).rstrip() + "\n"


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return done.stdout.strip() or "unknown"


def _made_images(folder: Path) -> str:
    """Made images for the small run."""
    file = folder / "images.npz"
    if not file.exists():
        images = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)
        np.savez(file, images=images, labels=np.arange(300) % 10)
    return f"{{name: npz, path: {file}, cache: {folder}/cache}}"


if __name__ == "__main__":
    typer.run(main)
