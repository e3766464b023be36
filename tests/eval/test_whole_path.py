"""From files to the number, against clean-fid, torchmetrics and torch-fidelity: the same folders, the same network.

FID's own weights are not needed for this: any network shows whether reading, resizing and statistics agree.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.pictures import encode, pictures, write_folder
from torch import Tensor, nn

from diffdistill.eval.evaluation.reference import compute_reference
from diffdistill.eval.features.extractors import Extractor
from diffdistill.eval.features.resize import levels, network_input
from diffdistill.eval.images.files import open_images
from diffdistill.eval.metrics.distances import frechet_from_features
from diffdistill.eval.protocols.protocol import Preparation

HALF = (128 / 255,) * 3
FLOAT32 = 2e-5
"""Relative: resizes agree to 1e-5 grey levels, sums of a convolution to their order."""


class Network(nn.Module):
    """Random weights; float grey levels of any size to [B, 24]."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.filters = nn.Parameter(torch.randn(24, 3, 7, 7, generator=rng) / 12)

    def forward(self, values: Tensor) -> Tensor:
        maps = nn.functional.conv2d((values - 128) / 128, self.filters, stride=4).relu()
        return maps.mean((2, 3))


@pytest.fixture(scope="module")
def network() -> Network:
    return Network().eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """60 photographs, and 60 others that are a little darker."""
    root, photographs = tmp_path_factory.mktemp("folders"), pictures(120)[0]
    first, second = photographs[:60], (photographs[60:] * 0.9).astype("uint8")
    made = (
        write_folder(root / name, {f"{number:03d}.png": encode(image) for number, image in enumerate(images)})
        for name, images in (("a", first), ("b", second))
    )
    return tuple(made)  # type: ignore[return-value]


def ours(folders: tuple[Path, Path], extractor: Extractor) -> float:
    a, b = (compute_reference(open_images(folder, Preparation()), extractor, Preparation()) for folder in folders)
    return frechet_from_features(a.rows(), b.rows())


def test_a_folder_against_a_folder_is_clean_fids_number(folders: tuple[Path, Path], network: Network) -> None:
    from cleanfid.fid import compare_folders

    places = [str(folder) for folder in folders]
    theirs = compare_folders(*places, network, "clean", num_workers=0, device=torch.device("cpu"), verbose=False)
    prepare = network_input(299, mean=HALF, std=HALF)
    extractor = Extractor(label="random", network=lambda x: network(x * 128 + 128), prepare=prepare, num_features=24)
    assert ours(folders, extractor) == pytest.approx(float(theirs), rel=FLOAT32)


@pytest.fixture
def without_resize(network: Network) -> Extractor:
    return Extractor(label="random", network=network, prepare=levels, num_features=24)


def test_images_without_a_resize_give_torchmetrics_number(
    folders: tuple[Path, Path], network: Network, without_resize: Extractor
) -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Raw(nn.Module):
        num_features = 24

        def forward(self, images: Tensor) -> Tensor:
            return network(images.float())

    metric = fid.FrechetInceptionDistance(feature=Raw())
    for folder, is_real in zip(folders, (False, True), strict=True):
        metric.update(open_images(folder, Preparation()).rows(torch.arange(60)), real=is_real)
    # Their result is rounded to float32 at the end.
    assert ours(folders, without_resize) == pytest.approx(float(metric.compute()), rel=1e-5)


def test_a_folder_against_a_folder_is_torch_fidelitys_number(
    folders: tuple[Path, Path], network: Network, without_resize: Extractor
) -> None:
    fidelity = pytest.importorskip("torch_fidelity")
    base = pytest.importorskip("torch_fidelity.feature_extractor_base").FeatureExtractorBase

    class Raw(base):  # type: ignore[misc, valid-type]
        def __init__(self, name: str, features_list: list[str], **rest: Any) -> None:
            super().__init__(name, features_list)

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            return self.convert_features_tuple_to_dict({"random": network(images.float())})

        def convert_features_tuple_to_dict(self, features: Any) -> Any:
            return features

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("random",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "random"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        @staticmethod
        def get_dummy_input_for_compile() -> Tensor:
            return torch.zeros(1, 3, 8, 8, dtype=torch.uint8)

    fidelity.register_feature_extractor("whole-path", Raw)
    theirs = fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        fid=True,
        cuda=False,
        feature_extractor="whole-path",
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )["frechet_inception_distance"]
    assert ours(folders, without_resize) == pytest.approx(theirs, rel=FLOAT32)
