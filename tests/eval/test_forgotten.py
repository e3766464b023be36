"""What was forgotten: the share of images that a classifier still calls so, and the distance of the others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.judged import EXTRACTOR, TOY, NoiseImages, TensorFeatures, toy_bench, toy_protocol

from diffdistill.eval.evaluation.run import evaluate
from diffdistill.eval.metrics.distances import frechet_from_features
from diffdistill.eval.metrics.scores import class_share
from diffdistill.eval.metrics.settings import ForgottenShare, Frechet, FrechetRest
from diffdistill.eval.metrics.sides import Rows
from diffdistill.eval.protocols.protocol import Labels
from diffdistill.settings.schema import UserError

FORGOTTEN = (1, 3)
METRICS = (ForgottenShare(features=TOY, forgotten=FORGOTTEN), FrechetRest(features=TOY, forgotten=FORGOTTEN))


def measured(root: Path, **changes: Any) -> dict[str, tuple[float, ...]]:
    protocol = toy_protocol(**({"metrics": METRICS} | changes))
    done = evaluate(NoiseImages(protocol), toy_bench(protocol), name="noise", root=root)
    assert done is not None
    return {name: values.values for name, values in done.record.metrics.items()}


def test_the_share_counts_the_samples_whose_largest_logit_is_of_the_classes() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.9, -9.0], [-5.0, -4.0, -3.0], [0.1, 0.2, 0.15]])
    assert class_share(logits, [1]) == 0.5
    assert class_share(logits, [0, 2]) == 0.5
    assert class_share(logits, [0, 1, 2]) == 1


@pytest.mark.parametrize("number", [3, -1])
def test_a_class_that_the_classifier_does_not_have_is_refused(number: int) -> None:
    with pytest.raises(UserError, match=f"class {number}: the classifier has the classes 0 .. 2"):
        class_share(torch.zeros(4, 3), [0, number])


@pytest.mark.parametrize("policy", ["cyclic", "class_major"])
def test_a_record_has_the_share_over_all_images_and_the_distance_of_those_asked_for_the_rest(
    tmp_path: Path, policy: Any
) -> None:
    labels = Labels(policy=policy, num_classes=10)
    found, protocol = measured(tmp_path, labels=labels), toy_protocol()
    index = torch.arange(300)
    asked = index % 10 if policy == "cyclic" else index // 30
    rest = (asked != 1) & (asked != 3)
    for repeat in range(2):
        seen = EXTRACTOR(NoiseImages(protocol).take(repeat, index))
        assert seen.logits is not None
        called = seen.logits.argmax(1)
        share = float(((called == 1) | (called == 3)).double().mean())
        assert found["forgotten-share-toy"][repeat] == pytest.approx(share, rel=1e-14)
        distance = frechet_from_features(seen.features[rest], toy_bench(protocol).real["toy"].rows())
        assert found["fd-rest-toy"][repeat] == pytest.approx(distance, rel=1e-6)


def test_images_of_the_forgotten_classes_move_the_whole_distance_alone(tmp_path: Path) -> None:
    class Spoilt(NoiseImages):
        def take(self, repeat: int, index: torch.Tensor) -> torch.Tensor:
            of_forgotten = torch.isin(index % 10, torch.tensor(FORGOTTEN))
            return super().take(repeat, index) + 5.0 * of_forgotten[:, None, None, None]

    protocol = toy_protocol(metrics=(Frechet(features=TOY), METRICS[1]))
    plain, spoilt = (
        evaluate(kind(protocol), toy_bench(protocol), name="noise", root=tmp_path / kind.__name__)
        for kind in (NoiseImages, Spoilt)
    )
    assert plain is not None
    assert spoilt is not None
    assert spoilt.record.metrics["fd-toy"].min > 10 * max(plain.record.metrics["fd-toy"].values)
    assert spoilt.record.metrics["fd-rest-toy"] == plain.record.metrics["fd-rest-toy"]


@pytest.mark.filterwarnings("ignore:8 samples of 16 features")
def test_of_fewer_images_of_the_rest_than_features_the_distance_is_from_the_features(tmp_path: Path) -> None:
    found = measured(tmp_path, num_images=10, repeats=1)
    protocol = toy_protocol(num_images=10, repeats=1)
    features = EXTRACTOR(NoiseImages(protocol).take(0, torch.arange(10))).features
    rest = features[[0, 2, 4, 5, 6, 7, 8, 9]]
    wanted = frechet_from_features(rest, toy_bench(protocol).real["toy"].rows())
    assert found["fd-rest-toy"][0] == pytest.approx(wanted, rel=1e-12)


def test_without_two_images_of_the_rest_the_distance_is_refused(tmp_path: Path) -> None:
    labels = Labels(policy="cyclic", num_classes=4)
    with pytest.raises(UserError, match="fd-rest-toy: 1 images are of other classes; a distance needs 2"):
        measured(tmp_path, labels=labels, num_images=2, repeats=1, metrics=(METRICS[1],))


def test_a_protocol_whose_images_are_not_asked_for_the_forgotten_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"frechet_rest: forgotten class 3 with labels.num_classes = 3"):
        toy_protocol(labels=Labels(policy="cyclic", num_classes=3), metrics=METRICS)
    with pytest.raises(ValueError, match=r"with labels.num_classes = 0"):
        toy_protocol(labels=Labels(policy="none"), metrics=METRICS)


def test_features_in_memory_are_cut_to_the_first() -> None:
    rows = Rows(torch.arange(12.0).view(6, 2))
    assert rows.rows(2).tolist() == TensorFeatures(rows.features).rows(2).tolist() == [[0, 1], [2, 3]]
    assert rows.summary.count == 6
