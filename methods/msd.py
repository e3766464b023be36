"""MSD: Multi-student Diffusion Distillation for Better One-step Generators.  Song et al. 2024, arXiv:2410.23274.

Implemented: the classes are parted into disjoint cells of equal size, and each student distils one of them by any
method (`base`), on conditions and real images of its cell alone. Stored teacher pairs stay those of all classes: the
paper found that students collapse on pairs of their own. A run is one student; runs do not know each other.
The paper's stages are runs as well, each of which begins with the one before (`init`): teacher score matching for
students smaller than the teacher (`base: tsm`), distribution matching (`dmd2` with gan_weight 0), adversarial
distribution matching (`dmd2`). `diffdistill join` makes one model of the students. Quadrants of prompts are of their
embeddings, and the router goes with the run; the paper does not say its axes.
"""

from typing import TYPE_CHECKING, Literal

from diffdistill.data.source import ImageSource
from diffdistill.diffusion.prompt_table import PromptTable
from diffdistill.diffusion.router import AnyRouter
from diffdistill.distillation.method import Method, Problem
from diffdistill.distillation.partition import AnyPartition, LabelRanges, Quadrants, prompt_cells
from diffdistill.distillation.wrapper import Wrapper, default_base, methods_above
from diffdistill.settings.numbers import NonNegativeInt, Processes
from diffdistill.settings.schema import UserError, field, schema

if TYPE_CHECKING:
    AnyBase = Method
else:
    AnyBase = methods_above("msd")


@schema
class MSD(Wrapper):
    """One of several students.

    base: the method that trains it.  num_students: K; 1 is the base method, bit for bit.  student_index: of this run,
    from 0.  partition: how classes are divided.
    """

    name: Literal["msd"] = "msd"
    base: AnyBase = field(default_factory=default_base)
    num_students: Processes = 4
    student_index: NonNegativeInt = 0
    partition: AnyPartition = field(default_factory=LabelRanges)

    def __post_init__(self) -> None:
        if self.student_index >= self.num_students:
            raise ValueError(f"student_index = {self.student_index}: must be below num_students = {self.num_students}")

    def classes(self, problem: Problem, source: ImageSource) -> tuple[int, ...]:
        """Those of this student's cell. Raises UserError if there are fewer classes than students."""
        if self.num_students == 1:
            return self.base.classes(problem, source)
        if (table := self._prompts(problem)) is not None:
            return tuple((prompt_cells(table)[1] == self.student_index).nonzero()[:, 0].tolist())
        if problem.num_classes < self.num_students:
            raise UserError(f"method.num_students = {self.num_students}: too many for {problem.num_classes} classes")
        cells = self.partition(problem.num_classes, self.num_students, source)
        return tuple((cells == self.student_index).nonzero()[:, 0].tolist())

    def router(self, problem: Problem) -> AnyRouter | None:
        """That of prompts, the same for all students; classes have none but which are whose."""
        table = None if self.num_students == 1 else self._prompts(problem)
        return None if table is None else prompt_cells(table)[0]

    def _prompts(self, problem: Problem) -> PromptTable | None:
        """Those that labels stand for, where the quadrants are theirs. Raises UserError unless there are four."""
        table = problem.teacher.conditions if problem.teacher else None
        if table is None or not isinstance(self.partition, Quadrants):
            return None
        if self.num_students != 4:
            raise UserError(f"method.num_students = {self.num_students}: there are four quadrants; use 4")
        return table
