"""Faults of FreeFlow, and of the line and the start that it shares."""

from mutate import Fault

METHOD, LINE, TEST = "methods/free_flow.py", "diffdistill/diffusion/line.py", "methods/test_free_flow.py::test_"
EXACT = f"{TEST}the_exact_map_is_its_own_target_and_another_one_is_not"
BY_DIFFERENCES = f"{TEST}the_target_is_the_teacher_s_velocity_less_the_map_s_change_in_d_alone_by_finite_differences"
AS_DMD2 = f"{TEST}without_prediction_and_by_nu_it_is_dmd2_without_a_gan_bit_for_bit"
VELOCITIES = f"{TEST}the_correction_between_gaussians_is_the_difference_of_velocities"
FAULTS = (
    Fault("the change has the wrong sign", METHOD, "- expand(1 - t, z) * change", "+ expand(1 - t, z) * change", EXACT),
    Fault("the change is left out", METHOD, " - expand(1 - t, z) * change", "", EXACT),
    Fault("the change is not by d", METHOD, "expand(1 - t, z) * change", "change", EXACT),
    Fault("d falls in the derivative", METHOD, "(torch.ones_like(t),)", "(-torch.ones_like(t),)", EXACT),
    Fault("the velocity has the wrong sign", METHOD, "(z - velocity -", "(z + velocity -", EXACT),
    Fault("the point that is reached is not the map's", METHOD, "line(y.to(z.dtype), z, t)", "z", EXACT),
    Fault(
        "the line is the other way round",
        LINE,
        "(1 - expand(t, x0)) * x0 + expand(t, x0)",
        "expand(t, x0) * x0 + (1 - expand(t, x0))",
        EXACT,
    ),
    Fault("the velocity is not divided by t", LINE, "(z - estimate) / expand(t, z)", "z - estimate", EXACT),
    Fault("the path's own scale is left out", LINE, "return z * expand(scale, z), time", "return z, time", EXACT),
    Fault("the prediction's teacher is not guided", METHOD, "t, told, guidance=guidance)", "t, told)", BY_DIFFERENCES),
    Fault(
        "the target has a graph",
        METHOD,
        "    @torch.no_grad()\n    def target",
        "    def target",
        BY_DIFFERENCES,
    ),
    Fault(
        "the derivative has a dropout of its own",
        METHOD,
        'with masks_again(draw["z"]):',
        "if True:",
        f"{TEST}y_and_its_derivative_have_the_same_dropout",
    ),
    Fault(
        "the fake score judges another image",
        METHOD,
        'torch.full_like(draw["prediction t"], players.teacher.path.t_min)',
        'draw["prediction t"]',
        AS_DMD2,
    ),
    Fault("nu is DMD2's no more", METHOD, 'self.normaliser == "nu"', 'self.normaliser == "r"', AS_DMD2),
    Fault("the images are not carried over", METHOD, 'draw["x"] if "x" in draw else ', "0.9 * ", AS_DMD2),
    Fault("the correction pushes away", METHOD, "(fake - teacher) / expand", "(teacher - fake) / expand", VELOCITIES),
    Fault(
        "the correction has no weight of r",
        METHOD,
        '(fake - teacher) / expand(line_time(players.teacher.path.ratio(draw["t"])), x)',
        "fake - teacher",
        VELOCITIES,
    ),
    Fault("r is the ratio", LINE, "return ratio / (1 + ratio)", "return ratio", VELOCITIES),
    Fault(
        "what is not finite pushes",
        METHOD,
        "zero_nonfinite((fake - teacher)",
        "((fake - teacher)",
        f"{TEST}images_whose_field_is_not_finite_push_nothing",
    ),
    Fault(
        "the prediction's weight is dropped",
        METHOD,
        "self.prediction_weight * prediction",
        "prediction",
        f"{TEST}both_parts_add_up_by_their_weights",
    ),
    Fault(
        "the correction's weight is dropped",
        METHOD,
        "self.correction_weight * correction",
        "correction",
        f"{TEST}both_parts_add_up_by_their_weights",
    ),
    Fault(
        "the fake score starts as the map",
        METHOD,
        '{"fake": "teacher"}',
        "{}",
        f"{TEST}the_fake_score_starts_as_the_teacher_beside_an_earlier_map_or_as_an_earlier_one",
    ),
    Fault(
        "the generator waits for a fake score that is not there",
        METHOD,
        'return (Update(("generator",), "generator_loss"),)',
        'return (Update(("generator",), "generator_loss", self.fake_updates),)',
        f"{TEST}what_has_no_weight_has_no_player_and_no_numbers",
    ),
    Fault(
        "the map's times are always the path's",
        METHOD,
        "self.prediction_time_law or even_times(problem.path)",
        "even_times(problem.path)",
        f"{TEST}times_of_the_map_are_its_law_s_or_all_of_the_path_s",
    ),
)
