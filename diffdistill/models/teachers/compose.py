"""A pipeline's folder, in the cache, of a teacher that is made of several files: everything else reads it as any other.

Parts that stay as they are are links to the pipeline's own files; the others are computed by diffusers' own loaders, in
float32, and written as it writes them. `teacher.json` says what it was made of, with the hashes of the files.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffdistill.data import cache as kept
from diffdistill.data.shards import files_key, table_key
from diffdistill.models.composed import ComposedTeacher
from diffdistill.models.teachers.added_files import find_added
from diffdistill.models.teachers.image_size import check_size, write_size
from diffdistill.models.teachers.installed import diffusers_class
from diffdistill.models.teachers.pipeline import INDEX, READING, Pipeline, load_model_of, open_pipeline, read_json
from diffdistill.models.teachers.single_file import save_part, write_single_file
from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import say
from diffdistill.settings.values import dump
from diffdistill.storage.atomic import write_text_atomically

MADE_OF = "teacher.json"
VERSION = 1  # of what is written; another one makes other keys
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
TOKEN_FILES = ("learned_embeds.safetensors",)
FACTOR_ENDS = (".lora_B.weight", "lora.up.weight", ".lora_linear_layer.up.weight", ".lora_up.weight")


@dataclass(frozen=True)
class _Files:
    """Where what is added lies."""

    file: FilePath | None
    lora: tuple[FilePath, ...]
    tokens: tuple[FilePath, ...]

    @property
    def keys(self) -> list[str | None]:
        root = kept.cache_folder(None)
        return [files_key([one], root=root) if one else None for one in (self.file, *self.lora, *self.tokens)]


def place_of(teacher: str | ComposedTeacher) -> str:
    """Where a teacher is to be read: of one that is made of several files the folder in the cache, made if need be.

    Raises UserError where something is missing, is a pickle, or does not fit.
    """
    if isinstance(teacher, str):
        return teacher
    return teacher.name if teacher.is_plain else compose(teacher)


def compose(teacher: ComposedTeacher) -> str:
    """The folder of a composed teacher, which is named by the contents of all its files. Raises UserError."""
    base, root = open_pipeline(teacher.name), kept.cache_folder(None)
    assert base.spec  # which is checked before gigabytes are read
    if teacher.size:
        check_size(base.family, base.options, teacher.size, pixels=base.vae_factor, origin=teacher.name)
    files = _Files(
        find_added("file", teacher.file, ()) if teacher.file else None,
        tuple(find_added("lora", one.place, LORA_FILES) for one in teacher.lora),
        tuple(find_added("textual_inversion", one.place, TOKEN_FILES) for one in teacher.textual_inversion),
    )
    told: list[Any] = [[one.weight for one in teacher.lora], [one.token for one in teacher.textual_inversion]]
    told += [teacher.size] if teacher.size else []
    key = f"teacher-{table_key('teacher', VERSION, files_key(_base_files(base), root=root), files.keys, told)[:32]}"
    folder = root / key
    if not (folder / INDEX).is_file():
        with kept.locked(root, key) as is_alone:
            if not (folder / INDEX).is_file():
                say(f"composing the teacher of {teacher.name} and its additions: {folder}")
                with kept.new_folder(root, key, is_alone=is_alone) as made:
                    _write(teacher, base, files, made)
    return os.path.abspath(folder)


def made_of(pipeline: Pipeline) -> dict[str, Any] | None:
    """What a composed teacher was made of, as its settings say it, with the hashes of its files; None for others."""
    file = pipeline.folder / MADE_OF
    return read_json(file) if file.is_file() else None


def tell_made_of(pipeline: Pipeline) -> str | None:
    """What was added to a composed teacher's weights, in a line for cards; None where nothing was."""
    found = made_of(pipeline)
    if found is None:
        return None
    if not any(found.get(name) for name in ("file", "lora", "textual_inversion")):
        return None  # the same weights
    name = FilePath
    parts = [f"`{found['name']}`"]
    parts += [f"the weights of `{name(found['file']).name}`"] if found.get("file") else []
    parts += [f"the LoRA `{name(one['place']).name}` with weight {one['weight']:g}" for one in found.get("lora", ())]
    parts += [f"the tokens of `{name(one['place']).name}`" for one in found.get("textual_inversion", ())]
    return " with ".join([parts[0], ", ".join(parts[1:])])


