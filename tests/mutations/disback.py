"""Faults of DisBack."""

from mutate import Fault

FAULTS = (
    Fault(
        "the target stays the teacher",
        "methods/disback.py",
        'if draw["position"]:',
        "if False:",
        "methods/test_disback.py::test_each_loss_takes_the_target_of_its_step_for_the_teacher",
    ),
    Fault(
        "weights under other names are passed over",
        "methods/disback.py",
        'load_strictly(module, select_group(stored, f"path {i}"), origin=f"prepared.safetensors (path {i})")',
        'module.load_state_dict(select_group(stored, f"path {i}"), strict=False)',
        "methods/test_disback.py::test_weights_under_other_names_are_refused",
    ),
    Fault(
        "the path is walked from the teacher outwards",
        "methods/disback.py",
        "return max(self.path_length - 1 - step // (self.backtracking_interval * self._of_student.every), 0)",
        "return min(step // (self.backtracking_interval * self._of_student.every), self.path_length - 1)",
        "methods/test_disback.py::test_the_targets_go_back_to_the_teacher_and_stay_there",
    ),
    Fault(
        "the target never moves",
        "methods/disback.py",
        "if position and position != self.position(step - 1):",
        "if False:",
        "methods/test_disback.py::test_each_loss_takes_the_target_of_its_step_for_the_teacher",
    ),
    Fault(
        "the fake score starts as the teacher",
        "methods/disback.py",
        "_load(players.fake, stored, self.path_length)",
        "pass",
        "methods/test_disback.py::test_the_fake_score_starts_at_the_end_of_the_path_and_the_target_one_before",
    ),
    Fault(
        "the recorded score is never trained",
        "methods/disback.py",
        "            optimizer.step()\n",
        "",
        "methods/test_disback.py::test_the_path_leaves_the_teacher_s_law_step_by_step",
    ),
    Fault(
        "every recorded score is the last",
        "methods/disback.py",
        "yield deepcopy(score).cpu()",
        "yield score",
        "methods/test_disback.py::test_the_path_leaves_the_teacher_s_law_step_by_step",
    ),
    Fault(
        "a resumed run forgets where it was",
        "diffdistill/training/run_state.py",
        "for name, module in self.players.items():\n            load_strictly(",
        "for name, module in self.players.items():\n            name == 'target' or load_strictly(",
        "methods/test_disback.py::test_a_run_resumed_between_two_targets_equals_one_that_was_not_stopped",
    ),
    Fault(
        "scores are kept one step after their interval",
        "methods/disback.py",
        "step % self.recording_interval == 0",
        "step % self.recording_interval == 1",
        "methods/test_disback.py::test_a_score_is_kept_after_every_interval_and_the_initial_generator_is_left_alone",
    ),
)
