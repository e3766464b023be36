"""Anyone's network as a TorchScript file."""

from pathlib import Path as FilePath
from typing import Any

import torch

from diffdistill.eval.features.extractors import Extractor, TorchScript
from diffdistill.eval.features.networks import ready
from diffdistill.eval.features.resize import network_input
from diffdistill.eval.features.weights import WeightsFile, find_weights
from diffdistill.settings.schema import UserError


def load(features: TorchScript, weights: FilePath | None, device: torch.device) -> Extractor:
    """Raises UserError if the file is missing, of another hash, or no TorchScript."""
    found = find_weights(WeightsFile(f"{features.label}.pt", features.sha256), weights)
    return Extractor(
        label=features.label,
        network=open_script(found.path, device),
        prepare=network_input(features.size, mean=features.mean, std=features.std),
        num_features=None,
        sha256=found.sha256,
        device=device,
    )


def open_script(path: FilePath, device: torch.device) -> Any:
    """The network in evaluation mode, its convolutions channels last.  Raises UserError if the file is no TorchScript.

    TorchScript is a program: `load_extractor` asks for leave before it comes here.
    """
    try:
        script = torch.jit.load(str(path), map_location=device)
    except Exception as error:  # RuntimeError, and what a damaged zip leads to
        raise UserError(f"{path}: cannot be read as TorchScript: {' '.join(str(error).split())[:200]}") from None
    return ready(script, device)
