"""Faults of sCM."""

from mutate import Fault

METHOD, TANGENT = "methods/scm.py", "diffdistill/distillation/trigflow.py"
FAULTS = (
    Fault(
        "the tangent has the wrong sign",
        TANGENT,
        "output - output.detach() - tangent",
        "output - output.detach() + tangent",
        "methods/test_scm.py::test_the_exact_student_is_at_rest_and_another_one_is_not",
    ),
    Fault(
        "the tangent forgets cos",
        TANGENT,
        "return first, cos * change - first",
        "return first, change - first",
        "methods/test_scm.py::test_the_tangent_is_the_paper_s_own_form_of_it",
    ),
    Fault(
        "the velocity is the student's own",
        TANGENT,
        "velocity = (cos * x - towards) / sin",
        "velocity = (cos * x - student(x_t, t, cond)) / sin",
        "methods/test_scm.py::test_at_full_ramp_the_tangent_is_the_change_of_f_along_the_teacher_s_trajectory",
    ),
    Fault(
        "time stands still in the tangent",
        TANGENT,
        "directions = velocity.to(x.dtype), torch.ones_like(tau)",
        "directions = velocity.to(x.dtype), torch.zeros_like(tau)",
        "methods/test_scm.py::test_the_tangent_of_the_exact_consistency_function_is_zero",
    ),
    Fault(
        "the weight's own share is dropped",
        METHOD,
        "weight.exp() * error - weight",
        "weight.exp() * error",
        "methods/test_scm.py::test_the_loss_is_e_to_the_weight_of_the_tangent_s_mean_square_less_the_weight",
    ),
    Fault(
        "the teacher is not guided",
        METHOD,
        "players.teacher(x_t, t, cond, guidance=self.guidance)",
        "players.teacher(x_t, t, cond, guidance=1.0)",
        "methods/test_scm.py::test_the_teacher_is_guided_and_the_student_s_class_reaches_both",
    ),
    Fault(
        "there is no warm-up",
        METHOD,
        "rng.step / self.warmup",
        "1.0",
        "methods/test_scm.py::test_the_ramp_rises_over_the_warm_up",
    ),
    Fault(
        "the derivative has dropout of its own",
        METHOD,
        "        with masks_again(x_t):  # F and its derivative have the same dropout\n",
        "        if True:\n",
        "methods/test_scm.py::test_the_output_and_its_derivative_have_the_same_dropout",
    ),
)
