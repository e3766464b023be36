"""Checkpoints of SiT and REPA (.pt) as runs of our own `dit` on a flow path. Nothing in a file is run.

Facts from github.com/willisma/SiT (models.py, transport/path.py, train.py) and github.com/sihyun-yu/REPA
(models/sit.py, loss.py, train.py): both networks are DiT's, are told t itself, not a thousand times t, and give the
velocity of a straight path.  REPA: x_t = (1 - t) data + t noise, velocity noise - data, as ours, and projectors beside
the blocks, which its training alone reads.  SiT: noise at t = 0 and velocity data - noise, and by default twice the
outputs, of which the first half counts.  Ma et al. 2024, arXiv:2401.08740; Yu et al. 2024, arXiv:2410.06940.
Not read: other paths and predictions, and normalised queries and keys.
"""

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.diffusion.denoiser import freeze
from diffdistill.diffusion.path import Flow
from diffdistill.diffusion.sampling import Heun
from diffdistill.models.spec import ModelConfig, ModelSpec, TrainedModel
from diffdistill.models.teachers.imported import refuse_taken, save_imported
from diffdistill.models.teachers.pickle_reader import MAX_BYTES, Refused, other_kind
from diffdistill.models.teachers.pipeline import open_pipeline
from diffdistill.networks.dit import FREQUENCIES, DiTConfig, sine_positions
from diffdistill.settings.reading import check_regular
from diffdistill.settings.schema import UserError
from diffdistill.storage.checkpoint import load_strictly

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Of the published sizes S, B, L and XL, by width: a file's tensors do not say."""
TOLD = {"path_type": ("linear",), "prediction": ("v", "velocity")}
"""What the arguments of its training may say, where they are in the file."""
LATER_BLOCK = re.compile(r"decoder_blocks\.(\d{1,4})\.")
IMAGENET = 1_000
"""Its classes."""
BLOCK = re.compile(r"blocks\.(\d{1,4})\.")
ZIP, LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j"  # what torch.save writes, and wrote
TIME_SCALE = 1e-3  # our networks are told a thousand times t
RENAMED = {
    "x_embedder.proj": "input",
    "t_embedder.mlp.0": "embed_time.0",
    "t_embedder.mlp.2": "embed_time.2",
    "y_embedder.embedding_table": "embed_label",
    "final_layer.adaLN_modulation.1": "modulate",
    "final_layer.linear": "output",
}
RENAMED_IN_BLOCK = {
    "attn.qkv": "qkv",
    "attn.proj": "project",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "adaLN_modulation.1": "modulate",
}


@dataclass(frozen=True)
class SiTOptions:
    """What a file may not say.  heads: of attention, None: by the width.  noise_at: the time of pure noise, 0 (SiT) or
    1 (REPA), None: by what else the file holds.  pipeline: diffusers' whose VAE makes the latents."""

    heads: int | None = None
    noise_at: int | None = None
    pipeline: str | None = None


SAID = SiTOptions()


def import_sit(file: FilePath, out: FilePath, options: SiTOptions = SAID) -> TrainedModel:
    """Convert a checkpoint into a run's folder, which `load_model` reads.

    Raises UserError if the folder holds a run, and Refused for whatever is no network of SiT's.
    """
    refuse_taken(out)
    return save_imported(read_sit(file, options), file, out)


