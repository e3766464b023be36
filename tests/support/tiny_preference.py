"""The preference models with small networks and random weights, in the layout of their own files."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffdistill.eval.features.networks import hps, laion_aesthetic, pickscore
from support.tiny_clip import NAME, SIDE, write_clip

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@dataclass(frozen=True)
class Judges:
    """pickscore: transformers' network; hps, clip: open_clip's; head: the aesthetic layers. files: by label.
    head_sha256: of the head's file, which lies in the folder of weights."""

    pickscore: Any
    hps: Any
    clip: Any
    head: nn.Module
    files: dict[str, Path]
    head_sha256: str


def write_judges(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Judges:
    """Write every file into `folder`, and let the package take networks of their size."""
    write_clip(folder)
    monkeypatch.setenv("DIFFDISTILL_WEIGHTS", str(folder))
    monkeypatch.setattr(pickscore, "TEXT", SMALL)
    monkeypatch.setattr(pickscore, "IMAGE", {**SMALL, "patch_size": 8, "image_size": SIDE})
    monkeypatch.setattr(pickscore, "PROJECTION", 16)
    monkeypatch.setattr(hps, "MODEL", NAME)
    monkeypatch.setattr(laion_aesthetic, "CLIP", NAME)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        chosen = pickscore.network().eval()
        chosen.logit_scale.data.fill_(3.0)
        preferred = open_clip.create_model(NAME).eval()
        clip = open_clip.create_model(NAME, force_quick_gelu=True).eval()
        head = nn.Sequential(
            *(nn.Linear(16, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64)),
            *(nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)),
        ).eval()
    # As the published file has it, transformers of its time kept the positions among the weights.
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file({**chosen.state_dict(), **positions}, folder / "pickscore-v1.safetensors")
    torch.save({"epoch": 0, "state_dict": preferred.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    save_file(clip.state_dict(), folder / f"clip-{NAME}-openai.safetensors")
    torch.save({f"layers.{name}": value for name, value in head.state_dict().items()}, folder / laion_aesthetic.HEAD)
    files = {
        "pickscore": folder / "pickscore-v1.safetensors",
        "hps-v2.1": folder / "HPS_v2.1_compressed.pt",
        "laion-aesthetic": folder / f"clip-{NAME}-openai.safetensors",
    }
    digest = hashlib.sha256((folder / laion_aesthetic.HEAD).read_bytes()).hexdigest()
    return Judges(chosen, preferred, clip, head, files, digest)
