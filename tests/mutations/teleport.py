"""Faults of Gaussian teleportation."""

from mutate import Fault

TELEPORT, TEST = "diffdistill/diffusion/teleport.py", "diffusion/test_teleport.py::test_"
FLOW = f"{TEST}low_rank_is_the_full_formula_with_zero_eigenvalues_and_composes"

FAULTS = (
    Fault("the mean stays as noised as it was", TELEPORT, "moved = a_to * mean +", "moved = a_from * mean +", FLOW),
    Fault(
        "modes shrink by the ratio of variances",
        TELEPORT,
        "(a_from**2 * values + s_from**2)).sqrt() - rest",
        "(a_from**2 * values + s_from**2)) - rest",
        FLOW,
    ),
    Fault("what is orthogonal to the data keeps its noise", TELEPORT, "rest * centred + (", "centred + (", FLOW),
    Fault(
        "the rest goes over the whole path",
        TELEPORT,
        "rest = Denoiser(denoiser.net, lower,",
        "rest = Denoiser(denoiser.net, denoiser.path,",
        f"{TEST}on_gaussian_data_only_the_rest_s_own_error_is_left",
    ),
    Fault(
        "the mean is not guided",
        TELEPORT,
        "return overall + scale * (own - overall)",
        "return own",
        f"{TEST}a_guided_mean_is_the_guided_trajectory_s",
    ),
    Fault(
        "the covariance is around the mean of all classes",
        TELEPORT,
        "centred = flat - torch.stack(of_class)[labels]",
        "centred = flat - flat.mean(0)",
        f"{TEST}a_fit_finds_mean_and_covariance_and_classes",
    ),
    Fault(
        "samples have unit variance",
        TELEPORT,
        "(noise.double() * self.values.sqrt()) @ self.vectors.T",
        "noise.double() @ self.vectors.T",
        f"{TEST}samples_have_their_class_s_mean_and_the_covariance",
    ),
    Fault(
        "a sampler that begins below the ratio is taken",
        TELEPORT,
        "if first < ratio * (1 - 1e-6):",
        "if False:",
        f"{TEST}what_cannot_be_is_refused",
    ),
)
