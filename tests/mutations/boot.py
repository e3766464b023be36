"""Faults of BOOT and of how its networks are read."""

from mutate import Fault

FAULTS = (
    Fault(
        "the target moves away from the estimate",
        "methods/boot.py",
        "y + expand(gain, y) * (f - y)",
        "y - expand(gain, y) * (f - y)",
        "methods/test_boot.py::test_the_exponential_target_is_ddim_read_as_a_signal",
    ),
    Fault(
        "the target has a graph",
        "methods/boot.py",
        "    @torch.no_grad()\n    def bootstrap",
        "    def bootstrap",
        "methods/test_boot.py::test_the_gradient_is_that_of_the_calls_at_s_and_t_max_alone",
    ),
    Fault(
        "the boundary's weight is dropped",
        "methods/boot.py",
        "self.boundary_weight * boundary",
        "boundary",
        "methods/test_boot.py::test_the_loss_is_bootstrap_and_boundary_by_their_weights",
    ),
    Fault(
        "no boundary at all",
        "methods/boot.py",
        " + self.boundary_weight * boundary",
        "",
        "methods/test_boot.py::test_the_loss_is_bootstrap_and_boundary_by_their_weights",
    ),
    Fault(
        "the teacher sees another noise level",
        "methods/boot.py",
        "self._estimate(players, draw, path.diffuse(y, eps, t), t)",
        "self._estimate(players, draw, path.diffuse(y, eps, s), s)",
        "methods/test_boot.py::test_the_exponential_target_is_ddim_read_as_a_signal",
    ),
    Fault(
        "the student is not told its scale",
        "methods/boot.py",
        'guidance=draw["w"] if self.takes_guidance else 1.0',
        "guidance=1.0",
        "methods/test_boot.py::test_a_student_that_takes_w_starts_as_one_that_does_not_and_is_told_w_in_training_and_sampling",
    ),
    Fault(
        "the teacher's condition is dropped",
        "methods/boot.py",
        "players.teacher(x, t, cond, guidance=1.0 if",
        "players.teacher(x, t, players.teacher.unconditional(cond), guidance=1.0 if",
        "methods/test_boot.py::test_the_loss_is_bootstrap_and_boundary_by_their_weights",
    ),
    Fault(
        "an EDM network keeps its skip",
        "diffdistill/networks/signal.py",
        "output_scale=teacher.sigma_data)",
        "output_scale=teacher.sigma_data, skip=1.0)",
        "methods/test_boot.py::test_a_student_starts_at_the_teacher_s_estimate_from_pure_noise",
    ),
    Fault(
        "the student does not start from the teacher",
        "diffdistill/distillation/signal_student.py",
        "    start_from(problem.network, problem.teacher)\n",
        "",
        "methods/test_boot.py::test_a_student_starts_at_the_teacher_s_estimate_from_pure_noise",
    ),
)
