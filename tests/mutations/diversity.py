"""Faults of the reward of pairs."""

from mutate import Fault

METHOD, REWARD = "methods/diversity.py", "diffdistill/distillation/pair_rewards.py"
TEST = "methods/test_diversity.py::test_"
FAULTS = (
    Fault(
        "samples are pushed together",
        METHOD,
        "made.total - self.weight * reward",
        "made.total + self.weight * reward",
        f"{TEST}the_student_s_loss_has_the_reward_and_no_other_loss",
    ),
    Fault(
        "a sample is compared with itself",
        REWARD,
        "cosines.sum(2) - cosines.diagonal(dim1=1, dim2=2)",
        "cosines.sum(2)",
        f"{TEST}orthonormal_samples_have_1_and_equal_ones_0",
    ),
    Fault(
        "the mean is of n",
        REWARD,
        "others / (size - 1)",
        "others / size",
        f"{TEST}the_mean_is_that_of_all_pairs_of_a_group",
    ),
    Fault(
        "each sample has a condition of its own",
        METHOD,
        "rng.grouped(self.samples_per_condition).uniform",
        "rng.uniform",
        f"{TEST}a_group_shares_its_condition_and_nothing_else",
    ),
    Fault(
        "latents are taken for pixels",
        REWARD,
        "seen if teacher.runtime.decode is None else teacher.runtime.decode(seen)",
        "seen",
        f"{TEST}other_features_see_pixels",
    ),
)
