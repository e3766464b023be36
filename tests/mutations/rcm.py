"""Faults of rCM."""

from mutate import Fault

METHOD, TEST = "methods/rcm.py", "methods/test_rcm.py::test_"
FAULTS = (
    Fault(
        "the warm-up is sCM's",
        METHOD,
        "expand(share, first) * first",
        "first",
        f"{TEST}its_warm_up_is_the_released_code_s",
    ),
    Fault(
        "the second part is there from the start",
        METHOD,
        "first + k * second",
        "first + second",
        f"{TEST}its_warm_up_is_the_released_code_s",
    ),
    Fault(
        "the consistency's teacher is not guided",
        METHOD,
        "towards = players.teacher(x_t, t, batch.cond, guidance=guidance)",
        "towards = players.teacher(x_t, t, batch.cond)",
        f"{TEST}without_matching_after_the_warm_up_it_is_scm_with_an_even_weight",
    ),
    Fault(
        "the matching is DMD2's half",
        METHOD,
        "matching = 2 * field_loss(x, pushed)",
        "matching = field_loss(x, pushed)",
        f"{TEST}without_consistency_it_is_dmd2_without_a_gan_bit_for_bit",
    ),
    Fault(
        "any call learns",
        METHOD,
        'numbers["step"] = torch.tensor(numbers["times"].shape[1] - 1)',
        "pass",
        f"{TEST}the_last_of_the_drawn_steps_learns_and_no_level_is_above_the_one_before",
    ),
    Fault(
        "the student is matched from the start",
        METHOD,
        "int(rng.step >= self.warmup)",
        "1",
        f"{TEST}matching_and_fake_score_begin_after_the_warm_up",
    ),
    Fault(
        "a level may be above the one before",
        "diffdistill/distillation/levels.py",
        "drawn.cummin(1).values if",
        "drawn if",
        f"{TEST}the_last_of_the_drawn_steps_learns_and_no_level_is_above_the_one_before",
    ),
)
