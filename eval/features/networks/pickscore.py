"""PickScore: a CLIP of transformers' with the weights that Pick-a-Pic's choices taught it."""

import math
from functools import cache, partial
from pathlib import Path as FilePath
from typing import Any

import torch
import torch.nn.functional as F

from diffdistill.eval.features.extractors import Extractor, PickScore
from diffdistill.eval.features.networks.open_clip import encode_texts, tokenizer_of
from diffdistill.eval.features.resize import CLIP_MEAN, CLIP_STD, framed, network_input
from diffdistill.eval.features.weights import WeightsFile, find_weights, load_state, load_strictly
from diffdistill.settings.schema import UserError

TOKENS = "ViT-H-14"
"""Whose tokens it reads: CLIP's own, which open_clip brings along."""
TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
IMAGE = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
}
PROJECTION = 1024
POSITIONS = "embeddings.position_ids"
"""Plain counting, which files of older versions of transformers hold as well."""


def load(features: PickScore, weights: FilePath | None, device: torch.device) -> Extractor:
    """Raises UserError if transformers, open_clip or the weights are missing, or are not PickScore's."""
    found = find_weights(WeightsFile("pickscore-v1.safetensors", features.sha256), weights)
    model = network()
    state = {name: value for name, value in load_state(found.path).items() if not name.endswith(POSITIONS)}
    load_strictly(model, state, origin=found.path)
    model, size = model.eval().requires_grad_(False).to(device), IMAGE["image_size"]
    scale = math.exp(model.logit_scale.item())
    resize = partial(framed, side=size, mode="shortest", interpolation="bicubic")
    return Extractor(
        label=features.label,
        network=lambda values: F.normalize(model.visual_projection(model.vision_model(values).pooler_output), dim=-1),
        prepare=network_input(size, mean=CLIP_MEAN, std=CLIP_STD, resize=resize),
        num_features=PROJECTION,
        sha256=found.sha256,
        encode_text=partial(
            encode_texts,
            lambda tokens: scale * F.normalize(model.text_projection(model.text_model(tokens).pooler_output), dim=-1),
            cache(partial(tokenizer_of, TOKENS)),
            device,
        ),
        device=device,
        parts=(model,),
    )


def network() -> Any:
    """CLIP's ViT-H-14 in transformers' names, its weights at random. Raises UserError without transformers."""
    try:
        from transformers import CLIPConfig, CLIPModel
    except ImportError:
        raise UserError("transformers is missing: pip install 'diffdistill[hf]'") from None
    sides: dict[str, Any] = {
        "text_config": {**TEXT, "hidden_act": "gelu", "projection_dim": PROJECTION},
        "vision_config": {**IMAGE, "hidden_act": "gelu", "projection_dim": PROJECTION},
    }
    return CLIPModel(CLIPConfig(**sides, projection_dim=PROJECTION))
