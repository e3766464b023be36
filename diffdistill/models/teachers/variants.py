"""What files of weights are called: `fp16` of model.fp16.safetensors is a variant."""

import re
from pathlib import Path as FilePath

WEIGHTS = ("diffusion_pytorch_model", "model")


def variant_of(folder: FilePath) -> str | None:
    """The variant of the weights, where there are none without one ("fp16")."""
    names = [file.name for kind in WEIGHTS for file in folder.glob(f"{kind}*.safetensors")]
    found = {variant for variant in map(variant_in, names) if "non_ema" not in variant}
    return None if not found or "" in found else min(found)


def variant_in(name: str) -> str:
    """What a name of weights has for its variant; "" for none."""
    return re.sub(r"-\d+-of-\d+", "", name).removesuffix(".safetensors").partition(".")[2]
