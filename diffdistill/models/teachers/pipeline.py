"""A diffusers pipeline on disk as a teacher. Only the classes that its family names are loaded, and no pickles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser, freeze
from diffdistill.diffusion.prompt_table import PromptTable
from diffdistill.models.foreign_kernels import refuse_foreign_kernels
from diffdistill.models.spec import ModelConfig, ModelSpec, TrainedModel
from diffdistill.models.teachers.class_labels import ID2LABEL, names_in
from diffdistill.models.teachers.family import BUILDING, Family
from diffdistill.models.teachers.fields import NETWORKS, SCHEDULER, VAES, check_fields
from diffdistill.models.teachers.hub import fetch_pipeline, is_hub_name
from diffdistill.models.teachers.image_size import read_size
from diffdistill.models.teachers.installed import diffusers_class
from diffdistill.models.teachers.registry import detect_family
from diffdistill.models.teachers.text_encoders import (
    EncoderDtype,
    by_turns,
    check_tokenizer,
    in_float32,
    on_device,
    published_dtype,
)
from diffdistill.models.teachers.variants import WEIGHTS, variant_of
from diffdistill.networks.diffusers_model import DiffusersConfig
from diffdistill.networks.parameter_limit import limited_parameters
from diffdistill.settings.reading import read_json as read_json_value
from diffdistill.settings.schema import UserError
from diffdistill.storage.finite import find_dead, name_some

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers")


def is_pipeline(place: str | FilePath) -> bool:
    """Whether a place is a diffusers pipeline's folder, or may be its name on the Hugging Face hub."""
    return (FilePath(place) / INDEX).is_file() or (not FilePath(place).exists() and is_hub_name(str(place)))


def open_pipeline(place: str | FilePath) -> "Pipeline":
    """A pipeline's folder, or its name on the Hugging Face hub. Nothing but JSON is read yet.

    Raises UserError if there is none, its family is not known, or a part that its family loads is of another class.
    """
    folder = FilePath(place) if FilePath(place).is_dir() else fetch_pipeline(str(place))
    index = read_json(folder / INDEX)
    family = detect_family(index.get("_class_name"), origin=str(folder / INDEX))
    kind = str(index["_class_name"])
    index = {**index, "_class_name": family.variants.get(kind, kind)}
    made = Pipeline(str(place), folder, index, family, is_variant=kind in family.variants)
    for part, classes in {family.network: family.network_classes, **family.parts}.items():
        _check_part(made, part, classes)
    if made.class_of(family.network) is None:
        raise UserError(f"{folder / INDEX}: names no {family.network}, which is the network")
    family.check_index(index, folder / INDEX)
    return made


def pipeline_of(spec: ModelSpec) -> "Pipeline | None":
    """The pipeline that a model came from, or None. Raises UserError as `open_pipeline`."""
    return open_pipeline(spec.pipeline) if spec.pipeline else None


def load_pipeline(place: str | FilePath) -> TrainedModel:
    """The network of a pipeline as a frozen teacher. Raises UserError as `open_pipeline`, and on damaged weights."""
    pipeline = open_pipeline(place)
    return TrainedModel(pipeline.load_denoiser(), pipeline.spec, FilePath(place))


