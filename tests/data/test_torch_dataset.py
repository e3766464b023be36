"""A torch Dataset is images by number, with a key of its content; what could not be resumed is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset, TensorDataset

from diffdistill.data.source import TensorImages
from diffdistill.data.torch_dataset import DatasetImages, as_source
from diffdistill.settings.schema import UserError

PIXELS = torch.randint(0, 256, (6, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
FLOATS = PIXELS / 127.5 - 1


class Rows:
    """A Dataset of these rows."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows_ = rows

    def __len__(self) -> int:
        return len(self.rows_)

    def __getitem__(self, number: int) -> Any:
        return self.rows_[number]


def pictures() -> Rows:
    return Rows([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in PIXELS])


FORMS: dict[str, Callable[[], Any]] = {
    "uint8 tensors": lambda: Rows(list(PIXELS)),
    "floats": lambda: Rows(list(FLOATS)),
    "arrays": lambda: Rows([image.permute(1, 2, 0).numpy() for image in PIXELS]),
    "arrays with the channels first": lambda: Rows(list(PIXELS.numpy())),
    "float arrays with the channels first": lambda: Rows(list(FLOATS.numpy())),
    "pictures": pictures,
    "a tensor dataset without labels": lambda: TensorDataset(PIXELS),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_image_is_the_same_image(form: str) -> None:
    source = as_source(FORMS[form]())
    index = torch.tensor([3, 0, 3])
    torch.testing.assert_close(source.rows(index), FLOATS[index])
    assert (source.image_shape, source.num_classes, source.labels, len(source)) == ((3, 4, 5), 0, None, 6)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_an_arrays_axes_show_which_are_the_channels(channels: int, dtype: type) -> None:
    pixels = np.arange(channels * 6 * 5, dtype=np.uint8).reshape(channels, 6, 5)
    first = torch.from_numpy(pixels / 127.5 - 1).float()[None]
    array = pixels if dtype == np.uint8 else (pixels / 127.5 - 1).astype(dtype)
    forms = [array, np.moveaxis(array, 0, 2), *([array[0]] if channels == 1 else [])]
    for form in forms:
        torch.testing.assert_close(as_source(Rows([form])).rows(torch.tensor([0])), first)


def test_arrays_of_latents_are_as_they_were() -> None:
    latents = np.random.default_rng(0).uniform(-1, 1, (16, 8, 8)).astype(np.float32)
    torch.testing.assert_close(as_source(Rows([latents])).rows(torch.tensor([0]))[0], torch.from_numpy(latents))
    points = torch.tensor([0.5, -0.5]).reshape(2, 1, 1)
    assert torch.equal(as_source(Rows([points])).rows(torch.tensor([0]))[0], points)


def test_labels_come_with_a_tensor_dataset() -> None:
    source = as_source(TensorDataset(PIXELS, LABELS))
    assert source.labels is not None
    assert torch.equal(source.labels, LABELS)
    assert source.num_classes == 3
    assert as_source(TensorDataset(PIXELS, LABELS), num_classes=10).num_classes == 10
    assert source.to(torch.device("cpu")).labels is not None


def test_what_is_expected_is_what_rows_gives() -> None:
    source = as_source(Rows(list(PIXELS)))
    source.expect(torch.tensor([1, 2]))
    assert torch.equal(source.rows(torch.tensor([1, 2])), FLOATS[[1, 2]])
    source.expect(torch.tensor([1, 2]))
    assert torch.equal(source.rows(torch.tensor([4])), FLOATS[[4]])


def test_the_key_is_of_images_labels_and_order() -> None:
    key = as_source(TensorDataset(PIXELS, LABELS)).key
    assert key == as_source(TensorDataset(PIXELS.clone(), LABELS.clone())).key
    others = [
        TensorDataset(PIXELS.flip(0), LABELS),
        TensorDataset(PIXELS, LABELS.flip(0)),
        TensorDataset(PIXELS[:5], LABELS[:5]),
        Rows(list(PIXELS)),
        Rows(list(PIXELS.transpose(2, 3))),
    ]
    keys = {as_source(other).key for other in others}
    assert len(keys) == len(others)
    assert key not in keys
    assert as_source(Rows(list(PIXELS)), key="mine").key == "mine"


def test_floats_without_a_negative_value_are_asked_about() -> None:
    dataset = Rows(list(PIXELS / 255))
    with pytest.raises(UserError, match=r"floats from 0\S* to .*value_range=\(0, 1\), or grey, value_range=\(-1, 1\)"):
        as_source(dataset)
    black, grey = as_source(dataset, value_range=(0, 1)), as_source(dataset, value_range=(-1, 1))
    torch.testing.assert_close(black.rows(torch.arange(6)), FLOATS)
    torch.testing.assert_close(grey.rows(torch.arange(6)), PIXELS / 255)
    assert black.key != grey.key
    with pytest.raises(UserError, match=r"value_range = \(1, 0\): must rise"):
        as_source(dataset, value_range=(1, 0))


def test_what_is_a_source_already_is_handed_back() -> None:
    source = TensorImages(FLOATS, None)
    assert as_source(source) is source


class Noisy(Rows):
    def __getitem__(self, number: int) -> Any:
        return torch.rand(1, 2, 2) * 2 - 1


class Flipped(Rows):
    """Every other time that a row is read it is the other way round, but for the first, the middle and the last."""

    count = 0

    def __getitem__(self, number: int) -> Any:
        self.count += number not in (0, len(self) // 2, len(self) - 1)
        return PIXELS[0].flip(2) if self.count % 2 else PIXELS[0]


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield PIXELS[0]


REFUSED: list[tuple[Any, str]] = [
    (Noisy([0, 1, 2]), r"row 0 of Noisy changes between reads, so a run could not be resumed"),
    (Flipped([0] * 20), r"row \d of Flipped changes between reads"),
    (Endless(), "Endless has no numbered rows; give a map-style Dataset"),
    (Rows([]), "Rows is empty"),
    (Rows([PIXELS[0], PIXELS[0, :, :2]]), r"row 1 is torch.uint8 \[3, 2, 5\], row 0 torch.uint8 \[3, 4, 5\]"),
    (Rows([PIXELS[0], FLOATS[0]]), r"row 1 is torch.float32"),
    (Rows([(PIXELS[0], 1), PIXELS[1]]), "row 1 has no label, unlike row 0"),
    (Rows([PIXELS[0], (PIXELS[1], 1)]), "row 1 has a label, unlike row 0"),
    (Rows([(PIXELS[0], -1)]), "row 0 has the label -1"),
    (Rows([(PIXELS[0], "cat")]), "a label is 'cat'; give the number of its class"),
    (Rows([(PIXELS[0], torch.tensor([0, 1]))]), r"a label is tensor\(\[0, 1\]\); give the number of its class"),
    (Rows([(PIXELS[0], torch.tensor(0.5))]), r"a label is tensor\(0.5000\); give the number of its class"),
    (Rows([FLOATS[0] * 2]), r"values go from .* outside \[-1, 1\]"),
    (Rows([FLOATS[0] / 0]), "row 0 holds NaN or infinite values"),
    (
        Rows([Image.new("RGB", (4, 4), "red").convert("P")]),
        r"an image has the mode 'P'; use image.convert\('RGB'\)",
    ),
    (Rows([Image.new("HSV", (4, 4))]), "an image has the mode 'HSV'"),
    (Rows([{"image": PIXELS[0]}]), "a row is dict|an image is|give an image"),
    (
        Rows([np.zeros((4, 4, 3))]),
        r"an image is a float array \[4, 4, 3\], \[C, H, W\] or \[H, W, C\]; give a tensor",
    ),
    (Rows([np.zeros((3, 8, 4))]), r"an image is a float array \[3, 8, 4\]"),
    (Rows([PIXELS[0].new_zeros(9, 8, 3)]), r"an image is a tensor \[9, 8, 3\]; tensors are \[C, H, W\]"),
    (Rows([torch.zeros(9, 8, 1)]), r"an image is a tensor \[9, 8, 1\]"),
    (Rows([np.zeros((2, 2, 2, 2))]), r"an image is torch.float64 \[2, 2, 2, 2\]"),
]


@pytest.mark.parametrize(("dataset", "said"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_cannot_be_trained_on_is_refused_with_the_reason(dataset: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"data: {said}"):
        as_source(dataset)


def test_rows_that_change_are_taken_where_the_caller_vouches_for_them() -> None:
    source = as_source(Noisy([0, 1, 2]), key="noise, whatever it is", value_range=(-1, 1))
    assert isinstance(source, DatasetImages)
    assert source.key == "noise, whatever it is"
    with pytest.raises(UserError, match="num_classes = 1, but there is a label 2"):
        as_source(TensorDataset(PIXELS, LABELS), num_classes=1)
