"""The input of a student's first step, where a method's equations follow the path from there."""

from diffdistill.diffusion.path import Path
from diffdistill.diffusion.sampling import TCD, FewSteps
from diffdistill.settings.schema import UserError

NEARLY_ONE = 0.01
"""By how much sigma of the first level may miss 1 for unit noise to be its own: Stable Diffusion's is 0.998."""


def check_first_noise(method: str, steps: FewSteps | TCD, path: Path) -> None:
    """Raise UserError where the student would begin with n, but learns what becomes of sigma n, which is not that."""
    if steps.init_noise == "unit":
        sigma = float(path.sigma(steps.times(path)[0]))
        if abs(sigma - 1) > NEARLY_ONE:
            said = f"{method} begins with sigma n, and sigma is {sigma:.3g} there"
            raise UserError(f"method.steps.init_noise = unit: {said}; use sigma, or start where sigma is 1")
