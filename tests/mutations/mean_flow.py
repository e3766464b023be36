"""Faults of MeanFlow and of networks that are told a second time."""

from mutate import Fault

METHOD = "methods/mean_flow.py"
FAULTS = (
    Fault(
        "the identity has the wrong sign",
        METHOD,
        "velocity - expand(t - r, z) * change",
        "velocity + expand(t - r, z) * change",
        "methods/test_mean_flow.py::test_the_exact_mean_velocity_is_its_own_target",
    ),
    Fault(
        "time stands still in the derivative",
        METHOD,
        "torch.ones_like(t))",
        "torch.zeros_like(t))",
        "methods/test_mean_flow.py::test_the_target_is_v_less_t_minus_r_times_the_change_along_the_line_by_finite_differences",
    ),
    Fault(
        "the weight has a gradient",
        METHOD,
        "(error.detach() + self.constant)",
        "(error + self.constant)",
        "methods/test_mean_flow.py::test_the_loss_divides_each_sample_s_square_by_itself_and_c_without_a_gradient",
    ),
    Fault(
        "the target has a graph",
        METHOD,
        "    @torch.no_grad()\n    def target",
        "    def target",
        "methods/test_mean_flow.py::test_the_loss_divides_each_sample_s_square_by_itself_and_c_without_a_gradient",
    ),
    Fault(
        "kappa is left out of the free estimate's share",
        METHOD,
        "(1 - self.guidance - self.kappa) * free",
        "(1 - self.guidance) * free",
        "methods/test_mean_flow.py::test_omega_and_kappa_mix_the_velocity_with_the_student_s_own_on_the_interval_alone",
    ),
    Fault(
        "guidance holds everywhere",
        METHOD,
        "is_guided = (t >= low) & (t <= high)",
        "is_guided = t >= 0",
        "methods/test_mean_flow.py::test_the_teacher_is_guided_on_the_interval_alone",
    ),
    Fault(
        "no condition is dropped",
        METHOD,
        "if self.mixes:\n            batch",
        "if False:\n            batch",
        "methods/test_mean_flow.py::test_what_loses_its_class_is_trained_without_it",
    ),
    Fault(
        "the share is the opposite one",
        METHOD,
        'uniforms["equal"] < self.share_equal',
        'uniforms["equal"] > self.share_equal',
        "methods/test_mean_flow.py::test_three_quarters_have_r_at_t_and_the_others_below",
    ),
    Fault(
        "the derivative has dropout of its own",
        METHOD,
        "        with masks_again(z):\n            mean",
        "        if True:\n            mean",
        "methods/test_mean_flow.py::test_u_and_its_derivative_have_the_same_dropout_and_own_estimates_have_none",
    ),
    Fault(
        "own estimates have dropout",
        METHOD,
        "        with without_dropout(players.generator):\n",
        "        if True:\n",
        "methods/test_mean_flow.py::test_u_and_its_derivative_have_the_same_dropout_and_own_estimates_have_none",
    ),
)
