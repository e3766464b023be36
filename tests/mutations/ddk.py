"""Faults of the law of labels by the gap."""

from mutate import Fault

METHOD, TEST = "methods/ddk.py", "methods/test_ddk.py::test_"
FAULTS = (
    Fault(
        "there is no floor",
        METHOD,
        "law = floor / len(self.shares) + (1 - floor) * self.shares",
        "law = self.shares",
        f"{TEST}labels_have_the_law_s_shares_and_every_class_its_floor",
    ),
    Fault(
        "the law is where the gap is not",
        METHOD,
        "found = gaps / gaps.sum()",
        "found = 1 - gaps / gaps.sum()",
        f"{TEST}the_law_follows_and_only_when_it_is_due",
    ),
    Fault(
        "the law of before counts for the other share",
        METHOD,
        "1 - self.decay)",
        "self.decay)",
        f"{TEST}the_law_follows_and_only_when_it_is_due",
    ),
    Fault(
        "the fake score is told the drawn class",
        METHOD,
        "changed[role] = torch.where(draw[role] == draw[name], label, draw[role])",
        "changed[role] = draw[role]",
        f"{TEST}what_was_dropped_stays_dropped",
    ),
    Fault(
        "a group of one condition is torn",
        METHOD,
        'rng.grouped(getattr(self.base, "samples_per_condition", 1)).uniforms(names)',
        "rng.uniforms(names)",
        f"{TEST}groups_stay_of_one_condition",
    ),
)
