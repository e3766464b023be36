"""Faults of PSO."""

from mutate import Fault

METHOD, TEST = "methods/pso.py", "methods/test_pso.py::test_"
START = f"{TEST}at_the_reference_the_loss_is_log_2_and_its_gradient_that_of_the_gap"
LIKELY = f"{TEST}the_likelihood_of_a_step_is_that_of_its_gaussian"
FAULTS = (
    Fault("the margin has the wrong sign", METHOD, "(expected - self.gap(", "(self.gap(", START),
    Fault(
        "the loser's error is not weighed",
        METHOD,
        "errors[0] - self.loser_weight * errors[1]",
        "errors[0] - errors[1]",
        START,
    ),
    Fault("the winner loses", METHOD, "is_first = (sign > 0)", "is_first = (sign < 0)", START),
    Fault("there is no beta", METHOD, "preference_loss(self.beta * margin)", "preference_loss(margin)", START),
    Fault(
        "the step has no scale",
        METHOD,
        "(2 * path.sigma(following).to(states[i].device) ** 2)",
        "2",
        LIKELY,
    ),
    Fault("the ratio is the wrong way up", METHOD, "(squares[1] - squares[0])", "(squares[0] - squares[1])", LIKELY),
    Fault(
        "nothing is clipped",
        METHOD,
        "clipped = ratios.clamp(low, high)",
        "clipped = ratios",
        f"{TEST}the_online_loss_prefers_the_winner_s_steps_and_the_clip_stops_the_gradient",
    ),
    Fault(
        "a tie has a winner",
        METHOD,
        "return sign.abs() * (expected",
        "return (expected",
        f"{TEST}ties_have_no_gradient",
    ),
    Fault(
        "the reference is the teacher",
        METHOD,
        '"reference": freeze(deepcopy(generator))',
        '"reference": freeze(deepcopy(problem.teacher))',
        f"{TEST}the_reference_is_the_start_and_stays",
    ),
)
