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
)
