"""Faults of Uni-Instruct."""

from mutate import Fault

METHOD, DIVERGENCES = "methods/uni_instruct.py", "diffdistill/distillation/divergences.py"
RATIO = "diffdistill/distillation/ratio_weighted.py"
SHARED, LAWS = "diffdistill/distillation/score_distillation.py", "diffdistill/diffusion/time_distributions.py"
TEST = "methods/test_uni_instruct.py::test_"
GRADIENT = f"{TEST}the_gradient_is_that_of_the_divergence_of_the_images_themselves"

FAULTS = (
    Fault(
        "no gradient is taken of the ratio",
        RATIO,
        "draw, self.reading.read(logits))",
        "draw, self.reading.read(logits.detach()))",
        GRADIENT,
    ),
    Fault(
        "alpha is one whatever the divergence",
        METHOD,
        "(1 + slope) / 2, carry",
        "torch.ones_like(slope), carry",
        GRADIENT,
    ),
    Fault("alpha counts the slope whole", METHOD, "(1 + slope) / 2, carry", "(1 + slope), carry", GRADIENT),
    Fault(
        "reverse KL has forward KL's alpha",
        METHOD,
        "torch.full_like(h, 0.5)",
        "torch.full_like(h, 1.0)",
        GRADIENT,
    ),
    Fault(
        "the slope of Jensen-Shannon is softened reverse KL's",
        DIVERGENCES,
        '"js": lambda r: 1 / (r + 1),\n    "sf": lambda r: -r / (r + 1)',
        '"js": lambda r: -r / (r + 1),\n    "sf": lambda r: -r / (r + 1)',
        f"{TEST}the_slope_is_the_weight_s_by_the_logarithm_of_the_ratio",
    ),
    Fault(
        "a clamp leaves alpha as it is",
        METHOD,
        " * self.reading.is_free(logits)",
        "",
        f"{TEST}where_a_clamp_holds_the_ratio_alpha_is_reverse_kl_s",
    ),
    Fault(
        "the density of the law is left out",
        METHOD,
        'factor * draw["slope"] if self.weight == "exact" else factor',
        "factor",
        f"{TEST}the_exact_weight_is_of_the_levels_whatever_their_law",
    ),
    Fault(
        "the density is multiplied, not divided by",
        LAWS,
        "return (last - first) / (high - low)",
        "return (high - low) / (last - first)",
        "diffusion/test_time_distributions.py::test_weighed_by_its_slope_every_law_is_even_in_the_logarithm_of_the_ratio",
    ),
    Fault(
        "the discriminator is never trained",
        RATIO,
        'critics = ("fake", "discriminator") if self.has_discriminator else ("fake",)',
        'critics = ("fake",)',
        "distillation/test_ratio_weighted.py::test_a_ratio_without_a_gan_still_has_a_discriminator_that_is_trained",
    ),
    Fault(
        "the GAN's share is not over as many values as the identity's sum",
        METHOD,
        ", values=x[0].numel())",
        ")",
        f"{TEST}the_discriminator_sees_the_sample_at_the_level_of_the_scores",
    ),
    Fault(
        "a discriminator that its loss has no weight for is taken",
        SHARED,
        "if is_asked and not gan_fake_weight:",
        "if False:",
        "distillation/test_ratio_weighted.py::test_a_discriminator_that_nothing_trains_is_refused",
    ),
    Fault(
        "the fake score is not guided",
        SHARED,
        'guidance=scale_in(draw, scales, "fake_guidance"))\n    if features is None',
        "guidance=1.0)\n    if features is None",
        f"{TEST}both_sides_are_guided",
    ),
)
