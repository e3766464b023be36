"""The protocols that come along, by name, and users' own from YAML."""

from dataclasses import replace

from diffdistill.eval.features.extractors import (
    CifarResNet,
    DinoV2,
    EfficientNetLite0,
    Hps,
    Inception,
    OpenClip,
    PickScore,
    Pixels,
)
from diffdistill.eval.metrics.settings import (
    Aesthetic,
    ClipScore,
    Cmmd,
    DensityCoverage,
    Frechet,
    InceptionScore,
    KernelDistance,
    PrecisionRecall,
    Preference,
)
from diffdistill.eval.protocols.protocol import Captions, Labels, Preparation, Protocol, Reference
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import read_yaml, validate

EDM_REFERENCES = "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/"
ADM_REFERENCES = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/64/"
COCO_CAPTIONS = Captions(
    name="captions_coco14_test.txt", count=30_000, source="DMD2", md5="20ed79e6a73d7b8fdbfb6ebc8c5c7e99"
)
COCO_REFERENCE = Reference(name="coco2014-val", dataset="coco2014", split="val", num_images=40_504)
COCO_IMAGES = Preparation(quantiser="floor", crop="centre_square", side=256, filter="lanczos")
"""As GigaGAN, DMD2 and SiD-LSG's final evaluation crop and resize, real images too; the quantiser is DMD2's."""

CLIP_G14 = OpenClip(model="ViT-g-14", pretrained="laion2b_s12b_b42k")
CLIP_L14_336 = OpenClip(model="ViT-L-14-336", pretrained="openai", size=336)

DIGITS_PIXELS = Protocol(
    name="digits-pixels",
    num_images=1800,
    image_shape=(1, 8, 8),
    labels=Labels(policy="class_major", num_classes=10),
    preparation=Preparation(quantiser="none"),
    reference=Reference(name="digits-train", dataset="digits", split="train", num_images=1437),
    metrics=(Frechet(features=Pixels()), PrecisionRecall(features=Pixels())),
)
"""How good generated digits are, in pixels, in seconds on a CPU."""

DIGITS_TEST_PIXELS = replace(
    DIGITS_PIXELS,
    name="digits-test-pixels",
    reference=Reference(name="digits-test", dataset="digits", split="test", num_images=360),
)
"""The same against digits that no method saw: who learns the training split by heart is nearer to that one alone."""

CIFAR10_FID50K = Protocol(
    name="cifar10-fid50k",
    num_images=50_000,
    repeats=3,
    headline="min",
    image_shape=(3, 32, 32),
    labels=Labels(policy="random", num_classes=10),
    reference=Reference(
        name="cifar10-train-edm",
        dataset="cifar10",
        split="train",
        num_images=50_000,
        file="cifar10-32x32.npz",
        source=EDM_REFERENCES + "cifar10-32x32.npz",
    ),
    metrics=(
        Frechet(features=Inception(mode="legacy_tensorflow")),
        InceptionScore(features=Inception(mode="legacy_tensorflow")),
    ),
)
"""EDM's (Karras et al. 2022, arXiv:2206.00364): 3 x 50,000, their minimum. A model without classes has no labels."""


def _imagenet64(suffix: str, name: str, source: str, preparation: str) -> Protocol:
    file = source.rpartition("/")[2]
    return Protocol(
        name=f"imagenet64-fid50k{suffix}",
        num_images=50_000,
        repeats=3,
        headline="min",
        image_shape=(3, 64, 64),
        labels=Labels(policy="random", num_classes=1000),
        reference=Reference(
            name=name,
            dataset="imagenet",
            split="train",
            num_images=1_281_167,
            preparation=preparation,
            file=file,
            source=source,
        ),
        metrics=(Frechet(features=Inception(mode="legacy_tensorflow")),),
    )


IMAGENET64 = (
    _imagenet64("", "imagenet64-edm", EDM_REFERENCES + "imagenet-64x64.npz", "EDM's dataset_tool: centre crop to 64"),
    _imagenet64(
        "-baseline", "imagenet64-edm-baseline", EDM_REFERENCES + "imagenet-64x64-baseline.npz", "ADM's, as EDM kept it"
    ),
    _imagenet64("-adm", "imagenet64-adm", ADM_REFERENCES + "VIRTUAL_imagenet64_labeled.npz", "ADM's own"),
)
"""Three reference files are in use, and each moves the number, so each is a protocol."""

COCO2014_FID30K = Protocol(
    name="coco2014-fid30k",
    num_images=30_000,
    image_shape=(3, 512, 512),
    labels=Labels(policy="captions"),
    captions=COCO_CAPTIONS,
    preparation=COCO_IMAGES,
    reference=COCO_REFERENCE,
    metrics=(Frechet(features=Inception(mode="clean")), KernelDistance(features=Inception(mode="clean"))),
)
"""Zero-shot COCO against all 40,504 images of val2014."""

