"""Distances between a student's images and stored ones; LPIPS by a library, on a backbone of random weights."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.closed_forms import random
from support.tiny_players import CLASSES, PATH, SHAPE, small_teacher
from torch import Tensor

from diffdistill.distillation.distances import LPIPS, SquaredError
from diffdistill.distillation.method import Method, Problem
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.rectified_flow import RectifiedFlow
from diffdistill.methods.regression import Regression
from diffdistill.settings.schema import UserError

lpips = pytest.importorskip("torchmetrics.functional.image.lpips")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SqueezeNet's features, of random numbers."""
    from torchvision.models import squeezenet1_1

    file = tmp_path_factory.mktemp("backbone") / "squeezenet.pth"
    torch.manual_seed(0)
    torch.save(squeezenet1_1().state_dict(), file)
    return file


def settings(file: Path, **changes: object) -> LPIPS:
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    given = {"weights": str(file), "sha256": sha256, "network": "squeeze", "size": 64} | changes
    return LPIPS(**given)  # type: ignore[arg-type]


def images(seed: int, channels: int = 3) -> Tensor:
    return random(2, channels, 32, 32, seed=seed).float().clamp(-1, 1)


def test_lpips_is_the_library_s_over_the_file_s_backbone(backbone: Path) -> None:
    x, y = images(0), images(1)
    library = lpips._LPIPS(pretrained=True, net="squeeze", pnet_rand=True)
    state = torch.load(backbone, weights_only=True)
    from torchvision.models import squeezenet1_1

    whole = squeezenet1_1()
    whole.load_state_dict(state)
    for part in (library.net.slices[i] for i in range(7)):
        for name, module in part.named_children():
            module.load_state_dict(whole.features[int(name)].state_dict())
    resized = [torch.nn.functional.interpolate(image, (64, 64), mode="bilinear") for image in (x, y)]
    with torch.no_grad():
        expected = library(*resized).flatten()
    found = settings(backbone).of_each(x, y)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(settings(backbone)(x, y), expected.mean())
    assert bool((found > 0).all())
    assert not settings(backbone).of_each(x, x).any()


def test_its_gradient_reaches_the_image_and_grey_is_three_equal_channels(backbone: Path) -> None:
    x = images(0, 1).requires_grad_()
    settings(backbone)(x, images(1, 1)).backward()
    assert x.grad is not None
    assert bool(x.grad.any())
    coloured = settings(backbone)(x.detach().expand(-1, 3, -1, -1), images(1, 1).expand(-1, 3, -1, -1))
    torch.testing.assert_close(settings(backbone)(x.detach(), images(1, 1)), coloured)


def test_safetensors_are_read_too(backbone: Path, tmp_path: Path) -> None:
    file = tmp_path / "squeezenet.safetensors"
    save_file(torch.load(backbone, weights_only=True), file)
    assert torch.equal(settings(file)(images(0), images(1)), settings(backbone)(images(0), images(1)))


def test_other_files_are_refused(backbone: Path, tmp_path: Path) -> None:
    x = images(0)
    for wrong, said in (
        (settings(backbone, sha256="0" * 8), "another file: its SHA-256 is"),
        (settings(backbone, weights=str(tmp_path / "none.pth")), "no such file; it should be torchvision's squeeze"),
        (settings(backbone, network="alex"), "not weights of alex"),
        (settings(backbone), r"lpips takes images of 1 or 3 channels, not \[4, 32, 32\]"),
    ):
        with pytest.raises(UserError, match=said):
            wrong(images(0, 4) if "channels" in said else x, images(0, 4) if "channels" in said else x)


@pytest.mark.parametrize(
    "method",
    [
        lambda lpips: Regression(distance=lpips),
        lambda lpips: RectifiedFlow(perceptual=lpips),
        lambda lpips: DMD2(gan_weight=0.0, regression_weight=1.0, regression_distance=lpips),
    ],
    ids=["regression", "rectified_flow", "dmd2"],
)
def test_a_file_that_is_another_and_latents_are_found_before_pairs_are_made(
    backbone: Path, method: Callable[[LPIPS], Method]
) -> None:
    teacher = small_teacher().float()
    of = partial(Problem, num_classes=CLASSES, path=PATH, teacher=teacher)
    method(settings(backbone)).players(of(SHAPE))
    with pytest.raises(UserError, match=r"method\.\w+: weights = .*: another file: its SHA-256 is"):
        method(settings(backbone, sha256="0" * 8)).players(of(SHAPE))
    with pytest.raises(UserError, match=r"method\.\w+: lpips takes .* not \[4, 4, 4\]"):
        method(settings(backbone)).players(of((4, *SHAPE[1:])))
    DMD2(gan_weight=0.0, regression_distance=settings(backbone, sha256="0" * 8)).players(of(SHAPE))  # no pairs


def test_the_squared_error_is_torch_s_bit_for_bit() -> None:
    x, y = images(0), images(1)
    assert torch.equal(SquaredError()(x, y), torch.nn.functional.mse_loss(x, y))
