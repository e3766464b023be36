"""Costs on the leaderboard: NFE, parameters, training, speed. Only costs measured the same way share a column."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffdistill.eval.records.record import Efficiency, Record


@dataclass(frozen=True)
class Cost:
    """A column of costs.

    label: its head.  unit: in words, for a plot's axis.  choice: the same in short.  value: of a record, or None where
    it is not known.
    """

    label: str
    unit: str
    choice: str
    value: Callable[[Record], float | None]
    is_plotted: bool = True


def cost_columns(records: Sequence[Record]) -> list[Cost]:
    """The costs that any of the records knows.

    Latency and throughput stand together only where device, precision and all else are the same: one column for each
    way of measuring.
    """
    costs = [
        Cost("NFE", "NFE: network evaluations per image", "NFE", nfe),
        Cost("params", "parameters of the networks that sample", "parameters", _parameters),
        Cost("images seen", "images seen in training", "training images", _cost("train_images")),
        Cost("training s", "training time, seconds", "training time", _cost("train_seconds")),
        Cost("CPU s", "training time, CPU-seconds", "training CPU time", _cost("train_cpu_seconds")),
        Cost("GPU h", "training time, GPU-hours", "GPU-hours", _cost("gpu_hours")),
        Cost("iterations", "training iterations", "iterations", _cost("train_steps"), is_plotted=False),
    ]
    for way in dict.fromkeys(_way(record.efficiency) for record in records if record.efficiency):
        costs += [
            Cost("ms", f"latency per image, ms ({way})", "latency", _efficiency("latency_ms", way)),
            Cost("images/s", f"images per second ({way})", "", _efficiency("throughput", way), is_plotted=False),
        ]
    if all(record.cost is None or record.cost.train_images is not None for record in records):
        costs = [cost for cost in costs if cost.label != "iterations"]  # these say less than images do
    return [cost for cost in costs if any(cost.value(record) is not None for record in records)]


def nfe(record: Record) -> int | None:
    """Number of function evaluations: of the network, per image."""
    if record.sampler and record.sampler.num_evaluations is not None:
        return record.sampler.num_evaluations
    return record.efficiency.num_evaluations if record.efficiency else None


def _parameters(record: Record) -> float | None:
    if record.model and record.model.parameters is not None:
        return record.model.parameters
    return record.efficiency.parameters if record.efficiency else None


def _cost(field: str) -> Callable[[Record], float | None]:
    return lambda record: getattr(record.cost, field) if record.cost else None


def _efficiency(field: str, way: str) -> Callable[[Record], float | None]:
    def value(record: Record) -> float | None:
        known = record.efficiency
        return getattr(known, field) if known and _way(known) == way else None

    return value


def _way(efficiency: Efficiency) -> str:
    """How it was measured: what must be equal for two latencies to stand in one column."""
    parts = [efficiency.device, efficiency.dtype, "compiled" if efficiency.compile else ""]
    parts += [f"{efficiency.threads} threads" if efficiency.threads else "", f"batch {efficiency.throughput_batch}"]
    parts += [f"with {', '.join(efficiency.includes)}" if efficiency.includes else ""]
    return ", ".join(part for part in parts if part)
