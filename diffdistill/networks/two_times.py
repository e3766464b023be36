"""Networks that are told where to go to, besides where they are: students that jump from t to any r below it."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.networks.guided import Guided
from diffdistill.networks.registry import BaseNetwork
from diffdistill.settings.numbers import Width
from diffdistill.settings.schema import Fraction, schema


@schema
class TwoTimesConfig:
    """Settings of `TwoTimes`.  width: of the encoding of r."""

    name: Literal["two_times"] = "two_times"
    base: BaseNetwork
    width: Width = 64

    def build(self, image_shape: tuple[int, int, int], num_classes: int, class_dropout: Fraction) -> "TwoTimes":
        """The network for images [C, H, W]. Raises UserError if the base does not fit them, or has no blocks."""
        return TwoTimes(self.base.build(image_shape, num_classes, class_dropout), self.width)


class TwoTimes(Guided):
    """r in [0, 1], `Cond.end_time`, added to the embedding of every block. Starts as the base, whatever r.

    Where no r is given it is 0, the image: so every sampler can call it.
    """

    part = "end_time"

    def told(self, cond: Cond, like: Tensor) -> Cond:
        if cond.end_time is not None:
            return cond
        return replace(cond, end_time=torch.zeros(len(like), device=like.device))