def _base_files(base: Pipeline) -> list[FilePath]:
    """The pipeline's files that matter: the index, and those of its parts."""
    parts = [name for name in base.family.parts if base.class_of(name) and (base.folder / name).is_dir()]
    others = [file for name in parts for file in sorted((base.folder / name).rglob("*")) if file.is_file()]
    return [base.folder / INDEX, base.scheduler_file, *base.network_files, *others]


def _write(teacher: ComposedTeacher, base: Pipeline, files: _Files, folder: FilePath) -> None:
    network = base.family.network
    for file in _base_files(base):
        is_root = file.parent == base.folder and file.name != INDEX
        part = FilePath("scheduler" if file == base.scheduler_file else network) if is_root else FilePath()
        _link(file, folder / part / (file.name if is_root else file.relative_to(base.folder)))
    for pattern in ("README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"):
        for file in filter(FilePath.is_file, base.folder.glob(pattern)):
            _link(file, folder / file.name)
    index = {**base.index, "_name_or_path": base.index.get("_name_or_path") or base.place}
    _replace(folder / INDEX, json.dumps(index, indent=2) + "\n")
    if size := teacher.size or base.asked_size:
        write_size(folder, size)
    if files.file:
        write_single_file(files.file, base, folder)
    if files.lora or files.tokens:
        _add(teacher, files, folder)
    assert open_pipeline(folder).spec  # a LoRA of control networks makes another network
    hashes = iter(filter(None, files.keys))
    told = dump(teacher)
    told |= {"sha256": next(hashes)} if files.file else {}
    for one in (*told["lora"], *told["textual_inversion"]):
        one["sha256"] = next(hashes)
    write_text_atomically(folder / MADE_OF, json.dumps({"format": 1, **told}, indent=2) + "\n")


def _add(teacher: ComposedTeacher, files: _Files, folder: FilePath) -> None:
    """Fuse LoRA files into the parts that they are for, and add tokens to tokenizers and text encoders."""
    made = open_pipeline(folder)
    loras = [_read(file) for file in files.lora]
    for file, tensors in zip(files.lora, loras, strict=True):
        if any("dora_scale" in name for name in tensors):
            raise UserError(
                f"lora: {file}: holds magnitudes of DoRA, which diffusers ignores; fuse it with its own tool"
            )
    has_text = bool(files.tokens) or any("text_encoder" in k or k.startswith("lora_te") for t in loras for k in t)
    pipe = _assemble(made, has_network=bool(loras), has_text=has_text)
    changed: set[str] = set()
    try:
        for one, file in zip(teacher.textual_inversion, files.tokens, strict=True):
            changed |= _add_tokens(pipe, _read(file), one.token, file)
        if loras:
            changed |= _fuse(pipe, loras, [one.weight for one in teacher.lora], files.lora)
    except ImportError as error:
        raise UserError(f"lora: reading LoRA files needs `pip install diffdistill[hf]`: {error}") from None
    for name in changed:
        save_part(getattr(pipe, name), folder / name)


def _assemble(made: Pipeline, *, has_network: bool, has_text: bool) -> Any:
    """diffusers' own pipeline with the parts alone that files are added to."""
    if has_text:
        pipe = made.load_encoder(dtype="fp32")
    else:
        kind = diffusers_class(str(made.index["_class_name"]))
        absent = {name for name, value in made.index.items() if isinstance(value, list)} | made.family.parts.keys()
        pipe = kind.from_pretrained(str(made.folder), **dict.fromkeys(absent), local_files_only=True)
    if has_network:
        network = made.family.network
        model = load_model_of(made.family.model_class(made.options), made.part(network))
        pipe.register_modules(**{network: model})
    return pipe


