"""What every metric asks of the features it is given, and the words in which it refuses them."""

from torch import Tensor

from diffdistill.diffusion.gaussians import check_finite
from diffdistill.settings.schema import UserError


def check_features(features: Tensor, name: str, *, min_samples: int = 1) -> None:
    """Raise UserError unless features are [N, d], finite, with at least min_samples rows and one column."""
    if features.ndim != 2:
        raise UserError(f"{name} must be [N, d], not {list(features.shape)}")
    if len(features) < min_samples or not features.shape[1]:
        raise UserError(f"{name} must hold {min_samples} samples or more of 1 feature or more: {list(features.shape)}")
    check_finite(features, name)


def check_pair(a: Tensor, b: Tensor, *, min_samples: int = 1) -> None:
    """Raise UserError unless a: [N, d] and b: [M, d] are two sets of the same features, as `check_features`."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise UserError(f"features must be [N, d] and [M, d], not {list(a.shape)} and {list(b.shape)}")
    check_features(a, "the first features", min_samples=min_samples)
    check_features(b, "the second features", min_samples=min_samples)
