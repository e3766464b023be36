"""The same numbers as clean-fid, torch-fidelity and torchmetrics on the same features, or the reason why not."""

import warnings
from importlib import import_module

import cleanfid.fid
import numpy as np
import pytest
import torch
import torch_fidelity.metric_fid
import torch_fidelity.metric_isc
import torch_fidelity.metric_kid
import torch_fidelity.metric_prc
import torchmetrics.image.fid
import torchmetrics.image.inception
import torchmetrics.image.kid
from support.made_features import covariance, normal
from torch import Tensor, nn

from diffdistill.diffusion.gaussians import frechet_distance
from diffdistill.eval.metrics.distances import frechet_from_features
from diffdistill.eval.metrics.kernels import kid
from diffdistill.eval.metrics.moments import Moments, Summary
from diffdistill.eval.metrics.neighbours import precision_recall
from diffdistill.eval.metrics.scores import clip_score, inception_score

REL = 1e-9
"""Where the definitions agree."""

SETTINGS = {"prc_neighborhood": 3, "prc_batch_size": 100, "verbose": False}
"""Of torch-fidelity's precision and recall."""


class AsTheyAre(nn.Module):
    """An extractor for torchmetrics that returns the features it is given."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


@pytest.fixture(scope="module")
def features() -> tuple[Tensor, Tensor]:
    """Generated [400, 24] and real [500, 24], float64, no sign and far from white, as after a ReLU."""
    mix = covariance(24, condition=1e3)
    return (normal(400, 24) @ mix * 3 + 0.3).relu(), (normal(500, 24, seed=1) @ mix * 3.3 + 0.2).relu()


class TestFrechet:
    def statistics(self, sides: tuple[Tensor, Tensor]) -> list[Summary]:
        found = []
        for side in sides:
            moments = Moments(side.shape[1], block_size=64)
            for batch in side.split(50):
                moments.update(batch)
            found.append(moments.summary())
        return found

    def ours(self, features: tuple[Tensor, Tensor]) -> float:
        a, b = self.statistics(features)
        return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)

    def test_clean_fids_distance_of_the_same_statistics(self, features: tuple[Tensor, Tensor]) -> None:
        a, b = ([x.mean(0).numpy(), np.cov(x.numpy(), rowvar=False)] for x in features)
        assert self.ours(features) == pytest.approx(cleanfid.fid.frechet_distance(*a, *b), rel=REL)

    def test_clean_fid_from_float32_features_differs_by_its_float32_mean(self, features: tuple[Tensor, Tensor]) -> None:
        """numpy's mean of float32 rows is a float32; np.cov of them is not. With a float64 mean nothing is left."""
        single = tuple(x.float() for x in features)
        theirs = cleanfid.fid.fid_from_feats(*(x.numpy() for x in single))
        means = [x.numpy().mean(0) for x in single]
        a, b = self.statistics(single)
        assert means[0].dtype == np.float32
        assert self.ours(single) == pytest.approx(theirs, rel=1e-5)
        assert self.ours(single) != pytest.approx(theirs, rel=REL)
        with_their_means = frechet_distance(
            torch.from_numpy(means[0]), a.covariance, torch.from_numpy(means[1]), b.covariance
        )
        # The gap of two float32 means is itself rounded to float32 in theirs.
        assert with_their_means == pytest.approx(theirs, rel=1e-6)

    def test_torch_fidelitys(self, features: tuple[Tensor, Tensor]) -> None:
        theirs = torch_fidelity.metric_fid.fid_statistics_to_metric(
            *map(torch_fidelity.metric_fid.fid_features_to_statistics, features), False
        )
        assert self.ours(features) == pytest.approx(theirs["frechet_inception_distance"], rel=REL)

    def test_torchmetrics_streamed_in_its_own_batches(self, features: tuple[Tensor, Tensor]) -> None:
        """Its covariance is the sum of squares less that of the mean: fine here, for the means are near zero."""
        metric = torchmetrics.image.fid.FrechetInceptionDistance(feature=AsTheyAre(24))
        metric.set_dtype(torch.float64)
        for is_real, side in enumerate(features):
            for batch in side.split(70):
                metric.update(batch, real=bool(is_real))
        assert self.ours(features) == pytest.approx(float(metric.compute()), rel=REL)

    def test_singular_covariances_are_exact_where_roots_of_zero_eigenvalues_are_not(self) -> None:
        """Theirs sums the roots of eigenvalues that are about 1e-16 instead of 0."""
        few = normal(40, 200).relu()
        mean, cov = few.mean(0), torch.cov(few.T)
        theirs = torch_fidelity.metric_fid.fid_statistics_to_metric(
            {"mu": mean.numpy(), "sigma": cov.numpy()}, {"mu": mean.numpy(), "sigma": cov.numpy()}, False
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            of_features = frechet_from_features(few, few)
        assert abs(frechet_distance(mean, cov, mean, cov)) < 1e-11
        assert abs(of_features) < 1e-11
        assert abs(theirs["frechet_inception_distance"]) > 1e-8


class TestKid:
    def of_subsets(self, a: Tensor, b: Tensor, subsets: list[tuple[np.ndarray, np.ndarray]]) -> list[float]:
        """Ours on the subsets that another tool drew: the draw is the only difference between the tools."""
        size = len(subsets[0][0])
        return [kid(a[i], b[j], num_subsets=1, subset_size=size)[0] for i, j in subsets]

    def test_clean_fids_on_whole_sets(self, features: tuple[Tensor, Tensor]) -> None:
        a, b = features[0], features[1][:400]
        theirs = cleanfid.fid.kernel_distance(a.numpy(), b.numpy(), num_subsets=1)
        assert kid(a, b, num_subsets=1, subset_size=400)[0] == pytest.approx(theirs, rel=REL)

    def test_torch_fidelitys_on_its_own_subsets(self, features: tuple[Tensor, Tensor]) -> None:
        settings = {"kid_subsets": 5, "kid_subset_size": 60, "rng_seed": 2020, "verbose": False}
        theirs = torch_fidelity.metric_kid.kid_features_to_metric(*features, **settings)
        rng = np.random.RandomState(2020)
        drawn = [tuple(rng.choice(len(x), 60, replace=False) for x in features) for _ in range(5)]
        ours = self.of_subsets(*features, drawn)
        assert np.mean(ours) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=REL)
        assert np.std(ours) == pytest.approx(theirs["kernel_inception_distance_std"], rel=REL)

    def test_torchmetrics_on_whole_sets(self, features: tuple[Tensor, Tensor]) -> None:
        a, b = features[0], features[1][:400]
        metric = torchmetrics.image.kid.KernelInceptionDistance(feature=AsTheyAre(24), subsets=1, subset_size=400)
        metric.update(a, real=False)
        metric.update(b, real=True)
        assert kid(a, b, num_subsets=1, subset_size=400)[0] == pytest.approx(float(metric.compute()[0]), rel=REL)


