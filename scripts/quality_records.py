"""The records of `scripts/quality.py`: one checkpoint a line of JSON."""

import json
from pathlib import Path

from diffdistill.settings.schema import schema
from diffdistill.settings.values import dump, validate

RECORDS = Path(__file__).parents[1] / "results" / "quality.jsonl"


@schema
class Measured:
    """A checkpoint of one run.

    run: its name, one for all its lines.  average: the half-life of the EMA, "" for that of the config itself.
    overrides: of the packaged config, without the teacher's place.
    total_steps: of the whole run, to whose end the rates fall.  cpu_seconds: of training until `step`.
    to_teacher, to_data: Frechet distances in pixels of 6,000 samples, to 6,000 of the teacher's, to the training split.
    precision, recall, fd_pixels: of protocol digits-pixels, at a run's end.  commit: of the code that measured it.
    """

    network: str
    run: str
    method: str
    factor: str
    variant: str
    average: str = ""
    config: str
    overrides: tuple[str, ...]
    seed: int
    step: int
    total_steps: int
    cpu_seconds: float
    to_teacher: float
    to_data: float
    precision: float | None = None
    recall: float | None = None
    fd_pixels: float | None = None
    commit: str | None = None

    @property
    def is_last(self) -> bool:
        return self.step == self.total_steps

    @property
    def quality(self) -> tuple[float, float, float]:
        """FD, precision and recall by protocol, of a run's end."""
        assert self.fd_pixels is not None
        assert self.precision is not None
        assert self.recall is not None
        return self.fd_pixels, self.precision, self.recall


def read(file: Path) -> list[Measured]:
    """All records, in order; none where there is no file. Raises UserError on a line that is none."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [validate(Measured, json.loads(line), origin=f"{file}, line {i}") for i, line in enumerate(lines, start=1)]


def append(file: Path, *records: Measured) -> None:
    """Add records at the end, all of a run at once, so that none is half there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write("".join(json.dumps(_rounded(dump(record))) + "\n" for record in records))


def _rounded(values: dict[str, object]) -> dict[str, object]:
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in values.items()}
