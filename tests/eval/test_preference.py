"""PickScore, HPS and LAION's aesthetic score: what their authors' own lines compute, on small random networks."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torchvision.transforms.functional as TF
import yaml
from PIL import Image
from support.tiny_clip import LABEL, METRIC, SIDE, write_clip
from support.tiny_preference import Judges, write_judges
from torch import Tensor
from torchvision.transforms import InterpolationMode
from transformers import CLIPImageProcessor
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.eval.features.extractors import Hps, LaionAesthetic, PickScore, load_extractor
from diffdistill.eval.features.networks import hps, pickscore
from diffdistill.eval.features.resize import CLIP_MEAN, CLIP_STD
from diffdistill.eval.metrics.scores import mean_product
from diffdistill.eval.protocols.packaged import PROTOCOLS
from diffdistill.eval.records.record import Record, read_records
from diffdistill.settings.schema import UserError

CAPTIONS = ["a dog on a beach", "two cats", "a red bus"]
HEIGHT, WIDTH = 40, 60


@pytest.fixture
def judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judges:
    return write_judges(tmp_path, monkeypatch)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Image.Image]:
    """Smooth ones: what Pillow rounds between its passes then moves little."""
    made = np.random.default_rng(0).integers(0, 256, (len(CAPTIONS), 5, 7, 3), dtype=np.uint8)
    pictures = [Image.fromarray(image).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC) for image in made]
    (tmp_path / "images").mkdir()
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / "images" / f"{number}.png")
    return pictures


def measure(folder: Path, metrics: list[object], weights: dict[str, Path]) -> Record:
    """`diffdistill eval` of the folder's images by their captions."""
    protocol = {
        "name": "tiny-preference",
        "num_images": len(CAPTIONS),
        "labels": {"policy": "captions"},
        "captions": {"name": "captions.txt", "count": len(CAPTIONS)},
        "metrics": metrics,
    }
    (folder / "protocol.yaml").write_text(yaml.safe_dump(protocol))
    (folder / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    given = [part for label, file in weights.items() for part in ("--weights", f"{label}={file}")]
    options = ["--protocol", str(folder / "protocol.yaml"), "--captions", str(folder / "captions.txt"), *given]
    told = CliRunner().invoke(app, ["eval", str(folder / "images"), *options, "--records", str(folder / "r.jsonl")])
    assert told.exit_code == 0, told.output
    return read_records(folder / "r.jsonl")[-1]


def unit(values: Tensor) -> Tensor:
    return values / values.norm(dim=-1, keepdim=True)


def as_pickscore_says(judges: Judges, pictures: list[Image.Image], captions: list[str]) -> Tensor:
    """The lines of PickScore's card; tokens padded as its processor pads them, with a mask."""
    processor = CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    model, tokens = judges.pickscore, open_clip.tokenize(captions)
    ends = tokens.argmax(1)
    mask = (torch.arange(tokens.shape[1]) <= ends[:, None]).long()
    padded = torch.where(mask.bool(), tokens, 49407)  # the end's own number
    images = model.get_image_features(**processor(images=pictures, return_tensors="pt"))
    texts = model.get_text_features(input_ids=padded, attention_mask=mask)
    images, texts = (getattr(found, "pooler_output", found) for found in (images, texts))
    return (model.logit_scale.exp() * unit(texts) @ unit(images).T).diagonal()


def as_hps_says(judges: Judges, pictures: list[Image.Image], captions: list[str]) -> Tensor:
    """Its authors' input: to a tensor, the longer side to the network's, black around; then the cosine."""
    shown = []
    for picture in pictures:
        scale = SIDE / max(picture.size)
        size = [round(picture.height * scale), round(picture.width * scale)]
        small = TF.resize(TF.to_tensor(picture), size, InterpolationMode.BICUBIC, antialias=True)
        rows, columns = SIDE - size[0], SIDE - size[1]
        padded = TF.pad(small, [columns // 2, rows // 2, columns - columns // 2, rows - rows // 2])
        shown.append(TF.normalize(padded, list(CLIP_MEAN), list(CLIP_STD)))
    images = judges.hps.encode_image(torch.stack(shown), normalize=True)
    return (images * judges.hps.encode_text(open_clip.tokenize(captions), normalize=True)).sum(1)


def as_laion_says(judges: Judges, pictures: list[Image.Image]) -> Tensor:
    transform = open_clip.image_transform(SIDE, is_train=False, mean=CLIP_MEAN, std=CLIP_STD)
    shown = torch.stack([transform(picture) for picture in pictures])
    return judges.head(unit(judges.clip.encode_image(shown))).squeeze(1)


@torch.no_grad()
def test_the_scores_of_one_protocol_are_those_of_their_authors(
    judges: Judges, pictures: list[Image.Image], tmp_path: Path
) -> None:
    write_clip(tmp_path)  # beside the preference models another CLIP, whose captions have a prefix
    aesthetic = {"name": "aesthetic", "features": {"name": "laion_aesthetic", "head_sha256": judges.head_sha256}}
    metrics = [
        METRIC,
        {"name": "preference", "features": {"name": "pickscore"}},
        {"name": "preference", "features": {"name": "hps"}},
        aesthetic,
    ]
    record = measure(tmp_path, metrics, {**judges.files, LABEL: tmp_path / "clip.safetensors"})
    found = {name: values.mean for name, values in record.metrics.items()}
    # Pillow rounds to grey levels after its resize, here and in their code alike; ours keeps the fractions.
    assert found["pickscore"] == pytest.approx(float(as_pickscore_says(judges, pictures, CAPTIONS).mean()), abs=5e-3)
    assert found["hps-v2.1"] == pytest.approx(float(as_hps_says(judges, pictures, CAPTIONS).mean()), abs=1e-6)
    assert found["laion-aesthetic"] == pytest.approx(float(as_laion_says(judges, pictures).mean()), abs=1e-4)
    moved = [*CAPTIONS[1:], CAPTIONS[0]]
    assert abs(found["pickscore"] - float(as_pickscore_says(judges, pictures, moved).mean())) > 5e-2
    assert abs(found["hps-v2.1"] - float(as_hps_says(judges, pictures, moved).mean())) > 1e-4
    assert set(record.protocol["weights_sha256"]) == {LABEL, *judges.files}


@pytest.mark.parametrize("spec", [PickScore(), Hps()])
def test_the_network_is_as_large_as_the_published_one(spec: PickScore | Hps) -> None:
    """Both are ViT-H-14, of which two libraries agree: nothing of it is made, weights stay without memory."""
    with torch.device("meta"):
        is_theirs = isinstance(spec, PickScore)
        model = pickscore.network() if is_theirs else open_clip.create_model(hps.MODEL, device="meta")
    assert sum(weight.numel() for weight in model.parameters()) == 986_109_441


def test_images_get_a_gradient_that_finite_differences_confirm(judges: Judges) -> None:
    for spec in (PickScore(), Hps(), LaionAesthetic(head_sha256=judges.head_sha256)):
        extractor = load_extractor(spec)
        image = torch.rand(1, 3, 24, 36, generator=torch.Generator().manual_seed(0)) * 2 - 1
        extractor(image)  # whatever the first, gradient-free, use keeps must not be in the way
        leaf = image.requires_grad_()

        def score(values: Tensor, extractor: object = extractor) -> Tensor:
            found = extractor.network(extractor.prepare(values))  # type: ignore[attr-defined]
            return found[1].sum() if isinstance(found, tuple) else found[:, :4].sum()

        (gradient,) = torch.autograd.grad(score(leaf), leaf)
        direction = gradient.detach() / gradient.norm()
        with torch.no_grad():
            slope = (score(leaf + 1e-2 * direction) - score(leaf - 1e-2 * direction)) / 2e-2
        assert float(slope) == pytest.approx(float(gradient.norm()), rel=2e-2)


def test_weights_of_another_network_and_a_missing_file_are_named(judges: Judges, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"HPS_v2\.1_compressed\.pt: not weights of this network"):
        load_extractor(PickScore(), weights=judges.files["hps-v2.1"])
    with pytest.raises(UserError, match=r"HPS_v2_compressed\.pt"):
        load_extractor(Hps(version="v2.0"))
    with pytest.raises(UserError, match="its SHA-256 is"):
        load_extractor(LaionAesthetic())  # the published predictor's hash, another file


def test_the_mean_product_is_no_cosine() -> None:
    images, texts = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 1.0], [1.0, -1.0]])
    assert mean_product(images, texts) == pytest.approx((3 - 2) / 2)
    with pytest.raises(UserError, match="each image needs its text"):
        mean_product(images, texts[:1])


def test_the_packaged_protocol_has_all_three() -> None:
    keys = [key for metric in PROTOCOLS["coco-preference"].metrics for key in metric.keys]
    assert keys == ["pickscore", "hps-v2.1", "laion-aesthetic"]
