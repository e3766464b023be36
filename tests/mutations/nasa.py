"""Faults of negative prompts inside attention, NASA."""

from mutate import Fault

LAYERS, MODELS = "diffdistill/networks/negative_prompts.py", "diffdistill/models/negative_prompts.py"
TEST = "models/test_negative_prompts.py::test_"
DRAWN = f"{TEST}a_drawn_scale_is_one_for_a_step_and_even_over_its_range"
TEACHER = f"{TEST}a_teacher_is_guided_away_from_the_negative_prompt_and_who_shares_its_prompts_is_not"

FAULTS = (
    Fault(
        "the scale of a step stays",
        LAYERS,
        "            processor.scale = own\n",
        "            pass\n",
        f"{TEST}within_a_step_the_scale_is_another_and_afterwards_the_usual_one",
    ),
    Fault("the range begins at zero", MODELS, "low + (high - low) * share", "high * share", DRAWN),
    Fault("every step has one scale", MODELS, "StepRandom(seed, step, ", "StepRandom(seed, 0, ", DRAWN),
    Fault(
        "the teacher leads away from no prompt",
        MODELS,
        "teacher.run_with(conditions=table.with_empty(negative.cond))",
        "teacher.run_with(conditions=table)",
        TEACHER,
    ),
    Fault(
        "all who share the table lead away from it",
        "diffdistill/diffusion/prompt_table.py",
        "made = copy.copy(self)",
        "made = self",
        TEACHER,
    ),
    Fault(
        "the student is not steered by what was drawn",
        LAYERS,
        "        processor.scale = scale\n    try:",
        "        pass\n    try:",
        f"{TEST}within_a_step_the_scale_is_another_and_afterwards_the_usual_one",
    ),
)
