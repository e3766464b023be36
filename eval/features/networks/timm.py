"""timm's models as features: pooled, before the classifier."""

from pathlib import Path as FilePath

import torch
from torch import Tensor

from diffdistill.eval.features.extractors import Extractor, Timm
from diffdistill.eval.features.networks import ready
from diffdistill.eval.features.resize import network_input
from diffdistill.eval.features.weights import WeightsFile, find_weights, load_state, load_strictly
from diffdistill.settings.schema import UserError


def load(features: Timm, weights: FilePath | None, device: torch.device) -> Extractor:
    """Raises UserError if timm, the model or the weights are missing."""
    try:
        import timm
    except ImportError:
        raise UserError("timm is missing: pip install 'diffdistill[eval]'") from None
    if not timm.is_model(features.model):
        close = ", ".join(timm.list_models(f"*{features.model[:6]}*")[:10])
        raise UserError(f"features.model = {features.model!r}: timm has none of this name (such as {close})")
    found = find_weights(WeightsFile(f"{features.label}.pth", features.sha256), weights)
    network = timm.create_model(features.model, pretrained=False)
    load_strictly(network, load_state(found.path), origin=found.path)
    network = ready(network, device)

    def run(values: Tensor) -> Tensor:
        pooled: Tensor = network.forward_head(network.forward_features(values), pre_logits=True)
        return pooled

    return Extractor(
        label=features.label,
        network=run,
        prepare=network_input(features.size, mean=features.mean, std=features.std),
        num_features=None,
        sha256=found.sha256,
        device=device,
    )
