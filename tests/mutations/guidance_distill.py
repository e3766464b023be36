"""Faults of the w-conditioned student."""

from mutate import Fault

FAULTS = (
    Fault(
        "the teacher is not guided",
        "methods/guidance_distill.py",
        "target = players.teacher(x_t, t, batch.cond, guidance=scale)",
        "target = players.teacher(x_t, t, batch.cond)",
        "methods/test_guidance_distill.py::test_the_loss_is_the_weighted_mean_square_of_what_guidance_adds",
    ),
    Fault(
        "the student is not told the scale",
        "methods/guidance_distill.py",
        "replace(batch.cond, guidance_input=scale)",
        "replace(batch.cond, guidance_input=torch.ones_like(scale))",
        "methods/test_guidance_distill.py::test_scales_cover_the_range_and_the_student_is_told_them",
    ),
    Fault(
        "the weight of the loss is dropped",
        "methods/guidance_distill.py",
        "weight=self.weight",
        'weight="x0"',
        "methods/test_guidance_distill.py::test_the_loss_is_the_weighted_mean_square_of_what_guidance_adds",
    ),
    Fault(
        "the gradient reaches the teacher",
        "methods/guidance_distill.py",
        "        with torch.no_grad():\n            target",
        "        with torch.enable_grad():\n            target",
        "methods/test_guidance_distill.py::test_gradients_reach_every_weight_of_the_student_and_none_of_the_teacher",
    ),
    Fault(
        "the student starts anew",
        "methods/guidance_distill.py",
        '        take_weights(student, problem.initial.get("student", teacher))\n',
        "",
        "methods/test_guidance_distill.py::test_at_scale_1_the_new_student_is_the_teacher_and_its_loss_is_zero",
    ),
    Fault(
        "the images are not noised",
        "methods/guidance_distill.py",
        'x_t = players.teacher.path.diffuse(batch.images, draw["eps"], t)',
        "x_t = batch.images",
        "methods/test_guidance_distill.py::test_the_loss_is_the_weighted_mean_square_of_what_guidance_adds",
    ),
    Fault(
        "truncated SNR is cut from above",
        "diffdistill/distillation/losses.py",
        "return (1 / squared).clamp_min(1)",
        "return (1 / squared).clamp_max(1)",
        "methods/test_guidance_distill.py::test_truncated_snr_is_the_signal_to_noise_ratio_but_at_least_1",
    ),
)
