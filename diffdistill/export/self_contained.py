"""A folder that diffusers loads with code of its own: for networks that diffusers does not have."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from diffdistill import __version__
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.router import RoutedDenoiser
from diffdistill.export.bundle import PACKAGE, BundleError, bundle
from diffdistill.export.parts import copy_parts
from diffdistill.export.substitutes import FamilyNetwork
from diffdistill.models.sentence_encoder import SentenceEncoder
from diffdistill.models.spec import ModelSpec, TrainedModel
from diffdistill.models.teachers import Pipeline, find_family, pipeline_of
from diffdistill.networks.diffusers_model import DiffusersConfig
from diffdistill.networks.given import GivenNetwork
from diffdistill.settings.schema import UserError
from diffdistill.storage.atomic import write_tensors, write_text_atomically

COMPONENT = "model"
WEIGHTS = "diffusion_pytorch_model.safetensors"
HEADER = '''"""A distilled model, made by diffdistill {version} out of the code that trained it.

It imports torch and diffusers only. Licence of the code: Apache-2.0.{foreign}
"""

'''


def write_self_contained(model: TrainedModel, folder: FilePath, *, guidance_scale: float = 1.0) -> None:
    """Write what `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads.

    guidance_scale: of calls that name none.  Raises UserError if the model's code cannot stand alone.
    """
    import diffusers

    source = pipeline_of(model.spec)
    try:
        code = network_code(model, source)
    except BundleError as error:
        raise UserError(f"{model.source}: cannot be exported with code of its own: {error}") from None
    # diffusers keeps the code of all local folders in one place, by file name: the same name must be the same code.
    module = f"network_{hashlib.sha256(code.encode()).hexdigest()[:12]}"
    place = folder / COMPONENT
    place.mkdir(parents=True, exist_ok=True)
    write_text_atomically(place / f"{module}.py", code)
    config = {"_class_name": "Model", "_diffusers_version": diffusers.__version__, "guidance_scale": guidance_scale}
    told = {"class_names": list(model.spec.class_names), "classes": list(model.spec.classes)}
    write_json(place / "config.json", config | {name: value for name, value in told.items() if value})
    write_tensors(place / WEIGHTS, _weights(model), {"format": "pt"})
    template = FilePath(__file__).with_name("pipeline.py").read_text(encoding="utf-8")
    write_text_atomically(folder / "pipeline.py", template)
    index = {
        "_class_name": ["pipeline", "DistilledPipeline"],
        "_diffusers_version": diffusers.__version__,
        COMPONENT: [module, "Model"],
    }
    if source:
        names = [name for name in (*source.family.parts, "scheduler") if source.class_of(name)]
        copy_parts(source, folder, names)
        index |= {name: source.index[name] for name in names}
    if model.spec.text_encoder:
        index |= _save_sentence_encoder(model.spec.text_encoder, folder)
    write_json(folder / "model_index.json", index)


def network_code(model: TrainedModel, source: Pipeline | None) -> str:
    """The file that builds the model's network and samples from it. Raises BundleError."""
    from diffdistill.export.exported import ExportedModel, Sentences, Source  # which imports diffusers

    spec, router = model.spec, getattr(model.denoiser, "router", None)
    used = {Denoiser, ExportedModel, FamilyNetwork, Sentences, Source}
    kinds = {*_kinds(spec.model), *_kinds(spec.sampler), *_kinds(router)} - {type(spec.model), DiffusersConfig}
    inner = innermost(spec.model.network)
    if isinstance(inner, GivenNetwork):
        raise BundleError(
            f"its {inner.kind} is an object from a Python program, which a config cannot build; register a network "
            "instead"
        )
    if isinstance(inner, DiffusersConfig):
        kinds.add(type(find_family(inner.family)))
    if source is not None:  # whose VAE is the model's, though its network may be ours
        kinds.add(type(source.family))
    lines = sorted(f"from {kind.__module__} import {kind.__name__}" for kind in {*kinds, *used})
    packages = frozenset(kind.__module__.split(".")[0] for kind in {*kinds, *used})
    foreign = "".join(f"\nWhat comes from {name} is under that package's own." for name in sorted(packages - {PACKAGE}))
    header = HEADER.format(version=__version__, foreign=foreign)
    body = _body(spec, router, len(students_of(model)), source)
    return bundle(header, "\n".join(lines) + "\n\n", body, packages=packages)


def _body(spec: ModelSpec, router: Any, num_students: int, source: Pipeline | None) -> str:
    """The class that `model_index.json` names. The repr of a setting is the code that makes it."""
    shape, classes, model = spec.image_shape, spec.num_classes, spec.model
    return f'''class Model(ExportedModel):
    """What was exported."""

    image_shape = {shape}
    num_classes = {classes}
    num_students = {num_students}
    sampler = {spec.sampler!r}
    router = {router!r}
    source = {"Sentences()" if spec.text_encoder else _source_code(source)}

    @staticmethod
    def make_denoiser():
        net = {_network_code(model.network)}.build({shape}, {classes}, {spec.class_dropout})
        denoiser = Denoiser(net, {model.path!r}, {model.predicts!r}, sigma_data={model.sigma_data})
        denoiser.run_with(guidance_rule={model.guidance_rule!r})
        return denoiser
'''


def _network_code(network: Any) -> str:
    """A family of diffusers' networks is named by its class, so that this one's code alone comes along."""
    inner, code = innermost(network), repr(network)
    if not isinstance(inner, DiffusersConfig):
        return code
    family = type(find_family(inner.family)).__name__
    return code.replace(repr(inner), f"FamilyNetwork(family={family}(), options={inner.options!r})")


def _source_code(source: Pipeline | None) -> str:
    if source is None:
        return "None"
    settings = {name: value for name, value in source.index.items() if name[0] != "_" and not isinstance(value, list)}
    family = type(source.family).__name__
    kind, size = str(source.index["_class_name"]), source.image_size
    return f"Source({family}(), {kind!r}, {settings!r}, {size}, {source.options!r})"


def _save_sentence_encoder(place: str, folder: FilePath) -> dict[str, Any]:
    """Write tokenizer and encoder as a pipeline's parts. Returns their entries of its index."""
    tokenizer, encoder = SentenceEncoder(place).load()
    # With its pooler, which is not used, but whose weights its class would miss.
    whole = type(encoder).from_pretrained(
        FilePath(place).expanduser(), local_files_only=True, use_safetensors=True, dtype=torch.float32
    )
    loaded = {"tokenizer": tokenizer, "text_encoder": whole}
    for name, part in loaded.items():
        part.save_pretrained(folder / name)
    return {name: ["transformers", type(part).__name__] for name, part in loaded.items()}


def innermost(network: Any) -> Any:
    """The network's settings within those of all that stands around it."""
    return innermost(network.base) if hasattr(network, "base") else network


def _kinds(value: object) -> Iterator[type]:
    """The classes of a setting and of all settings in it."""
    if isinstance(value, tuple):
        for item in value:
            yield from _kinds(item)
    elif is_dataclass(value):
        yield type(value)
        for part in fields(value):
            yield from _kinds(getattr(value, part.name))


def students_of(model: TrainedModel) -> list[Any]:
    """The denoisers of a model: one, or as many as its router knows."""
    return list(model.denoiser.students) if isinstance(model.denoiser, RoutedDenoiser) else [model.denoiser]


def _weights(model: TrainedModel) -> dict[str, Tensor]:
    return {
        f"students.{number}.{name}": tensor.detach().cpu().contiguous().clone()
        for number, student in enumerate(students_of(model))
        for name, tensor in student.state_dict().items()
    }


def write_json(file: FilePath, value: Any) -> None:
    """As diffusers writes its configs."""
    write_text_atomically(file, json.dumps(value, indent=2) + "\n")
