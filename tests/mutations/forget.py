"""Faults of SFD."""

from mutate import Fault

METHOD, TEST = "methods/forget.py", "methods/test_forget.py::test_"
SHARES = f"{TEST}a_share_of_every_label_is_forgotten_and_the_teacher_alone_is_told_another"
FAULTS = (
    Fault(
        "the teacher is told the forgotten class",
        METHOD,
        "torch.where(is_forgotten, becomes, drawn[name])}",
        "torch.where(is_forgotten, forgotten, drawn[name])}",
        SHARES,
    ),
    Fault(
        "the sample is of the other class as well",
        METHOD,
        "label = torch.where(is_forgotten, forgotten, drawn[name])",
        "label = torch.where(is_forgotten, becomes, drawn[name])",
        SHARES,
    ),
    Fault("forgotten classes are drawn as the others", METHOD, "if c not in self.forgotten)", "if c >= 0)", SHARES),
    Fault("no sample is forgotten", METHOD, "< self.share", "< 0", SHARES),
    Fault(
        "a fixed class is not kept to",
        METHOD,
        "stays if self.becomes is None else",
        "stays if self.becomes else",
        SHARES,
    ),
    Fault(
        "what was dropped is told again",
        METHOD,
        "torch.where(drawn[role] == drawn[name], label, drawn[role])",
        "label",
        f"{TEST}what_the_fake_score_s_loss_drops_stays_dropped_and_the_rest_has_its_own_class",
    ),
    Fault(
        "a group of one condition is torn",
        METHOD,
        "uniforms = of_groups.uniforms(",
        "uniforms = rng.uniforms(",
        f"{TEST}samples_that_share_a_condition_are_forgotten_together",
    ),
    Fault(
        "a base that tells the teacher nothing is taken",
        METHOD,
        "if not self.base.tells_teacher_class:",
        "if self.base is None:",
        f"{TEST}a_base_whose_teacher_is_told_no_class_of_its_own_is_refused",
    ),
    Fault(
        "the distance of the rest is that of the forgotten",
        "eval/metrics/settings.py",
        "rows[~torch.isin(asked",
        "rows[torch.isin(asked",
        "eval/test_forgotten.py::test_images_of_the_forgotten_classes_move_the_whole_distance_alone",
    ),
    Fault(
        "the share counts the least likely classes",
        "eval/metrics/scores.py",
        "torch.isin(logits.argmax(1)",
        "torch.isin(logits.argmin(1)",
        "eval/test_forgotten.py::test_the_share_counts_the_samples_whose_largest_logit_is_of_the_classes",
    ),
)
