"""Faults of Hyper-SD, its segments and the TCD sampler."""

from mutate import Fault

FAULTS = (
    Fault(
        "an edge is its own segment's lower end, as in the paper's formula",
        "diffdistill/distillation/segments.py",
        "torch.searchsorted(edges, index.contiguous())",
        "torch.searchsorted(edges, index.contiguous(), right=True).clamp_max(len(edges) - 1)",
        "distillation/test_segments.py::test_the_lower_edge_is_strictly_smaller_for_all_grids_and_segments",
    ),
    Fault(
        "the target has a graph",
        "methods/hyper_sd.py",
        "        with torch.no_grad():\n            x_after",
        "        with torch.enable_grad():\n            x_after",
        "methods/test_hyper_sd.py::test_a_target_with_the_student_s_weights_is_the_solver_s_step_and_the_student_s_own_jump",
    ),
    Fault(
        "the solver ignores its class",
        "methods/hyper_sd.py",
        "solver(x, t, cond, guidance=w)",
        "solver(x, t, solver.unconditional(cond), guidance=1.0)",
        "methods/test_hyper_sd.py::test_one_segment_with_its_end_fixed_is_consistency_distillation",
    ),
    Fault(
        "the student of the stage before is guided once more",
        "methods/hyper_sd.py",
        "(players.solver, 1.0)",
        '(players.solver, draw.get("w", 1.0))',
        "methods/test_hyper_sd.py::test_the_first_stage_asks_the_guided_teacher_and_the_next_the_student_of_the_stage_before",
    ),
    Fault(
        "the solver stays that of the first stage",
        "methods/hyper_sd.py",
        "            players.solver.load_state_dict(players.target.state_dict())",
        "            pass",
        "methods/test_hyper_sd.py::test_a_new_stage_s_solver_is_what_the_stage_before_has_learned",
    ),
    Fault(
        "the target never moves",
        "methods/hyper_sd.py",
        "        follow(players.target, players.generator, 1 - self.target_decay)\n",
        "",
        "methods/test_hyper_sd.py::test_the_target_follows_the_student_by_the_decay",
    ),
    Fault(
        "the score's push has the wrong sign",
        "methods/hyper_sd.py",
        "matching_field(x, fake, real,",
        "matching_field(x, real, fake,",
        "methods/test_hyper_sd.py::test_the_score_stage_pushes_as_dmd2_does_on_the_student_s_own_images",
    ),
    Fault(
        "the weight of the distance is dropped",
        "methods/hyper_sd.py",
        "stage.mse_weight * consistency",
        "1.0 * consistency",
        "methods/test_hyper_sd.py::test_the_score_stage_pushes_as_dmd2_does_on_the_student_s_own_images",
    ),
    Fault(
        "a fake score that never learns",
        "methods/hyper_sd.py",
        '"fake": self._start("score_weight")}',
        '"fake": None}',
        "methods/test_hyper_sd.py::test_players_and_updates_are_those_that_the_weights_ask_for",
    ),
    Fault(
        "feedback goes on beyond its threshold",
        "diffdistill/distillation/rewards.py",
        "F.relu(self.threshold",
        "(self.threshold",
        "methods/test_trajectory_runs.py::test_feedback_ends_at_the_threshold_and_has_the_reward_s_gradient_below_it",
    ),
    Fault(
        "TCD jumps to the next time whatever eta",
        "diffdistill/diffusion/sampling.py",
        "target = (1 - self.eta) * following",
        "target = following",
        "diffusion/test_tcd.py::test_eta_one_is_multistep_consistency_sampling",
    ),
)
