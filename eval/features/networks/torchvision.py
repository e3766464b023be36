"""torchvision's classification models as features, at a node of their graph."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from diffdistill.eval.features.extractors import Extractor, Torchvision
from diffdistill.eval.features.networks import ready
from diffdistill.eval.features.stated import OWN, as_before, completed, library_input, said_of_own, unknown_weights
from diffdistill.eval.features.weights import Found, WeightsFile, find_weights, load_state, load_strictly
from diffdistill.settings.schema import UserError

FACTS = ("mean", "std")


def load(features: Torchvision, weights: FilePath | None, device: torch.device) -> Extractor:
    """Raises UserError if torchvision, the model, its node or the weights are missing, or it says otherwise of them."""
    asked = features
    complete(features)
    found = find_weights(WeightsFile(f"{features.label}.pth", features.sha256), weights)
    features = complete(_told_by_the_file(features, found))
    network = _network(features, load_state(found.path), origin=found.path)
    cut = ready(_cut(network.eval(), features), device)

    def run(values: Tensor) -> Tensor:
        flat: Tensor = cut(values)["features"].flatten(1)
        return flat

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


def complete(features: Torchvision) -> Torchvision:
    """The specification with what the transforms of torchvision's weights say.

    Raises UserError if it has no such model or weights, or says otherwise.
    """
    models = _models()
    known = models.list_models(module=models)
    if features.model not in known:
        raise UserError(f"features.model = {features.model!r}: torchvision has none of this name ({', '.join(known)})")
    weights = _weights(features)
    how = weights.transforms()
    crop, side = how.crop_size[0], how.resize_size[0]
    size = features.size or crop
    said: dict[str, Any] = {
        "pretrained": weights.name,
        "size": size,
        "resize_side": max(size, round(side * size / crop)),
        "resize_mode": "shortest",
        "interpolation": how.interpolation.value,
        "mean": tuple(how.mean),
        "std": tuple(how.std),
    }
    if features.pretrained == OWN:
        said |= said_of_own(features, FACTS)
    return completed(features, said, facts=FACTS, origin=f"torchvision of {features.model}, {weights.name},")


def _weights(features: Torchvision) -> Any:
    """torchvision's entry for the weights. Raises UserError if it has none of the name."""
    kinds = _models().get_model_weights(features.model)
    if features.pretrained in (None, OWN):
        return kinds.DEFAULT
    if features.pretrained not in (choices := [kind.name for kind in kinds]):
        raise unknown_weights(features, choices, "torchvision")
    return kinds[features.pretrained]


def _told_by_the_file(features: Torchvision, found: Found) -> Torchvision:
    """torchvision's files bear the first digits of their hash: a file says itself which weights it holds.

    Raises UserError where the specification names others.
    """
    for kind in _models().get_model_weights(features.model):
        digits = kind.url.rpartition("-")[2].partition(".")[0]
        if len(digits) >= 8 and found.sha256.startswith(digits):
            if features.pretrained not in (None, kind.name):
                raise UserError(f"features.pretrained = {features.pretrained!r}: {found.path} holds {kind.name}")
            return replace(features, pretrained=kind.name)
    return features


def _network(features: Torchvision, state: Mapping[str, Tensor], *, origin: FilePath) -> Any:
    """The network as torchvision builds it for these weights: its input's transform and size belong to them."""
    models = _models()
    if features.pretrained == OWN:
        network = models.get_model(features.model, weights=None)
        load_strictly(network, state, origin=origin)
        return network
    weights = _weights(features)
    with _given(type(weights), state):
        try:
            return models.get_model(features.model, weights=weights)
        except RuntimeError as error:
            raise UserError(f"{origin}: not weights of this network: {' '.join(str(error).split())[:200]}") from None


@contextmanager
def _given(kind: Any, state: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, torchvision takes our verified tensors for its download's."""
    kind.get_state_dict = lambda *_, **__: dict(state)
    try:
        yield
    finally:
        del kind.get_state_dict


def _cut(network: Any, features: Torchvision) -> Any:
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    try:
        return create_feature_extractor(network, {features.node: "features"})
    except ValueError:
        last = ", ".join(get_graph_node_names(network)[1][-5:])
        raise UserError(f"features.node = {features.node!r}: not in {features.model} (its last are {last})") from None


def _models() -> Any:
    try:
        from torchvision import models
    except ImportError:
        raise UserError("torchvision is missing: pip install 'diffdistill[eval]'") from None
    return models
