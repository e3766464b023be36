"""A student that was trained with `qat`, its weights stored in their bits: torchao's tensors in safetensors, which
diffusers loads without this package. Without that a folder holds the same numbers in plain layers."""

import json
from pathlib import Path as FilePath
from typing import Any

import torch

from diffdistill.export.stock import StockFolder
from diffdistill.models.spec import TrainedModel
from diffdistill.networks.qat import QuantisedTraining, on_grid, quantised_layers
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import dump
from diffdistill.storage.atomic import write_text_atomically

FACTS = "quantisation.json"


def note_grid(model: TrainedModel, folder: FilePath) -> None:
    """Say beside plain weights which layers hold what grid: a file for who quantises them again."""
    assert model.spec.qat is not None
    layers = list(quantised_layers(model.denoiser.net, model.spec.qat))
    facts = {**dump(model.spec.qat), "scheme": "symmetric", "layers": layers}
    write_text_atomically(folder / FACTS, json.dumps(facts, indent=1) + "\n")


def store_in_bits(model: TrainedModel, stock: StockFolder, folder: FilePath) -> None:
    """Round the network of a stock folder, which holds the weights that were trained, and store it so; the model is
    then what the folder is. Raises UserError if a package is missing, or too old."""
    settings = model.spec.qat
    assert settings is not None
    place = folder / stock.source.family.network
    kind: Any = type(stock.net.model)
    names = [name.removeprefix("model.") for name in quantised_layers(stock.net, settings)]
    options: Any = {"local_files_only": True, "torch_dtype": torch.float32}
    rounded = kind.from_pretrained(place, quantization_config=_config(settings, names), **options)
    rounded.save_pretrained(place)
    on_grid(model.denoiser.net, settings)


def _config(settings: QuantisedTraining, names: list[str]) -> Any:
    """diffusers' own setting for these layers."""
    try:
        from diffusers import TorchAoConfig
        from torchao.prototype.safetensors import safetensors_support  # noqa: F401  (torchao 0.16)
        from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerAxis, PerGroup
    except ImportError as error:
        raise UserError(
            f"--quantised: needs torchao 0.16, and diffusers that knows it: pip install 'diffdistill[quant]' ({error})"
        ) from None
    granularity = PerGroup(settings.group) if settings.group else PerAxis(0)
    own = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{settings.bits}"), granularity=granularity)
    return TorchAoConfig(FqnToConfig(dict.fromkeys(names, own)))