def _fuse(pipe: Any, loras: list[dict[str, Tensor]], weights: list[float], files: tuple[FilePath, ...]) -> set[str]:
    """Add LoRA's factors to the weights under them. Returns the parts that changed."""
    kind = type(pipe).__name__
    if not hasattr(pipe, "load_lora_weights"):
        raise UserError(f"lora: diffusers' {kind} loads no LoRA files")
    names = [f"lora_{number}" for number in range(len(loras))]
    parts = [part for part in pipe._lora_loadable_modules if isinstance(getattr(pipe, part, None), nn.Module)]
    for name, tensors, file in zip(names, loras, files, strict=True):
        try:
            count = _count_factors(pipe, tensors)
            pipe.load_lora_weights(dict(tensors), adapter_name=name)
        except READING as error:
            raise UserError(f"lora: {file}: does not fit {kind}: {' '.join(str(error).split())[:300]}") from None
        landed = sum(_holds(module, name) for part in parts for module in getattr(pipe, part).modules())
        if not landed or landed < count:
            raise UserError(f"lora: {file}: {count - landed} of its {count} pairs of factors fit no layer of {kind}")
    changed = {p for p in parts if any(_holds(module, n) for module in getattr(pipe, p).modules() for n in names)}
    pipe.set_adapters(names, weights)
    pipe.fuse_lora(components=sorted(changed), adapter_names=names)
    pipe.unload_lora_weights()
    return changed


def _holds(module: nn.Module, adapter: str) -> bool:
    """Whether a layer of peft's has these factors."""
    return adapter in getattr(module, "lora_A", {}) or adapter in getattr(module, "lora_embedding_A", {})


def _count_factors(pipe: Any, tensors: dict[str, Tensor]) -> int:
    """The pairs of factors in a file, by diffusers' own names for them."""
    network = getattr(pipe, pipe.unet_name if hasattr(pipe, "unet_name") else pipe.transformer_name, None)
    told = {"unet_config": network.config} if hasattr(pipe, "unet_name") and network is not None else {}
    state = type(pipe).lora_state_dict(dict(tensors), **told)
    keys = state[0] if isinstance(state, tuple) else state
    return sum(key.endswith(FACTOR_ENDS) for key in keys)


ENCODERS = {"clip_l": "", "clip_g": "_2"}
"""Of Stable Diffusion XL, by the names that files of tokens for both of them have."""


def _add_tokens(pipe: Any, tensors: dict[str, Tensor], token: str | None, file: FilePath) -> set[str]:
    """Add a token's vectors to the tokenizer and the encoder that they are of. Returns the parts that changed."""
    if not hasattr(pipe, "load_textual_inversion"):
        raise UserError(f"textual_inversion: diffusers' {type(pipe).__name__} loads no tokens")
    if token is None and (len(tensors) != 1 or "emb_params" in tensors):
        raise UserError(f"textual_inversion: {file}: does not name its token; set `token`")
    changed: set[str] = set()
    for name, vectors in tensors.items():
        end = ENCODERS.get(name, "")
        encoder, tokenizer = (getattr(pipe, f"{part}{end}", None) for part in ("text_encoder", "tokenizer"))
        if encoder is None:
            raise UserError(f"textual_inversion: {file}: {name}: the pipeline has no encoder for it")
        try:
            pipe.load_textual_inversion(
                {token or name: vectors}, token=token, text_encoder=encoder, tokenizer=tokenizer
            )
        except READING as error:
            raise UserError(f"textual_inversion: {file}: {' '.join(str(error).split())[:300]}") from None
        changed |= {f"text_encoder{end}", f"tokenizer{end}"}
    return changed


def _read(file: FilePath) -> dict[str, Tensor]:
    """A file's tensors in float32. Raises UserError where it cannot be read or holds no finite numbers."""
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    dead = next((name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())), None)
    if dead or not tensors:
        raise UserError(f"{file}: {f'{dead} is not finite' if dead else 'holds no tensors'}")
    return tensors


def _link(source: FilePath, target: FilePath) -> None:
    """The same file at another place, without its bytes where the file system can."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:
        try:
            target.symlink_to(source)
        except OSError:
            shutil.copyfile(source, target)


def _replace(file: FilePath, text: str) -> None:
    """Write a file anew: what it was a link to stays."""
    file.unlink()
    write_text_atomically(file, text)
