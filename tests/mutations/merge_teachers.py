"""Faults of the student of several teachers."""

from mutate import Fault

TEST = "methods/test_merge_teachers.py::"
BY_HAND = f"{TEST}test_the_loss_is_the_squared_error_in_eps_to_each_samples_own_teacher"
FAULTS = (
    Fault(
        "samples are asked of the wrong teacher",
        "methods/merge_teachers.py",
        "order = upload(torch.cat(rows).argsort(), style.device)",
        "order = torch.arange(len(style))",
        BY_HAND,
    ),
    Fault(
        "the student is told another style",
        "methods/merge_teachers.py",
        "F.one_hot(style, len(teachers))",
        "F.one_hot(len(teachers) - 1 - style, len(teachers))",
        f"{TEST}test_gaussian_teachers_have_the_student_of_their_styles_as_fixed_point_and_a_shift_costs_what_it_should",
    ),
    Fault(
        "the condition is not dropped",
        "methods/merge_teachers.py",
        'cond = student.drop_condition(cond, draw["is_dropped"])',
        "pass",
        BY_HAND,
    ),
    Fault("the weight is dropped", "methods/merge_teachers.py", "weight=self.weight", 'weight="x0"', BY_HAND),
    Fault(
        "features have no weight",
        "methods/merge_teachers.py",
        "error + self.feature_weight * apart",
        "error + apart",
        f"{TEST}test_features_add_the_mean_over_taps_of_their_squared_error",
    ),
    Fault(
        "a teacher without a sample is not asked",
        "methods/merge_teachers.py",
        "upload(own if len(own) else own.new_zeros(1), style.device) for own in rows",
        "own for own in rows",
        f"{TEST}test_every_teacher_is_asked_at_each_step_also_without_a_sample",
    ),
    Fault(
        "the student starts anew",
        "methods/merge_teachers.py",
        '        take_weights(student, problem.start_of("student"))\n',
        "",
        f"{TEST}test_a_student_of_one_teacher_that_it_starts_as_has_no_loss",
    ),
    Fault(
        "the gradient reaches the teachers",
        "methods/merge_teachers.py",
        "        with torch.no_grad():\n            target",
        "        with torch.enable_grad():\n            target",
        f"{TEST}test_only_the_styles_that_are_drawn_learn_and_no_teacher_does",
    ),
    Fault(
        "a folded style takes the place of the bias",
        "diffdistill/networks/styled.py",
        "else layer.bias + added",
        "else added",
        f"{TEST}test_a_run_is_sampled_and_exported_by_style",
    ),
)
