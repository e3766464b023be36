"""Inception Score, CLIP score and diversity: closed forms, invariances, faults."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from support.made_features import normal
from torch import Tensor

from diffdistill.eval.metrics.scores import clip_score, diversity, diversity_by_condition, inception_score


def certain(classes: Tensor, num_classes: int, logit: float = 1e4) -> Tensor:
    """Logits of a classifier without doubt: the other chances underflow to 0."""
    return logit * torch.nn.functional.one_hot(classes, num_classes).double()


def test_certain_and_balanced_classes_score_their_number() -> None:
    mean, deviation = inception_score(certain(torch.arange(40) % 8, 8), splits=1)
    assert mean == pytest.approx(8, rel=1e-14)
    assert deviation == 0


def test_one_class_scores_one_and_so_does_a_classifier_that_knows_nothing() -> None:
    assert inception_score(certain(torch.zeros(40, dtype=torch.int64), 8)) == (1.0, 0.0)
    assert inception_score(torch.zeros(40, 8))[0] == pytest.approx(1, abs=1e-15)


def test_two_kinds_of_doubt_have_their_closed_form() -> None:
    # Half the samples are (p, 1 - p), half (1 - p, p): the mean is (1/2, 1/2), and log 2 - H(p) the divergence.
    p = 0.9
    logits = torch.tensor([[p, 1 - p], [1 - p, p]], dtype=torch.float64).log().repeat(10, 1)
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert inception_score(logits, splits=1)[0] == pytest.approx(2 * math.exp(-entropy), rel=1e-14)


def test_a_set_in_the_order_of_its_classes_has_splits_of_many_classes() -> None:
    assert inception_score(certain(torch.arange(1000) // 100, 10), splits=10)[0] > 8  # unshuffled: 1


def test_splits_are_those_of_the_shuffled_set() -> None:
    logits = normal(103, 7)
    shuffled = logits[torch.randperm(103, generator=torch.Generator().manual_seed(3))]
    parts = [inception_score(shuffled[i * 103 // 4 : (i + 1) * 103 // 4], splits=1)[0] for i in range(4)]
    mean, deviation = inception_score(logits, splits=4, seed=3)
    assert mean == pytest.approx(sum(parts) / 4, rel=1e-14)
    assert deviation == pytest.approx(float(np.std(parts)), rel=1e-12)


def test_more_splits_than_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"splits must be 1 .. 5 for 5 samples, not 10"):
        inception_score(normal(5, 3))


def test_the_plain_cosine_and_the_clamped_one() -> None:
    images = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
    texts = torch.tensor([[1.0, 1.0], [0.0, -1.0], [5.0, 0.0]])
    root = math.sqrt(0.5)
    assert clip_score(images, texts) == pytest.approx((root - 1 + 1) / 3, rel=1e-14)
    assert clip_score(images, texts, scale=100.0, clamp="zero") == pytest.approx(100 * (root + 0 + 1) / 3, rel=1e-14)


def test_each_image_needs_its_text_and_features_that_have_a_direction() -> None:
    with pytest.raises(ValueError, match="3 images, 2 texts"):
        clip_score(normal(3, 4), normal(2, 4))
    with pytest.raises(ValueError, match="pair 1 are all zero"):
        clip_score(torch.tensor([[1.0], [0.0]]), torch.ones(2, 1))


def test_features_too_large_for_a_length_are_refused_by_their_pair() -> None:
    """Their squares overflow: infinite against a text of zeros is NaN, which is neither above zero nor equal to it."""
    huge = torch.tensor([[1.0, 0.0], [1e200, 1e200], [1.0, 1.0]], dtype=torch.float64)
    for texts in (torch.ones(3, 2).double(), torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]).double()):
        with pytest.raises(ValueError, match="the features of pair 1 are too large for a length: no cosine"):
            clip_score(huge, texts)


def test_diversity_equals_brute_force_and_conditions_count_alike() -> None:
    features, conditions = normal(30, 5), torch.tensor([4] * 20 + [2] * 10)
    expected = {}
    for condition in (2, 4):
        members = features[conditions == condition]
        gaps = [float((x - y).norm()) for x, y in combinations(members, 2)]
        expected[condition] = sum(gaps) / len(gaps)
    assert diversity_by_condition(features, conditions) == pytest.approx(expected, rel=1e-13)
    assert diversity(features, conditions) == pytest.approx((expected[2] + expected[4]) / 2, rel=1e-13)


def test_a_generator_that_ignores_its_noise_has_no_diversity() -> None:
    features = normal(1, 50).repeat(20, 1) + 1e3
    assert diversity(features, torch.zeros(20, dtype=torch.int64)) == 0.0


def test_some_pairs_estimate_the_mean_of_all() -> None:
    features, conditions = normal(300, 8), torch.zeros(300, dtype=torch.int64)
    exact = diversity(features, conditions)
    first, again, other = (diversity(features, conditions, max_pairs=4000, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert first == pytest.approx(exact, rel=0.02)  # a distance spreads by a quarter; 4000 of them by 0.4 %
    assert diversity(features, conditions, max_pairs=300 * 299 // 2) == exact


def test_a_condition_with_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="condition 7 has one sample"):
        diversity(normal(3, 4), torch.tensor([1, 7, 1]))
