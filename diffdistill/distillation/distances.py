"""The distance between a student's image and the one that it is to make: in pixels, or between a network's features."""

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path as FilePath
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from diffdistill.diffusion.denoiser import Denoiser, device_of
from diffdistill.settings.numbers import Resolution
from diffdistill.settings.schema import UserError, schema

Backbone = Literal["vgg", "alex", "squeeze"]


@schema
class SquaredError:
    """The mean squared error in pixels."""

    name: Literal["mse"] = "mse"

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        """The mean over x, target: [B, ...]."""
        return F.mse_loss(x, target)

    def check(self, setting: str, image_shape: Sequence[int], teacher: Denoiser) -> None:
        """It needs nothing."""


@schema
class LPIPS:
    """Learned perceptual similarity, by torchmetrics (`pip install 'diffdistill[lpips]'`), over a backbone on disk.

    network: the backbone.  weights: its file, as torchvision's (.pth) or in safetensors; it is not downloaded.
    sha256: of that file, or at least its first 8 digits; size: images are resized to this side first.
    Zhang et al. 2018, arXiv:1801.03924.
    """

    weights: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{8,64}$")]
    name: Literal["lpips"] = "lpips"
    network: Backbone = "vgg"
    size: Resolution = 224

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        """The mean over x, target: [B, 1 or 3, H, W] in -1 .. 1."""
        return self.of_each(x, target).mean()

    def of_each(self, x: Tensor, target: Tensor) -> Tensor:
        """[B], float32 or wider.  Raises UserError for images that are not grey or in colour."""
        _need_pixels(x.shape[1:])
        network = _network(self.network, self.weights, self.sha256, str(x.device))
        both = [self._prepared(image) for image in (x, target)]
        with torch.autocast(x.device.type, enabled=False):
            distance: Tensor = network(*both)
        return distance.flatten()

    def check(self, setting: str, image_shape: Sequence[int], teacher: Denoiser) -> None:
        """Read the file, for where the teacher's images [C, H, W] are made.

        Raises UserError naming the setting where it cannot be used, and for images that are not grey or in colour.
        """
        try:
            _need_pixels(image_shape)
            _network(self.network, self.weights, self.sha256, str(device_of(teacher)))
        except UserError as error:
            raise UserError(f"{setting}: {error}") from None

    def _prepared(self, image: Tensor) -> Tensor:
        image = image.float().expand(-1, 3, -1, -1)
        return F.interpolate(image, size=(self.size, self.size), mode="bilinear", antialias=False)


PairDistance = Annotated[SquaredError | LPIPS, Field(discriminator="name")]
"""The distances that a config may name."""


def _need_pixels(shape: Sequence[int]) -> None:
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise UserError(f"lpips takes images of 1 or 3 channels, not {list(shape)}")


@lru_cache(maxsize=4)
def _network(backbone: Backbone, weights: str, digest: str, device: str) -> nn.Module:
    """LPIPS with its learned layers, which come with torchmetrics, over a backbone that is read from `weights`.

    Raises UserError where the file is missing, another one, or of another network.
    """
    try:
        from torchmetrics.functional.image.lpips import _LPIPS
    except ImportError:
        raise UserError("lpips needs torchmetrics and torchvision: pip install 'diffdistill[lpips]'") from None
    file = FilePath(weights).expanduser()
    if not file.is_file():
        raise UserError(f"weights = {weights!r}: no such file; it should be torchvision's {backbone}")
    with file.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if not found.startswith(digest):
        raise UserError(f"weights = {weights!r}: another file: its SHA-256 is {found}, not {digest}")
    network = _LPIPS(pretrained=True, net=backbone, pnet_rand=True)
    state = _read(file)
    # A slice keeps the number of its layers in torchvision's `features`.
    names = {name: re.sub(r"^slices?\.?\d+\.", "features.", name) for name in network.net.state_dict()}
    missing = [name for name in names.values() if name not in state]
    if missing:
        raise UserError(f"weights = {weights!r}: not weights of {backbone}: it has no {missing[0]}")
    try:
        network.net.load_state_dict({name: state[other] for name, other in names.items()})
    except RuntimeError as error:
        raise UserError(f"weights = {weights!r}: not weights of {backbone}: {error}") from None
    return network.eval().requires_grad_(False).to(device)


def _read(file: FilePath) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        read: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
        return read
    except Exception as error:  # torch and safetensors raise many kinds on damaged files
        raise UserError(f"weights = {str(file)!r}: cannot be read: {error}") from None
