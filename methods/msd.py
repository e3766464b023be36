"""MSD: Multi-student Diffusion Distillation for Better One-step Generators.  Song et al. 2024, arXiv:2410.23274.

Implemented: the classes are parted into disjoint cells of equal size, and each student distils one of them by any
method (`base`), on conditions and real images of its cell alone. Stored teacher pairs stay those of all classes: the
paper found that students collapse on pairs of their own. A run is one student; runs do not know each other.
The paper's stages are runs as well, each of which begins with the one before (`init`): teacher score matching for
students smaller than the teacher (`base: tsm`), distribution matching (`dmd2` with gan_weight 0), adversarial
distribution matching (`dmd2`). `diffdistill join` makes one model of the students.
Not implemented: text prompts as conditions in training (the router for them is in diffdistill/diffusion/router.py).
"""

from typing import TYPE_CHECKING, Literal

from diffdistill.data.source import ImageSource
from diffdistill.distillation.method import Method, Problem
from diffdistill.distillation.partition import AnyPartition, LabelRanges
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

    base: the method that trains it.  num_students: K; 1 is the base method, bit for bit.  student_index: which of the
    students this run is, from 0.  partition: how classes are shared out.
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
        if problem.num_classes < self.num_students:
            raise UserError(f"method.num_students = {self.num_students}: too many for {problem.num_classes} classes")
        cells = self.partition(problem.num_classes, self.num_students, source)
        return tuple((cells == self.student_index).nonzero()[:, 0].tolist())
