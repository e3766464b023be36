"""A protocol: every choice behind a number, frozen and named. A different choice is a different protocol.

The same model gets different distances from another resize, quantiser, reference, seed or noise. So nothing here has
a value that the machine or the batch size decides, and two results compare only if their protocols are equal.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from diffdistill.eval.features.extractors import Sha256
from diffdistill.eval.metrics.settings import AnyMetric, FrechetRest
from diffdistill.settings.limits import MAX_CHOSEN, MAX_CLASSES
from diffdistill.settings.numbers import Channels, NonNegativeInt, Resolution, SamplingSteps
from diffdistill.settings.schema import PositiveInt, field, schema

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=64)]
"""Part of a file's name, which stays in its folder."""


@schema
class Noise:
    """Image seeds[i] starts from StepRandom(0, step, seeds[i]) under `latent`; a stochastic sampler's step j adds that
    of f"{fresh} {j}". One generator an image: neither batch size nor device nor rank changes it."""

    generator: Literal["philox-per-image"] = "philox-per-image"
    step: NonNegativeInt = 0
    latent: str = "noise"
    fresh: str = "fresh"


@schema
class Labels:
    """What image i of a repeat (0 .. N - 1) is conditioned on.

    none: nothing.  class_major: i // (N / classes), labels ascend.  cyclic: i mod classes (DMD2).
    random: drawn from the image's own seed (EDM).  captions: caption i.
    names: of the classes, by number, where they are said: a model's are matched with them. Not written where there are
    none, so that protocols of before are the same.
    """

    policy: Literal["none", "class_major", "cyclic", "random", "captions"]
    num_classes: NonNegativeInt = 0
    names: Annotated[tuple[str, ...], Field(max_length=MAX_CLASSES)] = ()

    def __post_init__(self) -> None:
        if self.names and (len(self.names) != self.num_classes or len(set(self.names)) < len(self.names)):
            raise ValueError(f"names: {len(self.names)} for num_classes = {self.num_classes}; give each class its own")

    @model_serializer(mode="wrap")
    def _without_no_names(self, told: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = told(self)
        return found if self.names else {key: value for key, value in found.items() if key != "names"}


@schema
class Captions:
    """The prompts, one a line, in the file's order: caption i for image i of every repeat.  sha256: of the file that
    was used, if the protocol does not say it before.  md5: where the source publishes no better."""

    name: str
    count: PositiveInt
    source: str = ""
    sha256: Sha256 | None = None
    md5: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None


@schema
class Preparation:
    """From the network's output in [-1, 1] to the image that is judged; the crop and resize hold for real ones too.

    quantiser: round to uint8, x * 127.5 + 128 cut (EDM); floor, (x + 1) * 127.5 cut (DMD2); none keeps floats.
    crop: the largest square in the middle.  side, filter: then to this many pixels by Pillow's filter on uint8.
    encoding: PNG, or never a file; a folder of JPEGs is another protocol.
    """

    quantiser: Literal["round", "floor", "none"] = "round"
    crop: Literal["none", "centre_square"] = "none"
    side: Resolution | None = None
    filter: Literal["none", "lanczos", "bicubic", "box"] = "none"
    encoding: Literal["lossless", "jpeg"] = "lossless"

    def __post_init__(self) -> None:
        if (self.side is None) != (self.filter == "none"):
            raise ValueError(f"filter = {self.filter!r}: goes with `side`, and only with it")


@schema
class Reference:
    """What is compared with.  dataset, split, num_images: which real images, and how many.  preparation: what was
    done to them.  file, source: where statistics are published, if they are not computed from the images."""

    name: Name
    dataset: str
    split: str
    num_images: PositiveInt | None = None
    preparation: str = "as they are"
    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=255)] | None = None
    source: str | None = None


@schema
class Numerics:
    """The extractor's arithmetic, and the statistics'."""

    features: Literal["float32", "float64"] = "float32"
    tf32: Literal[False] = False
    statistics: Literal["float64"] = "float64"


@schema
class Protocol:
    """Every choice behind a record.

    num_images: N of one repeat.  repeats: repeat r has the image seeds first_seed + r N .. first_seed + (r + 1) N - 1.
    headline: which of the repeats' min and mean is shown first; both are kept.  image_shape: [C, H, W] as generated,
    None where the model decides.  weights_sha256, reference_sha256: by the features' label, of the extractors and
    references that were used; empty until they are known.  A reference's is that of its images, or of an imported
    file's mean and covariance: what another machine finds again.
    """

    name: Name
    version: PositiveInt = 1
    num_images: PositiveInt
    first_seed: NonNegativeInt = 0
    repeats: SamplingSteps = 1
    headline: Literal["min", "mean"] = "mean"
    image_shape: tuple[Channels, Resolution, Resolution] | None = None
    noise: Noise = field(default_factory=Noise)
    labels: Labels = field(default_factory=lambda: Labels(policy="none"))
    captions: Captions | None = None
    preparation: Preparation = field(default_factory=Preparation)
    reference: Reference | None = None
    metrics: Annotated[tuple[AnyMetric, ...], Field(min_length=1, max_length=MAX_CHOSEN)]
    numerics: Numerics = field(default_factory=Numerics)
    weights_sha256: dict[str, Sha256] = field(default_factory=dict)
    reference_sha256: dict[str, Sha256] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys = [key for metric in self.metrics for key in metric.keys]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"metrics: {twice[0]} is named twice; names must be unique")
        if (self.labels.policy == "captions") != (self.captions is not None):
            raise ValueError("captions: go with labels.policy: captions, and only with it")
        if self.captions and self.captions.count < self.num_images:
            raise ValueError(f"captions.count = {self.captions.count}: {self.num_images} images need one each")
        if self.labels.policy == "class_major" and self.num_images % max(self.labels.num_classes, 1):
            raise ValueError(f"num_images = {self.num_images}: is no multiple of {self.labels.num_classes} classes")
        for metric in self.metrics:
            if isinstance(metric, FrechetRest) and max(metric.forgotten) >= self.labels.num_classes:
                told = f"labels.num_classes = {self.labels.num_classes}"
                raise ValueError(f"metrics: {metric.name}: forgotten class {max(metric.forgotten)} with {told}")

    @property
    def is_square(self) -> bool:
        """Whether every judged image is a square."""
        shape, how = self.image_shape, self.preparation
        return how.crop == "centre_square" or how.side is not None or bool(shape and shape[1] == shape[2])

    @property
    def seed_ranges(self) -> tuple[tuple[int, int], ...]:
        """[first, end) of every repeat's image seeds."""
        firsts = (self.first_seed + repeat * self.num_images for repeat in range(self.repeats))
        return tuple((first, first + self.num_images) for first in firsts)

    def resolved(
        self,
        *,
        weights: Mapping[str, str],
        references: Mapping[str, str],
        features: Mapping[str, Any] = MappingProxyType({}),
    ) -> "Protocol":
        """The same with what was really used, by the features' label: SHA-256s, and specifications that say all."""
        metrics = [replace(m, features=features.get(m.features.label, m.features)) for m in self.metrics]
        return replace(
            self,
            metrics=tuple(metrics),
            weights_sha256=dict(sorted(weights.items())),
            reference_sha256=dict(sorted(references.items())),
        )
