"""Pixels as features."""

from pathlib import Path as FilePath

import torch
from torch import Tensor

from diffdistill.eval.features.extractors import Extractor, Pixels
from diffdistill.eval.features.resize import signed
from diffdistill.settings.schema import UserError


def load(features: Pixels, weights: FilePath | None, device: torch.device) -> Extractor:
    """Raises UserError if weights are given."""
    if weights is not None:
        raise UserError(f"weights {weights}: {features.label} have none")
    return Extractor(label=features.label, network=_flat, prepare=signed, num_features=None, device=device)


def _flat(images: Tensor) -> Tensor:
    return images.flatten(1)
