"""Faults of the score fields."""

from mutate import Fault

METHOD, FIELDS, TABLE = (
    "methods/score_field.py",
    "diffdistill/distillation/score_fields.py",
    "diffdistill/networks/image_table.py",
)
LAW, TEST = "methods/test_score_field_identities.py::test_", "methods/test_score_field.py::test_"
TSM = f"{LAW}tsm_with_gamma_one_is_ism_and_with_gamma_zero_has_no_field"
FAULTS = (
    Fault(
        "it pushes away",
        METHOD,
        "gap = pulled - subtracted",
        "gap = subtracted - pulled",
        f"{LAW}sds_seeks_the_mean_and_takes_the_spread_to_nothing",
    ),
    Fault(
        "the fake score sees another image",
        METHOD,
        "noise_of(players.fake, x_t, t, condition",
        "noise_of(players.fake, x, t, condition",
        f"{TEST}a_fake_score_that_is_the_teacher_leaves_guidance_alone",
    ),
    Fault(
        "the fake score's scale is the teacher's",
        METHOD,
        'guidance = scale_in(draw, self.scales, "fake_guidance")',
        'guidance = scale_in(draw, self.scales, "guidance")',
        f"{LAW}esd_descends_the_divergence_less_what_a_sample_says_of_its_class",
    ),
    Fault(
        "the noisier image has the time of the other",
        METHOD,
        "noise_of(teacher, path.diffuse(x, eps, later), later, cond)",
        "noise_of(teacher, path.diffuse(x, eps, later), t, cond)",
        f"{LAW}asd_collapses_at_large_noise_and_repels_at_small",
    ),
    Fault(
        "the cleaner time is nearer, not further",
        METHOD,
        "math.sqrt(1 - self.gamma**2)",
        "self.gamma",
        TSM,
    ),
    Fault(
        "inversion goes by the class",
        FIELDS,
        "guidance=None), t, s)",
        "guidance=1.0), t, s)",
        f"{LAW}csm_is_csd_where_inversion_arrives",
    ),
    Fault(
        "the mix is the longest",
        FIELDS,
        "a * first + (1 - a) * second",
        "a * second + (1 - a) * first",
        f"{LAW}the_shortest_mix_is_the_shortest_of_the_segment_and_agrees_with_both",
    ),
    Fault(
        "each channel has a limit of its own",
        FIELDS,
        "field.abs().amax(1, keepdim=True)",
        "field.abs()",
        f"{TEST}weights_are_powers_of_alpha_and_sigma_and_pixels_have_a_limit",
    ),
    Fault(
        "the particle depends on the noise's scale",
        TABLE,
        "torch.atan2(first, second) / (2 * math.pi) + 0.5",
        "torch.erf(first) / 2 + 0.5",
        "networks/test_image_table.py::test_noise_picks_each_particle_as_often_and_on_any_scale",
    ),
)
