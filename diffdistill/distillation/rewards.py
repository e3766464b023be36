"""Rewards: differentiable judges of images, by name, for methods that learn from feedback.

A reward is a function (images [B, C, H, W] in [-1, 1], cond) -> [B], the higher the better, with a gradient to the
images. `register` adds one in Python; an installed package adds one to every command by an entry point of the group
`diffdistill.rewards`. The models of the papers (LAION's aesthetic score, ImageReward) are not part of this package.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.settings.numbers import Number
from diffdistill.settings.registry import Registry
from diffdistill.settings.schema import NonNegative, UserError, schema

Reward = Callable[[Tensor, Cond], Tensor]


def contrast(images: Tensor, cond: Cond) -> Tensor:
    """Standard deviation over all values of an image."""
    return images.flatten(1).std(1)


def sharpness(images: Tensor, cond: Cond) -> Tensor:
    """Mean absolute difference between neighbours, to the right and below."""
    right, below = images.diff(dim=-1).abs(), images.diff(dim=-2).abs()
    return (right.flatten(1).mean(1) + below.flatten(1).mean(1)) / 2


def _fault(item: object) -> str | None:
    return None if callable(item) else "cannot be called with images and cond"


REWARDS: Registry[Reward] = Registry(
    "reward",
    {reward.__name__: f"{__name__}:{reward.__name__}" for reward in (contrast, sharpness)},
    group="diffdistill.rewards",
    check=_fault,
)
"""Every reward, by name."""


def register(name: str, reward: Reward) -> None:
    """Make a reward known to this process. Raises UserError if another has the name."""
    REWARDS.register(reward, name=name)


def find_reward(name: str) -> Reward:
    """A reward by name: ours, registered, or an entry point. Raises UserError naming those that are known."""
    if name not in REWARDS.names():
        raise UserError(f"reward: {name!r} is unknown; choose from {', '.join(sorted(REWARDS.names()))}")
    return REWARDS.find(name)


@schema
class Feedback:
    """A reward as a loss: weight E[relu(threshold - r(x, c))].

    threshold: the reward beyond which an image is good enough.  Xu et al. 2023, arXiv:2304.05977 (ReFL); Ren et al.
    2024, arXiv:2404.13686, section 3.2.
    """

    reward: str
    threshold: Number
    weight: NonNegative = 1.0

    def loss(self, images: Tensor, cond: Cond) -> Tensor:
        """Scalar, with the graph of images [B, ...]. Raises UserError for an unknown reward."""
        reward = find_reward(self.reward)(images, cond)
        return self.weight * F.relu(self.threshold - reward.to(torch.promote_types(reward.dtype, torch.float32))).mean()
