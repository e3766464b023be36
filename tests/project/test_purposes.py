"""What is for something else than distance: the page shows the records, and a Gaussian of any data is images."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from diffdistill.data.digits import Digits

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "scripts" / "purpose_tables.py")


def test_the_page_shows_the_records(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "purposes.md").read_text())
    runpy.run_path(SCRIPT)["table"](ROOT / "results" / "purposes.jsonl", page)
    assert page.read_text() == (ROOT / "docs" / "purposes.md").read_text()


def test_a_row_is_the_mean_with_the_least_and_the_greatest_of_the_seeds(tmp_path: Path) -> None:
    made = runpy.run_path(SCRIPT)
    rows = [
        {"table": "bits", "row": "4", "seed": seed, "figures": {"KiB": 8.0, "fd-pixels": value}}
        for seed, value in enumerate((0.25, 0.75, 0.5))
    ]
    records, page = tmp_path / "records.jsonl", tmp_path / "page.md"
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page.write_text("".join(f"<!-- table: {name} -->\nold\n<!-- end -->\nafter\n" for name in made["TABLES"]))
    made["table"](records, page)
    text = page.read_text()
    assert "| | KiB | fd-pixels |\n|---|---|---|\n| 4 | 8 | 0.500 (0.250 to 0.750) |" in text
    assert text.count("after") == len(made["TABLES"])
    assert "old" not in text


def test_of_a_gaussian_of_any_data_there_are_images(tmp_path: Path) -> None:
    main = runpy.run_path(str(ROOT / "scripts" / "gaussian_images.py"))["main"]
    main("{name: digits}", tmp_path / "gaussian.npz", count=4000, seed=0)
    with np.load(tmp_path / "gaussian.npz", allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    assert images.shape == (4000, 8, 8, 1)
    assert labels[:12].tolist() == [*range(10), 0, 1]
    real, of = Digits().tensors()
    for label in (0, 7):
        found = torch.from_numpy(images[labels == label]).double().mean(0)[..., 0] / 127.5 - 1
        assert found.numpy() == pytest.approx(
            real[of == label].double().mean(0)[0].numpy(), abs=0.3
        )  # cut off at black and white
