"""The metrics that a protocol may name. Each class owns all that is known of its metric: every setting that changes
the number, the names and facts of its values, what it needs, and how it is computed (the arithmetic is in
eval/metrics/distances.py and its neighbours). A new metric is one class here, and one name in `AnyMetric`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, ClassVar, Literal, get_args

import torch
from pydantic import Field

from diffdistill.eval.features.extractors import AnyFeatures, Hps, Inception, LaionAesthetic, OpenClip, PickScore
from diffdistill.eval.metrics.facts import AGAINST, PUBLISHED, Fact
from diffdistill.eval.metrics.kernels import cmmd, kid
from diffdistill.eval.metrics.neighbours import Prdc, prdc
from diffdistill.eval.metrics.scores import class_share, clip_score, diversity, inception_score, mean_product
from diffdistill.eval.metrics.sides import Found, Rows, Sides, frechet_of
from diffdistill.settings.limits import MAX_CHOSEN, MAX_LEVELS
from diffdistill.settings.numbers import Levels, NonNegativeInt, SamplingSteps, Seed
from diffdistill.settings.schema import Positive, PositiveInt, UserError, field, schema

CMMD_CLIP = ("clip-vit-l-14-336", "openai")
"""CMMD's CLIP: the features' label, and whose weights."""

Classes = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1, max_length=MAX_CHOSEN)]
"""Some classes, by number."""


class Metric(ABC):
    """facts: of every name that its values can have.  needs: of the judged images, beside their features.
    compares: whether it compares them with others."""

    facts: ClassVar[tuple[Fact, ...]]
    needs: ClassVar[frozenset[Literal["logits", "texts"]]] = frozenset()
    compares: ClassVar[bool] = True

    @property
    @abstractmethod
    def keys(self) -> tuple[str, ...]:
        """The names under which a record holds the values."""

    @abstractmethod
    def compute(self, sides: Sides) -> Found:
        """One value for each of `keys`. Raises UserError where a side lacks what is needed."""

    @property
    def text_prefix(self) -> str:
        """What is put before every caption, where texts are needed."""
        return ""


@schema
class Frechet(Metric):
    """Frechet distance.  covariance: divided by N - 1.  Called fid over FID's Inception alone, whose mode is named."""

    facts = (Fact("fid", "lower", "FID", priority=0), Fact("fd", "lower", "FD", priority=1))

    name: Literal["frechet"] = "frechet"
    features: AnyFeatures
    covariance: Literal["unbiased"] = "unbiased"

    @property
    def keys(self) -> tuple[str, ...]:
        return ("fid" if isinstance(self.features, Inception) else f"fd-{self.features.label}",)

    def compute(self, sides: Sides) -> Found:
        return Found((frechet_of(sides.fake, sides.real),))


@schema
class FrechetRest(Metric):
    """Frechet distance of the images that are asked for other classes than the forgotten ones, by the protocol's
    numbers. The reference is taken whole: it has to be of images without those classes."""

    facts = (Fact("fd-rest", "lower", "FD of the rest"),)

    name: Literal["frechet_rest"] = "frechet_rest"
    features: AnyFeatures
    forgotten: Classes
    covariance: Literal["unbiased"] = "unbiased"

    @property
    def keys(self) -> tuple[str, ...]:
        return (f"fd-rest-{self.features.label}",)

    def compute(self, sides: Sides) -> Found:
        rows, asked = sides.fake.rows(), sides.fake.conditions
        rest = rows[~torch.isin(asked, torch.tensor(self.forgotten, device=asked.device)).to(rows.device)]
        if len(rest) < 2:
            raise UserError(f"{sides.key}: {len(rest)} images are of other classes; a distance needs 2 or more")
        return Found((frechet_of(Rows(rest), sides.real),))


@schema
class ForgottenShare(Metric):
    """The share of all images, whatever they are asked for, whose largest logit is that of a forgotten class.
    forgotten: by the classifier's numbers.  Chen et al. 2024, arXiv:2409.11219."""

    facts = (Fact("forgotten-share", "lower", "share still called forgotten", decimals=4),)
    compares = False
    needs = frozenset({"logits"})

    name: Literal["forgotten_share"] = "forgotten_share"
    features: AnyFeatures
    forgotten: Classes

    @property
    def keys(self) -> tuple[str, ...]:
        return (f"forgotten-share-{self.features.label}",)

    def compute(self, sides: Sides) -> Found:
        return Found((class_share(sides.fake.logits, self.forgotten),))


