"""Faults of merged runs."""

from mutate import Fault

MERGE, TEST = "diffdistill/models/merge.py", "models/test_merge.py::test_"
FACTORS = f"{TEST}products_of_factors_are_mixed_exactly"

FAULTS = (
    Fault(
        "weights are of the other run",
        MERGE,
        "total = total + share * (tensor.double() - origin.double())",
        "total = total + (1 - share) * (tensor.double() - origin.double())",
        f"{TEST}affine_students_are_interpolated_on_the_same_noise",
    ),
    Fault(
        "the average is the first run's",
        MERGE,
        "parts = [run.of(player, group) for run in runs]",
        'parts = [(run if group == "players" else runs[0]).of(player, group) for run in runs]',
        f"{TEST}it_is_linear_in_every_player_and_average",
    ),
    Fault(
        "a player's own weights are not asked",
        MERGE,
        "(by_player or {}).get(name, weights)",
        "weights",
        f"{TEST}a_player_may_have_weights_of_its_own",
    ),
    Fault(
        "factors are mixed as weights are",
        MERGE,
        "        if axis is None:",
        "        if axis is None or name:",
        FACTORS,
    ),
    Fault(
        "the scales of factors are forgotten",
        MERGE,
        "share * _scale(run.spec) / _scale(runs[0].spec)",
        "share",
        FACTORS,
    ),
    Fault(
        "equal factors stand side by side",
        MERGE,
        "        if same is None:",
        "        if True:",
        f"{TEST}factors_with_themselves_or_alone_keep_their_rank",
    ),
    Fault(
        "another start is not said",
        MERGE,
        "len(starts) == 1)",
        "True)",
        f"{TEST}another_start_is_said",
    ),
)
