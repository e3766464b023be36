"""Stand-ins of what people add to a pipeline: single-file checkpoints, LoRA files, tokens; all of random weights."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
BLOCKS = {
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
"""Of the stand-in's UNet, diffusers' names and those of the checkpoints that CompVis published."""


def save_ldm(unet: Any, file: Path, *, change: float = 0.0, text: dict[str, Tensor] | None = None) -> Path:
    """A UNet of `stand_ins.unet` as a single file.  change: added to each weight.  text: further tensors."""
    tensors = {f"model.diffusion_model.{_older(name)}": weight + change for name, weight in unet.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in {**tensors, **(text or {})}.items()}, file)
    return file


def _older(name: str) -> str:
    block = max((key for key in BLOCKS if name.startswith(f"{key}.")), key=len)
    first, _, rest = name[len(block) + 1 :].partition(".")
    return f"{BLOCKS[block]}.{RESNET.get(first, first)}" + (f".{rest}" if rest else "")


def save_lora(
    file: Path,
    place: Path,
    *,
    network: str = "unet",
    is_kohya: bool = False,
    alpha: float = 2.0,
    rank: int = 4,
    has_text: bool = False,
) -> Path:
    """Factors over the attention of the network (and the text encoder) of a pipeline's folder, which visibly change
    it."""
    rng = torch.Generator().manual_seed(len(file.name))
    made: dict[str, Tensor] = {}
    for part in (network, *(["text_encoder"] if has_text else [])):
        weights = load_file(next((place / part).glob("*.safetensors")))
        for name, weight in weights.items():
            if not name.endswith(("to_q.weight", "to_v.weight", "q_proj.weight", "out_proj.weight")):
                continue
            down = torch.randn(rank, weight.shape[1], generator=rng)
            up = torch.randn(weight.shape[0], rank, generator=rng)
            layer = name.removesuffix(".weight")
            if is_kohya:
                layer = layer if layer.startswith("text_model.") or part == "unet" else f"text_model.{layer}"
                key = f"lora_{'te' if part == 'text_encoder' else 'unet'}_{layer.replace('.', '_')}"
                made |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
                made[f"{key}.alpha"] = torch.tensor(alpha)
            else:
                made |= {f"{part}.{layer}.lora_A.weight": down, f"{part}.{layer}.lora_B.weight": up}
    save_file(made, file)
    return file


def save_token(file: Path, *names: str, width: int, vectors: int = 1) -> Path:
    """A token of textual inversion.  names: of the token; or of the encoders, `clip_l` and `clip_g`, that it is of."""
    rng = torch.Generator().manual_seed(3)
    save_file({name: torch.randn(vectors, width, generator=rng) for name in names}, file)
    return file


def save_loaded(place: Path, folder: Path, lora: Path) -> Path:
    """The pipeline of a folder as people save it with a LoRA left loaded."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(place)
    pipe.load_lora_weights(str(lora))
    pipe.save_pretrained(folder)
    return folder


def read_index(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "model_index.json").read_text())
    return found
