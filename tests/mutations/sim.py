"""Faults of SIM."""

from mutate import Fault

METHOD = "methods/sim.py"
THEOREM = "methods/test_sim.py::test_the_gradient_is_that_of_the_score_divergence_whose_law_is_held_fixed"

FAULTS = (
    Fault("the wrong sign", METHOD, "return -(slope * residual)", "return (slope * residual)", THEOREM),
    Fault(
        "y is detached",
        METHOD,
        "y, residual = (fake - teacher).flatten(1)",
        "y, residual = (fake - teacher).detach().flatten(1)",
        THEOREM,
    ),
    Fault(
        "the denominator is detached",
        METHOD,
        "torch.sqrt(y.square().sum(1, keepdim=True) + c**2)",
        "torch.sqrt(y.detach().square().sum(1, keepdim=True) + c**2)",
        "methods/test_sim.py::test_pseudo_huber_s_denominator_is_in_the_graph",
    ),
    Fault(
        "the denominator is of each pixel",
        METHOD,
        "y.square().sum(1, keepdim=True)",
        "y.square()",
        "methods/test_sim.py::test_a_very_large_c_gives_sid_s_numerator_and_a_very_small_one_the_unit_field",
    ),
    Fault("the residual is the teacher's", METHOD, "(fake - x).flatten(1)", "(teacher - x).flatten(1)", THEOREM),
    Fault(
        "the fake score is never trained",
        METHOD,
        'return (Update(("fake",), "fake_loss"), Update(',
        "return (Update(",
        "methods/test_sim.py::test_the_fake_score_steps_first_on_samples_of_its_own",
    ),
    Fault(
        "the teacher is not guided",
        METHOD,
        "guidance=guidance, weight",
        "guidance=1.0, weight",
        "methods/test_sim.py::test_value_and_gradient_of_a_step_are_those_by_hand",
    ),
)