@schema
class KernelDistance(Metric):
    """KID: squared MMD with the kernel (gamma x.y + coef0)^degree, mean over random subsets drawn by `seed`.

    gamma: one over the number of features.  Binkowski et al. 2018, arXiv:1801.01401.
    """

    facts = (Fact("kid", "lower", "KID", decimals=5, priority=4),)

    name: Literal["kid"] = "kid"
    features: AnyFeatures
    num_subsets: Levels = 100
    subset_size: Annotated[int, Field(ge=2, le=MAX_LEVELS)] = 1000
    degree: Literal[3] = 3
    coef0: Literal[1] = 1
    gamma: Literal["1/d"] = "1/d"
    estimator: Literal["unbiased"] = "unbiased"
    seed: Seed = 0

    @property
    def keys(self) -> tuple[str, ...]:
        return (f"kid-{self.features.label}",)

    def compute(self, sides: Sides) -> Found:
        fake, real = sides.fake.rows(), sides.real.rows()
        mean, spread = kid(fake, real, num_subsets=self.num_subsets, subset_size=self.subset_size, seed=self.seed)
        return Found((mean,), spread)


@schema
class PrecisionRecall(Metric):
    """Kynkaanniemi et al. 2019, arXiv:1904.06991.  max_samples: the first so many of either side; None takes all."""

    facts = (Fact("precision", "higher", "precision"), Fact("recall", "higher", "recall"))

    name: Literal["precision_recall"] = "precision_recall"
    features: AnyFeatures
    nearest_k: SamplingSteps = 3
    max_samples: PositiveInt | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return ("precision", "recall")

    def compute(self, sides: Sides) -> Found:
        both = _balls(self, sides)
        return Found((both.precision, both.recall))


@schema
class DensityCoverage(Metric):
    """Naeem et al. 2020, arXiv:2002.09797.  max_samples: the first so many of either side; None takes all."""

    facts = (Fact("density", "higher", "density"), Fact("coverage", "higher", "coverage"))

    name: Literal["density_coverage"] = "density_coverage"
    features: AnyFeatures
    nearest_k: SamplingSteps = 5
    max_samples: PositiveInt | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        return ("density", "coverage")

    def compute(self, sides: Sides) -> Found:
        both = _balls(self, sides)
        return Found((both.density, both.coverage))


@schema
class InceptionScore(Metric):
    """Salimans et al. 2016, arXiv:1606.03498: from the logits beside the features, the mean over `splits`.

    Called is over FID's Inception alone.
    """

    facts = (Fact("is", "higher", "IS"),)
    compares = False
    needs = frozenset({"logits"})

    name: Literal["inception_score"] = "inception_score"
    features: AnyFeatures
    splits: SamplingSteps = 10

    @property
    def keys(self) -> tuple[str, ...]:
        return ("is" if isinstance(self.features, Inception) else f"is-{self.features.label}",)

    def compute(self, sides: Sides) -> Found:
        mean, spread = inception_score(sides.fake.logits, splits=self.splits)
        return Found((mean,), spread)


@schema
class Cmmd(Metric):
    """CMMD: scale times the biased squared MMD with a Gaussian kernel of width sigma.

    Called cmmd over its authors' CLIP alone.  Jayasumana et al. 2024, arXiv:2401.09603.
    """

    facts = (Fact("cmmd", "lower", "CMMD", priority=2), Fact("mmd", "lower", "MMD", decimals=5, priority=3))

    name: Literal["cmmd"] = "cmmd"
    features: AnyFeatures
    sigma: Positive = 10.0
    scale: Positive = 1000.0
    estimator: Literal["biased"] = "biased"

    @property
    def keys(self) -> tuple[str, ...]:
        is_theirs = isinstance(self.features, OpenClip) and (self.features.label, self.features.pretrained) == CMMD_CLIP
        return ("cmmd" if is_theirs else f"mmd-{self.features.label}",)

    def compute(self, sides: Sides) -> Found:
        return Found((cmmd(sides.fake.rows(), sides.real.rows(), sigma=self.sigma, scale=self.scale),))


@schema
class ClipScore(Metric):
    """scale times the mean cosine of image and caption.  prefix: put before every caption.
    clamp: cosines below zero count as zero (torchmetrics) or as they are (GigaGAN, DMD2)."""

    facts = (Fact("clip-score", "higher", "CLIP score"),)
    compares = False
    needs = frozenset({"texts"})

    name: Literal["clip_score"] = "clip_score"
    features: OpenClip
    prefix: str = ""
    scale: Positive = 1.0
    clamp: Literal["none", "zero"] = "none"

    @property
    def keys(self) -> tuple[str, ...]:
        return ("clip-score",)

    @property
    def text_prefix(self) -> str:
        return self.prefix

    def compute(self, sides: Sides) -> Found:
        return Found((clip_score(sides.fake.rows(), sides.fake.texts, scale=self.scale, clamp=self.clamp),))


