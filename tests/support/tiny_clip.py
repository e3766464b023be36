"""A CLIP of open_clip's, small and with random weights, for the tests of what knows text."""

import json
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import nn

NAME, SIDE = "tiny-score", 32
MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIDE, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
LABEL = f"clip-{NAME}"
METRIC = {
    "name": "clip_score",
    "features": {"name": "open_clip", "model": NAME, "pretrained": "laion2b", "size": SIDE},
    "prefix": "A photo depicts ",
}


def write_clip(folder: Path) -> nn.Module:
    """Make it known to open_clip, write its weights to folder/clip.safetensors, and give the network."""
    (folder / f"{NAME}.json").write_text(json.dumps(MODEL))
    open_clip.add_model_config(folder / f"{NAME}.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: nn.Module = open_clip.create_model(NAME).eval()
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, folder / "clip.safetensors")
    return network
