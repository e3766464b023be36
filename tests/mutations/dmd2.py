"""Faults of DMD2."""

from mutate import Fault

METHOD, SHARED, LOSSES = (
    "methods/dmd2.py",
    "diffdistill/distillation/score_distillation.py",
    "diffdistill/distillation/losses.py",
)

FAULTS = (
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
        METHOD,
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
        METHOD,
        'role="teacher"), guidance=guidance)',
        'role="teacher"))',
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
        METHOD,
        'role="fake"), guidance=fake_guidance)',
        'role="fake"), guidance=guidance)',
        "distillation/test_scales.py::test_esd_descends_the_kl_of_each_class_less_the_information_about_it",
    ),
)
