"""Pickles in the format of EDM's checkpoints, by a writer of our own: no code of theirs is needed or in them.

An object of theirs is a call of `torch_utils.persistence._reconstruct_persistent_obj` on a dict of type, version,
module_src, class_name and state. Their modules do not exist here: names are put in their place while a file is written.
"""

import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffdistill.networks.edm_unet import EDMUNet

SOURCE = "raise SystemExit('the source in the file ran')\n"
ARGUMENTS: dict[str, dict[str, Any]] = {
    "ddpmpp": {
        **{"model_type": "SongUNet", "model_channels": 16, "channel_mult": [1, 2, 2], "num_blocks": 2},
        **{"attn_resolutions": [8, 4], "augment_dim": 9, "dropout": 0.13},
        **{"embedding_type": "positional", "encoder_type": "standard", "decoder_type": "standard"},
        **{"channel_mult_noise": 1, "resample_filter": [1, 1]},
    },
    "ncsnpp": {
        **{"model_type": "SongUNet", "model_channels": 16, "channel_mult": [1, 2, 2], "num_blocks": 2},
        **{"attn_resolutions": [8, 4], "augment_dim": 9, "dropout": 0.13},
        **{"embedding_type": "fourier", "encoder_type": "residual", "decoder_type": "standard"},
        **{"channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]},
    },
    "adm": {
        **{"model_type": "DhariwalUNet", "model_channels": 64, "channel_mult": [1, 2], "num_blocks": 1},
        **{"attn_resolutions": [8], "dropout": 0.1},
    },
}
SHAPE = {"img_resolution": 16, "img_channels": 3, "label_dim": 5}


class Persistent:
    """An object of a class of theirs."""

    def __init__(self, class_name: str, state: dict[str, Any], **change: Any) -> None:
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": class_name, "state": state}
        self.meta = meta | change

    def __reduce__(self) -> tuple[Any, ...]:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,), None


@contextmanager
def named_as_theirs() -> Iterator[type]:
    """While it lasts their modules' names can be pickled. Yields their EasyDict."""

    def reconstruct(meta: Any) -> Any:
        raise AssertionError("only its name is pickled")

    reconstruct.__module__, reconstruct.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    easy = type("EasyDict", (dict,), {"__module__": "dnnlib.util", "__qualname__": "EasyDict"})
    members = {
        "torch_utils.persistence": {"_reconstruct_persistent_obj": reconstruct},
        "dnnlib.util": {"EasyDict": easy},
    }
    for name, found in members.items():
        for module in (name.split(".", maxsplit=1)[0], name):
            sys.modules[module] = types.ModuleType(module)
        sys.modules[name].__dict__.update(found)
    try:
        yield easy
    finally:
        for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"):
            del sys.modules[name]


def write_checkpoint(file: Path, content: Mapping[str, Any], *, protocol: int = 4) -> Path:
    with named_as_theirs() as easy:
        dataset = easy(class_name="training.dataset.ImageFolderDataset", path="./x.zip", use_labels=True)
        whole = {"loss_fn": Persistent("EDMLoss", {"P_mean": -1.2, "sigma_data": 0.5}), "augment_pipe": None}
        with file.open("wb") as handle:
            pickle.dump(whole | {"dataset_kwargs": dataset} | dict(content), handle, protocol)
    return file


def network_of(tensors: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> Persistent:
    """An EDMPrecond that holds these tensors, by their names in its `model`."""
    state = module_state({"model": module("SongUNet", tensors)}, {})
    return Persistent("EDMPrecond", state | {"sigma_data": 0.5, "_init_args": (), "_init_kwargs": dict(arguments)})


def module(kind: str, tensors: Mapping[str, Tensor]) -> Any:
    """A tree of modules for dotted names; `enc` and `dec` are torch's own ModuleDicts."""
    own = {name: tensor for name, tensor in tensors.items() if "." not in name}
    inner: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        if rest:
            inner.setdefault(first, {})[rest] = tensor
    modules = {name: module(name if name in ("enc", "dec") else "Part", found) for name, found in inner.items()}
    if kind in ("enc", "dec"):
        made = nn.ModuleDict()
        made.__dict__["_modules"] = OrderedDict(modules)
        return made
    return Persistent(kind, module_state(modules, own) | {"skip_scale": np.sqrt(0.5)})


def module_state(modules: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What torch's modules keep."""
    buffers = {name: tensor for name, tensor in tensors.items() if name in ("freqs", "resample_filter")}
    parameters = {name: nn.Parameter(tensor, False) for name, tensor in tensors.items() if name not in buffers}
    return {
        "training": False,
        "_parameters": OrderedDict(parameters),
        "_buffers": OrderedDict(buffers),
        "_non_persistent_buffers_set": set(),
        "_forward_hooks": OrderedDict(),
        "_modules": OrderedDict(modules),
    }


def waves(net: EDMUNet) -> dict[str, Tensor]:
    """Weights by EDM's names, from a formula, for whoever has their code: 0.3 sin(0.7 i + k), of the k-th name."""
    names, state = net.edm_names(), net.state_dict()
    made = {}
    for k, own in enumerate(sorted(names, key=names.__getitem__)):
        values = 0.3 * torch.sin(torch.arange(state[own].numel(), dtype=torch.float64) * 0.7 + k)
        made[names[own]] = values.reshape(state[own].shape).float()
    made["enc.8x8_down.conv0.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
    return made
