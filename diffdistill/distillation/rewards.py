"""Rewards: differentiable judges of images, by name, for methods that learn from feedback.

A reward is a function (images [B, C, H, W] in [-1, 1], cond) -> [B], the higher the better, with a gradient to the
images: what the student makes, latents where it makes latents. A `Judge` sees what people see instead, pixels and the
prompt's words. `register` adds one in Python; an installed package adds one to every command by an entry point of the
group `diffdistill.rewards`. PickScore, HPS and LAION's aesthetic score are judges of ours.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser, device_of
from diffdistill.settings.numbers import Number
from diffdistill.settings.registry import Registry
from diffdistill.settings.schema import NonNegative, UserError, schema

Reward = Callable[[Tensor, Cond], Tensor]


class Judge(ABC):
    """A reward that looks at pixels, and where `reads_text` at the prompts."""

    name: str
    reads_text = True

    @abstractmethod
    def load(self, device: torch.device) -> None:
        """Make ready on a device. Raises UserError where something is missing."""

    @property
    def parts(self) -> tuple[nn.Module, ...]:
        """The networks that it holds in memory."""
        return ()

    @abstractmethod
    def __call__(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """images: [B, 1 or 3, H, W], about in [-1, 1].  captions: [B], empty ones where it reads none.  Returns [B]."""


def contrast(images: Tensor, cond: Cond) -> Tensor:
    """Standard deviation over all values of an image."""
    return images.flatten(1).std(1)


def sharpness(images: Tensor, cond: Cond) -> Tensor:
    """Mean absolute difference between neighbours, to the right and below."""
    right, below = images.diff(dim=-1).abs(), images.diff(dim=-2).abs()
    return (right.flatten(1).mean(1) + below.flatten(1).mean(1)) / 2


def _fault(item: object) -> str | None:
    return None if callable(item) else "cannot be called with images and cond"


REWARDS: Registry[Reward | Judge] = Registry(
    "reward",
    {
        "contrast": "diffdistill.distillation.rewards:contrast",
        "sharpness": "diffdistill.distillation.rewards:sharpness",
        "pickscore": "diffdistill.eval.features.judges:PICKSCORE",
        "hps": "diffdistill.eval.features.judges:HPS",
        "laion_aesthetic": "diffdistill.eval.features.judges:LAION_AESTHETIC",
    },
    group="diffdistill.rewards",
    check=_fault,
)
"""Every reward, by name."""


def register(name: str, reward: Reward | Judge) -> None:
    """Make a reward known to this process. Raises UserError if another has the name."""
    REWARDS.register(reward, name=name)


def find_reward(name: str) -> Reward | Judge:
    """A reward by name: ours, registered, or an entry point. Raises UserError naming those that are known."""
    if name not in REWARDS.names():
        raise UserError(f"reward: {name!r} is unknown; choose from {', '.join(sorted(REWARDS.names()))}")
    return REWARDS.find(name)


def check_reward(name: str, teacher: Denoiser | None) -> None:
    """Raise UserError for an unknown reward, and for a judge that this teacher's students give nothing to see; make a
    judge ready.  teacher: knows the prompts, and the VAE where it makes latents."""
    reward = find_reward(name)
    if not isinstance(reward, Judge):
        return
    if teacher is None:
        raise UserError(f"reward: {name!r} needs a teacher; name one")
    if reward.reads_text and (teacher.conditions is None or not teacher.conditions.texts):
        raise UserError(f"reward: {name!r} needs prompts, and the teacher takes none")
    reward.load(teacher.offload_device or device_of(teacher))


def reward_of(name: str, images: Tensor, cond: Cond, teacher: Denoiser | None = None) -> Tensor:
    """The reward of images [B, ...], [B], in float32 or wider. Raises UserError for an unknown reward.

    cond: the samples', for a judge with the numbers of their prompts.  teacher: as for `check_reward`.
    A judge, and the VAE before it, compute without autocast.
    """
    reward = find_reward(name)
    if isinstance(reward, Judge):
        if teacher is None:
            raise UserError(f"reward: {name!r} needs pixels and prompts; give `loss` the teacher")
        with torch.autocast(images.device.type, enabled=False):  # in bfloat16 images tie that differ
            seen = _wide(images)
            seen = seen if teacher.runtime.decode is None else _wide(teacher.runtime.decode(seen))
            found = reward(seen, _captions(reward, teacher, cond, len(images)))
    else:
        found = reward(images, cond)
    return _wide(found)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def is_judge(name: str) -> bool:
    """Whether a reward looks at pixels. Raises UserError for an unknown one."""
    return isinstance(find_reward(name), Judge)


@schema
class Feedback:
    """A reward as a loss: weight E[relu(threshold - r(x, c))].

    threshold: the reward above which the loss is zero.  Xu et al. 2023, arXiv:2304.05977 (ReFL); Ren et al.
    2024, arXiv:2404.13686, section 3.2.
    """

    reward: str
    threshold: Number
    weight: NonNegative = 1.0

    def check(self, teacher: Denoiser | None) -> None:
        """As `check_reward`."""
        check_reward(self.reward, teacher)

    def loss(self, images: Tensor, cond: Cond, teacher: Denoiser | None = None) -> Tensor:
        """Scalar, with the graph of images [B, ...]; arguments and errors as of `reward_of`."""
        return self.weight * F.relu(self.threshold - reward_of(self.reward, images, cond, teacher)).mean()


def check_feedback(feedback: Iterable[Feedback], teacher: Denoiser | None) -> None:
    """`Feedback.check` of each."""
    for one in feedback:
        one.check(teacher)


def _captions(judge: Judge, teacher: Denoiser, cond: Cond, count: int) -> list[str]:
    if not judge.reads_text:
        return [""] * count
    if teacher.conditions is None or cond.label is None:
        raise UserError(f"reward: {judge.name!r} needs the indices of the prompts, and the condition holds none")
    return teacher.conditions.words(cond.label)
