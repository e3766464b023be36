"""Records for the tests of what is shown: a few models under one protocol, some of them hostile."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from diffdistill.eval.board.leaderboard import Located
from diffdistill.eval.records.record import (
    Cost,
    Efficiency,
    Environment,
    Images,
    ModelRecord,
    Record,
    SamplerRecord,
    Source,
    Values,
    append_record,
)

PROTOCOL = {"name": "digits-pixels", "num_images": 1800, "nearest_k": 3, "reference": {"name": "digits-train"}}
HOSTILE = "<img src=x onerror=alert(1)></script><script>window.hacked = 1</script>\"'>{{7*7}} =cmd|' /C calc'!A0"
ENVIRONMENT = Environment(
    date="2026-01-01T00:00:00Z",
    versions={"torch": "2.11"},
    commit=None,
    command="diffdistill eval runs/x",
    device="cpu",
    dtype="float32",
    tf32=False,
    wall_seconds=1.5,
)
EFFICIENCY = Efficiency(
    num_evaluations=1,
    parameters=1000,
    latency_ms=2.0,
    throughput=500.0,
    throughput_batch=64,
    peak_memory_bytes=None,
    device="a processor",
    dtype="float32",
    compile=False,
    includes=(),
    warm_up=1,
    repeats=3,
)


def measured(
    name: str,
    *distances: float,
    seed: int | None = 0,
    recall: float | None = 0.5,
    steps: int = 1,
    protocol: dict[str, Any] | None = None,
    grid: str | None = None,
    **changes: Any,
) -> Record:
    """distances: fd-pixels, one a repeat.  steps: network evaluations for one image."""
    metrics = {"fd-pixels": Values.of(distances)} if distances else {}
    metrics |= {"recall": Values.of([recall])} if recall is not None else {}
    record = Record(
        kind="measured",
        name=name,
        method="dmd2",
        seed=seed,
        protocol=PROTOCOL | (protocol or {}),
        metrics=metrics,
        model=ModelRecord(source=f"runs/{len(name)}", teacher="runs/teacher", parameters=1000),
        sampler=SamplerRecord(name="few_steps", num_evaluations=steps),
        cost=Cost(train_images=6400 * steps),
        images=Images(count=1800, seeds=((0, 1800),), grid=grid),
        environment=ENVIRONMENT,
    )
    return replace(record, **changes)


def reported(name: str, fid: float, **changes: Any) -> Record:
    record = Record(
        kind="reported",
        name=name,
        method="sid",
        protocol={"name": "CIFAR-10: a paper", "task": "CIFAR-10", "evaluator": "a paper's"},
        metrics={"fid": Values.of([fid])},
        source=Source(title="A paper", url="https://example.org/paper", place="Table 2"),
    )
    return replace(record, **changes)


def located(*records: Record) -> list[Located]:
    """Records as if they stood in one file, one below the other."""
    return [Located(record, Path("records.jsonl"), number) for number, record in enumerate(records, start=1)]


def written(folder: Path, *records: Record) -> Path:
    """A JSONL file of the records."""
    for record in records:
        append_record(folder / "records.jsonl", record)
    return folder / "records.jsonl"


def draw_grid(file: Path, colour: str = "teal") -> Path:
    """A small picture."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 20), colour).save(file)
    return file
