"""Faults of SiD."""

from mutate import Fault

METHOD, SHARED = "methods/sid.py", "diffdistill/distillation/score_distillation.py"
CLOSED_FORM = "methods/test_sid.py::test_the_gradient_between_gaussians_is_the_closed_form"
BY_HAND = "methods/test_sid.py::test_value_and_gradient_of_a_step_are_those_by_hand"

FAULTS = (
    Fault(
        "the identity has the wrong sign",
        SHARED,
        "return (gap * (residual - x).flatten(1)).sum(1)",
        "return (gap * (x - residual).flatten(1)).sum(1)",
        CLOSED_FORM,
    ),
    Fault("alpha counts the other way", SHARED, "(1 - alpha) * gap", "(1 + alpha) * gap", CLOSED_FORM),
    Fault(
        "the teacher is detached",
        SHARED,
        "return x, x_t, teacher, sample_weight(",
        "return x, x_t, teacher.detach(), sample_weight(",
        "methods/test_sid.py::test_the_gradient_between_gaussians_is_the_closed_form",
    ),
    Fault(
        "the networks see a detached image",
        SHARED,
        '    x_t = path.diffuse(x, draw["eps"], t)\n    teacher = ',
        '    x_t = path.diffuse(x.detach(), draw["eps"], t)\n    teacher = ',
        BY_HAND,
    ),
    Fault(
        "the weight is dropped",
        METHOD,
        "mean_of_finite(weight * score_identity(",
        "mean_of_finite(score_identity(",
        BY_HAND,
    ),
    Fault(
        "the fake score is never trained",
        METHOD,
        '            Update(("fake",), "fake_loss", statistics=of_all[0]),\n',
        "",
        "methods/test_sid.py::test_the_fake_score_steps_first_and_k_times_to_one_of_the_generator",
    ),
    Fault(
        "the fake score's loss reaches the generator",
        SHARED,
        '    with torch.no_grad():\n        x = generate(players, draw, steps, "fake ", cond=made_with)',
        '    x = generate(players, draw, steps, "fake ", cond=made_with)',
        "methods/test_sida.py::test_the_fake_score_s_loss_reaches_the_fake_score_alone",
    ),
    Fault(
        "the fake score's scale is the teacher's",
        METHOD,
        "ask(x_t, t, cond, guidance=self.fake_guidance)",
        "ask(x_t, t, cond, guidance=self.guidance)",
        "methods/test_sid_guidance.py::test_the_teacher_is_guided_by_kappa_4_and_the_fake_score_by_kappa_2_and_3",
    ),
    Fault(
        "real images have noise of their own in SiDA",
        METHOD,
        "tapped = players.fake.features(path.diffuse(images, eps, t)",
        'tapped = players.fake.features(path.diffuse(images, draw["eps"], t)',
        "methods/test_sida.py::test_real_and_generated_images_are_compared_at_one_time_noise_and_class",
    ),
    Fault(
        "SiDA's logits are not clamped",
        METHOD,
        ".clamp(-MAX_LOGIT, MAX_LOGIT)",
        "",
        "methods/test_sida.py::test_the_adversarial_share_is_that_by_hand",
    ),
    Fault(
        "the generator's loss leaves out classes as the fake score's does",
        METHOD,
        't, cond = draw["t"], condition(players, draw, role="fake")\n',
        't, cond = draw["t"], players.fake.drop_condition(condition(players, draw), draw["fake is_dropped"])\n',
        "methods/test_sid_guidance.py::test_the_generator_s_loss_leaves_out_no_class",
    ),
    Fault(
        "the image keeps the class that the fake score loses",
        SHARED,
        '        x = generate(players, draw, steps, "fake ", cond=made_with)',
        '        x = generate(players, draw, steps, "fake ")',
        "methods/test_sid_guidance.py::test_a_sample_that_loses_its_class_is_made_without_it_too",
    ),
    Fault(
        "real images are moved as the generated ones",
        METHOD,
        'augment(images, draw["real motion"])',
        'augment(images, draw["fake motion"])',
        "methods/test_sida.py::test_real_images_are_moved_by_numbers_of_their_own_and_the_fake_score_is_told_how",
    ),
)
