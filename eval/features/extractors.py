"""Features of images: what a protocol may name under `features`, and `load_extractor`, which makes them.

A specification says all that changes the numbers (network, resize, weights' hash) and nothing of this machine. A
distance over features that are not FID's Inception is never called FID: its name carries `label`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field, model_serializer
from torch import Tensor, nn

from diffdistill.eval.features.resize import Interpolation, ResizeMode, Triple
from diffdistill.settings.numbers import Resolution
from diffdistill.settings.registry import OneOf, Registry, schema_class
from diffdistill.settings.schema import UserError, schema

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Label = Annotated[str, Field(pattern=r"^[a-z][a-z0-9.-]*$", max_length=64)]


@dataclass(frozen=True)
class Extracted:
    """features: [B, d] float32 or float64, on the extractor's device.  logits: [B, K], of networks that have them."""

    features: Tensor
    logits: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """Images to features: `extractor(images)`.

    label: what the features are called.  prepare: images to the network's input.  network: that input to features
    [B, num_features], or to a pair of features and logits [B, num_logits].  num_features: None where the images decide
    (pixels).  sha256: of the weights' file; None where there are no weights.  encode_text: captions to
    [B, num_features], for networks that know text.  features: their specification, with all that a library says of
    the weights.  earlier: as versions took it that did not read this, or None.  parts: a reward's modules.
    """

    label: str
    network: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]
    prepare: Callable[[Tensor], Tensor]
    num_features: int | None
    num_logits: int = 0
    sha256: str | None = None
    encode_text: Callable[[Sequence[str]], Tensor] | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    features: "FeaturesConfig | None" = None
    earlier: "FeaturesConfig | None" = None
    parts: tuple[nn.Module, ...] = ()

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Extracted:
        """images: [B, C, H, W] with C = 1 or 3, uint8 grey levels or float in [-1, 1], on any device.

        Raises UserError for other images, and where features are NaN or infinite.
        """
        checked_images(images)
        found = self.network(self.prepare(images.to(self.device)))
        features, logits = found if isinstance(found, tuple) else (found, None)
        wanted = (len(images), features.shape[-1] if self.num_features is None else self.num_features)
        if features.shape != wanted:
            raise UserError(f"{self.label}: gives features {list(features.shape)}, not {list(wanted)}")
        broken = (~features.isfinite().all(1)).nonzero().flatten().tolist()
        if broken:
            raise UserError(f"{self.label}: NaN or infinite features of {len(broken)} images of {len(images)}")
        return Extracted(features, logits)