class TestInceptionScore:
    def test_torch_fidelitys_of_the_shuffled_set(self) -> None:
        """Ours shuffles by torch's generator, theirs by numpy's: so theirs gets ours shuffled already."""
        logits = 3 * normal(203, 10)
        order = torch.randperm(203, generator=torch.Generator().manual_seed(0))
        theirs = torch_fidelity.metric_isc.isc_features_to_metric(logits[order], splits=10, shuffle=False)
        mean, deviation = inception_score(logits, splits=10)
        assert mean == pytest.approx(theirs["inception_score_mean"], rel=REL)
        assert deviation == pytest.approx(theirs["inception_score_std"], rel=REL)

    def test_torchmetrics_of_the_same_shuffle(self) -> None:
        """Theirs takes the global seed, and divides the variance by splits - 1 where we and Salimans' code do not."""
        logits = 3 * normal(200, 10)
        metric = torchmetrics.image.inception.InceptionScore(feature=AsTheyAre(10), splits=4)
        metric.update(logits)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            their_mean, their_deviation = metric.compute()
        mean, deviation = inception_score(logits, splits=4, seed=5)
        assert mean == pytest.approx(float(their_mean), rel=REL)
        assert deviation * np.sqrt(4 / 3) == pytest.approx(float(their_deviation), rel=REL)

    def test_a_classifier_without_doubt_is_nan_for_torch_fidelity(self) -> None:
        """Its logarithm of a chance that underflows to 0, times that chance."""
        logits = 1e4 * torch.nn.functional.one_hot(torch.arange(20) % 2, 3).double()
        assert np.isnan(torch_fidelity.metric_isc.isc_features_to_metric(logits, splits=1)["inception_score_mean"])
        assert inception_score(logits, splits=1)[0] == pytest.approx(2, rel=1e-14)


