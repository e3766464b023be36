"""Scores of one set of images: Inception Score, share of classes, CLIP score, preference, diversity. In float64."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from diffdistill.eval.metrics.checks import check_features, check_pair
from diffdistill.eval.metrics.pairs import blocks, half_of_pairs, rounding, squared_distances
from diffdistill.settings.schema import UserError


def inception_score(logits: Tensor, *, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp(mean KL(p(y|x) || p(y))): 1, the worst, .. K, the best.

    logits: [N, K].  The samples are shuffled by `seed` first, for a set in the order of its classes would have splits
    of few classes.  Raises UserError for NaN, other shapes, or fewer samples than splits.
    Salimans et al. 2016, arXiv:1606.03498.
    """
    check_features(logits, "logits")
    if not 1 <= splits <= len(logits):
        raise UserError(f"splits must be 1 .. {len(logits)} for {len(logits)} samples, not {splits}")
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed)).to(logits.device)
    bounds = [i * len(logits) // splits for i in range(splits + 1)]
    scores = torch.stack([_exp_mutual_information(logits[order[i:j]]) for i, j in pairwise(bounds)])
    return float(scores.mean()), float(scores.std(correction=0))


def class_share(logits: Tensor, classes: Sequence[int]) -> float:
    """The share of samples whose largest logit is that of one of the classes, 0 .. 1.

    logits: [N, K].  classes: 0 .. K - 1.  Raises UserError for NaN, other shapes, and a class that is none of K.
    """
    check_features(logits, "logits")
    outside = [one for one in classes if not 0 <= one < logits.shape[1]]
    if outside:
        raise UserError(f"class {outside[0]}: the classifier has the classes 0 .. {logits.shape[1] - 1}")
    found = torch.isin(logits.argmax(1), torch.tensor(classes, device=logits.device))
    return float(found.double().mean())


def clip_score(images: Tensor, texts: Tensor, *, scale: float = 1.0, clamp: Literal["none", "zero"] = "none") -> float:
    """scale times the mean cosine of each image and its own text.

    images, texts: [N, d], features of one CLIP model.  Two conventions are in use: the plain cosine, about 0.3
    (GigaGAN, DMD2), and scale=100, clamp="zero", a negative cosine counting as 0 (Hessel et al. 2021,
    arXiv:2104.08718, with 2.5 for 100; torchmetrics cuts the mean instead).
    Raises UserError for NaN, other shapes, and features that are all zero or so large that they have no length.
    """
    check_pair(images, texts)
    if len(images) != len(texts):
        raise UserError(f"each image needs its text: {len(images)} images, {len(texts)} texts")
    images, texts = images.double(), texts.double()
    norms = images.norm(dim=1) * texts.norm(dim=1)
    is_usable = (norms > 0) & norms.isfinite()
    if not bool(is_usable.all()):
        pair = int((~is_usable).nonzero()[0])
        what = "all zero" if float(norms[pair]) == 0 else "too large for a length"
        raise UserError(f"the features of pair {pair} are {what}: no cosine")
    cosines = (images * texts).sum(1) / norms
    return scale * float((cosines.clamp_min(0) if clamp == "zero" else cosines).mean())


def mean_product(images: Tensor, texts: Tensor) -> float:
    """The mean over pairs of an image's features times its own text's, [N, d] each: what preference models call their
    score. Raises UserError for NaN and other shapes."""
    check_pair(images, texts)
    if len(images) != len(texts):
        raise UserError(f"each image needs its text: {len(images)} images, {len(texts)} texts")
    return float((images.double() * texts.double()).sum(1).mean())


def diversity(features: Tensor, conditions: Tensor, *, max_pairs: int | None = None, seed: int = 0) -> float:
    """The mean of `diversity_by_condition`: conditions count alike, however many samples they have."""
    values = diversity_by_condition(features, conditions, max_pairs=max_pairs, seed=seed)
    return sum(values.values()) / len(values)


def diversity_by_condition(
    features: Tensor, conditions: Tensor, *, max_pairs: int | None = None, seed: int = 0
) -> dict[int, float]:
    """Mean Euclidean distance between two samples of the same condition, by condition, ascending.

    features: [N, d]; conditions: [N] int64.  max_pairs: of one condition; where there are more, so many are drawn with
    replacement by `seed`.  0: the generator ignores its noise.
    Raises UserError for NaN, other shapes, and a condition with one sample.
    """
    check_features(features, "features")
    if conditions.shape != features.shape[:1]:
        raise UserError(f"{len(features)} samples need as many conditions, not {list(conditions.shape)}")
    values = {}
    for condition in torch.unique(conditions).tolist():
        members = features[(conditions == condition).to(features.device)].double()
        if len(members) < 2:
            raise UserError(f"condition {condition} has one sample: diversity needs 2 or more of each")
        few = max_pairs is None or len(members) * (len(members) - 1) // 2 <= max_pairs
        values[condition] = _mean_distance(members) if few else _mean_distance_of_some(members, max_pairs or 0, seed)
    return values


def _exp_mutual_information(logits: Tensor) -> Tensor:
    """exp of H(p(y)) - mean H(p(y|x)), the mean KL divergence: 0 log 0 stays 0, where logarithms would give NaN."""
    chances = logits.double().softmax(1)
    entropy = torch.special.entr
    return (entropy(chances.mean(0)).sum() - entropy(chances).sum(1).mean()).exp()


def _mean_distance(samples: Tensor, block_size: int = 2048) -> float:
    """Of all pairs of samples: [n, d] float64."""
    samples, total = samples - samples.mean(0), 0.0
    for rows, columns in half_of_pairs(len(samples), block_size):
        gaps = _distances(samples[rows], samples[columns])
        total += float((gaps.triu(1) if rows == columns else gaps).sum(1).sum())
    return total / (len(samples) * (len(samples) - 1) / 2)


def _mean_distance_of_some(samples: Tensor, num_pairs: int, seed: int) -> float:
    rng, total = torch.Generator().manual_seed(seed), 0.0
    for piece in blocks(num_pairs, 2048):
        size = (piece.stop - piece.start,)
        first = torch.randint(len(samples), size, generator=rng)
        second = (first + torch.randint(1, len(samples), size, generator=rng)) % len(samples)
        total += float((samples[first.to(samples.device)] - samples[second.to(samples.device)]).norm(dim=1).sum())
    return total / num_pairs


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """[A, B]: what is within rounding of 0 is 0, or its root would be far from it."""
    gaps = squared_distances(a, b)
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    return gaps.where(gaps > rounding(a.shape[1]) * norms, 0).sqrt()
