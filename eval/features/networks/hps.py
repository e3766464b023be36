"""Human Preference Score v2: open_clip's ViT-H-14 with the weights of the authors, and their way to its input."""

from dataclasses import replace
from pathlib import Path as FilePath

import torch

from diffdistill.eval.features.extractors import Extractor, Hps, OpenClip
from diffdistill.eval.features.networks import open_clip
from diffdistill.eval.features.resize import CLIP_MEAN, CLIP_STD, letterboxed, network_input
from diffdistill.eval.features.weights import WeightsFile, find_weights

MODEL = "ViT-H-14"
FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


def load(features: Hps, weights: FilePath | None, device: torch.device) -> Extractor:
    """All of an image is shown, with black where it is no square.

    Raises UserError if open_clip or the weights are missing, or are not of this model.
    """
    found = find_weights(WeightsFile(FILES[features.version], features.sha256), weights)
    clip = OpenClip(model=MODEL, pretrained="own", mean=CLIP_MEAN, std=CLIP_STD, quick_gelu=False)
    made = open_clip.load(clip, found.path, device)
    size = open_clip.complete(clip).size
    assert size
    prepare = network_input(size, mean=CLIP_MEAN, std=CLIP_STD, resize=letterboxed)
    return replace(made, label=features.label, prepare=prepare, features=features, earlier=None)
