"""The betas that a diffusers scheduler's config stands for. The config may be anyone's."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffdistill.settings.limits import MAX_LISTED
from diffdistill.settings.schema import UserError


def read_betas(config: Mapping[str, Any]) -> Tensor:
    """[num_train_timesteps], float64.

    Raises UserError where there are more than any table has, none can be made, or the schedule ends at zero signal,
    which has no x0 at t_max from eps.
    """
    from diffusers import DDPMScheduler

    count = config.get("num_train_timesteps", 1000)
    if not isinstance(count, int) or not 2 <= count <= MAX_LISTED:
        raise UserError(f"scheduler config: num_train_timesteps = {count!r:.100}: must be 2 to {MAX_LISTED:,}")
    try:
        betas = DDPMScheduler.from_config(dict(config)).betas.double()
    except (ArithmeticError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"scheduler config: has no betas: {' '.join(str(error).split())[:200]}") from None
    if float(betas.max()) >= 1:
        raise UserError("scheduler config: rescale_betas_zero_snr leaves no signal at the last step")
    if not bool((betas > 0).all()):
        raise UserError("scheduler config: its betas must be above 0 and below 1")
    return betas
