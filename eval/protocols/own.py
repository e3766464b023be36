"""Protocols that `--against` makes by itself, from what the judged model makes and what there is to compare with."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod

from diffdistill.eval.features.extractors import AnyFeatures, CifarResNet, EfficientNetLite0, Pixels
from diffdistill.eval.features.networks import cifar_resnet, efficientnet_lite0
from diffdistill.eval.features.weights import weights_folder
from diffdistill.eval.metrics.settings import Frechet, KernelDistance
from diffdistill.eval.protocols.protocol import Captions, Labels, Preparation, Protocol, Reference
from diffdistill.settings.schema import UserError

TINY = 1024
"""Values of an image up to which pixels are their own features: 1 x 28 x 28, 3 x 16 x 16."""
SMALL_SIDE = 16
"""Larger images come down to this side where no network is there to look at them."""
NUM_IMAGES, NUM_IMAGES_NETWORK = 6_000, 5_000


@dataclass(frozen=True)
class Made:
    """What a model makes.  shape: [C, H, W] of its images.  num_classes: 0 without.  takes_text: whether it asks for
    captions."""

    shape: tuple[int, ...]
    num_classes: int
    takes_text: bool


@dataclass(frozen=True)
class Choice:
    """features, and how images are prepared for them.  why: in words."""

    features: AnyFeatures
    preparation: Preparation
    why: str


def choose_features(shape: tuple[int, ...], *, quantiser: str = "round", weights: Sequence[str] = ()) -> Choice:
    """Pixels for tiny images; else a network that is at hand; else the pixels of small copies.

    shape: [C, H, W].  weights: labels of networks whose files the user names.
    """
    as_they_are = Preparation(quantiser=quantiser)  # type: ignore[arg-type]
    if prod(shape) <= TINY:
        return Choice(Pixels(), as_they_are, "pixels, as the images are tiny")
    size = " x ".join(map(str, shape[1:]))
    networks: list[AnyFeatures] = [CifarResNet()] if shape[1:] == (32, 32) else []
    for features in (*networks, EfficientNetLite0()):
        if features.label in weights or _is_there(features):
            return Choice(features, Preparation(), f"{features.label}, which is here, for images of {size}")
    if shape[1] != shape[2]:
        raise UserError(f"--against: no feature network is available, and images of {size} are not square; --protocol")
    small = Preparation(side=SMALL_SIDE, filter="box")
    return Choice(Pixels(), small, f"pixels at {SMALL_SIDE} x {SMALL_SIDE}, as no network of features is here")


def make_protocol(
    name: str,
    made: Made,
    choice: Choice,
    *,
    reference: Reference | None,
    num_images: int | None = None,
    preparation: Preparation | None = None,
    captions: Captions | None = None,
) -> Protocol:
    """Frechet and kernel distance in the chosen features.

    num_images: default 6,000 in pixels and 5,000 in a network's features, or the captions where they are fewer.
    preparation: instead of the choice's.  Raises UserError for a model that takes text, without captions.
    """
    if made.takes_text and captions is None:
        raise UserError(
            "--against: the model takes text; pass --captions FILE, one per line, or a --protocol with captions"
        )
    usual = NUM_IMAGES if isinstance(choice.features, Pixels) else NUM_IMAGES_NETWORK
    count = num_images or min(usual, captions.count if captions else usual)
    labels = Labels(policy="cyclic", num_classes=made.num_classes) if made.num_classes else Labels(policy="none")
    features, real = choice.features, reference.num_images if reference else None
    subset_size = min(1000, count, real or count)
    return Protocol(
        name=name,
        num_images=count,
        image_shape=made.shape,  # type: ignore[arg-type]
        labels=Labels(policy="captions") if captions else labels,
        captions=captions,
        preparation=preparation or choice.preparation,
        reference=reference,
        metrics=(Frechet(features=features), KernelDistance(features=features, subset_size=subset_size)),
    )


def _is_there(features: AnyFeatures) -> bool:
    """Whether a network's weights are on this machine; nothing is downloaded."""
    if isinstance(features, CifarResNet):
        return (weights_folder() / cifar_resnet.weights_file(features).name).is_file()
    is_in_package = find_spec(efficientnet_lite0.PACKAGE) is not None
    return is_in_package or (weights_folder() / efficientnet_lite0.FILE.name).is_file()
