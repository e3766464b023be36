"""A measured record."""

from diffdistill.eval.records.record import (
    Environment,
    Images,
    ModelRecord,
    Record,
    Values,
)

MEASURED = Record(
    kind="measured",
    name="a student",
    protocol={"name": "digits-pixels", "num_images": 1800, "nearest_k": 3},
    metrics={"fd-pixels": Values.of([0.2, 0.25, 0.15]), "recall": Values.of([0.9])},
    model=ModelRecord(source="runs/x"),
    images=Images(count=1800, seeds=((0, 1800),)),
    environment=Environment(
        date="2026-01-01T00:00:00Z",
        versions={"torch": "2.11"},
        commit=None,
        command="diffdistill eval runs/x",
        device="cpu",
        dtype="float32",
        tf32=False,
        wall_seconds=1.5,
    ),
)
