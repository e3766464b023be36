"""open_clip's models as features of images, and of captions."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.eval.features.extractors import Extractor, OpenClip
from diffdistill.eval.features.resize import network_input
from diffdistill.eval.features.weights import WeightsFile, find_weights, load_state, load_strictly
from diffdistill.settings.schema import UserError


def load(features: OpenClip, weights: FilePath | None, device: torch.device) -> Extractor:
    """Raises UserError if open_clip, the model or the weights are missing, or the size is not the model's."""
    try:
        import open_clip
    except ImportError:
        raise UserError("open_clip is missing: pip install 'diffdistill[eval]'") from None
    known = open_clip.list_models()
    if features.model not in known:  # open_clip would follow hf-hub:... and local-dir:... to files of anyone
        raise UserError(f"features.model = {features.model!r}: open_clip has none of this name ({', '.join(known)})")
    config = open_clip.get_model_config(features.model)
    if features.size != (size := config["vision_cfg"].get("image_size", 224)):
        raise UserError(f"features.size = {features.size}: {features.model} takes {size}")
    found = find_weights(WeightsFile(f"{features.label}-{features.pretrained}.safetensors", features.sha256), weights)
    # The name of OpenAI's weights also decides on their activation function.
    is_openai = features.pretrained == "openai"
    model = open_clip.create_model(features.model, pretrained=None, force_quick_gelu=is_openai, precision="fp32")
    load_strictly(model, load_state(found.path), origin=found.path)
    model = model.eval().to(device)
    scale = partial(F.normalize, dim=-1) if features.normalise == "unit" else torch.nn.Identity()
    return Extractor(
        label=features.label,
        network=lambda values: scale(model.encode_image(values)),
        prepare=network_input(features.size, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD),
        num_features=config["embed_dim"],
        sha256=found.sha256,
        encode_text=partial(_encode, model, open_clip.get_tokenizer(features.model), scale),
        device=device,
    )


@torch.inference_mode()
def _encode(model: Any, tokenizer: Any, scale: Any, captions: Sequence[str]) -> Tensor:
    """Captions to [B, d]; what is longer than the model's context is cut, as open_clip does it."""
    device = next(model.parameters()).device
    encoded: Tensor = scale(model.encode_text(tokenizer(list(captions)).to(device)))
    return encoded
