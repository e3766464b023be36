"""Faults of the preference field."""

from mutate import Fault

METHOD, TEST = "methods/preference_field.py", "methods/test_preference_field.py::test_"
FIELD = f"{TEST}at_the_teacher_s_law_it_moves_the_mean_to_the_winners_alone"
CRITICS = f"{TEST}each_critic_learns_its_own_and_ties_teach_neither"
FAULTS = (
    Fault("it moves to the losers", METHOD, "gap = gap - self.strength", "gap = gap + self.strength", FIELD),
    Fault(
        "the matching part is missing",
        METHOD,
        "gap = players.fake(x_t, t, cond) - teacher",
        "gap = 0 * teacher",
        f"{TEST}without_strength_and_with_equal_critics_it_is_dmd2",
    ),
    Fault("winners and losers are exchanged", METHOD, "expand(sign > 0, x) > 0", "expand(sign < 0, x) > 0", CRITICS),
    Fault("a tie teaches", METHOD, "torch.where(counts > 0, sample, estimate.detach())", "sample", CRITICS),
    Fault(
        "the two samples have classes of their own",
        METHOD,
        'return drawn | {"other label": drawn["label"]}',
        "return drawn",
        f"{TEST}two_samples_of_a_pair_have_one_condition_and_noise_of_their_own",
    ),
    Fault(
        "the teacher is not guided",
        METHOD,
        "players.teacher(x_t, t, cond, guidance=self.guidance)",
        "players.teacher(x_t, t, cond)",
        f"{TEST}the_teacher_is_guided_and_an_unknown_reward_refused",
    ),
)
