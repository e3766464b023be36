"""Rows of images with their names, as the README and the demo show them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffdistill.data.pictures import save_rows


def test_rows_stand_below_one_another_right_of_their_labels(tmp_path: Path) -> None:
    file = tmp_path / "rows.png"
    dark, light = (torch.full((3, 1, 8, 8), value) for value in (-1.0, 0.0))
    save_rows(file, {"teacher\n35 NFE": dark, "student": light}, min_side=56)
    pixels = np.array(Image.open(file))
    assert pixels.shape[0] == 2 * 58
    images = pixels[:, -3 * 58 :]
    for row, value in ((0, 0), (1, 128)):
        for column in range(3):
            image = images[58 * row : 58 * row + 56, 58 * column : 58 * column + 56]
            assert (image == value).all()
    labels = pixels[:, : -3 * 58]
    assert (labels[:58] < 128).any()
    assert (labels[58:] < 128).any()
    assert (labels[:, -2:] == 255).all()  # none runs into the images


def test_titles_stand_over_their_columns(tmp_path: Path) -> None:
    plain, titled = tmp_path / "plain.png", tmp_path / "titled.png"
    rows = {"one": torch.ones(2, 1, 8, 8)}
    save_rows(plain, rows)
    save_rows(titled, rows, titles=["0", "1"])
    below, whole = np.array(Image.open(plain)), np.array(Image.open(titled))
    added = len(whole) - len(below)
    assert (whole[added:] == below).all()
    first, second = np.array_split(whole[:added, -2 * 58 :], 2, axis=1)
    assert (first < 128).any()
    assert (second < 128).any()
    assert (whole[:added, : -2 * 58] == 255).all()
