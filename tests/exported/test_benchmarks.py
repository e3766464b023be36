"""Images for GenEval and DPG-Bench, found again as their scripts find them."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.stand_ins import save_stand_in
from torchvision.transforms.functional import pil_to_tensor
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.data.pictures import to_uint8
from diffdistill.exported.image_generators import open_image_generator
from diffdistill.inference.image_generator import SampleRequest

PROMPTS = ["a photo of a bench", "a photo of two cows", "a red fox"]
LINES = [
    json.dumps({"tag": "counting", "include": [{"class": "x", "count": n}], "prompt": p}) for n, p in enumerate(PROMPTS)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stand_in("sd", tmp_path_factory.mktemp("benchmarks") / "sd")


def run(place: Path, *options: str) -> str:
    told = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["benchmark", str(place), "--steps", "1", *options])
    assert told.exit_code == 0, told.output
    return told.output


def expected(place: Path) -> torch.Tensor:
    """[prompt, sample, 3, 16, 16]: image s of prompt p is image s * 3 + p of these prompts."""
    made = open_image_generator(str(place), SampleRequest(prompts=PROMPTS, seed=5, num_steps=1))(torch.arange(12))
    return to_uint8(made).unflatten(0, (4, 3)).transpose(0, 1)


def test_geneval_finds_samples_and_the_line_of_each_prompt(place: Path, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text("\n".join(LINES) + "\n")
    out, prompts = tmp_path / "images", str(tmp_path / "metadata.jsonl")
    run(place, "--prompts", prompts, "--out", str(out), "--seed", "5", "--batch", "5")
    found = {}
    for folder in out.iterdir():  # as evaluate_images.py walks
        assert folder.is_dir()
        assert folder.name.isdigit()
        with (folder / "metadata.jsonl").open() as handle:
            prompt = json.load(handle)["prompt"]
        names = [file.name for file in (folder / "samples").iterdir() if re.match(r"\d+\.png", file.name)]
        assert sorted(names) == ["0000.png", "0001.png", "0002.png", "0003.png"]
        found[prompt] = torch.stack([pil_to_tensor(Image.open(folder / "samples" / name)) for name in sorted(names)])
        assert (folder / "metadata.jsonl").read_text().strip() == LINES[int(folder.name)]
    for prompt, images in zip(PROMPTS, expected(place), strict=True):
        assert (found[prompt].int() - images.int()).abs().max() <= 1
    told = json.loads((tmp_path / "images.json").read_text())
    assert (told["benchmark"], told["prompts"], told["images_per_prompt"], told["seed"]) == ("geneval", 3, 4, 5)


def test_dpg_bench_cuts_the_four_images_of_a_prompt_out_of_one_picture(place: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    for name, prompt in zip(("a", "b", "whoops1"), PROMPTS, strict=True):
        (tmp_path / "prompts" / f"{name}.txt").write_text(f"{prompt}\n")
    out = tmp_path / "images"
    options = ["--prompts", str(tmp_path / "prompts"), "--out", str(out), "--seed", "5"]
    run(place, "--layout", "dpg", *options)
    side = 16
    corners = [(0, 0), (side, 0), (0, side), (side, side)]  # as compute_dpg_bench.py cuts
    files = sorted(out.iterdir())
    assert [file.name.split(".")[0] for file in files] == ["a", "b", "whoops1"]
    for file, images in zip(files, expected(place), strict=True):
        picture = Image.open(file)
        for (left, top), image in zip(corners, images, strict=True):
            cut = pil_to_tensor(picture.crop((left, top, left + side, top + side)))
            assert (cut.int() - image.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ('{"tag": "x"}', [], "line 1: must be a JSON object with a `prompt`"),
        ("", [], "holds no prompts"),
        (LINES[0], ["--layout", "dpg"], "needs a folder of .txt files"),
        (LINES[0], ["--out", "{full}"], "name a new folder"),
    ],
)
def test_what_cannot_be_is_said(place: Path, tmp_path: Path, content: str, options: list[str], message: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old.png").touch()
    (tmp_path / "p.jsonl").write_text(content)
    options = [option.format(full=tmp_path / "full") for option in options]
    given = ["benchmark", str(place), "--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "new"), *options]
    told = CliRunner(env={"COLUMNS": "300"}).invoke(app, given)
    assert told.exit_code == 2
    assert message in told.output
