"""Faults of DMD2."""

from mutate import Fault

METHOD, SHARED, LOSSES = (
    "methods/dmd2.py",
    "diffdistill/distillation/score_distillation.py",
    "diffdistill/distillation/losses.py",
)

APART, DECOUPLED = "diffdistill/distillation/decoupled.py", "distillation/test_decoupled.py::test_"

FAULTS = (
    Fault(
        "each head's loss is of the heads' mean logit",
        "diffdistill/networks/discriminator.py",
        'return torch.stack(logits).mean(0) if self.loss == "of_mean" else torch.stack(logits, 1)',
        "return torch.stack(logits).mean(0)",
        "distillation/test_gan_taps.py::test_losses_of_each_head_are_averaged",
    ),
    Fault(
        "FastGen's list of a U-Net has the first blocks of each resolution",
        "diffdistill/networks/taps.py",
        "if i + 1 == len(is_down) or is_down[i + 1])",
        "if i == 0 or is_down[i])",
        "networks/test_taps.py::test_fastgen_s_list_names_blocks_of_the_network",
    ),
    Fault(
        "the field has the wrong sign",
        SHARED,
        "return (fake - teacher) / sample_normaliser",
        "return (teacher - fake) / sample_normaliser",
        "methods/test_dmd2_gradients.py::test_the_generator_s_gradient_is_that_of_the_reverse_kl",
    ),
    Fault(
        "no stop-gradient around the field",
        LOSSES,
        "return 0.5 * F.mse_loss(x, (x - field).detach().to(x.dtype))",
        "return 0.5 * F.mse_loss(x, (x - field).to(x.dtype))",
        "distillation/test_losses.py::test_the_field_loss_sends_each_pixel_its_field_over_the_number_of_pixels",
    ),
    Fault(
        "the normaliser is dropped",
        SHARED,
        "return (fake - teacher) / sample_normaliser(x, teacher, minimum)",
        "return fake - teacher",
        "methods/test_dmd2_gradients.py::test_the_generator_s_gradient_is_the_reference",
    ),
    Fault(
        "the fake score is never trained",
        METHOD,
        'return (Update(("generator",), "generator_loss", self.fake_updates), Update(critics, "fake_loss"))',
        'return (Update(("generator",), "generator_loss", self.fake_updates),)',
        "methods/test_dmd2.py::test_there_are_exactly_so_many_fake_updates_to_one_generator_update",
    ),
    Fault(
        "the fake score's condition is dropped",
        SHARED,
        'role="fake"), guidance=fake_guidance)',
        'role="fake"), guidance=0.0)',
        "methods/test_dmd2_gradients.py::test_the_generator_s_gradient_is_the_reference",
    ),
    Fault(
        "the fake loss has no weight",
        SHARED,
        'draw["fake t"], cond, weight=weight)',
        'draw["fake t"], cond, weight="x0")',
        "methods/test_dmd2_gradients.py::test_the_fake_score_s_gradient_is_the_reference",
    ),
    Fault(
        "the teacher is not guided",
        SHARED,
        'real = players.teacher(x_t, t, condition(players, draw, role="teacher"), guidance=guidance)',
        'real = players.teacher(x_t, t, condition(players, draw, role="teacher"))',
        "methods/test_dmd2_gradients.py::test_the_generator_s_gradient_is_the_reference",
    ),
    Fault(
        "the fake score has a scale of its own where it is to have the teacher's",
        "diffdistill/distillation/scales.py",
        'return scale_in(draw, scales, "guidance")',
        "return 1.0",
        "distillation/test_scales.py::test_same_is_the_teacher_s_scale_in_every_sample",
    ),
    Fault(
        "the fake score's scale is the teacher's",
        SHARED,
        'role="fake"), guidance=fake_guidance)',
        'role="fake"), guidance=guidance)',
        "distillation/test_scales.py::test_esd_descends_the_kl_of_each_class_less_the_information_about_it",
    ),
    Fault(
        "guidance is subtracted",
        APART,
        'term("guidance ", plain - guided, plain, guided)',
        'term("guidance ", guided - plain, plain, guided)',
        f"{DECOUPLED}at_one_noise_and_by_one_normaliser_the_two_terms_are_dmd2_s_field",
    ),
    Fault(
        "guidance is at the matching's noise",
        APART,
        'x_t, t = path.diffuse(x, draw["guidance eps"], draw["guidance t"]), draw["guidance t"]',
        "",
        f"{DECOUPLED}between_gaussians_the_student_rests_where_the_closed_form_says",
    ),
    Fault(
        "guidance is as noisy as it likes",
        APART,
        "uniform = uniform * share_below(",
        "uniform = uniform + 0 * share_below(",
        f"{DECOUPLED}guidance_is_at_cleaner_noise_than_the_student_s_call_was",
    ),
    Fault(
        "the student follows the fake score",
        SHARED,
        "own.lerp_(other, share)",
        "other.lerp_(own, share)",
        f"{DECOUPLED}the_fake_score_goes_a_share_of_the_way_to_the_student_after_the_student_s_update_alone",
    ),
)
