"""Faults of the guidance policies."""

from mutate import Fault

FAULTS = (
    Fault(
        "the threshold is not armed",
        "diffdistill/diffusion/guidance/policies.py",
        "self._armed & (cosine > self.policy.threshold)",
        "(cosine > self.policy.threshold)",
        "diffusion/test_guidance.py::test_adaptive_guidance_is_armed_by_a_fall_of_the_cosine_or_below_its_ratio",
    ),
    Fault(
        "guidance ends where the estimates differ",
        "diffdistill/diffusion/guidance/policies.py",
        "cosine > self.policy.threshold",
        "cosine < self.policy.threshold",
        "diffusion/test_guidance.py::test_adaptive_guidance_with_a_threshold_of_minus_1_is_the_condition_alone",
    ),
    Fault(
        "samples that are done are still asked about",
        "diffdistill/diffusion/guidance/policies.py",
        "rows = guided.nonzero()[:, 0]",
        "rows = torch.arange(len(x))",
        "diffusion/test_guidance.py::test_a_sample_that_is_done_costs_one_evaluation_a_call_and_stays_done",
    ),
    Fault(
        "the interval has no high end",
        "diffdistill/diffusion/guidance/policies.py",
        "if self.ratio_low < float(now) <= self.ratio_high",
        "if self.ratio_low < float(now)",
        "diffusion/test_guidance.py::test_an_interval_guides_above_its_low_end_up_to_its_high_end_and_asks_once_elsewhere",
    ),
    Fault(
        "CFG++ takes the ratio of noise the wrong way round",
        "diffdistill/diffusion/guidance/policies.py",
        "float(1 - following / now)",
        "float(1 - now / following)",
        "diffusion/test_guidance.py::test_ddim_under_cfg_plus_plus_keeps_the_unconditional_noise",
    ),
    Fault(
        "DDIM does not say where it goes",
        "diffdistill/diffusion/sampling.py",
        "x = transfer(denoiser.path, x, guided(x, t, s), t, s)",
        "x = transfer(denoiser.path, x, guided(x, t), t, s)",
        "diffusion/test_guidance.py::test_ddim_under_cfg_plus_plus_keeps_the_unconditional_noise",
    ),
    Fault(
        "LinearAG forgets what it predicted",
        "diffdistill/diffusion/linear_ag.py",
        "            history.add(eps, predicted)\n",
        "            history.add(eps, eps)\n",
        "diffusion/test_guidance.py::test_linear_ag_with_an_intercept_is_exact_on_gaussians_of_one_covariance",
    ),
    Fault(
        "a network that takes the scale is guided twice",
        "diffdistill/diffusion/denoiser.py",
        "cond, guidance = replace(cond, guidance_input=given.expand(len(x_t))), 1.0",
        "cond = replace(cond, guidance_input=given.expand(len(x_t)))",
        "networks/test_guided_networks.py::test_the_scale_is_fed_to_the_network_in_one_call_of_one_row_a_sample",
    ),
)
