"""Faults of RF++."""

from mutate import Fault

METHOD, TEST = "methods/rectified_flow.py", "methods/test_rectified_flow.py::test_"
LOSS = f"{TEST}the_loss_is_the_velocity_s_error_on_the_line"
FAULTS = (
    Fault("the error is the image's", METHOD, "error = (estimate - x) / expand(s, x)", "error = estimate - x", LOSS),
    Fault("the loss has no weight", METHOD, "((1 - s) * distance / size).mean()", "(distance / size).mean()", LOSS),
    Fault("c goes by the root", METHOD, "self.huber_constant * size)", "self.huber_constant * size**0.5)", LOSS),
    Fault(
        "noise and image are of other pairs",
        METHOD,
        'student.path.diffuse(x, pair["noise"], t)',
        'student.path.diffuse(x, pair["noise"].roll(1, 0), t)',
        LOSS,
    ),
    Fault(
        "the student is told another class",
        METHOD,
        'student.class_cond(pair["label"])',
        'student.class_cond(0 * pair["label"])',
        LOSS,
    ),
    Fault(
        "the perceptual distance is not over the time",
        METHOD,
        '1 / s if self.perceptual_weight == "1/t"',
        's if self.perceptual_weight == "1/t"',
        f"{TEST}the_perceptual_distance_is_over_the_time",
    ),
    Fault(
        "the law is even",
        "diffdistill/diffusion/time_distributions.py",
        "s = 0.5 + torch.asinh((2 * share - 1) * math.sinh(self.a / 2)) / self.a",
        "s = share",
        f"{TEST}the_law_is_the_paper_s",
    ),
    Fault(
        "pairs of another teacher are taken",
        "diffdistill/distillation/pairs.py",
        "if found is not None and found != facts:",
        "if found is not None and not facts:",
        "distillation/test_pairs.py::test_pairs_of_something_else_are_refused",
    ),
    Fault(
        "each shard has the same numbers",
        "diffdistill/distillation/pairs.py",
        "torch.arange(indices.start, indices.stop,",
        "torch.arange(len(indices),",
        "distillation/test_pairs.py::test_pairs_in_shards_are_those_of_one_piece",
    ),
)
