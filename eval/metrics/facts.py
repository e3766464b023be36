"""What is true of a metric's numbers, whoever measured them: stated once, on the metric's class."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Fact:
    """What there is to know of the numbers of one name.

    name: of the metric in a record, alone or with features behind it: fd is fd-pixels too.  better: which of two
    numbers wins.  label: how the name is spoken.  decimals: digits after the point that mean something.  priority: of
    several metrics a board is ranked by the one with the smallest; None is ranked by only where no other has one.
    """

    name: str
    better: Literal["lower", "higher"]
    label: str
    decimals: int = 3
    priority: int | None = None

    def holds_for(self, metric: str) -> bool:
        """metric: a name in a record."""
        return metric == self.name or metric.startswith(f"{self.name}-")


PUBLISHED = (
    Fact("geneval", "higher", "GenEval"),
    Fact("vbench", "higher", "VBench"),
    Fact("image-reward", "higher", "image reward"),
)
"""Metrics of published numbers that nothing here computes."""

AGAINST = (Fact("to-teacher", "lower", "To teacher"), Fact("same-noise-rms", "lower", "Same-noise RMS"))
"""What boards show of the distance to a teacher, beside its floor."""
