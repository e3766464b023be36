"""Single-file checkpoints, through diffusers' own conversion, by the configs of a pipeline: without the network."""

import json
import shutil
from pathlib import Path as FilePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from diffdistill.models.teachers.installed import diffusers_class
from diffdistill.models.teachers.pipeline import READING, Pipeline, read_json
from diffdistill.settings.schema import UserError
from diffdistill.storage.atomic import write_text_atomically
from diffdistill.storage.finite import find_dead, name_some

VAE = ("first_stage_model.", "vae.")
"""How the names of a VAE's weights begin in such a file."""
TEXT = ("cond_stage_model.", "conditioner.embedders.", "text_encoders.")


def write_single_file(file: FilePath, base: Pipeline, folder: FilePath) -> None:
    """Write the parts that the file holds, as diffusers writes them, in the place of the pipeline's.

    folder: of a pipeline as `base`.  Raises UserError where the file is of another architecture.
    """
    names = _names(file)
    network = base.family.network
    parts = {network: _convert(file, base.family.model_class(base.options), base.part(network))}
    if any(name.startswith(VAE) for name in names) and base.has_vae:
        parts["vae"] = _convert(file, str(base.class_of("vae")), base.folder / "vae")
    if any(name.startswith(TEXT) for name in names):
        encoders = [part for part in base.family.text_parts if part.startswith("text_encoder")]
        found = {part: _encoder(file, base, part) for part in encoders if base.class_of(part)}
        parts |= {part: model for part, model in found.items() if model is not None}
    for part, model in parts.items():
        _check(model, file)
        save_part(model, folder / part)


def save_part(part: Any, folder: FilePath) -> None:
    """Write a part anew, without the place that it was read from, so that the same weights are the same files."""
    shutil.rmtree(folder)
    part.save_pretrained(folder)
    file = folder / "config.json"
    if file.is_file():
        config = {name: value for name, value in read_json(file).items() if name != "_name_or_path"}
        write_text_atomically(file, json.dumps(config, indent=2) + "\n")


def _names(file: FilePath) -> list[str]:
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"file: {file}: cannot be read: {' '.join(str(error).split())[:200]}") from None


def _convert(file: FilePath, name: str, config: FilePath) -> nn.Module:
    """A model of diffusers' class `name` with the file's weights, in float32."""
    kind = diffusers_class(name)
    if not hasattr(kind, "from_single_file"):
        raise UserError(f"file: {file}: diffusers reads no single files of {name}")
    try:
        made: nn.Module = kind.from_single_file(
            str(file), config=str(config), local_files_only=True, torch_dtype=torch.float32
        )
    except READING as error:
        raise UserError(f"file: {file}: is no {name} of {config}: {' '.join(str(error).split())[:300]}") from None
    return made


def _encoder(file: FilePath, base: Pipeline, part: str) -> nn.Module | None:
    """A text encoder with the file's weights; None where the file lacks it, as most lack T5."""
    from diffusers.loaders import single_file_utils as theirs

    kind = diffusers_class(str(base.class_of(part)), "transformers")
    weights = theirs.load_single_file_checkpoint(str(file))
    options = {"config": str(base.folder / part), "local_files_only": True, "torch_dtype": torch.float32}
    try:
        if theirs.is_clip_model_in_single_file(kind, weights):
            made: nn.Module = theirs.create_diffusers_clip_model_from_ldm(kind, weights, **options)
            return made
        if kind.__name__ == "T5EncoderModel" and theirs.is_t5_in_single_file(weights):
            made = theirs.create_diffusers_t5_model_from_checkpoint(kind, weights, **options)
            return made
    except READING as error:
        raise UserError(f"file: {file}: {part}: {' '.join(str(error).split())[:300]}") from None
    return None


def _check(model: nn.Module, file: FilePath) -> None:
    """Raise UserError unless the file gave every weight, and all are finite."""
    weights = dict(model.named_parameters())
    empty = [name for name, weight in weights.items() if weight.is_meta]
    if empty:
        raise UserError(f"file: {file}: lacks {empty[0]} ({len(empty)} weights in all)")
    dead = find_dead(weights)
    if dead:
        raise UserError(f"file: {file}: its weights are not finite: {name_some(dead)}")
