"""Faults of f-distill."""

from mutate import Fault

METHOD, DIVERGENCES = "methods/f_distill.py", "diffdistill/distillation/divergences.py"
RATIO = "diffdistill/distillation/ratio_weighted.py"
GRADIENT = "methods/test_f_distill.py::test_the_gradient_is_that_of_the_divergence"

FAULTS = (
    Fault(
        "the ratio of several heads is of the first alone",
        "diffdistill/distillation/divergences.py",
        "return wide.mean(1) if wide.ndim == 2 else wide",
        "return wide[:, 0] if wide.ndim == 2 else wide",
        "distillation/test_gan_taps.py::test_the_ratio_is_of_the_mean_logit_however_the_losses_are_taken",
    ),
    Fault(
        "the weight of Jensen-Shannon is inverted",
        DIVERGENCES,
        '"js": lambda r: r / (r + 1),\n    "sf"',
        '"js": lambda r: 1 / (r + 1),\n    "sf"',
        GRADIENT,
    ),
    Fault(
        "the ratio is upside down",
        DIVERGENCES,
        "return mean_logit(logits).clamp",
        "return (-mean_logit(logits)).clamp",
        GRADIENT,
    ),
    Fault(
        "the weight is dropped",
        METHOD,
        "zero_nonfinite(expand(weight, x) * (",
        "zero_nonfinite(1 * (",
        GRADIENT,
    ),
    Fault(
        "a gradient is taken of the weight",
        METHOD,
        "    @torch.no_grad()\n    def _weight(",
        "    def _weight(",
        "methods/test_f_distill.py::test_a_weight_has_no_gradient",
    ),
    Fault(
        "the weight is not normalised",
        RATIO,
        "return h(ratio) / h(everyone).mean(), ratio, carry",
        "return h(ratio), ratio, carry",
        "methods/test_f_distill.py::test_without_bins_the_weight_is_h_of_the_clamped_ratio_over_its_mean",
    ),
    Fault(
        "a piece of a batch is normalised by itself",
        DIVERGENCES,
        'everyone = draw.get("all ratio", ratio.detach())',
        "everyone = ratio.detach()",
        "methods/test_f_distill.py::test_a_piece_of_a_batch_is_normalised_by_the_means_of_the_whole",
    ),
    Fault(
        "the discriminator is never trained",
        RATIO,
        'critics = ("fake", "discriminator") if self.has_discriminator else ("fake",)',
        'critics = ("fake",)',
        "distillation/test_ratio_weighted.py::test_a_ratio_without_a_gan_still_has_a_discriminator_that_is_trained",
    ),
    Fault(
        "the discriminator looks at noise of its own",
        METHOD,
        'path.diffuse(seen, draw["eps"], draw["t"])',
        'path.diffuse(seen, draw["fake eps"], draw["t"])',
        "methods/test_f_distill.py::test_the_discriminator_sees_the_sample_of_the_matching_at_its_noise",
    ),
    Fault(
        "the ratios of the whole batch have other dropout than the loss",
        "diffdistill/training/trainer.py",
        "        iteration.select(update)  # for the dropout of the loss\n",
        "",
        "training/test_trainer.py::test_only_the_players_of_an_update_have_dropout_when_its_statistics_and_its_loss_are_asked_for",
    ),
    Fault(
        "R1 moves images by no noise of its own",
        "diffdistill/distillation/score_distillation.py",
        'batch.images + r1[1] * draw["gan r1"]',
        'batch.images + draw["gan r1"]',
        "methods/test_f_distill.py::"
        "test_r1_is_the_squared_change_of_the_logit_when_real_images_move_and_reaches_the_critics_alone",
    ),
    Fault(
        "R1 has no weight",
        "diffdistill/distillation/score_distillation.py",
        "discrimination + r1[0] * penalty",
        "discrimination + penalty",
        "methods/test_f_distill.py::"
        "test_r1_is_the_squared_change_of_the_logit_when_real_images_move_and_reaches_the_critics_alone",
    ),
)
