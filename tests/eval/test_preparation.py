"""What is judged: grey levels, crops and resizes exactly as the protocol names them."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffdistill.eval.images.preparation import centre_square, prepare
from diffdistill.eval.protocols.protocol import Preparation

LEVELS = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)


@pytest.mark.parametrize(
    ("quantiser", "expected"), [("round", [0, 0, 64, 128, 191, 255, 255]), ("floor", [0, 0, 63, 127, 191, 255, 255])]
)
def test_grey_levels_are_rounded_or_cut_as_named(quantiser: str, expected: list[int]) -> None:
    images = torch.tensor([-9.0, -1.0, -0.5, 0.0, 0.5, 1.0, 9.0]).reshape(1, 1, 1, 7)
    found = prepare(images, Preparation(quantiser=quantiser))  # type: ignore[arg-type]
    assert found.dtype == torch.uint8
    assert found.flatten().tolist() == expected


def test_every_grey_level_survives_the_rounding_quantiser() -> None:
    assert torch.equal(prepare(LEVELS.float() / 127.5 - 1, Preparation()), LEVELS)


def test_no_quantiser_keeps_floats_and_uint8_as_they_are() -> None:
    images = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert prepare(images, Preparation(quantiser="none")) is images
    assert prepare(LEVELS, Preparation()) is LEVELS


@pytest.mark.parametrize(("height", "width", "corner"), [(4, 7, (0, 1)), (7, 4, (1, 0)), (5, 5, (0, 0))])
def test_the_square_is_from_the_middle(height: int, width: int, corner: tuple[int, int]) -> None:
    images = torch.arange(height * width).reshape(1, 1, height, width)
    side, (top, left) = min(height, width), corner
    assert torch.equal(centre_square(images), images[..., top : top + side, left : left + side])


@pytest.mark.parametrize("channels", [1, 3])
def test_the_resize_is_pillows_on_grey_levels(channels: int) -> None:
    images = torch.randint(256, (2, channels, 20, 30), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    found = prepare(images, Preparation(crop="centre_square", side=8, filter="lanczos"))
    for image, made in zip(images[..., 5:25], found, strict=True):
        array = image.permute(1, 2, 0).numpy()
        picture = Image.fromarray(array[..., 0] if channels == 1 else array).resize((8, 8), Image.Resampling.LANCZOS)
        assert np.array_equal(made.permute(1, 2, 0).numpy().squeeze(), np.array(picture))
