"""DINOv2's vision transformer as features: the class token after the last normalisation.

Oquab et al. 2023, arXiv:2304.07193, without registers; the weights are Meta's (Apache-2.0) in their own names. A
network of our own, since timm and transformers resize the position embedding in another way than Meta's code did
when FD-DINOv2 was published, and each way is another number.
"""

from pathlib import Path as FilePath
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffdistill.eval.features.extractors import DinoV2, Extractor
from diffdistill.eval.features.resize import network_input
from diffdistill.eval.features.weights import WeightsFile, find_weights, load_state, load_strictly
from diffdistill.settings.schema import UserError

PATCH, TRAINED_SIDE = 14, 37  # patches a side at 518 pixels
HOME = "https://dl.fbaipublicfiles.com/dinov2/dinov2_{0}/dinov2_{0}_pretrain.pth"


class Size(NamedTuple):
    """hidden: of the MLP; gated: SwiGLU instead of GELU."""

    width: int
    depth: int
    heads: int
    hidden: int
    gated: bool = False


SIZES = {
    "vits14": Size(384, 12, 6, 1536),
    "vitb14": Size(768, 12, 12, 3072),
    "vitl14": Size(1024, 24, 16, 4096),
    "vitg14": Size(1536, 40, 24, 4096, True),
}


class Attention(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.proj = nn.Linear(size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(size.width, size.hidden), nn.Linear(size.hidden, size.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class GatedMlp(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(size.width, 2 * size.hidden), nn.Linear(size.hidden, size.width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


class Scale(nn.Module):
    """A factor for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(size.width, eps=1e-6) for _ in range(2))
        self.attn = Attention(size)
        self.mlp = GatedMlp(size) if size.gated else Mlp(size)
        self.ls1, self.ls2 = Scale(size.width), Scale(size.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """[B, 3, H, W], sides divisible by 14, to the class token [B, width]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + TRAINED_SIDE**2, size.width))
        self.mask_token = nn.Parameter(torch.zeros(1, size.width))  # of the training; in the file, not used here
        self.patch_embed = PatchEmbed(size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), self.patch_embed(images)], 1)
        x = x + self._positions(images.shape[2] // PATCH, images.shape[3] // PATCH)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def _positions(self, rows: int, columns: int) -> Tensor:
        """[1, 1 + rows * columns, width].  Meta's code adds 0.1 to both sides before it takes the scale."""
        if (rows, columns) == (TRAINED_SIDE, TRAINED_SIDE):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].unflatten(1, (TRAINED_SIDE, TRAINED_SIDE)).permute(0, 3, 1, 2)
        scale = [(side + 0.1) / TRAINED_SIDE for side in (rows, columns)]
        resized = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)], 1)


def load(features: DinoV2, weights: FilePath | None, device: torch.device) -> Extractor:
    """Raises UserError if the weights are missing or others, or the size has no whole number of patches."""
    if features.size % PATCH:
        raise UserError(f"features.size = {features.size}: must be a multiple of {PATCH}")
    file = WeightsFile(f"dinov2_{features.model}_pretrain.pth", features.sha256, HOME.format(features.model))
    found = find_weights(file, weights)
    network = VisionTransformer(SIZES[features.model])
    load_strictly(network, load_state(found.path), origin=found.path)
    return Extractor(
        label=features.label,
        network=network.eval().to(device),
        prepare=network_input(features.size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        num_features=SIZES[features.model].width,
        sha256=found.sha256,
        device=device,
    )
