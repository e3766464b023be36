"""LoRA's factors as files that others load: in diffusers' keys, and in kohya's, which ComfyUI reads.

alpha / rank is multiplied into the factors, so that no reader has to know it.
"""

from collections.abc import Mapping
from pathlib import Path as FilePath

from torch import Tensor, tensor

from diffdistill.export.comfyui import write_workflow
from diffdistill.export.stock import StockFolder, describe, fit_pipeline
from diffdistill.models.load import find_teacher, merge_model
from diffdistill.models.spec import TrainedModel
from diffdistill.models.teachers import Pipeline, is_pipeline
from diffdistill.models.teachers.compose import tell_made_of
from diffdistill.models.teachers.installed import diffusers_class
from diffdistill.networks.diffusers_model import DiffusersNetwork
from diffdistill.networks.lora import LoRA
from diffdistill.settings.schema import UserError
from diffdistill.storage.atomic import write_tensors
from diffdistill.storage.checkpoint import read_state

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya_lora_weights.safetensors"
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
RENAMED = {"add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2"}
"""SDXL's layers that readers of kohya's files know by their older names alone."""


def write_lora(model: TrainedModel, folder: FilePath, *, is_kohya: bool) -> StockFolder:
    """Write the file of the factors, and the scheduler of the student's steps. Returns how the pipeline is called.

    model: with LoRA.  Raises UserError unless it is LoRA over a pipeline that loads such files.
    """
    net = model.denoiser.net
    if not isinstance(net, LoRA):
        raise UserError(f"{model.source}: was trained in full and has no LoRA factors; use --kind stock")
    plain = _plain(model)
    source, steps = fit_pipeline(plain)
    _check_loads(source, is_kohya=is_kohya)
    _check_base(model, source)
    tensors = kohya_keys(factors_of(net)) if is_kohya else diffusers_keys(factors_of(net), source.family.network)
    folder.mkdir(parents=True, exist_ok=True)
    file = KOHYA_FILE if is_kohya else DIFFUSERS_FILE
    write_tensors(folder / file, tensors, {"format": "pt"})
    if is_kohya:  # of diffusers' keys ComfyUI passes over those of attention
        write_workflow(plain, source, folder, file)
    steps.scheduler.save_pretrained(folder / "scheduler")
    return describe(source, steps, str(source.index["_class_name"]), plain.denoiser.net)  # type: ignore[arg-type]


def factors_of(net: LoRA) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each layer of diffusers' model, by its name there; alpha / rank is in B."""
    found, settings = net.adapters.state_dict(), net.settings
    scale = (settings.alpha or settings.rank) / settings.rank
    names = [name.removesuffix(DOWN) for name in found if name.endswith(DOWN)]
    return {
        name.removeprefix("model."): (found[name + DOWN].detach().cpu(), scale * found[name + UP].detach().cpu())
        for name in names
    }


def diffusers_keys(factors: Mapping[str, tuple[Tensor, Tensor]], part: str) -> dict[str, Tensor]:
    """As `save_lora_weights` of diffusers' pipelines writes them.  part: "unet" or "transformer"."""
    return {
        f"{part}.{name}{end}": factor.contiguous().clone()
        for name, pair in factors.items()
        for end, factor in zip((DOWN, UP), pair, strict=True)
    }


def kohya_keys(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """lora_unet_<layer>.lora_down.weight, .lora_up.weight and .alpha, the layers by their names in diffusers."""
    made: dict[str, Tensor] = {}
    for name, (down, up) in factors.items():
        flat = name.replace(".", "_")
        key = f"lora_unet_{RENAMED.get(flat, flat)}"
        made |= {f"{key}.lora_down.weight": down.contiguous().clone(), f"{key}.lora_up.weight": up.contiguous().clone()}
        made[f"{key}.alpha"] = tensor(float(len(down)))
    return made


def _plain(model: TrainedModel) -> TrainedModel:
    """The same with the network that the factors stand over. Raises UserError if it is not one of diffusers'."""
    plain = merge_model(model)
    if not isinstance(plain.denoiser.net, DiffusersNetwork):
        raise UserError(
            f"{type(plain.denoiser.net).__name__} is not one of diffusers' networks; none can load its factors"
        )
    return plain


def _check_loads(source: Pipeline, *, is_kohya: bool) -> None:
    name = str(source.index["_class_name"])
    if not hasattr(diffusers_class(name), "load_lora_weights"):
        raise UserError(f"diffusers' {name} loads no LoRA files; use --kind stock, which merges the factors")
    if is_kohya and source.family.network != "unet":
        raise UserError(f"{name}: its LoRA files have diffusers' keys alone; use --kind lora")


def _check_base(model: TrainedModel, source: Pipeline) -> None:
    """Raise UserError unless the factors stand over the pipeline's own network."""
    state = read_state(model.source)
    teacher = find_teacher(model.source, state) if state.get("teacher") else None
    if teacher is None or not is_pipeline(teacher):
        raise UserError(
            f"{model.source}: its factors belong to {teacher}, which differs from {source.place}; use --kind stock"
        )
    if told := tell_made_of(source):
        raise UserError(f"{model.source}: its factors belong to {told}, which others do not have; use --kind stock")
