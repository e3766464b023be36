"""Faults of CDM."""

from mutate import Fault

METHOD, TEST = "methods/cdm.py", "methods/test_cdm.py::test_"
BESIDE = f"{TEST}beside_the_trajectory_the_student_is_matched_from_a_point_on_its_line"
FAULTS = (
    Fault(
        "the point is on the trajectory",
        METHOD,
        'start.t, draw["point t"])\n',
        "start.t, start.t)\n",
        BESIDE,
    ),
    Fault("the line has a gradient", METHOD, "start.x, x.detach(), start.t", "start.x, x, start.t", BESIDE),
    Fault(
        "beside the trajectory the field has the wrong sign",
        METHOD,
        "matching_field(x, fake, teacher, minimum",
        "matching_field(x, teacher, fake, minimum",
        BESIDE,
    ),
    Fault(
        "beside the trajectory it is compared at the matching's noise",
        METHOD,
        'diffuse(x, draw["beside eps"], t)',
        'diffuse(x, draw["eps"], t)',
        BESIDE,
    ),
    Fault(
        "beside the trajectory the teacher is guided",
        METHOD,
        'teacher = players.teacher(x_t, t, condition(players, draw, role="teacher"))',
        'teacher = players.teacher(x_t, t, condition(players, draw, role="teacher"), guidance=self.guidance)',
        BESIDE,
    ),
    Fault(
        "the fake score follows after its own updates as well",
        METHOD,
        'if self.fake_follows and "x" in carried:',
        "if self.fake_follows:",
        f"{TEST}the_fake_score_follows_the_student_after_the_student_s_update_alone",
    ),
    Fault(
        "the first call is matched as well",
        METHOD,
        'is_anchored = self.anchor_weight > 0 and int(draw["step"]) == 0',
        "is_anchored = False",
        f"{TEST}the_first_call_learns_the_anchor_and_the_later_ones_the_matching",
    ),
    Fault(
        "the anchor is what was reached, not the image on its line",
        METHOD,
        "return (reached - expand(ratio, noise) * noise) / expand(signal, noise)",
        "return reached",
        f"{TEST}the_anchor_is_the_image_whose_line_meets_the_teacher_s_ode",
    ),
    Fault(
        "the anchor's teacher is not guided",
        METHOD,
        "teacher(reached, t, told, guidance=guidance)",
        "teacher(reached, t, told)",
        f"{TEST}the_anchor_follows_the_guided_teacher",
    ),
)