@dataclass(frozen=True)
class Pipeline:
    """place: as it was named.  folder: where it lies.  index: its model_index.json, with the plain class of its family.
    is_variant: whether the folder names another (image to image, other guidance)."""

    place: str
    folder: FilePath
    index: Mapping[str, Any]
    family: Family
    is_variant: bool = False

    @cached_property
    def options(self) -> dict[str, Any]:
        """The network's own arguments, from its config.json. Raises UserError."""
        file = self.part(self.family.network) / "config.json"
        config = read_json(file)
        if config.get("_class_name") not in self.family.network_classes:
            raise UserError(
                f"{file}: _class_name = {config.get('_class_name')!r}, not {self.family.network_classes[0]}"
            )
        refuse_quantised(config, file)
        diffusers_class(self.family.model_class(config))  # whose defaults are read next
        if known := NETWORKS.get(str(config["_class_name"])):
            check_fields(config, known, file)
        try:
            self.family.check_options(config)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        return {key: value for key, value in config.items() if not key.startswith("_")}

    @cached_property
    def spec(self) -> ModelSpec:
        """What the network is. Raises UserError."""
        file, options = self.scheduler_file, self.sized_options
        scheduler = read_json(file)
        check_fields(scheduler, SCHEDULER, file)
        try:
            path, predicts = self.family.noise(scheduler, options)
        except READING as error:
            raise UserError(f"{file}: {error}") from None
        if self.has_vae and (self.folder / "vae" / "config.json").is_file():
            assert self.vae_config is not None  # which is checked
        network = DiffusersConfig(family=self.family.name, options=self.options)
        rule = self.family.guidance_rule(self.index)
        num_classes = self.family.num_classes(self.options)
        return ModelSpec(
            model=ModelConfig(
                network=network,
                path=path,
                predicts=predicts,
                sigma_data=float(scheduler.get("sigma_data") or 0.5),
                guidance_rule=rule,
            ),
            image_shape=self.family.image_shape(options),
            num_classes=num_classes,
            class_names=names_in(self.index.get(ID2LABEL), num_classes),
            class_dropout=self.family.class_dropout,
            sampler=self.family.sampler,
            pipeline=self.place,
        )

    @cached_property
    def asked_size(self) -> tuple[int, int] | None:
        """Height and width in pixels that its folder says in the place of the network's config. Raises UserError."""
        size, factor = read_size(self.folder), self.vae_factor
        if size and any(side % factor for side in size):
            raise UserError(f"{self.place}: images of {list(size)} pixels: sides must be multiples of {factor}")
        return size

    @property
    def sized_options(self) -> dict[str, Any]:
        """The network's, as `image_shape` and `noise` take them."""
        size, options = self.asked_size, self.options
        return options if size is None else self.family.sized(options, [side // self.vae_factor for side in size])

    def part(self, name: str) -> FilePath:
        """The folder of a part; the pipeline's own where its network lies there, as in the oldest ones."""
        folder = self.folder / name
        is_in_root = not folder.is_dir() and name == self.family.network and (self.folder / "config.json").is_file()
        return self.folder if is_in_root else folder

    @property
    def scheduler_file(self) -> FilePath:
        """The scheduler's config; of the oldest pipelines beside model_index.json."""
        file = FilePath("scheduler_config.json")
        folders = (self.folder / "scheduler", self.folder)
        return next((folder / file for folder in folders if (folder / file).is_file()), folders[0] / file)

    @property
    def network_files(self) -> list[FilePath]:
        """The config and the weights of the network."""
        folder = self.part(self.family.network)
        files = sorted(file for file in folder.iterdir() if file.is_file())
        own = ("config.json", "diffusion_pytorch_model")
        return files if folder != self.folder else [file for file in files if file.name.startswith(own)]

    @property
    def has_vae(self) -> bool:
        """Whether its network makes latents."""
        return self.class_of("vae") is not None

    @property
    def vae_factor(self) -> int:
        """Pixels of an image for one of the latents, on each side; 1 without a VAE."""
        if not self.has_vae:
            return 1
        config, file = self.vae_config, self.folder / "vae" / "config.json"
        try:
            factor = self.family.vae_factor(config)
        except READING as error:
            raise UserError(f"{file}: does not say how many pixels one latent covers: {_short(error)}") from None
        if factor < 1:
            raise UserError(f"{file}: does not say how many pixels one latent covers: its list of blocks is empty")
        return factor

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The VAE's config.json. Raises UserError."""
        file, name = self.folder / "vae" / "config.json", str(self.class_of("vae"))
        config = read_json(file)
        if name in VAES:
            check_fields(config, VAES[name], file)
        return config

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        _, height, width = self.spec.image_shape
        return height * self.vae_factor, width * self.vae_factor

    def class_of(self, part: str) -> str | None:
        """The class that model_index.json names for a part, or None if the pipeline lacks it."""
        library, name = self.index.get(part) or (None, None)
        return name if library else None

    def load_denoiser(self) -> Denoiser:
        """The frozen network with its weights, in float32, on the CPU. Raises UserError."""
        spec, folder = self.spec, self.part(self.family.network)
        model = load_model_of(self.family.model_class(self.options), folder)
        net = self.family.wrap(model, spec.num_classes, spec.class_dropout)
        denoiser = Denoiser(net, spec.model.path, spec.model.predicts, sigma_data=spec.model.sigma_data)
        denoiser.run_with(guidance_rule=spec.model.guidance_rule)
        freeze(denoiser)
        return denoiser

    def load_vae(self) -> nn.Module:
        """The frozen VAE. Raises UserError if there is none."""
        name = self.class_of("vae")
        if name is None or "vae" not in self.family.parts:
            raise UserError(f"{self.place}: has no VAE; its network makes pixels")
        assert self.vae_config is not None  # which is checked
        return freeze(load_model_of(name, self.folder / "vae"))

    def encoder_dtypes(self, dtype: EncoderDtype) -> dict[str, torch.dtype]:
        """What each text encoder computes in."""
        parts = [part for part in self.family.text_parts if part.startswith("text_encoder") and self.class_of(part)]
        if dtype == "fp32":
            return dict.fromkeys(parts, torch.float32)
        return {part: published_dtype(self.folder / part, str(self.class_of(part))) for part in parts}

    def load_encoder(
        self, device: torch.device | str = "cpu", *, dtype: EncoderDtype = "published", stays: bool = True
    ) -> Any:
        """diffusers' own pipeline with the parts alone that encode prompts. Raises UserError.

        stays: whether all are on the device; False leaves them in memory, for `encode_all`.
        """
        if not self.family.takes_text:
            raise UserError(f"{self.place}: {self.index.get('_class_name')} takes no prompts")
        kind = diffusers_class(str(self.index["_class_name"]))
        given = list(filter(self.class_of, self.family.text_parts))
        for part in given:
            if part.startswith("tokenizer"):
                check_tokenizer(self.folder / part)
        parts = {name for name, value in self.index.items() if _is_part(value)} | self.family.parts.keys()
        absent = dict.fromkeys(parts - {"scheduler", *given})
        try:
            encoders = {
                part: load_model_of(str(self.class_of(part)), self.folder / part, library="transformers", dtype=own)
                for part, own in self.encoder_dtypes(dtype).items()
            }
            made = on_device(kind, device).from_pretrained(
                str(self.folder), **absent, **encoders, local_files_only=True
            )
        except ImportError as error:
            raise UserError(f"{self.place}: encoding prompts needs `pip install diffdistill[hf]`: {error}") from None
        except UserError:
            raise
        except READING as error:
            raise UserError(f"{self.folder}: tokenizers: cannot be read: {_short(error)}") from None
        for encoder in encoders.values():
            encoder.to(device if stays else "cpu")
        return made

    @torch.no_grad()
    def encode(self, encoder: Any, prompts: Sequence[str]) -> Cond:
        """Prompts as what the network is given, [N, ...] each part. encoder: of `load_encoder`."""
        return in_float32(self.family.encode(encoder, prompts, self.image_size, self.options), self.place)

    @torch.no_grad()
    def encode_empty(self, encoder: Any) -> Cond:
        """The empty prompt, as what the pipeline guides away from: [1, ...] each part."""
        return in_float32(self.family.encode_empty(encoder, self.image_size, self.options), self.place)

    def encode_all(self, encoder: Any, batches: Sequence[Sequence[str]], *, has_empty: bool = False) -> list[Cond]:
        """Batches of prompts, and behind them the empty one, on the CPU; one encoder at a time is on the device."""
        calls = [partial(self.encode, encoder, batch) for batch in batches]
        calls += [partial(self.encode_empty, encoder)] if has_empty else []
        encoders = [part for part in encoder.components.values() if isinstance(part, nn.Module)]
        return [cond.map(Tensor.cpu) for cond in by_turns(encoders, calls, encoder.device)]

    def conditions(self, prompts: Sequence[str], device: torch.device | str = "cpu") -> PromptTable:
        """These prompts by number, encoded at once and kept in memory; the encoders are let go."""
        *shards, empty = self.encode_all(self.load_encoder(device, stays=False), [prompts], has_empty=True)
        return PromptTable(shards, empty)


READING = (OSError, *BUILDING)  # what diffusers and transformers raise on files that they cannot read


def load_model_of(
    name: str, folder: FilePath, *, library: str = "diffusers", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A model of a class of diffusers or transformers from safetensors whose names and shapes are all its own.

    Raises UserError on a header that lies, on weights that are missing or not finite, on a folder of pickles only, and
    on a config.json that names programs.
    """
    from safetensors import SafetensorError

    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        refuse_foreign_kernels(config, folder / "config.json")
        refuse_quantised(config, folder / "config.json")

    _check_weights(folder)
    kind, variant = diffusers_class(name, library), variant_of(folder)
    try:
        with limited_parameters():
            model, about = kind.from_pretrained(
                str(folder),
                torch_dtype=dtype,  # without it transformers takes the config's, and rounds to it
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                variant=variant,
            )
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except (*READING, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be read: {_short(error)}") from None
    missing = [*about["missing_keys"], *(str(key) for key in about["mismatched_keys"])]
    if missing and any(".base_layer." in str(key) for key in about["unexpected_keys"]):
        raise UserError(
            f"{folder}: was saved with a LoRA left loaded, whose weight is in no file; save it after fuse_lora() and "
            "unload_lora_weights(), or name its base and the LoRA's file: teacher: {name: BASE, lora: [{place: FILE}]}"
        )
    if missing:
        raise UserError(f"{folder}: the weights are of another architecture: {missing[0]} ({len(missing)} in all)")
    dead = find_dead(dict(model.named_parameters()))
    if dead:
        raise UserError(f"{folder}: its weights are not finite: {name_some(dead)}")
    return model.float() if dtype == torch.float32 else model  # some buffers stay in float32


def _check_weights(folder: FilePath) -> None:
    """Raise UserError, with what to do, on a part whose weights are pickles, or those without training's average."""
    found = [file.name for kind in WEIGHTS for file in folder.glob(f"{kind}*.safetensors")]
    pickles = sorted(file.name for file in folder.glob("*.bin"))
    if pickles and not found:
        raise UserError(
            f"{folder}: its weights are a pickle, {pickles[0]}, which may run code and is not opened; if you trust "
            "it, load the pipeline with diffusers and save it with safe_serialization=True"
        )
    if found and all(".non_ema" in name for name in found):
        raise UserError(
            f"{folder}: holds only the weights without EMA, {found[0]}; to use them, rename it to "
            f"{found[0].replace('.non_ema', '')}"
        )


def refuse_quantised(config: Mapping[str, Any], file: FilePath) -> None:
    """Raise UserError on a part's config.json that names a quantisation."""
    if config.get("quantization_config"):
        raise UserError(f"{file}: quantised weights are not supported; use the pipeline's unquantised weights")


def read_json(file: FilePath) -> dict[str, Any]:
    """A JSON object. Raises UserError."""
    try:
        found = read_json_value(file)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: must be a JSON object")
    return found


def _check_part(pipeline: Pipeline, part: str, classes: tuple[str, ...]) -> None:
    """Raise UserError if a part is of a class that its family does not load."""
    value, file = pipeline.index.get(part), pipeline.folder / INDEX
    if value is None or value == [None, None]:
        return
    if not _is_part(value):
        raise UserError(f"{file}: {part} = {value!r}: must be a library and a class")
    library, name = value
    if library not in LIBRARIES or name not in classes:
        raise UserError(
            f"{file}: {part}: names {library}.{name}, which is not loaded; choose from {', '.join(classes)}"
        )


def _is_part(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(part is None or isinstance(part, str) for part in value)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
