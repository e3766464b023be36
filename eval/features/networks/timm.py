"""timm's models as features: pooled, before the classifier."""

import math
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from diffdistill.eval.features.extractors import Extractor, Timm
from diffdistill.eval.features.networks import ready
from diffdistill.eval.features.stated import OWN, as_before, completed, library_input, said_of_own, unknown_weights
from diffdistill.eval.features.weights import WeightsFile, find_weights, load_state, load_strictly
from diffdistill.settings.schema import UserError

FACTS = ("mean", "std")
MODES = {"center": "shortest", "squash": "squash"}
"""timm's crop_mode in our words; "border" is not known."""


def load(features: Timm, weights: FilePath | None, device: torch.device) -> Extractor:
    """Raises UserError if timm, the model or the weights are missing, or timm says otherwise of them."""
    asked, features = features, complete(features)
    found = find_weights(WeightsFile(f"{features.label}.pth", features.sha256), weights)
    network = _timm().create_model(_name(features), pretrained=False)
    load_strictly(network, load_state(found.path), origin=found.path)
    network = ready(network, device)

    def run(values: Tensor) -> Tensor:
        pooled: Tensor = network.forward_head(network.forward_features(values), pre_logits=True)
        return pooled

    return Extractor(
        label=features.label,
        network=run,
        prepare=library_input(features),
        num_features=None,
        sha256=found.sha256,
        device=device,
        features=features,
        earlier=as_before(asked, features),
    )


def complete(features: Timm) -> Timm:
    """The specification with what timm's pretrained_cfg says of the weights.

    Raises UserError if it has no such model or weights, or says otherwise.
    """
    library = _timm()
    if not library.is_model(features.model):
        close = ", ".join(library.list_models(f"*{features.model[:6]}*")[:10])
        raise UserError(f"features.model = {features.model!r}: timm has none of this name (such as {close})")
    config = _config(features)
    channels, height, width = config.input_size
    if (channels, height) != (3, width):
        raise UserError(f"features.model = {features.model!r}: takes {config.input_size}; only 3 x n x n is known")
    if config.fixed_input_size and features.size not in (None, height):
        raise UserError(f"features.size = {features.size}: {features.model} takes {height}")
    size = features.size or height
    said: dict[str, Any] = {
        "pretrained": config.tag,
        "size": size,
        "resize_side": math.floor(size / config.crop_pct),
        "resize_mode": MODES.get(config.crop_mode, config.crop_mode),
        "interpolation": config.interpolation,
        "mean": tuple(config.mean),
        "std": tuple(config.std),
    }
    if features.pretrained == OWN:
        said |= said_of_own(features, FACTS)
    return completed(features, said, facts=FACTS, origin=f"timm of {features.model}, {config.tag},")


def _config(features: Timm) -> Any:
    """Raises UserError if the model has no weights of the tag."""
    architecture, _, tag = features.model.partition(".")
    asked = features.pretrained if features.pretrained not in (None, OWN) else tag
    try:
        if tag in ("", asked):
            return _timm().get_pretrained_cfg(f"{architecture}.{asked}" if asked else architecture)
    except RuntimeError:  # timm's for a tag that it does not have
        pass
    tags = [name.partition(".")[2] for name in _timm().list_pretrained(f"{architecture}.*")]
    raise unknown_weights(replace(features, pretrained=asked), tags, "timm")


def _name(features: Timm) -> str:
    architecture = features.model.partition(".")[0]
    return features.model if features.pretrained in ("", OWN) else f"{architecture}.{features.pretrained}"


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise UserError("timm is missing: pip install 'diffdistill[eval]'") from None
    return timm
