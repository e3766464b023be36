"""The metrics that a protocol may name, each with every setting that changes its number. What computes them is
eval/metrics/distances.py and its neighbours; `keys` are the names under which a record holds the values."""

from typing import Annotated, Literal

from pydantic import Field

from diffdistill.eval.features.extractors import AnyFeatures, Inception, OpenClip
from diffdistill.settings.schema import Positive, PositiveInt, schema

CMMD_LABEL = "clip-vit-l-14-336"
"""CMMD's CLIP."""


@schema
class Frechet:
    """Frechet distance.  covariance: divided by N - 1.  Called fid over FID's Inception alone, whose mode is named."""

    name: Literal["frechet"] = "frechet"
    features: AnyFeatures
    covariance: Literal["unbiased"] = "unbiased"

    @property
    def keys(self) -> tuple[str, ...]:
        return ("fid" if isinstance(self.features, Inception) else f"fd-{self.features.label}",)


@schema
class KernelDistance:
    """KID: squared MMD with the kernel (gamma x.y + coef0)^degree, mean over random subsets drawn by `seed`.

    gamma: one over the number of features.  Binkowski et al. 2018, arXiv:1801.01401.
    """

    name: Literal["kid"] = "kid"
    features: AnyFeatures
    num_subsets: PositiveInt = 100
    subset_size: Annotated[int, Field(ge=2)] = 1000
    degree: Literal[3] = 3
    coef0: Literal[1] = 1
    gamma: Literal["1/d"] = "1/d"
    estimator: Literal["unbiased"] = "unbiased"
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def keys(self) -> tuple[str, ...]:
        return (f"kid-{self.features.label}",)


@schema
class PrecisionRecall:
    """Kynkaanniemi et al. 2019, arXiv:1904.06991.  max_samples: the first so many of either side; None takes all."""

    name: Literal["precision_recall"] = "precision_recall"
    features: AnyFeatures
    nearest_k: PositiveInt = 3
    max_samples: PositiveInt | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return ("precision", "recall")


@schema
class DensityCoverage:
    """Naeem et al. 2020, arXiv:2002.09797.  max_samples: the first so many of either side; None takes all."""

    name: Literal["density_coverage"] = "density_coverage"
    features: AnyFeatures
    nearest_k: PositiveInt = 5
    max_samples: PositiveInt | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return ("density", "coverage")


@schema
class InceptionScore:
    """Salimans et al. 2016, arXiv:1606.03498: from the logits beside the features, the mean over `splits`.

    Called is over FID's Inception alone.
    """

    name: Literal["inception_score"] = "inception_score"
    features: AnyFeatures
    splits: PositiveInt = 10

    @property
    def keys(self) -> tuple[str, ...]:
        return ("is" if isinstance(self.features, Inception) else f"is-{self.features.label}",)


@schema
class Cmmd:
    """CMMD: scale times the biased squared MMD with a Gaussian kernel of width sigma.

    Called cmmd over its authors' CLIP alone.  Jayasumana et al. 2024, arXiv:2401.09603.
    """

    name: Literal["cmmd"] = "cmmd"
    features: AnyFeatures
    sigma: Positive = 10.0
    scale: Positive = 1000.0
    estimator: Literal["biased"] = "biased"

    @property
    def keys(self) -> tuple[str, ...]:
        is_theirs = isinstance(self.features, OpenClip) and self.features.label == CMMD_LABEL
        return ("cmmd" if is_theirs else f"mmd-{self.features.label}",)


@schema
class ClipScore:
    """scale times the mean cosine of image and caption.  prefix: put before every caption.
    clamp: cosines below zero count as zero (torchmetrics) or as they are (GigaGAN, DMD2)."""

    name: Literal["clip_score"] = "clip_score"
    features: OpenClip
    prefix: str = ""
    scale: Positive = 1.0
    clamp: Literal["none", "zero"] = "none"

    @property
    def keys(self) -> tuple[str, ...]:
        return ("clip-score",)


@schema
class Diversity:
    """Mean distance between features of images of the same condition.  max_pairs: of one condition, drawn by `seed`."""

    name: Literal["diversity"] = "diversity"
    features: AnyFeatures
    max_pairs: PositiveInt | None = None
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def keys(self) -> tuple[str, ...]:
        return ("diversity",)


AnyMetric = Annotated[
    Frechet | KernelDistance | PrecisionRecall | DensityCoverage | InceptionScore | Cmmd | ClipScore | Diversity,
    Field(discriminator="name"),
]
"""What a protocol may name under `metrics`."""
