"""Faults of TDM."""

from mutate import Fault

METHOD, TEST = "methods/tdm.py", "methods/test_tdm.py::test_"
EXACT = f"{TEST}with_an_exact_student_the_teacher_is_the_fake_score_s_minimum"
FAULTS = (
    Fault(
        "the field has the wrong sign",
        METHOD,
        "gap, scale = fake - teacher,",
        "gap, scale = teacher - fake,",
        f"{TEST}in_one_step_tdm_is_dmd2",
    ),
    Fault(
        "the noise is added to the image, not where the step arrives",
        METHOD,
        "(expand(scale, x0) * arrived +",
        "(expand(scale, x0) * x0 +",
        f"{TEST}the_points_of_arrival_of_an_exact_student_noised_have_the_teacher_s_law",
    ),
    Fault(
        "the added noise has the scale of all noise",
        METHOD,
        "(path.sigma(t) ** 2 - (scale * sigma) ** 2)",
        "(path.sigma(t) ** 2)",
        f"{TEST}the_points_of_arrival_of_an_exact_student_noised_have_the_teacher_s_law",
    ),
    Fault(
        "the fake score's noise is not weighted by beta",
        METHOD,
        "error = expand(beta, x_t) / sigma * (estimate - x_t / alpha) + sigma / alpha * eps",
        "error = estimate - x_t / alpha + sigma / alpha * eps",
        EXACT,
    ),
    Fault(
        "steps that leave noise have a larger loss",
        METHOD,
        "weight = weight * data / (data + (path.sigma(t) ** 2 - beta**2) / path.alpha(t) ** 2)",
        "weight = weight * 1.0",
        f"{TEST}the_least_loss_of_the_fake_score_is_as_large_for_every_step_and_level",
    ),
    Fault(
        "the importance weight is the released mean",
        METHOD,
        "exponent.sum(1) + exponent.shape[1] * (beta / path.sigma(t)).log()",
        "exponent.mean(1) + exponent.shape[1] * (beta / path.sigma(t)).log()",
        f"{TEST}the_importance_weight_is_a_density_ratio_of_the_whole_sample",
    ),
    Fault(
        "each update makes a roll-out of its own",
        METHOD,
        'carry={"start": start}',
        "carry={}",
        f"{TEST}both_updates_share_one_roll_out_in_which_each_sample_has_a_step_of_its_own",
    ),
    Fault(
        "all samples have the first one's step",
        METHOD,
        '[rows, draw["call"]]',
        '[:, draw["call"][0]]',
        f"{TEST}both_updates_share_one_roll_out_in_which_each_sample_has_a_step_of_its_own",
    ),
    Fault(
        "levels are of the whole range",
        METHOD,
        "t = law(low + uniform * (high - low), path)",
        "t = law(uniform, path)",
        f"{TEST}levels_are_the_law_s_between_the_ends_of_each_step",
    ),
    Fault(
        "the teacher is not guided",
        METHOD,
        'role="teacher"), guidance=guidance)',
        'role="teacher"))',
        f"{TEST}a_fake_score_that_is_the_teacher_pushes_nothing_and_guidance_reaches_the_teacher",
    ),
    Fault(
        "the fake score learns through the generator",
        METHOD,
        """        with torch.no_grad():
            start = self.start(players, draw)
            x0 = self""",
        """        if True:
            start = self.start(players, draw)
            x0 = self""",
        f"{TEST}each_loss_reaches_its_player_alone",
    ),
)
