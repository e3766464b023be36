"""EDM's published checkpoints (.pkl) as runs of our own networks. Their code is read as data, and thrown away.

A file is a pickled dict whose `ema` is a network. Objects of EDM's classes are calls of `torch_utils.persistence`'s
`_reconstruct_persistent_obj` on one dict: type, version, module_src (Python's text, never run), class_name, state.
Facts from github.com/NVlabs/edm: torch_utils/persistence.py, training/networks.py, training/training_loop.py.
Karras et al. 2022, arXiv:2206.00364.  Not read: the baselines' preconditioning (VPPrecond, VEPrecond, iDDPMPrecond).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from diffdistill.diffusion.denoiser import Denoiser, freeze
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.sampling import Heun
from diffdistill.models.spec import ModelConfig, ModelSpec, TrainedModel
from diffdistill.models.teachers.imported import refuse_taken, save_imported
from diffdistill.models.teachers.pickle_reader import (
    PLAIN_CALLS,
    Build,
    Global,
    Record,
    Refused,
    read_dict,
    read_pickle,
)
from diffdistill.networks.edm_unet import ADM, DDPMPP, NCSNPP, EDMUNet
from diffdistill.settings.schema import UserError
from diffdistill.storage.checkpoint import load_strictly

PERSISTENCE = Global("torch_utils.persistence", "_reconstruct_persistent_obj")
VERSION = 6  # of the persistence, in all of EDM's files
CONTAINERS = frozenset({("torch.nn.modules.container", "ModuleDict"), ("torch.nn.modules.container", "ModuleList")})
CONSTANTS = "resample_filter"  # buffers that follow from the architecture
MAX_DEPTH = 20
MAX_LEVELS, MAX_CHANNELS, MAX_CLASSES = 10, 4096, 20_000
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # table 1

EDM_NETWORK = "EDMPrecond"
SONG_DEFAULTS: Mapping[str, Any] = {
    "model_channels": 128,
    "channel_mult": [1, 2, 2, 2],
    "num_blocks": 4,
    "attn_resolutions": [16],
    "dropout": 0.10,
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
}
DHARIWAL_DEFAULTS: Mapping[str, Any] = {
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "num_blocks": 3,
    "attn_resolutions": [32, 16, 8],
    "dropout": 0.10,
}
COMMON_DEFAULTS: Mapping[str, Any] = {"augment_dim": 0, "label_dropout": 0, "channel_mult_emb": 4}
KINDS = {
    ("positional", 1, "standard", "standard", (1, 1)): DDPMPP,
    ("fourier", 2, "residual", "standard", (1, 3, 3, 1)): NCSNPP,
}
KIND_SETTINGS = ("embedding_type", "channel_mult_noise", "encoder_type", "decoder_type", "resample_filter")


@dataclass(frozen=True)
class Described:
    """spec: what the network is here.  tensors: by EDM's names, of `EDMPrecond.model`."""

    spec: ModelSpec
    tensors: Mapping[str, Tensor]


def import_edm(file: FilePath, out: FilePath) -> TrainedModel:
    """Convert a checkpoint into a run's folder, which `load_model` reads.

    Raises UserError if the folder holds a run, and Refused for whatever is no network of EDM's.
    """
    refuse_taken(out)
    return save_imported(read_edm(file), file, out)


def read_edm(file: FilePath) -> TrainedModel:
    """The network in a checkpoint, frozen. Raises Refused, UserError."""
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    found = describe(file)
    denoiser = found.spec.build_empty()
    load_strictly(denoiser, _own_names(denoiser, found.tensors), origin=str(file), takes_tensors=True)
    freeze(denoiser)
    return TrainedModel(denoiser, found.spec, file)


def describe(file: FilePath) -> Described:
    """What a checkpoint holds, without a network built for it. Raises Refused, UserError."""
    calls: dict[tuple[str, str], Build] = {
        **PLAIN_CALLS,
        (PERSISTENCE.module, PERSISTENCE.name): _persistent,
        ("dnnlib.util", "EasyDict"): read_dict,
    }
    content = read_pickle(file, calls=calls, records=CONTAINERS)
    network = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(network, Record):
        raise Refused(f"{file}: holds no network under `ema`")
    if network.kind.name != EDM_NETWORK:
        raise Refused(f"{file}: the network is a {network.kind.name}; only {EDM_NETWORK} is read")
    tensors = {name.removeprefix("model."): tensor for name, tensor in _tensors(network, str(file))}
    spec = _spec(network.state, str(file))
    _check_sizes(spec, tensors, str(file))
    return Described(spec, tensors)


def _persistent(meta: Any) -> Record:
    """An object of EDM's: its class by name, and its state. The source that comes with it is dropped here."""
    if type(meta) is not dict or meta.get("type") != "class" or meta.get("version") != VERSION:
        raise Refused("a persistent object of another kind")
    name, state = meta.get("class_name"), meta.get("state")
    if type(name) is not str or not name.isidentifier() or type(state) is not dict:
        raise Refused("a persistent object without a name or a state")
    return Record(Global("training.networks", name), state)


