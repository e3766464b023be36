"""torchvision's classification models as features, at a node of their graph."""

from pathlib import Path as FilePath

import torch
from torch import Tensor

from diffdistill.eval.features.extractors import Extractor, Torchvision
from diffdistill.eval.features.networks import ready
from diffdistill.eval.features.resize import network_input
from diffdistill.eval.features.weights import WeightsFile, find_weights, load_state, load_strictly
from diffdistill.settings.schema import UserError


def load(features: Torchvision, weights: FilePath | None, device: torch.device) -> Extractor:
    """Raises UserError if torchvision, the model, its node or the weights are missing."""
    try:
        from torchvision import models
        from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
    except ImportError:
        raise UserError("torchvision is missing: pip install 'diffdistill[eval]'") from None
    known = models.list_models(module=models)
    if features.model not in known:
        raise UserError(f"features.model = {features.model!r}: torchvision has none of this name ({', '.join(known)})")
    found = find_weights(WeightsFile(f"{features.label}.pth", features.sha256), weights)
    network = models.get_model(features.model, weights=None)
    load_strictly(network, load_state(found.path), origin=found.path)
    try:
        cut = create_feature_extractor(network.eval(), {features.node: "features"})
    except ValueError:
        last = ", ".join(get_graph_node_names(network)[1][-5:])
        raise UserError(f"features.node = {features.node!r}: not in {features.model} (its last are {last})") from None
    cut = ready(cut, device)

    def run(values: Tensor) -> Tensor:
        flat: Tensor = cut(values)["features"].flatten(1)
        return flat

    return Extractor(
        label=features.label,
        network=run,
        prepare=network_input(features.size, mean=features.mean, std=features.std),
        num_features=None,
        sha256=found.sha256,
        device=device,
    )
