"""FID's Inception-v3 as features: the TorchScript file that clean-fid, StyleGAN and EDM use, or pytorch-fid's weights.

What each mode does to an image is clean-fid's (Parmar et al. 2022, arXiv:2104.11222), and tests hold the two equal on
a stand-in of the same interface. clean-fid itself is needed for legacy_pytorch alone.
"""

from functools import partial
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from diffdistill.eval.features.extractors import FID_TORCHSCRIPT_SHA256, Extractor, Inception
from diffdistill.eval.features.networks import ready
from diffdistill.eval.features.networks.torchscript import open_script
from diffdistill.eval.features.resize import bilinear_resize, clean_resize, colours, levels
from diffdistill.eval.features.weights import WeightsFile, find_weights, load_state
from diffdistill.settings.schema import UserError

TORCHSCRIPT = WeightsFile(
    "inception-2015-12-05.pt",
    FID_TORCHSCRIPT_SHA256,
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
)
PYTORCH_FID = WeightsFile(
    "pt_inception-2015-12-05-6726825d.pth",
    "6726825d",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
)
SIDE, NUM_FEATURES, NUM_CLASSES = 299, 2048, 1008


class FidInception(nn.Module):
    """The TorchScript network: features [B, 2048] and logits [B, 1008], without bias as in TF-GAN and StyleGAN."""

    def __init__(self, script: Any, *, resizes: bool) -> None:
        """resizes: the network's own resize of [B, 3, H, W], TensorFlow 1's; else the input is 299 x 299 already."""
        super().__init__()
        self.script, self.resizes = script, resizes

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """values: [B, 3, H, W] float grey levels."""
        if self.resizes:
            features = self.script(values, return_features=True)
        else:
            features = self.script.layers((values - 128) / 128)
        features = features.reshape(len(values), NUM_FEATURES).float()
        return features, features @ self.script.output.weight.T


def load(features: Inception, weights: FilePath | None, device: torch.device) -> Extractor:
    """Raises UserError if the weights or, for legacy_pytorch, clean-fid are missing, or the weights are others."""
    return (_from_pytorch_fid if features.mode == "legacy_pytorch" else _from_torchscript)(features, weights, device)


def _from_torchscript(features: Inception, weights: FilePath | None, device: torch.device) -> Extractor:
    found = find_weights(_expected(TORCHSCRIPT, features), weights)
    script = open_script(found.path, device)
    is_clean = features.mode == "clean"
    return Extractor(
        label=features.label,
        network=FidInception(script, resizes=not is_clean),
        prepare=partial(_grey_levels, resize=clean_resize if is_clean else None),
        num_features=NUM_FEATURES,
        num_logits=NUM_CLASSES,
        sha256=found.sha256,
        device=device,
    )


def _from_pytorch_fid(features: Inception, weights: FilePath | None, device: torch.device) -> Extractor:
    found = find_weights(_expected(PYTORCH_FID, features), weights)
    network = ready(_clean_fid_network(load_state(found.path), origin=found.path), device)

    def run(values: Tensor) -> Tensor:
        pooled: Tensor = network(values / 255)[0].flatten(1)
        return pooled

    return Extractor(
        label=features.label,
        network=run,
        prepare=partial(_grey_levels, resize=bilinear_resize),
        num_features=NUM_FEATURES,
        sha256=found.sha256,
        device=device,
    )


def _clean_fid_network(state: dict[str, Tensor], *, origin: FilePath) -> Any:
    """clean-fid's network from our verified tensors: left alone it downloads them, and verifies nothing."""
    try:
        from cleanfid import inception_pytorch
    except ImportError:
        raise UserError("clean-fid is missing: pip install 'diffdistill[eval]'") from None
    downloads = inception_pytorch.load_state_dict_from_url
    inception_pytorch.load_state_dict_from_url = lambda *_, **__: state
    try:
        return inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False)
    except RuntimeError as error:
        raise UserError(f"{origin}: not weights of this network: {' '.join(str(error).split())[:200]}") from None
    finally:
        inception_pytorch.load_state_dict_from_url = downloads


def _grey_levels(images: Tensor, resize: Any) -> Tensor:
    """[B, 3, H, W] float 0 .. 255, resized if there is a resize, channels last."""
    values = colours(levels(images))
    return (resize(values, SIDE) if resize else values).contiguous(memory_format=torch.channels_last)


def _expected(published: WeightsFile, features: Inception) -> WeightsFile:
    """The published file, or the one of the specification's hash."""
    return WeightsFile(published.name, features.sha256 or published.sha256, published.url)
