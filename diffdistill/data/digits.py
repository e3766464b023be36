"""scikit-learn's handwritten digits, 8 x 8: the default data, embedded, no download."""

from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffdistill.data.source import TensorImages
from diffdistill.settings.schema import schema

SPLIT_SEED = 0
NUM_TRAIN = 1437


@schema
class Digits:
    """1,797 grey images 8 x 8 in [-1, 1] with their class: 1,437 to train on, 360 held out."""

    name: Literal["digits"] = "digits"
    split: Literal["train", "test"] = "train"

    def load(self) -> TensorImages:
        """The images of `tensors`, in memory."""
        return TensorImages(*self.tensors())

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Images [N, 1, 8, 8] float32 in [-1, 1] and labels [N] int64.

        The split is numpy's default_rng(0).permutation(1797): the first 1,437 train. Alpaydin & Kaynak 1998.
        """
        images, labels = _read()
        order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
        chosen = order[:NUM_TRAIN] if self.split == "train" else order[NUM_TRAIN:]
        return torch.from_numpy(images[chosen]).float()[:, None] / 8 - 1, torch.from_numpy(labels[chosen]).long()


@cache
def _read() -> tuple[NDArray[Any], NDArray[Any]]:
    """All images, 0 to 16, and labels, as scikit-learn has them: text, which takes as long as a step of training."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images, bunch.target
