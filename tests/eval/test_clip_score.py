"""CLIP score through the command line: a folder of images, a file of captions, a small CLIP from a local file."""

from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from PIL import Image
from support.tiny_clip import LABEL, METRIC, write_clip
from torch import nn
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.eval.records.record import read_records

CAPTIONS = ["a dog on a beach", "two cats", "the same again", "a red bus"]


@pytest.fixture
def clip(tmp_path: Path) -> nn.Module:
    return write_clip(tmp_path)


def score(folder: Path, captions: list[str]) -> float:
    """What `diffdistill eval` says about four images in a folder."""
    protocol = {
        "name": "tiny-clip",
        "num_images": len(CAPTIONS),
        "image_shape": [3, 32, 32],
        "labels": {"policy": "captions"},
        "captions": {"name": "captions.txt", "count": len(CAPTIONS)},
        "metrics": [METRIC],
    }
    (folder / "protocol.yaml").write_text(yaml.safe_dump(protocol))
    (folder / "captions.txt").write_text("\n".join(captions) + "\n")
    options = [
        *("--protocol", str(folder / "protocol.yaml"), "--captions", str(folder / "captions.txt")),
        *("--weights", f"{LABEL}={folder / 'clip.safetensors'}", "--records", str(folder / "r.jsonl")),
    ]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["eval", str(folder / "images"), *options])
    assert result.exit_code == 0, result.output
    return read_records(folder / "r.jsonl")[-1].metrics["clip-score"].mean


@torch.no_grad()
def test_the_clip_score_is_the_mean_cosine_of_each_image_and_its_own_caption(clip: nn.Module, tmp_path: Path) -> None:
    made = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (32, 32, 3), generator=made, dtype=torch.uint8).numpy() for _ in CAPTIONS]
    (tmp_path / "images").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
    shown = torch.stack([open_clip.image_transform(32, is_train=False)(Image.fromarray(image)) for image in images])
    of_images = clip.encode_image(shown, normalize=True).double()  # type: ignore[operator]

    def cosines(captions: list[str]) -> torch.Tensor:
        tokens = open_clip.tokenize([f"A photo depicts {caption}" for caption in captions])
        return (of_images * clip.encode_text(tokens, normalize=True).double()).sum(1)  # type: ignore[operator]

    assert score(tmp_path, CAPTIONS) == pytest.approx(float(cosines(CAPTIONS).mean()), rel=1e-5)
    moved = [*CAPTIONS[1:], CAPTIONS[0]]
    assert float(cosines(moved).mean()) != pytest.approx(float(cosines(CAPTIONS).mean()), rel=1e-3)
    assert score(tmp_path, moved) == pytest.approx(float(cosines(moved).mean()), rel=1e-5)


def test_other_captions_are_another_protocol(clip: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(len(CAPTIONS)):
        Image.new("RGB", (32, 32), (60 * i, 10, 90)).save(tmp_path / "images" / f"{i}.png")
    for captions in (CAPTIONS, CAPTIONS[::-1], CAPTIONS):
        score(tmp_path, captions)
    first, other, again = (record.protocol_id for record in read_records(tmp_path / "r.jsonl"))
    assert first == again != other
