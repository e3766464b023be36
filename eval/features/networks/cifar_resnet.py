"""ResNets for CIFAR-10 as features.  He et al. 2016, arXiv:1512.03385, section 4.2.

The weights are those of akamaster/pytorch_resnet_cifar10 (BSD-2): test accuracy 91.7% (depth 20) to 93.4% (56).
"""

from pathlib import Path as FilePath

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.eval.features.extractors import CifarResNet, Extractor
from diffdistill.eval.features.networks import ready
from diffdistill.eval.features.resize import network_input
from diffdistill.eval.features.weights import WeightsFile, find_weights, load_state, load_strictly

HASHES = {20: "12fca82f", 32: "d509ac18", 44: "014dd654", 56: "4bfd9763"}
HOME = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/"
NUM_FEATURES, NUM_CLASSES = 64, 10


class Block(nn.Module):
    """Two convolutions and a shortcut without weights: option A, every second pixel and channels of zeros."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.stride = out_channels // channels
        self.conv1 = nn.Conv2d(channels, out_channels, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            added = inner.shape[1] - x.shape[1]
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, added // 2, added // 2))
        return F.relu(inner + x)


class ResNet(nn.Module):
    """[B, 3, 32, 32] to pooled features [B, 64] and logits [B, 10].  depth: 6 n + 2."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (_stage(*of, depth) for of in ((16, 16), (16, 32), (32, 64)))
        self.linear = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.bn1(self.conv1(x)))
        features = self.layer3(self.layer2(self.layer1(x))).mean((2, 3))
        return features, self.linear(features)


def weights_file(features: CifarResNet) -> WeightsFile:
    """As its author publishes it."""
    digits = HASHES[features.depth]
    name = f"resnet{features.depth}-{digits}.th"
    return WeightsFile(name, digits, HOME + name)


def load(features: CifarResNet, weights: FilePath | None, device: torch.device) -> Extractor:
    """Raises UserError if the weights are missing or others."""
    found = find_weights(weights_file(features), weights)
    network = ResNet(features.depth)
    load_strictly(network, load_state(found.path), origin=found.path)
    return Extractor(
        label=features.label,
        network=ready(network, device),
        prepare=network_input(32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        num_features=NUM_FEATURES,
        num_logits=NUM_CLASSES,
        sha256=found.sha256,
        device=device,
    )


def _stage(channels: int, out_channels: int, depth: int) -> nn.Sequential:
    more = (Block(out_channels, out_channels) for _ in range((depth - 2) // 6 - 1))
    return nn.Sequential(Block(channels, out_channels), *more)