COCO_CLIP = Protocol(
    name="coco-clip",
    num_images=30_000,
    image_shape=(3, 512, 512),
    labels=Labels(policy="captions"),
    captions=COCO_CAPTIONS,
    preparation=COCO_IMAGES,
    metrics=(ClipScore(features=CLIP_G14, prefix="A photo depicts "),),
)
"""GigaGAN's and DMD2's: the raw cosine, with their prefix."""

COCO_PREFERENCE = Protocol(
    name="coco-preference",
    num_images=5_000,
    labels=Labels(policy="captions"),
    captions=COCO_CAPTIONS,
    metrics=(Preference(features=PickScore()), Preference(features=Hps()), Aesthetic()),
)
"""What people prefer, by three models of it, on the first 5,000 captions and images of any size."""

COCO2014_CMMD30K = Protocol(
    name="coco2014-cmmd30k",
    num_images=30_000,
    image_shape=(3, 512, 512),
    labels=Labels(policy="captions"),
    captions=COCO_CAPTIONS,
    preparation=COCO_IMAGES,
    reference=Reference(
        name="coco2014-val-captioned", dataset="coco2014", split="val, the images of the captions", num_images=30_000
    ),
    metrics=(Cmmd(features=CLIP_L14_336),),
)
"""CMMD against the real images of the same captions."""

FD_DINOV2_50K = Protocol(
    name="fd-dinov2-50k",
    num_images=50_000,
    repeats=3,
    headline="min",
    image_shape=(3, 512, 512),
    labels=Labels(policy="random", num_classes=1000),
    reference=Reference(
        name="imagenet512",
        dataset="imagenet",
        split="train",
        num_images=1_281_167,
        preparation="EDM2's dataset_tool: centre crop to 512",
    ),
    metrics=(Frechet(features=DinoV2()),),
)
"""EDM2's second column (Karras et al. 2023, arXiv:2312.02696)."""


def _small(
    name: str,
    shape: tuple[int, int, int],
    features: Pixels | CifarResNet | EfficientNetLite0,
    num_images: int,
    reference: Reference,
) -> Protocol:
    """Of ten classes in turn."""
    return Protocol(
        name=name,
        num_images=num_images,
        image_shape=shape,
        labels=Labels(policy="cyclic", num_classes=10),
        reference=reference,
        metrics=(
            Frechet(features=features),
            KernelDistance(features=features),
            PrecisionRecall(features=features, max_samples=10_000),
            DensityCoverage(features=features, max_samples=10_000),
        ),
    )


FIRST = "train, the first images"
CIFAR10 = Reference(name="cifar10-train", dataset="cifar10", split="train", num_images=50_000)
CIFAR10_10K = Reference(name="cifar10-train-10k", dataset="cifar10", split=FIRST, num_images=10_000)
MNIST_10K = Reference(name="mnist-train-10k", dataset="mnist", split=FIRST, num_images=10_000)
CIFAR10_RESNET20 = _small("cifar10-resnet20", (3, 32, 32), CifarResNet(depth=20), 10_000, CIFAR10)
CIFAR10_EFFICIENTNET = _small("cifar10-efficientnet-lite0", (3, 32, 32), EfficientNetLite0(), 5_000, CIFAR10_10K)
MNIST_PIXELS = _small("mnist-pixels", (1, 28, 28), Pixels(), 5_000, MNIST_10K)
MNIST_EFFICIENTNET = _small("mnist-efficientnet-lite0", (1, 28, 28), EfficientNetLite0(), 5_000, MNIST_10K)
"""Real features from a package, or from a file of 1 MB: some minutes on a CPU."""

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        DIGITS_PIXELS,
        DIGITS_TEST_PIXELS,
        CIFAR10_RESNET20,
        CIFAR10_EFFICIENTNET,
        MNIST_PIXELS,
        MNIST_EFFICIENTNET,
        CIFAR10_FID50K,
        *IMAGENET64,
        COCO2014_FID30K,
        COCO_CLIP,
        COCO_PREFERENCE,
        COCO2014_CMMD30K,
        FD_DINOV2_50K,
    )
}


def find_protocol(name: str) -> Protocol:
    """A protocol that comes along, or a user's own from a YAML file.

    Raises UserError naming the choices, every fault of a file, or a name that is taken by another protocol.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    if not name.endswith((".yaml", ".yml")):
        raise UserError(f"protocol {name!r}: unknown (choices: {', '.join(PROTOCOLS)}, or a YAML file)")
    own = validate(Protocol, read_yaml(name), origin=name)
    if own.name in PROTOCOLS and own != PROTOCOLS[own.name]:
        raise UserError(f"{name}: name = {own.name!r}: is the name of another protocol; choose another name")
    return own