@schema
class Preference(Metric):
    """The mean score that a model of people's choices gives each image and its caption: PickScore (about 22), HPS
    (about 0.28). Students can score above their teacher, so that it says what pleases, not what is learned."""

    facts = (Fact("pickscore", "higher", "PickScore"), Fact("hps", "higher", "HPS", decimals=4))
    compares = False
    needs = frozenset({"texts"})

    name: Literal["preference"] = "preference"
    features: Annotated[PickScore | Hps, Field(discriminator="name")]

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.features.label,)

    def compute(self, sides: Sides) -> Found:
        return Found((mean_product(sides.fake.rows(), sides.fake.texts),))


@schema
class Aesthetic(Metric):
    """The mean of LAION's aesthetic predictor, 1 to 10 as people voted. It reads no caption."""

    facts = (Fact("laion-aesthetic", "higher", "LAION aesthetic"),)
    compares = False
    needs = frozenset({"logits"})

    name: Literal["aesthetic"] = "aesthetic"
    features: LaionAesthetic = field(default_factory=LaionAesthetic)

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.features.label,)

    def compute(self, sides: Sides) -> Found:
        return Found((float(sides.fake.logits.double().mean()),))


@schema
class Diversity(Metric):
    """Mean distance between features of images of the same condition.  max_pairs: of one condition, drawn by `seed`."""

    facts = (Fact("diversity", "higher", "diversity"),)
    compares = False

    name: Literal["diversity"] = "diversity"
    features: AnyFeatures
    max_pairs: PositiveInt | None = None
    seed: Seed = 0

    @property
    def keys(self) -> tuple[str, ...]:
        return ("diversity",)

    def compute(self, sides: Sides) -> Found:
        fake = sides.fake
        return Found((diversity(fake.rows(), fake.conditions, max_pairs=self.max_pairs, seed=self.seed),))


AnyMetric = Annotated[
    Frechet
    | FrechetRest
    | KernelDistance
    | PrecisionRecall
    | DensityCoverage
    | InceptionScore
    | ForgottenShare
    | Cmmd
    | ClipScore
    | Preference
    | Aesthetic
    | Diversity,
    Field(discriminator="name"),
]
"""What a protocol may name under `metrics`."""

CLASSES: tuple[type[Metric], ...] = get_args(get_args(AnyMetric)[0])

FACTS = (*(fact for kind in CLASSES for fact in kind.facts), *PUBLISHED, *AGAINST)


@lru_cache(maxsize=1024)
def fact_of(metric: str) -> Fact | None:
    """What is known of a metric.  metric: its name in a record, as in fd-pixels or recall; None for a foreign one."""
    return max((fact for fact in FACTS if fact.holds_for(metric)), key=lambda fact: len(fact.name), default=None)


def better(metric: str) -> Literal["lower", "higher", "unknown"]:
    """Which of two numbers of a metric wins."""
    fact = fact_of(metric)
    return fact.better if fact else "unknown"


def metric_label(metric: str) -> str:
    """A metric's name as a heading: FD resnet20-cifar for fd-resnet20-cifar."""
    fact = fact_of(metric)
    return f"{fact.label} {metric[len(fact.name) + 1 :]}".rstrip() if fact else metric.replace("-", " ", 1)


def primary_metric(metrics: Sequence[str]) -> str:
    """What a table is sorted by: the one of the least priority, else the first whose better side is known."""
    facts = {metric: fact_of(metric) for metric in metrics}
    known = [metric for metric in metrics if facts[metric]]
    first = {m: fact.priority for m, fact in facts.items() if fact and fact.priority is not None}
    return min(first, key=lambda metric: first[metric]) if first else (known or list(metrics))[0]


def _balls(metric: PrecisionRecall | DensityCoverage, sides: Sides) -> Prdc:
    """Of the same features, precision and recall with density and coverage cost little more than either."""
    key = (metric.features.label, metric.max_samples)
    if key not in sides.shared:
        both = [other for other in sides.metrics if isinstance(other, (PrecisionRecall, DensityCoverage))]
        nearest = {type(m): m.nearest_k for m in both if (m.features.label, m.max_samples) == key}
        own = metric.nearest_k
        sides.shared[key] = prdc(
            sides.real.rows(metric.max_samples),
            sides.fake.rows(metric.max_samples),
            nearest_k=nearest.get(PrecisionRecall, own),
            density_k=nearest.get(DensityCoverage, own),
        )
    return sides.shared[key]
