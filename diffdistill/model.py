"""Denoisers on disk: what a checkpoint says about its network, and how a run's weights become a Denoiser."""

from dataclasses import dataclass
from pathlib import Path as FilePath

import torch
from torch import Tensor

from diffdistill.checkpoint import MANIFEST, STATE, CheckpointError, list_checkpoints, load_checkpoint, select_group
from diffdistill.config import ModelConfig, validate
from diffdistill.denoiser import Denoiser, freeze
from diffdistill.sampling import AnySampler
from diffdistill.schema import Fraction, PositiveInt, UserError, schema


@schema
class ModelSpec:
    """Enough to build a network again: its config, the images it was made for, and how to sample from it."""

    model: ModelConfig
    image_shape: tuple[PositiveInt, ...]
    num_classes: int
    class_dropout: Fraction
    sampler: AnySampler

    def build(self) -> Denoiser:
        """A new, untrained Denoiser. Raises UserError if network and images do not fit."""
        net = self.model.network.build(self.image_shape, self.num_classes, self.class_dropout)  # type: ignore[arg-type]
        return Denoiser(net, self.model.path, self.model.predicts, sigma_data=self.model.sigma_data)


@dataclass(frozen=True)
class TrainedModel:
    """denoiser: frozen.  spec: what it is.  source: the checkpoint it came from."""

    denoiser: Denoiser
    spec: ModelSpec
    source: FilePath


def load_model(place: str | FilePath, *, use_ema: bool = True, ema: str | None = None) -> TrainedModel:
    """The trained network of a run's folder (its newest checkpoint) or of one checkpoint folder.

    use_ema: the averaged weights where there are some.  ema: the name of one of the run's `more_emas`.
    Raises UserError if there is none or it is damaged.
    """
    target = find_checkpoint(FilePath(place))
    named = f"ema-{ema}" if ema else "ema"
    checkpoint = load_checkpoint(target, groups=("players", named))
    if ema and named not in checkpoint.tensors:
        known = ", ".join(sorted(f.stem.removeprefix("ema-") for f in target.glob("ema-*.safetensors"))) or "none"
        raise UserError(f"{target}: no average {ema!r} beside `ema`; there are: {known}")
    spec = validate(ModelSpec, checkpoint.state.get("model"), origin=f"{target}/state.json")
    student = f"{checkpoint.state['student']}."
    group = named if (use_ema or ema) and named in checkpoint.tensors else "players"
    weights = {k.removeprefix(student): v for k, v in checkpoint.tensors[group].items() if k.startswith(student)}
    denoiser = spec.build()
    load_strictly(denoiser, weights, origin=str(target))
    freeze(denoiser)
    return TrainedModel(denoiser, spec, target)


@dataclass(frozen=True)
class TrainedPlayers:
    """denoisers: a run's players by name, frozen, the student's averaged weights where there are some.  spec: what
    they are."""

    denoisers: dict[str, Denoiser]
    spec: ModelSpec


def load_players(place: str | FilePath) -> TrainedPlayers:
    """The players of a run's newest checkpoint (or of one checkpoint's folder) that are built as its student is.

    Raises UserError if there is none or it is damaged.
    """
    target = find_checkpoint(FilePath(place))
    checkpoint = load_checkpoint(target, groups=("players", "ema"))
    spec = validate(ModelSpec, checkpoint.state.get("model"), origin=f"{target}/state.json")
    found = {}
    for name in sorted({key.split(".")[0] for key in checkpoint.tensors["players"]}):
        is_averaged = name == checkpoint.state["student"] and "ema" in checkpoint.tensors
        weights = select_group(checkpoint.tensors["ema" if is_averaged else "players"], name)
        denoiser = spec.build()
        if denoiser.state_dict().keys() == weights.keys():
            load_strictly(denoiser, weights, origin=f"{target} ({name})")
            freeze(denoiser)
            found[name] = denoiser
    return TrainedPlayers(found, spec)


def find_checkpoint(place: FilePath) -> FilePath:
    """The newest checkpoint of a run's folder, or `place` itself if it is one. Raises CheckpointError."""
    if not place.is_dir():
        raise CheckpointError(f"{place}: no such folder; give a run's folder or one of its checkpoints")
    if (place / STATE).exists() or (place / MANIFEST).exists():
        return place
    found = list_checkpoints(place / "checkpoints")
    if not found:
        raise CheckpointError(f"{place}: holds no checkpoint (looked for {place}/checkpoints/step-*)")
    return found[-1]


def load_strictly(module: torch.nn.Module, weights: dict[str, Tensor], *, origin: str) -> None:
    """load_state_dict with one readable message. Raises UserError if names or shapes differ."""
    own = module.state_dict()
    faults = [f"{name} is missing" for name in own.keys() - weights.keys()]
    faults += [f"{name} is unknown" for name in weights.keys() - own.keys()]
    faults += [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(own[name].shape)}"
        for name in own.keys() & weights.keys()
        if own[name].shape != weights[name].shape
    ]
    if faults:
        listed = "; ".join(sorted(faults)[:3])
        raise UserError(f"{origin}: the weights are of another architecture: {listed} ({len(faults)} in all)")
    module.load_state_dict(weights)