class TestPrecisionRecall:
    @pytest.mark.parametrize("save_cpu_ram", [False, True])
    def test_torch_fidelitys(self, features: tuple[Tensor, Tensor], save_cpu_ram: bool) -> None:
        fake, real = features
        theirs = torch_fidelity.metric_prc.prc_features_to_metric(fake, real, **SETTINGS, save_cpu_ram=save_cpu_ram)
        precision, recall = precision_recall(real, fake)
        assert 0 < precision < 1 > recall > 0
        # Shares of few samples: theirs are means in float32.
        assert (precision, recall) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-7)

    def test_far_from_the_origin_torch_fidelity_loses_the_float32_distances(
        self, features: tuple[Tensor, Tensor]
    ) -> None:
        """Both take distances from products; ours in float64 and about the mean, so nothing is left of the offset."""
        fake, real = ((x + 1000).float() for x in features)
        theirs = torch_fidelity.metric_prc.prc_features_to_metric(fake, real, **SETTINGS, save_cpu_ram=False)
        radii = torch.cdist(real.double() - 1000, real.double() - 1000).kthvalue(4).values
        exact = (torch.cdist(fake.double() - 1000, real.double() - 1000) <= radii).any(1).double().mean()
        assert precision_recall(real, fake)[0] == float(exact)
        assert abs(theirs["precision"] - float(exact)) > 0.05


class TestClipScore:
    def theirs(self, images: Tensor, texts: Tensor) -> Tensor:
        """100 cosines by torchmetrics, whose model and processor pass features through."""

        class Model:
            def to(self, device: torch.device) -> "Model":
                return self

            def get_image_features(self, pixels: Tensor) -> Tensor:
                return pixels.flatten(1)

        def processor(*, images: list[Tensor], **_: object) -> dict[str, Tensor]:
            return {"pixel_values": torch.stack(images)}

        # By its full name: the package has a function of the same name in the module's place.
        update = import_module("torchmetrics.functional.multimodal.clip_score")._clip_score_update
        return update(*(list(x[:, :, None, None]) for x in (images, texts)), Model(), processor)[0]

    def test_torchmetrics_where_no_cosine_is_negative(self) -> None:
        images, texts = normal(20, 8).abs(), normal(20, 8, seed=1).abs()
        theirs = float(self.theirs(images, texts).mean().clamp_min(0))
        assert clip_score(images, texts, scale=100.0, clamp="zero") == pytest.approx(theirs, rel=REL)

    def test_torchmetrics_cuts_the_mean_where_hessel_cuts_each_cosine(self) -> None:
        images, texts = normal(20, 8), normal(20, 8, seed=1)
        theirs = self.theirs(images, texts)
        ours = clip_score(images, texts, scale=100.0, clamp="zero")
        assert ours == pytest.approx(float(theirs.clamp_min(0).mean()), rel=REL)
        assert ours > float(theirs.mean().clamp_min(0))
        assert clip_score(images, texts) == pytest.approx(float(theirs.mean()) / 100, rel=REL)
