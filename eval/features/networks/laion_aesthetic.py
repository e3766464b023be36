"""LAION's "improved aesthetic predictor": a few linear layers on the embedding of OpenAI's CLIP ViT-L-14."""

from dataclasses import replace
from pathlib import Path as FilePath

import torch
from torch import Tensor, nn

from diffdistill.eval.features.extractors import Extractor, LaionAesthetic, OpenClip
from diffdistill.eval.features.networks import open_clip
from diffdistill.eval.features.weights import WeightsFile, find_weights, load_state, load_strictly

CLIP = "ViT-L-14"
HEAD = "sac+logos+ava1-l14-linearMSE.pth"
HOME = "https://raw.githubusercontent.com/christophschuhmann/improved-aesthetic-predictor/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
WIDTHS = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}
"""Of the linear layers, by their place in the file: dropout stands at the others, and no activation anywhere."""


class Head(nn.Module):
    """[B, width] of unit length to a score [B, 1]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [width, *WIDTHS.values()]
        self.layers = nn.ModuleDict({str(place): nn.Linear(widths[i], widths[i + 1]) for i, place in enumerate(WIDTHS)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def load(features: LaionAesthetic, weights: FilePath | None, device: torch.device) -> Extractor:
    """weights: CLIP's; the predictor's own file is 3.7 MB and comes by its hash.

    Raises UserError if open_clip or either file is missing, or is not what it should be.
    """
    found = find_weights(WeightsFile(HEAD, features.head_sha256, HOME))
    clip = OpenClip(model=CLIP, pretrained="openai", sha256=features.sha256)
    made = open_clip.load(clip, weights, device)
    assert made.num_features
    head = Head(made.num_features)
    load_strictly(head, load_state(found.path), origin=found.path)
    head, embed = head.eval().requires_grad_(False).to(device), made.network

    def network(values: Tensor) -> tuple[Tensor, Tensor]:
        embedded = embed(values)
        assert isinstance(embedded, Tensor)
        return embedded, head(embedded)

    about = replace(made, label=features.label, num_logits=1, features=features, earlier=None)
    return replace(about, network=network, parts=(*made.parts, head))
