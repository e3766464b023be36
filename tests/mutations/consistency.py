"""Faults of discrete consistency."""

from mutate import Fault

METHOD, CURRICULA = "methods/consistency.py", "diffdistill/distillation/curricula.py"
LOSSES, TEST = "diffdistill/distillation/losses.py", "methods/test_consistency.py::test_"
OWN = f"{TEST}the_loss_is_the_weighted_distance_to_the_student_s_own_estimate"
FAULTS = (
    Fault(
        "the target has a gradient",
        METHOD,
        "    @torch.no_grad()\n    def target(",
        "    def target(",
        f"{TEST}the_loss_reaches_the_generator_s_first_call_alone",
    ),
    Fault(
        "there is no boundary condition",
        METHOD,
        "return torch.where(is_least.bool(), at_least, student(x_r, r, cond))",
        "return student(x_r, r, cond)",
        OWN,
    ),
    Fault(
        "the target is at the noisier level",
        METHOD,
        "student(x_r, r, cond))",
        "student(x_r, t, cond))",
        f"{TEST}the_gap_of_the_discrete_fixed_point_is_its_closed_form",
    ),
    Fault("the loss has no weight", METHOD, "weight.to(distance.device) * distance", "distance", OWN),
    Fault(
        "the lower level has other noise",
        METHOD,
        'student.path.diffuse(batch.images, draw["eps"], r)',
        'student.path.diffuse(batch.images, -draw["eps"], r)',
        f"{TEST}the_gap_of_the_discrete_fixed_point_is_its_closed_form",
    ),
    Fault(
        "the teacher is not guided",
        METHOD,
        "players.teacher(x_t, t, cond, guidance=self.guidance)",
        "players.teacher(x_t, t, cond)",
        f"{TEST}guidance_reaches_the_teacher_and_needs_one",
    ),
    Fault(
        "the calls have dropout of their own",
        METHOD,
        "        with masks_again(x_t):  # both calls have the same dropout\n",
        "        if True:\n",
        f"{TEST}both_calls_have_the_same_dropout",
    ),
    Fault(
        "the root is of each element",
        LOSSES,
        "    squared = (widen(x) - widen(target)).square().flatten(1).sum(1)\n"
        "    return (squared + max(c**2, 1e-24)).sqrt() - c",
        "    squared = (widen(x) - widen(target)).square().flatten(1)\n"
        "    return ((squared + max(c**2, 1e-24)).sqrt() - c).sum(1)",
        f"{TEST}the_distance_is_of_a_sample_s_norm",
    ),
    Fault(
        "the grid never doubles",
        CURRICULA,
        "self.first * 2 ** min(step // length, stages)",
        "self.first",
        f"{TEST}the_grid_doubles_at_the_paper_s_iterations",
    ),
    Fault(
        "a drawn level becomes the cleaner end of its interval",
        CURRICULA,
        ".clamp(1, len(grid) - 1)",
        ".sub(1).clamp(1, len(grid) - 1)",
        f"{TEST}a_grid_and_a_log_normal_law_are_the_paper_s_differences_of_erf",
    ),
    Fault(
        "ECT does not near the level",
        CURRICULA,
        "self.q ** -(stage + 1)",
        "self.q ** -1",
        f"{TEST}ect_starts_at_the_image_and_ends_next_to_the_level",
    ),
)