def _tensors(
    record: Record, origin: str, prefix: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by their dotted names. No module stands in two places, as it would in a loop."""
    seen = set() if seen is None else seen
    if id(record) in seen or prefix.count(".") > MAX_DEPTH:
        raise Refused(f"{origin}: {prefix}: a module that is there already, or more than {MAX_DEPTH} deep")
    seen.add(id(record))
    for group in ("_parameters", "_buffers"):
        for name, tensor in _group(record, group, origin).items():
            if isinstance(tensor, Tensor):
                yield f"{prefix}{name}", tensor
            elif tensor is not None:
                raise Refused(f"{origin}: {prefix}{name}: no tensor but a {type(tensor).__name__}")
    for name, module in _group(record, "_modules", origin).items():
        if isinstance(module, Record):
            yield from _tensors(module, origin, f"{prefix}{name}.", seen)
        elif module is not None:
            raise Refused(f"{origin}: {prefix}{name}: no module but a {type(module).__name__}")


def _group(record: Record, group: str, origin: str) -> dict[str, Any]:
    found = record.state.get(group, {})
    if type(found) is not dict:
        raise Refused(f"{origin}: {record.kind.name}.{group} is a {type(found).__name__}")
    return found


def _spec(state: Mapping[str, Any], origin: str) -> ModelSpec:
    """The network's description, from the arguments that it was made with."""
    given = state.get("_init_kwargs")
    if type(given) is not dict or state.get("_init_args") not in ((), []):
        raise Refused(f"{origin}: the network's arguments are not in the file")
    kind = given.get("model_type", "DhariwalUNet")
    if kind not in ("SongUNet", "DhariwalUNet"):
        raise Refused(f"{origin}: model_type = {kind!r}: only SongUNet and DhariwalUNet are read")
    options = {**COMMON_DEFAULTS, **(SONG_DEFAULTS if kind == "SongUNet" else DHARIWAL_DEFAULTS), **given}
    side, channels, num_classes = (
        _integer(options.get(name, default), name, origin)
        for name, default in (("img_resolution", None), ("img_channels", None), ("label_dim", 0))
    )
    if options["channel_mult_emb"] != 4:
        raise Refused(f"{origin}: channel_mult_emb = {options['channel_mult_emb']!r}: only 4 is read")
    try:
        model = ModelConfig(
            network=_network(kind, options, origin),
            path=EDM(sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX),
            predicts="edm",
            sigma_data=float(options.get("sigma_data", 0.5)),
        )
        return ModelSpec(
            model=model,
            image_shape=(channels, side, side),
            num_classes=num_classes,
            class_dropout=float(options["label_dropout"]),
            sampler=Heun(num_steps=18 if side <= 32 else 40),
        )
    except (TypeError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(f"{origin}: the network's arguments: {' '.join(str(error).split())[:200]}") from None


def _network(kind: str, options: Mapping[str, Any], origin: str) -> DDPMPP | NCSNPP | ADM:
    shared = {
        "channels": options["model_channels"],
        "multipliers": tuple(options["channel_mult"]),
        "blocks": options["num_blocks"],
        "attention_resolutions": tuple(options["attn_resolutions"]),
        "dropout": float(options["dropout"]),
        "augment_dim": options["augment_dim"],
    }
    if kind == "DhariwalUNet":
        return ADM(**shared)
    chosen = tuple(_frozen(options[name]) for name in KIND_SETTINGS)
    if chosen not in KINDS:
        shown = ", ".join(f"{name} = {value!r}" for name, value in zip(KIND_SETTINGS, chosen, strict=True))
        raise Refused(f"{origin}: {shown}: neither DDPM++ nor NCSN++")
    return KINDS[chosen](**shared)


def _check_sizes(spec: ModelSpec, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Raise Refused for arguments that ask for far more than the tensors that are there, before anything is built."""
    network: Any = spec.model.network
    widest = network.channels * max(network.multipliers)
    if len(network.multipliers) * network.blocks > len(tensors) or len(network.multipliers) > MAX_LEVELS:
        raise Refused(f"{origin}: num_blocks = {network.blocks:,}: the file holds {len(tensors):,} tensors")
    if widest > MAX_CHANNELS or spec.num_classes > MAX_CLASSES or spec.image_shape[0] > MAX_CHANNELS:
        raise Refused(f"{origin}: {widest:,} channels, {spec.num_classes:,} classes: too many")


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _integer(value: Any, name: str, origin: str) -> int:
    if type(value) is not int or not 0 <= value <= 2**20:
        raise Refused(f"{origin}: {name} = {value!r}: must be a whole number")
    return value


def _own_names(denoiser: Denoiser, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by our names, in float32. What is no counterpart of ours stays under its own name, and is refused."""
    net = denoiser.net
    assert isinstance(net, EDMUNet)
    ours = {theirs: own for own, theirs in net.edm_names().items()}
    kept = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] != CONSTANTS}
    return {f"net.{ours.get(name, name)}": tensor.to(torch.float32) for name, tensor in kept.items()}
