"""A student of several styles at one of them, or at a mixture: a plain model."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from diffdistill.diffusion.denoiser import freeze
from diffdistill.models.load import merge_model
from diffdistill.models.spec import ModelSpec, TrainedModel
from diffdistill.networks.styled import Styled, StyledConfig
from diffdistill.settings.limits import MAX_NUMBER
from diffdistill.settings.schema import UserError

ROUNDING = 1e-6


def styles_of(spec: ModelSpec) -> tuple[str, ...]:
    """The names of a model's styles; none for a model that is told none."""
    network = spec.model.network
    return network.styles if isinstance(network, StyledConfig) else ()


def at_style(model: TrainedModel, text: str) -> TrainedModel:
    """The model with one style, or a mixture: a network of its base's own class, without LoRA.

    text: as `parse_style`.  Raises UserError as it does, and for a model without styles.
    """
    names = styles_of(model.spec)
    if not names:
        raise UserError(f"--style {text}: {model.source} has no styles; leave it out")
    weights = parse_style(text, names)
    merged = merge_model(model)
    net, network = merged.denoiser.net, merged.spec.model.network
    assert isinstance(net, Styled)
    assert isinstance(network, StyledConfig)
    denoiser = merged.denoiser.with_net(net.folded(torch.tensor([weights[name] for name in names])))
    freeze(denoiser)
    return replace(
        merged, denoiser=denoiser, spec=replace(merged.spec, model=replace(merged.spec.model, network=network.base))
    )


def parse_style(text: str, names: tuple[str, ...]) -> Mapping[str, float]:
    """ "a", or "a=0.3,b=0.7": the weight of each name, of 1 together; below 0 and above 1 are beyond the teachers.

    Raises UserError on other text, other names, and other sums.
    """
    weights = dict.fromkeys(names, 0.0)
    parts = [part.partition("=") for part in text.split(",")]
    for name, sign, number in ((name.strip(), sign, number) for name, sign, number in parts):
        if name not in weights:
            raise UserError(f"--style {text}: no style {name!r}; there are: {', '.join(names)}")
        try:
            value = float(number) if sign else 1.0
        except ValueError:
            value = float("nan")
        if not abs(value) <= MAX_NUMBER:
            raise UserError(f"--style {text}: {number!r} is no number; write {name}=0.5")
        weights[name] += value
    if abs(sum(weights.values()) - 1) > ROUNDING:
        raise UserError(f"--style {text}: the weights sum to {sum(weights.values()):g}; they must sum to 1")
    return weights
