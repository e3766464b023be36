"""open_clip's models as features of images, and of captions."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path as FilePath
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.eval.features.extractors import Extractor, OpenClip
from diffdistill.eval.features.stated import OWN, completed, library_input, said_of_own, unknown_weights
from diffdistill.eval.features.weights import WeightsFile, find_weights, load_state, load_strictly
from diffdistill.settings.schema import UserError

FACTS = ("quick_gelu", "mean", "std")


def load(features: OpenClip, weights: FilePath | None, device: torch.device) -> Extractor:
    """Raises UserError if open_clip, the model or the weights are missing, or open_clip says otherwise of them."""
    features = complete(features)
    found = find_weights(WeightsFile(f"{features.label}-{features.pretrained}.safetensors", features.sha256), weights)
    model = _network(features)
    load_strictly(model, load_state(found.path), origin=found.path)
    model = model.eval().requires_grad_(False).to(device)
    scale = partial(F.normalize, dim=-1) if features.normalise == "unit" else torch.nn.Identity()
    return Extractor(
        label=features.label,
        network=lambda values: scale(model.encode_image(values)),
        prepare=library_input(features),
        num_features=_open_clip().get_model_config(features.model)["embed_dim"],
        sha256=found.sha256,
        encode_text=partial(
            encode_texts,
            lambda tokens: scale(model.encode_text(tokens)),
            cache(partial(tokenizer_of, features.model)),
            device,
        ),
        device=device,
        parts=(model,),
        features=features,
        earlier=_earlier(features),
    )


def complete(features: OpenClip) -> OpenClip:
    """The specification with what open_clip's table says of this pair of model and weights.

    Raises UserError if it has no such model or weights, or says otherwise.
    """
    known = (library := _open_clip()).list_models()
    if features.model not in known:  # open_clip would follow hf-hub:... and local-dir:... to files of anyone
        raise UserError(f"features.model = {features.model!r}: open_clip has none of this name ({', '.join(known)})")
    config = library.get_model_config(features.model)
    size = config["vision_cfg"].get("image_size", 224)
    if features.size not in (None, size):
        raise UserError(f"features.size = {features.size}: {features.model} takes {size}")
    tags = library.list_pretrained_tags_by_model(features.model)
    row = library.get_pretrained_cfg(features.model, features.pretrained)
    if features.pretrained == OWN:
        row = said_of_own(features, FACTS)
    elif tags and not row:
        raise unknown_weights(features, tags, "open_clip")
    usual = library.transform.PreprocessCfg()  # what open_clip itself takes where a row says nothing
    names = ("mean", "std", "interpolation", "resize_mode")
    said: dict[str, Any] = {name: row.get(name) or getattr(usual, name) for name in names}
    said |= {name: tuple(said[name]) for name in ("mean", "std")}
    said |= {"size": size, "quick_gelu": _activation(features, row, bool(config.get("quick_gelu")))}
    return completed(features, said, facts=FACTS, origin=f"open_clip of {features.model}, {features.pretrained},")


def _activation(features: OpenClip, row: dict[str, Any], has_quick_gelu: bool) -> bool:
    """Whether these weights are for QuickGELU.  row: of the table.  has_quick_gelu: whether the model has it anyway."""
    # A model without a row: its own config decides, and the name of OpenAI's weights.
    said = row.get("quick_gelu", False) if row else has_quick_gelu or features.pretrained == "openai"
    if has_quick_gelu and not said and not features.quick_gelu:
        raise UserError(
            f"features.quick_gelu: the model {features.model} has it, while open_clip's table does not say so of "
            f"{features.pretrained}; say quick_gelu: true if the weights are for it, or take a model without it"
        )
    return bool(said) or has_quick_gelu


def _earlier(features: OpenClip) -> OpenClip:
    """OpenAI's mean and deviation for all, and QuickGELU by the model's config or OpenAI's name alone."""
    library = _open_clip()
    config = library.get_model_config(features.model)
    return replace(
        features,
        mean=library.OPENAI_DATASET_MEAN,
        std=library.OPENAI_DATASET_STD,
        interpolation="bicubic",
        resize_mode="squash",
        quick_gelu=bool(config.get("quick_gelu")) or features.pretrained == "openai",
    )


def _network(features: OpenClip) -> Any:
    """The completed specification's network, its weights at random: nothing is downloaded for a part of it."""
    library, is_quick = _open_clip(), bool(features.quick_gelu)
    try:
        return library.create_model(
            features.model, pretrained=None, force_quick_gelu=is_quick, pretrained_hf=False, precision="fp32"
        )
    except Exception as error:  # what a text tower that transformers cannot find leads to
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"features.model = {features.model!r}: open_clip cannot build it: {reason}") from None


@torch.inference_mode()
def encode_texts(
    encode: Callable[[Tensor], Tensor], tokenizer: Callable[[], Any], device: torch.device, captions: Sequence[str]
) -> Tensor:
    """Captions to [B, d]; what is longer than the model's context is cut, as open_clip does it."""
    return encode(tokenizer()(list(captions)).to(device))


def tokenizer_of(model: str) -> Any:
    """Captions to tokens [B, L] as a model of open_clip reads them. Raises UserError if they cannot be had."""
    try:
        return _open_clip().get_tokenizer(model)
    except Exception as error:  # a tokenizer of transformers that is not on this machine
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"features.model = {model!r}: its tokenizer cannot be read: {reason}") from None


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError:
        raise UserError("open_clip is missing: pip install 'diffdistill[eval]'") from None
    return open_clip
