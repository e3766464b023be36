"""Several students as one model: a router knows the student of every condition, and a denoiser asks it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser, Taps, Want
from diffdistill.diffusion.on_device import constant
from diffdistill.settings.limits import MAX_CLASSES, MAX_PROCESSES, MAX_WIDTH
from diffdistill.settings.numbers import Number
from diffdistill.settings.schema import schema

Numbers = Annotated[tuple[Number, ...], Field(max_length=MAX_WIDTH)]


@schema
class ClassRouter:
    """table: the student of each class. A label beyond them is "no class" of student 0, the next of student 1, ..."""

    name: Literal["classes"] = "classes"
    table: Annotated[tuple[Annotated[int, Field(ge=0, le=MAX_PROCESSES)], ...], Field(max_length=MAX_CLASSES)]

    def __call__(self, cond: Cond) -> Tensor:
        """The student of each sample, [B] int64. Raises ValueError without a label."""
        if cond.label is None:
            raise ValueError("this router routes by class, and the condition has no label")
        table, null = constant(self.table, cond.label.device, torch.int64), len(self.table)
        return torch.where(cond.label < null, table[cond.label.clamp_max(null - 1)], cond.label - null)


@schema
class QuadrantRouter:
    """Four students by a text's embedding, see `text_embedding`: below or above thresholds on two axes; a tie is below.

    mean: of the embeddings, [D]; axes: two directions, [D] each; thresholds: on the first axis, and on the second for
    those below and those above on the first.
    """

    name: Literal["quadrants"] = "quadrants"
    mean: Numbers
    axes: tuple[Numbers, Numbers]
    thresholds: tuple[Number, Number, Number]

    def __call__(self, cond: Cond) -> Tensor:
        """The student of each sample, [B] int64. Raises ValueError without a text."""
        return self.cell(text_embedding(cond))

    def cell(self, embeddings: Tensor) -> Tensor:
        """embeddings: [B, D].  Returns [B] int64 in 0 .. 3; the first axis decides between {0, 1} and {2, 3}."""
        first, second = _project(embeddings, self.mean, self.axes)
        split, below, above = self.thresholds
        is_above = first > split
        return 2 * is_above.long() + torch.where(is_above, second > above, second > below).long()


def text_embedding(cond: Cond) -> Tensor:
    """One vector a text, [B, D]: the pooled one, else the mean of its tokens. Raises ValueError without a text."""
    if cond.pooled_text is not None:
        return cond.pooled_text
    if cond.text is None:
        raise ValueError("this router routes by text, and the condition has none")
    if cond.text_mask is None:
        return cond.text.mean(1)
    weight = cond.text_mask.to(cond.text.dtype)[..., None]
    return (cond.text * weight).sum(1) / weight.sum(1).clamp_min(1)


AnyRouter = Annotated[ClassRouter | QuadrantRouter, Field(discriminator="name")]
"""The routers that a folder of students may hold."""


def fit_quadrants(embeddings: Tensor) -> QuadrantRouter:
    """The router whose four cells hold equally many of these embeddings, up to one and up to ties.

    embeddings: [N, D], N >= 4.  The axes are the two principal ones. The halves of the first are split at medians of
    their own, for one median on each axis alone makes cells of any size.
    """
    embeddings = embeddings.double()
    mean = embeddings.mean(0)
    _, _, directions = torch.linalg.svd(embeddings - mean, full_matrices=False)
    axes = torch.stack([axis * axis[axis.abs().argmax()].sign() for axis in directions[:2]])
    first, second = _project(embeddings, mean, axes)
    split = _lower_median(first)
    thresholds = (split, _lower_median(second[first <= split]), _lower_median(second[first > split]))
    low, high = axes.tolist()
    return QuadrantRouter(mean=tuple(mean.tolist()), axes=(tuple(low), tuple(high)), thresholds=thresholds)


def _project(embeddings: Tensor, mean: Tensor | Numbers, axes: Tensor | tuple[Numbers, ...]) -> tuple[Tensor, Tensor]:
    """Both coordinates of each embedding, [B] float64. Not a matrix product, which may round a row by its company."""
    centred = embeddings.double() - torch.as_tensor(mean, dtype=torch.float64, device=embeddings.device)
    directions = torch.as_tensor(axes, dtype=torch.float64, device=embeddings.device)
    first, second = (centred[:, None] * directions).sum(-1).unbind(1)
    return first, second


def _lower_median(values: Tensor) -> float:
    """One of the values, so that it falls below itself; 0 of none."""
    return float(values.median()) if len(values) else 0.0


class RoutedDenoiser(Denoiser):
    """Several students behind the interface of one: each sample is its own student's.

    A Denoiser, so that samplers and evaluation take it as any other. "No class" remembers the student of the class
    that it stands in for, so that both estimates of a guided sample are of one student.
    """

    def __init__(self, students: Sequence[Denoiser], router: Callable[[Cond], Tensor]) -> None:
        """students: of one architecture and path.  router: the student of each sample, by number."""
        first = students[0]
        super().__init__(first.net, first.path, first.predicts, sigma_data=first.sigma_data)
        self.runtime = first.runtime
        self.students = nn.ModuleList(students)
        self.router = router

    def run_with(self, **changes: Any) -> None:
        """Change what all students are run with from now on, as Denoiser's."""
        super().run_with(**changes)
        for student in self.students:
            student.run_with(**changes)  # type: ignore[operator]

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond = NO_COND,
        *,
        guidance: float | Tensor = 1.0,
        uncond: Cond | None = None,
        want: Want = "x0",
        taps: Taps | None = None,
    ) -> Tensor:
        """As Denoiser's. Raises ValueError where features are wanted: those of different students do not compare."""
        if want != "x0":
            raise ValueError("features: the students share none; use one student")
        plain, null = self._plain(cond), None if uncond is None else self._plain(uncond)

        def estimate(number: int, rows: Tensor) -> Tensor:
            scale = guidance[rows] if isinstance(guidance, Tensor) and guidance.ndim else guidance
            other = None if null is None else null[rows]
            made: Tensor = self.students[number](x_t[rows], t[rows], plain[rows], guidance=scale, uncond=other)
            return made

        return by_student(self.which(cond), estimate)

    def which(self, cond: Cond) -> Tensor:
        """The student of each sample, [B] int64: by its class, or by the prompt that its number stands for."""
        if self.conditions is None or cond.label is None or isinstance(self.router, ClassRouter):
            return self.router(cond)
        null = self.num_classes
        found = self.router(self.resolve(self._plain(cond)))
        return torch.where(cond.label < null, found, cond.label - null)

    def unconditional(self, cond: Cond) -> Cond:
        """`cond` with the class taken away, but for whose student it is. Raises ValueError as Denoiser's."""
        null = super().unconditional(cond)
        assert null.label is not None
        return replace(null, label=null.label + self.which(cond))

    def _plain(self, cond: Cond) -> Cond:
        """As students know it: one label for "no class"."""
        return cond if cond.label is None else replace(cond, label=cond.label.clamp_max(self.num_classes))


def by_student(which: Tensor, make: Callable[[int, Tensor], Any]) -> Tensor:
    """A batch whose rows are made by different students.

    which: [B], the student of each row; make: (student, numbers of its rows) -> their values [n, ...].
    """
    parts = [(which == number).nonzero()[:, 0] for number in which.unique().tolist()]
    made = torch.cat([make(int(which[rows[0]]), rows) for rows in parts])
    return made[torch.cat(parts).argsort()]
