"""scikit-learn's handwritten digits, 8 x 8: the default data, embedded, no download."""

from typing import Literal

import numpy as np
import torch
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
        from sklearn.datasets import load_digits

        bunch = load_digits()
        order = np.random.default_rng(SPLIT_SEED).permutation(len(bunch.target))
        chosen = order[:NUM_TRAIN] if self.split == "train" else order[NUM_TRAIN:]
        images = torch.from_numpy(bunch.images[chosen]).float()[:, None] / 8 - 1
        return images, torch.from_numpy(bunch.target[chosen]).long()
