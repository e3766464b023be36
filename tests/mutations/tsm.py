"""Faults of teacher score matching."""

from mutate import Fault

FAULTS = (
    Fault(
        "the target is the image",
        "methods/tsm.py",
        "target = teacher(x_t, t, cond)",
        "target = batch.images",
        "methods/test_tsm.py::test_the_loss_is_zero_at_the_teacher_s_own_weights",
    ),
    Fault(
        "the weight is dropped",
        "methods/tsm.py",
        "(expand(scale, x_t) * (student(x_t, t, cond) - target) ** 2)",
        "((student(x_t, t, cond) - target) ** 2)",
        "methods/test_tsm.py::test_the_loss_is_the_weighted_square_of_the_difference_of_two_gaussian_denoisers",
    ),
    Fault(
        "the target has a gradient",
        "methods/tsm.py",
        "with torch.no_grad():",
        "with torch.enable_grad():",
        "methods/test_tsm.py::test_no_gradient_reaches_the_teacher",
    ),
    Fault(
        "the teacher is asked without the dropped classes",
        "methods/tsm.py",
        "target = teacher(x_t, t, cond)",
        "target = teacher(x_t, t, batch.cond)",
        "methods/test_tsm.py::test_both_are_asked_about_the_same_class_or_about_none",
    ),
    Fault(
        "the fake score starts as the larger teacher",
        "diffdistill/distillation/method.py",
        "[other] = self.initial.values()",
        "pass",
        "methods/test_tsm.py::test_generator_and_fake_score_of_a_later_run_start_as_the_smaller_network",
    ),
)
