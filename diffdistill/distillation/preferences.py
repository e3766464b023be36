"""Which of two images is preferred, and losses on the preference."""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.distillation.rewards import reward_of


@torch.no_grad()
def preference(reward: str, first: Tensor, second: Tensor, cond: Cond, teacher: Denoiser | None = None) -> Tensor:
    """1 where the first image [B, ...] is preferred, -1 where the second is, 0 for ties, [B]. No gradient is asked for.

    reward: by name; cond, teacher: as for `reward_of`.  Raises UserError for an unknown reward.
    """
    return (reward_of(reward, first, cond, teacher) - reward_of(reward, second, cond, teacher)).sign()


def preference_loss(margin: Tensor) -> Tensor:
    """-log sigmoid of each margin [B]: log 2 where nothing is known.  Rafailov et al. 2023, arXiv:2305.18290, eq. 7."""
    return -F.logsigmoid(margin)
