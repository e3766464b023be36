"""Faults of pi-Flow, of its policy and of networks with a wider last layer."""

from mutate import Fault

METHOD, POLICY, GRID = "methods/pi_flow.py", "diffdistill/diffusion/dx_policy.py", "diffdistill/networks/grid.py"
WRITTEN = "methods/test_pi_flow.py::test_the_loss_and_its_gradient_are_the_released_code_s"
THEIRS = "diffusion/test_dx_policy.py::test_a_roll_out_is_diffusers_policy_s_to_rounding"
FAULTS = (
    Fault("the gap is not divided by s", METHOD, "(gap / expand(level, gap)).square()", "gap.square()", WRITTEN),
    Fault(
        "states have a gradient",
        METHOD,
        "            with torch.no_grad():\n                after",
        "            if True:\n                after",
        WRITTEN,
    ),
    Fault(
        "the window is left out",
        METHOD,
        "(end - window).maximum(policy.low)",
        "end.maximum(policy.low)",
        WRITTEN,
    ),
    Fault("the mean ends before the teacher's step does", METHOD, "(end - window)", "(raw - window)", WRITTEN),
    Fault("the teacher's step is not taken", METHOD, "            raw = end\n", "", WRITTEN),
    Fault(
        "the teacher's share rises",
        METHOD,
        "max(0.0, 1 - rng.step / self.mixing_steps)",
        "min(1.0, rng.step / self.mixing_steps)",
        "methods/test_pi_flow.py::test_the_teacher_s_share_falls_from_one_to_none",
    ),
    Fault(
        "the teacher is not guided",
        METHOD,
        "guidance=self.guidance)\n        return",
        "guidance=1.0)\n        return",
        WRITTEN,
    ),
    Fault(
        "segments are drawn alike",
        METHOD,
        'uniforms["segment"][:, None] * edges[0] < edges[1:-1]',
        'uniforms["segment"][:, None] < torch.linspace(1, 0, len(edges))[1:-1]',
        "methods/test_pi_flow.py::test_segments_are_drawn_by_their_lengths",
    ),
    Fault(
        "all segments start at noise",
        METHOD,
        "device=number.device), number]",
        "device=number.device), 0 * number]",
        "methods/test_pi_flow.py::test_later_segments_start_where_the_student_comes_to",
    ),
    Fault(
        "substeps are of the same number everywhere",
        POLICY,
        ".round().clamp_min(1)[:, None]",
        ".round().amax().clamp_min(1).expand(len(start))[:, None]",
        THEIRS,
    ),
    Fault(
        "places are in the opposite order",
        POLICY,
        "(raw[:, :-1] - self.low[:, None])",
        "(self.high[:, None] - raw[:, :-1])",
        THEIRS,
    ),
    Fault(
        "places are steps, not lines",
        POLICY,
        "clamp(0, 1) * (places - 1)\n",
        "clamp(0, 1).mul(places - 1).round()\n",
        THEIRS,
    ),
    Fault(
        "the shift is taken the other way",
        POLICY,
        "return shift * raw / (1 + (shift - 1) * raw)",
        "return raw / (shift + (1 - shift) * raw)",
        THEIRS,
    ),
    Fault(
        "the last segment is as long as the others",
        POLICY,
        "length = 1 / (self.num_steps - 1 + self.last_segment)",
        "length = 1 / self.num_steps",
        "diffusion/test_dx_policy.py::test_all_steps_are_those_of_diffusers_piflow_scheduler",
    ),
    Fault(
        "z is not scaled to the path",
        POLICY,
        "x = (z * expand(line_scale(path, t), z)).to(z.dtype)",
        "x = z",
        "diffusion/test_dx_policy.py::test_with_one_estimate_a_call_a_segment_is_ddim_s_step",
    ),
    Fault(
        "all places have the first one's layer",
        GRID,
        "output + part for part in added.chunk(self.places, 1 if weight.ndim == 4 else -1)",
        "output + added.chunk(self.places, 1 if weight.ndim == 4 else -1)[0] for _ in range(self.places)",
        "networks/test_grid.py::test_each_output_is_that_of_a_last_layer_of_its_own",
    ),
    Fault(
        "one image gets the cleanest place's estimate",
        GRID,
        "return made[:, -1]",
        "return made[:, 0]",
        "networks/test_grid.py::test_each_output_is_that_of_a_last_layer_of_its_own",
    ),
    Fault(
        "the head does not start at nothing",
        GRID,
        "nn.init.zeros_(parameter)",
        "nn.init.normal_(parameter, std=0.01)",
        "networks/test_grid.py::test_all_outputs_start_as_the_teacher_s",
    ),
)
