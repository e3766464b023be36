"""Faults of first calls that are the teacher's."""

from mutate import Fault

CALLS, TEST = "diffdistill/diffusion/guidance/first_calls.py", "diffusion/test_first_calls.py::test_"
ENDS = f"{TEST}no_first_call_is_the_student_and_all_of_them_the_teacher"
LEVEL = f"{TEST}another_path_is_asked_at_the_same_level"

FAULTS = (
    Fault(
        "one call more is the teacher's", CALLS, "if next(number) >= self.calls:", "if next(number) > self.calls:", ENDS
    ),
    Fault(
        "the teacher's calls are the last",
        CALLS,
        "if next(number) >= self.calls:",
        "if next(number) < self.calls:",
        f"{TEST}the_spread_of_gaussians_is_the_closed_form",
    ),
    Fault(
        "the teacher is guided as the student is",
        CALLS,
        "begin(self.guidance, self.teacher, told)",
        "begin(self.rest, self.teacher, told)",
        f"{TEST}each_side_has_its_own_guidance_and_condition",
    ),
    Fault(
        "a teacher without classes is told one",
        CALLS,
        "told = NO_COND if cond.label is None else self.teacher.class_cond(cond.label)",
        "told = cond",
        f"{TEST}a_teacher_without_classes_is_told_none",
    ),
    Fault("another path is asked at the same time", CALLS, "other.time_of_ratio(path.ratio(t))", "t", LEVEL),
    Fault(
        "the state is not scaled to another path", CALLS, "x * expand(other.sigma(time) / path.sigma(t), x)", "x", LEVEL
    ),
)