def checked_images(images: Tensor) -> None:
    """Raises UserError unless images are [B, 1 or 3, H, W], uint8 or float."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape[2:]:
        raise UserError(f"images must be [B, 1 or 3, H, W], not {list(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise UserError(f"images must be uint8 (0 .. 255) or float in [-1, 1], not {images.dtype}")


@schema
class Pixels:
    """The pixels themselves, in [-1, 1], flattened."""

    name: Literal["pixels"] = "pixels"

    @property
    def label(self) -> str:
        return "pixels"


@schema
class Inception:
    """FID's Inception-v3 of 2015-12-05, pool3, through clean-fid's network.  Heusel et al. 2017, arXiv:1706.08500.

    mode: clean (Pillow's bicubic to 299 on floats), legacy_tensorflow (the network's own resize), legacy_pytorch
    (bilinear, pytorch-fid's weights).  Parmar et al. 2022, arXiv:2104.11222.
    """

    name: Literal["inception"] = "inception"
    mode: Literal["clean", "legacy_tensorflow", "legacy_pytorch"] = "clean"
    sha256: Sha256 | None = None

    @property
    def label(self) -> str:
        return f"inception-{self.mode.replace('_', '-')}"


@schema
class EfficientNetLite0:
    """EfficientNet-Lite0 on ImageNet, 1280 pooled features: real weights in a package, so it runs without a network."""

    name: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    size: Resolution = 224
    resize: Literal["clean"] = "clean"

    @property
    def label(self) -> str:
        return "efficientnet-lite0" if self.size == 224 else f"efficientnet-lite0-{self.size}"


@schema
class CifarResNet:
    """ResNet for CIFAR-10, 64 pooled features and 10 logits, at 32 x 32.  He et al. 2016, arXiv:1512.03385."""

    name: Literal["cifar_resnet"] = "cifar_resnet"
    depth: Literal[20, 32, 44, 56] = 20
    resize: Literal["clean"] = "clean"

    @property
    def label(self) -> str:
        return f"resnet{self.depth}-cifar"


def _unsaid_left_out(self: Any, dumped: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Settings that came later appear where they are said alone: what was a protocol before is the same today."""
    return {key: value for key, value in dumped(self).items() if value is not None or key not in self.ADDED}


@schema
class Torchvision:
    """A torchvision classification model; features at `node` of its graph, flattened.  model: "resnet50" and so on.

    pretrained: the weights' name, as in IMAGENET1K_V1; None is told by the file, or is torchvision's default; own,
    weights that it does not know.  All else that is None is what torchvision says of the weights: images are resized
    to resize_side (resize_mode), then the middle size x size is taken.
    """

    ADDED: ClassVar = ("pretrained", "resize_side", "resize_mode", "interpolation")

    name: Literal["torchvision"] = "torchvision"
    model: str
    pretrained: str | None = None
    node: str = "flatten"
    size: Resolution | None = None
    resize: Literal["clean"] = "clean"
    resize_side: Resolution | None = None
    resize_mode: ResizeMode | None = None
    interpolation: Interpolation | None = None
    mean: Triple | None = None
    std: Triple | None = None
    sha256: Sha256 | None = None

    @property
    def label(self) -> str:
        return f"torchvision-{self.model}".lower().replace("_", "-")

    _dumped = model_serializer(mode="wrap")(_unsaid_left_out)


@schema
class Timm:
    """A timm model's pooled features before its classifier.  model: "vit_small_patch16_224" and so on.

    pretrained: the weights' tag, as in augreg_in21k, which may also stand behind the model's name and a dot; None is
    timm's default; own, weights that it does not know.  All else that is None is what timm says of the weights, as for
    `Torchvision`.
    """

    ADDED: ClassVar = ("pretrained", "resize_side", "resize_mode", "interpolation")

    name: Literal["timm"] = "timm"
    model: str
    pretrained: str | None = None
    size: Resolution | None = None
    resize: Literal["clean"] = "clean"
    resize_side: Resolution | None = None
    resize_mode: ResizeMode | None = None
    interpolation: Interpolation | None = None
    mean: Triple | None = None
    std: Triple | None = None
    sha256: Sha256 | None = None

    @property
    def label(self) -> str:
        return f"timm-{self.model}".lower().replace("_", "-")

    _dumped = model_serializer(mode="wrap")(_unsaid_left_out)


@schema
class DinoV2:
    """DINOv2's class token at 224 x 224, without registers.  Oquab et al. 2023, arXiv:2304.07193.

    vitl14 is the one of FD-DINOv2 (Stein et al. 2023, arXiv:2306.04675); no two sizes compare.
    """

    name: Literal["dinov2"] = "dinov2"
    model: Literal["vits14", "vitb14", "vitl14", "vitg14"] = "vitl14"
    size: Resolution = 224
    resize: Literal["clean"] = "clean"
    sha256: Sha256 | None = None

    @property
    def label(self) -> str:
        return f"dinov2-{self.model}"


@schema
class OpenClip:
    """An open_clip model's image embedding, and its text's.  pretrained: the weights' tag in open_clip's table; own,
    weights that it does not know.

    normalise: unit length, as cosines need.  All that is None is what open_clip says of this pair of model and weights.
    quick_gelu: x sigmoid(1.702 x) as the activation, as in OpenAI's and others' weights.
    """

    ADDED: ClassVar = ("quick_gelu", "resize_mode", "interpolation", "mean", "std")

    name: Literal["open_clip"] = "open_clip"
    model: str
    pretrained: str
    size: Resolution | None = None
    resize: Literal["clean"] = "clean"
    resize_mode: ResizeMode | None = None
    interpolation: Interpolation | None = None
    mean: Triple | None = None
    std: Triple | None = None
    quick_gelu: bool | None = None
    normalise: Literal["unit", "none"] = "unit"
    sha256: Sha256 | None = None

    @property
    def label(self) -> str:
        return f"clip-{self.model}".lower().replace("_", "-")

    _dumped = model_serializer(mode="wrap")(_unsaid_left_out)


@schema
class PickScore:
    """PickScore's CLIP (ViT-H-14, in transformers' names): what people chose in Pick-a-Pic. Its texts come times the
    model's logit scale, so that a product with an image is the score.  Kirstain et al. 2023, arXiv:2305.01569."""

    name: Literal["pickscore"] = "pickscore"
    sha256: Sha256 | None = None

    @property
    def label(self) -> str:
        return "pickscore"


@schema
class Hps:
    """Human Preference Score v2's CLIP (ViT-H-14, in open_clip's names). v2.0 and v2.1 are different weights.
    Wu et al. 2023, arXiv:2306.09341."""

    name: Literal["hps"] = "hps"
    version: Literal["v2.0", "v2.1"] = "v2.1"
    sha256: Sha256 | None = None

    @property
    def label(self) -> str:
        return f"hps-{self.version}"


@schema
class LaionAesthetic:
    """OpenAI's CLIP ViT-L-14, whose embedding LAION's "improved aesthetic predictor" reads: its score is the logit.
    Schuhmann et al. 2022, arXiv:2210.08402.  sha256: of CLIP's weights; head_sha256: of the predictor's."""

    name: Literal["laion_aesthetic"] = "laion_aesthetic"
    sha256: Sha256 | None = None
    head_sha256: Sha256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"

    @property
    def label(self) -> str:
        return "laion-aesthetic"


@schema
class TorchScript:
    """Anyone's network as a TorchScript file: float [B, 3, size, size], (x / 255 - mean) / std, to [B, d].

    A program, which runs where the caller allows it: --trust-code, or trusts_code=True."""

    name: Literal["torchscript"] = "torchscript"
    label: Label
    size: Resolution
    resize: Literal["clean"] = "clean"
    mean: Triple = (0.0, 0.0, 0.0)
    std: Triple = (1.0, 1.0, 1.0)
    sha256: Sha256


@schema
class Registered:
    """An extractor that a Python program gave to `register` under this label."""

    name: Literal["registered"] = "registered"
    label: Label


class FeaturesConfig(Protocol):
    """Features' settings, a class with `@schema` and a `name` of its own. One from outside has `load` beside it:
    (weights' file or None, device) -> Extractor."""

    @property
    def name(self) -> str: ...
    @property
    def label(self) -> str:
        """What the features are called in the name of a distance."""
        ...


_NETWORKS = (Inception, EfficientNetLite0, CifarResNet, Torchvision, Timm, DinoV2, OpenClip, TorchScript)
_PREFERENCES = (PickScore, Hps, LaionAesthetic)
_OWN = (Pixels, *_NETWORKS, *_PREFERENCES, Registered)
FEATURES: Registry[type[FeaturesConfig]] = Registry(
    "features",
    {str(kind.name): f"{__name__}:{kind.__name__}" for kind in _OWN},
    group="diffdistill.features",
    check=schema_class("label", "load"),
)
"""Every kind of features, by its name in a protocol."""

if TYPE_CHECKING:
    AnyFeatures = FeaturesConfig
else:
    AnyFeatures = Annotated[Any, OneOf(FEATURES)]

FID_TORCHSCRIPT_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
"""The one TorchScript that runs unasked: FID's Inception as StyleGAN publishes it."""

_REGISTERED: dict[str, Extractor] = {}


def load_extractor(
    features: AnyFeatures,
    *,
    weights: str | FilePath | None = None,
    device: torch.device | str = "cpu",
    trusts_code: bool = False,
) -> Extractor:
    """The extractor that a specification describes.

    weights: their file; without it the cache is looked into, and where there is an address, it is downloaded there.
    trusts_code: whether weights that are a program may run.
    Raises UserError if a package or the weights are missing, saying where they belong, or are not those of the hash.
    """
    if is_foreign_code(features) and not trusts_code:
        raise UserError(
            f"features {features.label}: TorchScript, a program that runs with your permissions; if you trust the "
            "file, add --trust-code (in Python: trusts_code=True)"
        )
    device = torch.device(device)
    file = None if weights is None else FilePath(weights)
    made: Extractor
    if isinstance(features, Registered):
        made = _registered(features.label)
    elif type(features) in _OWN:
        made = import_module(f"{__package__}.networks.{features.name}").load(features, file, device)
    else:
        made = features.load(file, device)  # type: ignore[attr-defined]
    if not isinstance(made, Extractor) or made.label != features.label:
        raise UserError(f"features {features.label!r}: `load` of {type(features).__name__} must give its Extractor")
    return made if made.features else replace(made, features=features)


def is_foreign_code(features: AnyFeatures) -> bool:
    """Whether the weights are a program other than the published one: a hash in a protocol is its author's word."""
    if isinstance(features, Inception):
        return features.mode != "legacy_pytorch" and features.sha256 not in (None, FID_TORCHSCRIPT_SHA256)
    return isinstance(features, TorchScript)


def register(extractor: Extractor) -> Registered:
    """Make a program's own extractor known, and give the specification that names it."""
    _REGISTERED[extractor.label] = extractor
    return Registered(label=extractor.label)


def _registered(label: str) -> Extractor:
    if label not in _REGISTERED:
        raise UserError(
            f"features {label!r}: none of that label was given to `register` (choices: {list(_REGISTERED)})"
        )
    return _REGISTERED[label]
