"""Faults of first steps that are the teacher's."""

from mutate import Fault

FILE, TEST = "diffdistill/diffusion/guidance/first_steps.py", "diffusion/test_first_steps.py::test_"
ENDS = f"{TEST}no_first_call_is_the_student_and_all_of_them_the_teacher"
LEVEL = f"{TEST}another_path_is_asked_at_the_same_level"

FAULTS = (
    Fault(
        "one step more is the teacher's",
        FILE,
        "if next(number) >= self.num_evaluations:",
        "if next(number) > self.num_evaluations:",
        ENDS,
    ),
    Fault(
        "the teacher's steps are the last",
        FILE,
        "if next(number) >= self.num_evaluations:",
        "if next(number) < self.num_evaluations:",
        f"{TEST}the_spread_of_gaussians_is_the_closed_form",
    ),
    Fault(
        "the teacher is guided as the student is",
        FILE,
        "begin(self.guidance, self.teacher, told)",
        "begin(self.rest, self.teacher, told)",
        f"{TEST}each_side_has_its_own_guidance_and_condition",
    ),
    Fault(
        "a teacher without classes is told one",
        FILE,
        "told = NO_COND if cond.label is None else self.teacher.class_cond(cond.label)",
        "told = cond",
        f"{TEST}a_teacher_without_classes_is_told_none",
    ),
    Fault("another path is asked at the same time", FILE, "other.time_of_ratio(path.ratio(t))", "t", LEVEL),
    Fault(
        "the state is not scaled to another path", FILE, "x * expand(other.sigma(time) / path.sigma(t), x)", "x", LEVEL
    ),
)
