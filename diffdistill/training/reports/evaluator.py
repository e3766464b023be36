"""A look at the student while it trains: a small evaluation every so many steps, and the best checkpoint by it."""

from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import Field
from torch import nn

from diffdistill.settings.numbers import Number
from diffdistill.settings.registry import from_above
from diffdistill.settings.schema import PositiveInt, field, schema

if TYPE_CHECKING:
    from diffdistill.distributed.processes import Processes
    from diffdistill.models.spec import ModelSpec
    from diffdistill.training.reports.log import Log


@schema
class EvalConfig:
    """Evaluation during training, of the EMA where there is one, and always at the last step.

    protocol: a name, or a YAML file; one repeat of it.  every: steps between two.  num_images: fewer than the
    protocol's, which makes it another protocol.  best_by: the metric of the best checkpoint;
    null: the protocol's first.  guidance: w of D_u + w (D_c - D_u).  weights, references: files by the
    features' label, where they are not in their folders.  captions: the file of a protocol's captions.
    """

    protocol: str = "digits-pixels"
    every: PositiveInt = 500
    num_images: PositiveInt | None = None
    best_by: str | None = None
    guidance: Number = 1.0
    batch_size: Annotated[int, Field(ge=1, le=256)] = 256
    weights: dict[str, str] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    captions: str | None = None


class EvaluatedRun(Protocol):
    """What an evaluator asks of the trainer."""

    step: int

    @property
    def student(self) -> nn.Module:
        """The player that samples are taken from."""
        ...

    @property
    def images_seen(self) -> int: ...


class Evaluator(Protocol):
    """What the trainer asks."""

    @property
    def protocol(self) -> Mapping[str, Any]:
        """What is measured, by settings and the hashes of files; empty for nothing."""
        ...

    def examine(self, run: EvaluatedRun, *, is_last: bool, log: "Log") -> bool:
        """Evaluate the student if it is due. Returns whether it is the best so far, and so has to be saved."""
        ...

    def best(self, step: int) -> str | None:
        """The name of the best checkpoint until `step`, which has to stay."""
        ...


class NoEvaluator:
    """Never looks."""

    @property
    def protocol(self) -> Mapping[str, Any]:
        return {}

    def examine(self, run: EvaluatedRun, *, is_last: bool, log: "Log") -> bool:
        return False

    def best(self, step: int) -> str | None:
        return None


def make_evaluator(
    config: EvalConfig | None,
    folder: FilePath,
    student: nn.Module,
    spec: "ModelSpec",
    processes: "Processes",
    *,
    trusts_code: bool = False,
) -> Evaluator:
    """The evaluator that a run's config asks for.  folder: the run's.  processes: they share the work.  trusts_code:
    whether features that are a program may run, which no config can say.

    Raises UserError, before training, for a protocol that does not fit the student, and for missing files.
    """
    if config is None:
        return NoEvaluator()
    made: Evaluator = from_above("StudentEvaluator").of(
        config, folder, student, spec, processes, trusts_code=trusts_code
    )
    return made
