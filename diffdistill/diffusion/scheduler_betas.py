"""The betas that a diffusers scheduler's config stands for. The config may be anyone's."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffdistill.settings.limits import MAX_LISTED
from diffdistill.settings.schema import UserError

LEAST = 2.0**-24  # alpha^2, which is diffusers' own; alpha is 2.4e-4


def read_betas(config: Mapping[str, Any]) -> Tensor:
    """[num_train_timesteps], float64.

    A schedule that ends without signal (`rescale_betas_zero_snr`: Lin et al. 2023, arXiv:2305.08891) keeps `LEAST` of
    it at its last step, as diffusers' Euler schedulers do: all that divides by alpha is then finite.
    Raises UserError where there are more than any table has, none can be made, or what is predicted there is eps,
    which says nothing of x0.
    """
    from diffusers import DDPMScheduler

    count = config.get("num_train_timesteps", 1000)
    if not isinstance(count, int) or not 2 <= count <= MAX_LISTED:
        raise UserError(f"scheduler config: num_train_timesteps = {count!r:.100}: must be 2 to {MAX_LISTED:,}")
    try:
        betas = DDPMScheduler.from_config(dict(config)).betas.double()
    except (ArithmeticError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"scheduler config: has no betas: {' '.join(str(error).split())[:200]}") from None
    if float(betas[-1]) >= 1:
        if config.get("prediction_type", "epsilon") == "epsilon":
            raise UserError(
                "scheduler config: rescale_betas_zero_snr leaves no signal at the last step, where a network that "
                "predicts epsilon says nothing; such networks predict v"
            )
        before = (1 - betas[:-1]).prod()
        betas[-1] = 1 - min(LEAST, float(before) / 2) / before  # steep schedules have less than that one step before
    if not bool(((betas > 0) & (betas < 1)).all()):
        raise UserError("scheduler config: its betas must be above 0 and below 1")
    return betas