def read_sit(file: FilePath, options: SiTOptions = SAID) -> TrainedModel:
    """The network in a checkpoint, averaged where it has an average, frozen. Raises Refused, UserError."""
    content = _load(file)
    told = content.get("args")
    told = vars(told) if isinstance(told, argparse.Namespace) else told
    arguments: Mapping[str, Any] = told if isinstance(told, Mapping) else {}
    tensors = _tensors(content, str(file))
    _check_arguments(arguments, tensors, str(file))
    is_repa = any(name.startswith("projectors.") for name in tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("projectors.")}
    spec = _spec(tensors, options, arguments.get("num_classes"), str(file))
    network = spec.model.network
    assert isinstance(network, DiTConfig)
    noise_at = _noise_at(options, is_repa=is_repa, learns_sigma=network.learn_sigma, origin=str(file))
    positions = tensors.pop("pos_embed").double()
    if noise_at == 0:
        tensors = _reversed(tensors)
    side = spec.image_shape[1] // network.patch
    expected = sine_positions((side, side), positions.shape[2])
    if not torch.allclose(positions, expected.double(), rtol=0, atol=1e-4):
        raise Refused(f"{file}: pos_embed: other positions than sines and cosines")
    own = {f"net.{_own_name(name)}": tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
    if not spec.class_dropout:  # ours has a row for no class in any case, which is not asked for here
        own["net.embed_label.weight"] = F.pad(own["net.embed_label.weight"], (0, 0, 0, 1))
    denoiser = spec.build_empty()
    load_strictly(denoiser, own, origin=str(file), takes_tensors=True)
    freeze(denoiser)
    return TrainedModel(denoiser, spec, file)


def _load(file: FilePath) -> Mapping[str, Any]:
    """The file's dict, by torch's own restricted reader, which makes tensors, containers and argparse's Namespace."""
    try:
        size = check_regular(file)
        with file.open("rb") as handle:
            head = handle.read(32)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    if size > MAX_BYTES:
        raise Refused(f"{file}: {size:,} bytes; at most {MAX_BYTES // 2**30} GiB are read")
    if not head.startswith((ZIP, LEGACY)):
        edm = "; EDM's .pkl is for import-edm" if head.startswith(b"\x80") else ""
        raise Refused(f"{file}: {other_kind(head) or 'nothing that torch.save wrote'}; give SiT's or REPA's .pt{edm}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=head.startswith(ZIP))
    except Exception as error:  # pickle's, zipfile's and torch's own
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"names {named[1]}, which is not read" if named else f"cannot be read ({type(error).__name__})"
        raise Refused(f"{file}: {what}; refused, and nothing was run") from None
    if not isinstance(content, Mapping):
        raise Refused(f"{file}: holds no dict but a {type(content).__name__}")
    return content


def _tensors(content: Mapping[str, Any], origin: str) -> dict[str, Tensor]:
    """Of the average where there is one, by SiT's names, without that of a wrapper for several processes."""
    found = content.get("ema", content.get("model", content))
    if not isinstance(found, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
    ):
        raise Refused(f"{origin}: its network is no dict of tensors")
    tensors = _numbered_through({name.removeprefix("module."): tensor for name, tensor in found.items()})
    needed = (
        "pos_embed",
        *(f"{name}.weight" for name in RENAMED),
        "final_layer.linear.bias",
        "blocks.0.attn.qkv.weight",
    )
    if missing := [name for name in needed if name not in tensors]:
        raise Refused(f"{origin}: no network of SiT's: {missing[0]} is missing ({len(missing)} in all)")
    for name, tensor in tensors.items():
        kind = f"{name!r}: {tuple(tensor.shape)} of {tensor.dtype}"
        if tensor.layout != torch.strided or tensor.is_meta or not tensor.is_floating_point():
            raise Refused(f"{origin}: {kind}, {tensor.layout} on {tensor.device}: no dense tensor of floats")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise Refused(f"{origin}: {kind}, more than the file holds of it")
    return tensors


def _numbered_through(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """REPA's early checkpoints number the blocks behind the projectors' anew, as decoder_blocks (its utils.py,
    load_legacy_checkpoints): here they go on from the others."""
    first = 1 + max((int(found[1]) for name in tensors if (found := BLOCK.match(name))), default=-1)
    return {
        f"blocks.{first + int(found[1])}.{name[found.end() :]}" if (found := LATER_BLOCK.match(name)) else name: tensor
        for name, tensor in tensors.items()
    }


def _check_arguments(arguments: Mapping[str, Any], tensors: Mapping[str, Tensor], origin: str) -> None:
    """Raise Refused for another path, another prediction, or normalised queries and keys."""
    for name, read in TOLD.items():
        value = arguments.get(name, read[0])
        if str(value).lower() not in read:
            raise Refused(f"{origin}: {name} = {value!r}: only {' or '.join(read)} is read")
    if any(".q_norm." in name or ".k_norm." in name for name in tensors):
        raise Refused(f"{origin}: qk_norm: a network with normalised queries and keys is not read")


def _spec(tensors: Mapping[str, Tensor], options: SiTOptions, told_classes: object, origin: str) -> ModelSpec:
    """The network's description, from the shapes of its tensors.  told_classes: what the training's arguments say.
    Raises Refused, UserError."""
    width, channels, patch, _ = _shape(tensors, "x_embedder.proj.weight", 4, origin)
    one, count, of_each = _shape(tensors, "pos_embed", 3, origin)
    rows, _ = _shape(tensors, "y_embedder.embedding_table.weight", 2, origin)
    _, told = _shape(tensors, "t_embedder.mlp.0.weight", 2, origin)
    outputs, _ = _shape(tensors, "final_layer.linear.weight", 2, origin)
    side, outputs = math.isqrt(count), outputs // patch**2
    if (one, side**2, of_each, told) != (1, count, width, FREQUENCIES) or outputs not in (channels, 2 * channels):
        raise Refused(
            f"{origin}: {count} positions, {told} frequencies, {outputs} outputs of {channels} channels: no SiT"
        )
    heads = options.heads or HEADS.get(width)
    if heads is None:
        known = ", ".join(map(str, HEADS))
        raise UserError(f"{origin}: a width of {width} is none of SiT's ({known}); say how many --heads it has")
    num_classes = _num_classes(rows, told_classes, origin)
    depth = 1 + max(int(found[1]) for name in tensors if (found := BLOCK.match(name)))
    try:
        network = DiTConfig(
            patch=patch, width=width, depth=depth, heads=heads, learn_sigma=outputs > channels, time_scale=TIME_SCALE
        )
        spec = ModelSpec(
            model=ModelConfig(network=network, path=Flow(), predicts="flow", sigma_data=1.0),  # of latents, about
            image_shape=(channels, side * patch, side * patch),
            num_classes=num_classes,
            class_dropout=0.1 if rows > num_classes else 0.0,
            sampler=Heun(num_steps=50),
        )
    except ValueError as error:
        raise Refused(f"{origin}: the network's shapes: {' '.join(str(error).split())[:200]}") from None
    return spec if options.pipeline is None else _of_pipeline(spec, options.pipeline)


def _num_classes(rows: int, told: object, origin: str) -> int:
    """Of the rows of a table of labels, the classes: all but a last one for no class, which is there where training
    left classes out. 1,000 rows are ImageNet's without it, 1,001 with it.  Raises Refused if what is told is neither.
    """
    if told is None:
        return rows if rows == IMAGENET else rows - 1
    if told not in (rows, rows - 1):
        raise Refused(f"{origin}: num_classes = {told!r}: y_embedder.embedding_table has {rows:,} rows")
    return rows if told == rows else rows - 1


def _shape(tensors: Mapping[str, Tensor], name: str, count: int, origin: str) -> tuple[int, ...]:
    """A tensor's sides, of which there are so many and none is 0. Raises Refused."""
    found = tuple(tensors[name].shape)
    if len(found) != count or 0 in found:
        raise Refused(f"{origin}: {name} is {found}: no SiT")
    return found


def _of_pipeline(spec: ModelSpec, place: str) -> ModelSpec:
    """The spec with the VAE, and the classes' names, of a pipeline. Raises UserError if its latents are others."""
    source = open_pipeline(place).spec
    if source.image_shape != spec.image_shape:
        raise UserError(
            f"--pipeline {place}: its latents are {list(source.image_shape)}, the network's {list(spec.image_shape)}"
        )
    names = source.class_names if source.num_classes == spec.num_classes else ()
    return replace(spec, pipeline=place, class_names=names)


def _noise_at(options: SiTOptions, *, is_repa: bool, learns_sigma: bool, origin: str) -> int:
    """The time of pure noise. Raises UserError where neither the file nor the options say."""
    if options.noise_at is not None:
        return options.noise_at
    if is_repa == learns_sigma:
        raise UserError(
            f"{origin}: REPA's have projectors, SiT's twice the outputs; this has {'both' if is_repa else 'neither'}; "
            f"say which it is: --noise-at 1 (REPA) or 0 (SiT)"
        )
    return 1 if is_repa else 0


def _reversed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same network told 1 - t, with the other sign: exact, as cos and sin of (1 - t) f are turned ones of t f."""
    half = FREQUENCIES // 2
    f = (1 / 10000) ** (torch.arange(half, dtype=torch.float64) / half)
    cosines, sines = tensors["t_embedder.mlp.0.weight"].double().chunk(2, 1)
    turned = torch.cat([cosines * f.cos() + sines * f.sin(), cosines * f.sin() - sines * f.cos()], 1)
    outputs = {name: -tensor for name, tensor in tensors.items() if name.startswith("final_layer.linear.")}
    return {**tensors, "t_embedder.mlp.0.weight": turned, **outputs}


def _own_name(name: str) -> str:
    """Our name of a tensor of SiT's; another name stays, and is refused as unknown."""
    group, _, kind = name.rpartition(".")
    if found := BLOCK.match(group):
        inner = group.removeprefix(found[0])
        return f"{found[0]}{RENAMED_IN_BLOCK.get(inner, inner)}.{kind}"
    return f"{RENAMED.get(group, group)}.{kind}"
