"""What libraries say of their weights is what features are computed with: over all of the libraries' tables."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.tiny_clip import MODEL, SIDE
from torch import Tensor

from diffdistill.eval.evaluation.reference import check_reference, compute_reference, open_reference, save_reference
from diffdistill.eval.features.extractors import Extractor, OpenClip, Pixels, Timm, Torchvision, load_extractor
from diffdistill.eval.features.networks import open_clip as clips
from diffdistill.eval.features.networks import timm as timms
from diffdistill.eval.features.networks import torchvision as visions
from diffdistill.eval.features.resize import clean_resize, framed, interpolated
from diffdistill.eval.features.stated import library_input, recorded
from diffdistill.eval.features.weights import Found
from diffdistill.eval.metrics.settings import Cmmd, Frechet
from diffdistill.eval.protocols.packaged import PROTOCOLS
from diffdistill.eval.protocols.protocol import Preparation, Protocol
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import dump, validate

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")
models = pytest.importorskip("torchvision.models")

OPENAI = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
PAIRS = open_clip.list_pretrained()
ROBERTA = ("roberta-ViT-B-32", "laion2b_s12b_b32k")
"""The one pair of which open_clip's model says QuickGELU and its table does not."""
HALF = (0.5, 0.5, 0.5)


def nowhere(features: Any) -> Extractor:
    """A stand-in under a specification."""
    return Extractor(label=features.label, network=lambda x: x, prepare=lambda x: x, num_features=None)


def clip_extractor(features: OpenClip) -> Extractor:
    now = clips.complete(features)
    return replace(nowhere(now), features=now, earlier=clips._earlier(now))


def test_every_pair_of_open_clips_table_gets_what_the_table_says() -> None:
    assert len(PAIRS) >= 196
    for model, tag in PAIRS:
        row, config = open_clip.get_pretrained_cfg(model, tag), open_clip.get_model_config(model)
        if (model, tag) == ROBERTA:
            continue
        got = clips.complete(OpenClip(model=model, pretrained=tag))
        assert got.quick_gelu is row.get("quick_gelu", False), (model, tag)
        assert (got.mean, got.std) == (tuple(row["mean"]), tuple(row["std"])), (model, tag)
        assert (got.interpolation, got.resize_mode) == (row["interpolation"], row["resize_mode"])
        assert got.size == config["vision_cfg"]["image_size"]
        assert clips.complete(got) == got


def test_a_pair_that_open_clip_contradicts_itself_about_is_refused_until_the_user_says_it() -> None:
    roberta = OpenClip(model=ROBERTA[0], pretrained=ROBERTA[1])
    with pytest.raises(UserError, match=r"features\.quick_gelu: the model roberta.* say quick_gelu: true"):
        clips.complete(roberta)
    assert clips.complete(replace(roberta, quick_gelu=True)).quick_gelu
    with pytest.raises(UserError, match=r"features\.quick_gelu"):
        clips.complete(replace(roberta, quick_gelu=False))


def test_pairs_that_were_right_before_keep_their_protocol_and_others_get_another() -> None:
    changed: Counter[str] = Counter()
    for model, tag in PAIRS:
        if (model, tag) == ROBERTA:
            continue
        row, config = open_clip.get_pretrained_cfg(model, tag), open_clip.get_model_config(model)
        before = bool(config.get("quick_gelu")) or tag == "openai"
        told = dump(recorded(clip_extractor(OpenClip(model=model, pretrained=tag)), is_square=True))
        was = {"name": "open_clip", "model": model, "pretrained": tag, "size": config["vision_cfg"]["image_size"]}
        was |= {"resize": "clean", "normalise": "unit", "sha256": None}
        other: dict[str, Any] = {}
        if row.get("quick_gelu", False) != before:
            other["quick_gelu"] = not before
        if (tuple(row["mean"]), tuple(row["std"])) != OPENAI:
            other |= {"mean": list(row["mean"]), "std": list(row["std"])}
        if row["interpolation"] != "bicubic":
            other["interpolation"] = row["interpolation"]
        assert told == was | other, (model, tag)
        changed.update(list(other))
    assert changed["quick_gelu"] >= 18
    assert changed["mean"] >= 50


def test_squashed_and_cropped_images_are_told_apart_where_they_are_no_squares() -> None:
    made = clip_extractor(OpenClip(model="ViT-B-32", pretrained="openai"))
    assert dump(recorded(made, is_square=False))["resize_mode"] == "shortest"
    assert "resize_mode" not in dump(recorded(made, is_square=True))


def protocol_of(features: Any) -> Protocol:
    return Protocol(name="own", num_images=4, image_shape=(3, 8, 8), metrics=(Frechet(features=features),))


def test_the_packaged_protocols_are_the_same_as_before_once_they_are_resolved() -> None:
    before = {"name": "open_clip", "resize": "clean", "normalise": "unit", "sha256": None}
    expected = {
        "coco-clip": {"model": "ViT-g-14", "pretrained": "laion2b_s12b_b42k", "size": 224},
        "coco2014-cmmd30k": {"model": "ViT-L-14-336", "pretrained": "openai", "size": 336},
    }
    for name, told in expected.items():
        protocol = PROTOCOLS[name]
        features: Any = protocol.metrics[0].features
        used = {features.label: recorded(clip_extractor(features), is_square=protocol.is_square)}
        resolved = dump(protocol.resolved(weights={}, references={}, features=used))
        assert resolved["metrics"][0]["features"] == before | told
        assert dump(validate(Protocol, resolved, origin="again")) == resolved


def test_the_protocol_says_what_was_used_where_it_was_not_known_before() -> None:
    features = OpenClip(model="ViT-B-32", pretrained="metaclip_400m")
    used = {features.label: recorded(clip_extractor(features), is_square=True)}
    resolved = protocol_of(features).resolved(weights={}, references={}, features=used)
    assert dump(resolved)["metrics"][0]["features"]["quick_gelu"] is True


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"pretrained": "laion400m_e99"},
            r"pretrained = 'laion400m_e99': open_clip has no such .* laion400m_e31.*own",
        ),
        (
            {"pretrained": "openai", "quick_gelu": False},
            r"quick_gelu = false: open_clip of ViT-B-32, openai, says t",
        ),
        ({"pretrained": "openai", "mean": HALF}, r"mean = \[0\.5, 0\.5, 0\.5\]: open_clip .* says \[0\.48145466, "),
        ({"pretrained": "openai", "std": HALF}, r"features\.std = "),
        ({"pretrained": "openai", "size": 256}, r"features\.size = 256: ViT-B-32 takes 224"),
        ({"pretrained": "own"}, r"pretrained = own: say features\.quick_gelu as well \(quick_gelu, mean, std\)"),
        ({"pretrained": "own", "quick_gelu": True, "mean": HALF}, r"say features\.std as well"),
    ],
)
def test_what_open_clip_does_not_know_or_says_otherwise_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        clips.complete(OpenClip(model="ViT-B-32", **settings))


def test_weights_of_ones_own_say_their_facts() -> None:
    own = OpenClip(model="ViT-B-32", pretrained="own", quick_gelu=True, mean=HALF, std=HALF)
    got = clips.complete(own)
    assert (got.quick_gelu, got.mean, got.std, got.interpolation) == (True, HALF, HALF, "bicubic")
    timm_own = timms.complete(Timm(model="resnet18", pretrained="own", mean=HALF, std=HALF))
    assert (timm_own.mean, timm_own.pretrained) == (HALF, "own")
    vision_own = visions.complete(Torchvision(model="resnet18", pretrained="own", mean=HALF, std=HALF))
    assert (vision_own.mean, vision_own.pretrained) == (HALF, "own")
    for features, complete in ((Timm, timms.complete), (Torchvision, visions.complete)):
        with pytest.raises(UserError, match=r"pretrained = own: say features\.mean as well"):
            complete(features(model="resnet18", pretrained="own"))  # type: ignore[operator]


def test_a_way_to_resize_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    row = open_clip.get_pretrained_cfg("ViT-B-32", "openai")
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: row | {"resize_mode": "longest"})
    features = OpenClip(model="ViT-B-32", pretrained="openai")
    with pytest.raises(UserError, match=r"features\.resize_mode: open_clip .* says 'longest', .* shortest, squash"):
        clips.complete(features)
    assert clips.complete(replace(features, resize_mode="squash")).resize_mode == "squash"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with a row of its own in open_clip's table, and the file of its QuickGELU weights."""
    (tmp_path / "tiny-stated.json").write_text(json.dumps(MODEL))
    open_clip.add_model_config(tmp_path / "tiny-stated.json")
    row = {"quick_gelu": True, "mean": HALF, "std": HALF, "interpolation": "bilinear", "resize_mode": "shortest"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-stated", {"quick": row})
    torch.manual_seed(0)
    network = open_clip.create_model("tiny-stated", force_quick_gelu=True)
    with torch.no_grad():
        for name, value in network.named_parameters():
            value.mul_(20 if ".c_proj." in name else 1)  # so that the activation weighs more than what it is added to
    file = tmp_path / "clip.safetensors"
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, file)
    return file


def test_open_clips_features_are_those_of_its_own_network_and_transform(tiny: Path) -> None:
    extractor = load_extractor(OpenClip(model="tiny-stated", pretrained="quick"), weights=tiny)
    theirs = open_clip.create_model("tiny-stated", force_quick_gelu=True).eval()
    theirs.load_state_dict(load(tiny))
    images = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    how = open_clip.transform.PreprocessCfg(size=SIDE, mean=HALF, std=HALF, interpolation="bilinear")
    preprocess = open_clip.transform.image_transform_v2(how, is_train=False)
    seen = torch.stack([preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    with torch.no_grad():
        assert torch.allclose(extractor.prepare(images), seen, atol=1e-6)
        assert torch.allclose(extractor(images).features, theirs.encode_image(seen, normalize=True), atol=1e-5)
        plain = open_clip.create_model("tiny-stated").eval()
        plain.load_state_dict(load(tiny))
        assert not torch.allclose(extractor(images).features, plain.encode_image(seen, normalize=True), atol=1e-3)


def load(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(file))


@pytest.mark.parametrize("shape", [(40, 100), (90, 33), (64, 64), (20, 27)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_images_are_resized_and_cropped_as_torchvision_does_it(shape: tuple[int, int], interpolation: Any) -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import center_crop, resize

    values = torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(0)) * 255
    how = InterpolationMode(interpolation)
    theirs = center_crop(resize(values.double(), [48], how, antialias=True), [32]).clamp(0, 255)
    got = framed(values, 32, side=48, mode="shortest", interpolation=interpolation)
    assert float((got - theirs).abs().max()) < 1e-3
    on_a_gpu = interpolated(values, (40, 56), interpolation)
    assert float((on_a_gpu - clean_resize(values, (40, 56), interpolation)).abs().max()) < 1e-3
    squashed = resize(values.double(), [32, 32], how, antialias=True).clamp(0, 255)
    got = framed(values, 32, side=32, mode="squash", interpolation=interpolation)
    assert float((got - squashed).abs().max()) < 1e-3


def test_every_weights_of_timm_gets_what_timm_says() -> None:
    refused = 0
    names = timm.list_pretrained()
    for name in names:
        config = timm.get_pretrained_cfg(name)
        how = timm.data.resolve_data_config(pretrained_cfg=config.to_dict())
        if how["crop_mode"] == "border" or how["input_size"][1] != how["input_size"][2]:
            refused += 1
            with pytest.raises(UserError, match=r"features\.(resize_mode: timm .* says 'border'|model = .* n x n)"):
                timms.complete(Timm(model=name))
            continue
        got = timms.complete(Timm(model=name))
        assert (got.mean, got.std) == (tuple(how["mean"]), tuple(how["std"])), name
        assert got.interpolation == how["interpolation"], name
        assert got.size == how["input_size"][1] == how["input_size"][2]
        assert got.resize_side == int(got.size / how["crop_pct"]), name
        assert {"shortest": "center", "squash": "squash"}[str(got.resize_mode)] == how["crop_mode"]
    assert refused < len(names) / 100


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t", "vit_base_patch16_siglip_224"])
def test_timms_images_are_those_of_its_transform(name: str) -> None:
    got = timms.complete(Timm(model=name))
    how = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    image = np.random.default_rng(0).integers(90, 160, (60, 90, 3), dtype=np.uint8)
    theirs = timm.data.create_transform(**how)(Image.fromarray(image))
    ours = library_input(got)(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
    grey_level = 1 / 255 / min(how["std"])
    assert float((ours - theirs).abs().max()) < 1.5 * grey_level  # theirs rounds to whole levels twice


def test_timms_weights_are_named_by_the_tag_or_behind_the_model() -> None:
    for features in (Timm(model="vit_base_patch16_224.dino"), Timm(model="vit_base_patch16_224", pretrained="dino")):
        got = timms.complete(features)
        assert (got.pretrained, timms._name(got)) == ("dino", "vit_base_patch16_224.dino")
        assert got.mean == (0.485, 0.456, 0.406)
    assert timms.complete(Timm(model="vit_base_patch16_224")).mean == HALF


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model": "vit_base_patch16_224", "pretrained": "dinner"},
            r"'dinner': timm has no such .*dino.*own",
        ),
        ({"model": "vit_base_patch16_224.dinner"}, "timm has no"),
        (
            {"model": "vit_base_patch16_224.dino", "pretrained": "mae"},
            r"'mae': timm has no such weights of",
        ),
        ({"model": "vit_base_patch16_224", "mean": (0.485, 0.456, 0.406)}, r"mean = .*timm of .* says \[0\.5, 0\.5, 0"),
        ({"model": "vit_base_patch16_224", "size": 64}, r"size = 64: vit_base_patch16_224 takes 224"),
    ],
)
def test_what_timm_does_not_know_or_says_otherwise_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        timms.complete(Timm(**settings))


def entries() -> list[tuple[str, Any]]:
    names = models.list_models(module=models)
    return [(name, entry) for name in names for entry in models.get_model_weights(name)]


def test_every_weights_of_torchvision_gets_what_its_transforms_say() -> None:
    assert len(entries()) >= 115
    for name, entry in entries():
        how = entry.transforms()
        got = visions.complete(Torchvision(model=name, pretrained=entry.name))
        assert (got.mean, got.std) == (tuple(how.mean), tuple(how.std)), entry
        assert ([got.size], [got.resize_side]) == (how.crop_size, how.resize_size), entry
        assert got.interpolation == how.interpolation.value
        assert got.resize_mode == "shortest"
        told = visions._told_by_the_file(Torchvision(model=name), found(entry))
        assert told.pretrained == entry.name


def found(entry: Any) -> Found:
    digits = entry.url.rpartition("-")[2].partition(".")[0]
    return Found(Path("weights.pth"), digits + "0" * (64 - len(digits)))


def test_torchvisions_images_are_those_of_the_weights_transforms() -> None:
    for name, tag in (("resnet18", "IMAGENET1K_V1"), ("regnet_y_16gf", "IMAGENET1K_SWAG_E2E_V1")):
        entry = models.get_model_weights(name)[tag]
        image = torch.randint(0, 256, (1, 3, 60, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        ours = library_input(visions.complete(Torchvision(model=name, pretrained=tag)))(image)
        assert float((ours - entry.transforms()(image)).abs().max()) < 0.51 / 255 / 0.224


def test_a_file_of_torchvisions_says_which_weights_it_holds() -> None:
    first = models.get_model_weights("resnet50")["IMAGENET1K_V1"]
    assert visions._told_by_the_file(Torchvision(model="resnet50"), found(first)).pretrained == "IMAGENET1K_V1"
    with pytest.raises(UserError, match=r"pretrained = 'IMAGENET1K_V2': weights\.pth holds IMAGENET1K_V1"):
        visions._told_by_the_file(Torchvision(model="resnet50", pretrained="IMAGENET1K_V2"), found(first))
    mine = Found(Path("mine.pth"), "f" * 64)
    assert visions._told_by_the_file(Torchvision(model="resnet50"), mine).pretrained is None
    with pytest.raises(UserError, match=r"torchvision has no such weights of resnet50 \(choices: IMAGENET1K_V1, IMAGE"):
        visions.complete(Torchvision(model="resnet50", pretrained="V3"))
    with pytest.raises(UserError, match=r"features\.mean = .*torchvision of resnet50, IMAGENET1K_V2, says"):
        visions.complete(Torchvision(model="resnet50", mean=HALF))


def test_a_network_that_transforms_its_input_for_its_weights_does_so_here() -> None:
    kind = type(models.get_model_weights("googlenet").DEFAULT)
    before = kind.get_state_dict
    with torch.device("meta"):
        state = models.googlenet(weights=None, aux_logits=True, init_weights=False).state_dict()
        made = visions._network(Torchvision(model="googlenet"), state, origin=Path("weights.pth"))
    assert made.transform_input
    assert kind.get_state_dict == before


def test_cmmd_bears_its_name_over_its_authors_weights_alone() -> None:
    theirs, other = (OpenClip(model="ViT-L-14-336", pretrained=tag) for tag in ("openai", "own"))
    assert Cmmd(features=theirs).keys == ("cmmd",)
    assert Cmmd(features=other).keys == ("mmd-clip-vit-l-14-336",)


class Few:
    """Six images as a reference's."""

    origin, notes = "few", ""

    def __len__(self) -> int:
        return 6

    def rows(self, index: Tensor) -> Tensor:
        return torch.arange(6 * 12, dtype=torch.uint8).view(6, 3, 2, 2)[index]

    def class_names(self, count: int | None = None) -> tuple[str, ...]:
        return ()


def reference_of(features: OpenClip, file: Path, *, is_of_before: bool) -> Any:
    made = compute_reference(Few(), replace(pixels(), **about(features)), Preparation())
    if is_of_before:
        made = replace(made, about=replace(made.about, features=None))
    save_reference(made, file)
    return open_reference(file, label=features.label)


def pixels() -> Extractor:
    return load_extractor(Pixels())


def about(features: OpenClip) -> dict[str, Any]:
    made = clip_extractor(features)
    return {"label": made.label, "features": made.features, "earlier": made.earlier}


RIGHT, OTHER = (OpenClip(model="ViT-B-32", pretrained=tag) for tag in ("laion2b_s34b_b79k", "metaclip_400m"))


def test_references_of_other_settings_are_refused(tmp_path: Path) -> None:
    made = reference_of(OTHER, tmp_path / "new.npz", is_of_before=False)
    check_reference(made, clip_extractor(OTHER), Preparation(), is_square=True)
    told = r"with other settings \(quick_gelu True -> False\); compute it again"
    with pytest.raises(UserError, match=told):
        check_reference(made, clip_extractor(RIGHT), Preparation(), is_square=True)
    bilinear = replace(OTHER, interpolation="bilinear")
    with pytest.raises(UserError, match=r"interpolation bicubic -> bilinear"):
        check_reference(made, clip_extractor(bilinear), Preparation(), is_square=True)


def test_references_of_before_are_read_where_their_settings_were_right(tmp_path: Path) -> None:
    right = reference_of(RIGHT, tmp_path / "right.npz", is_of_before=True)
    check_reference(right, clip_extractor(RIGHT), Preparation(), is_square=True)
    with pytest.raises(UserError, match=r"resize_mode squash -> shortest"):
        check_reference(right, clip_extractor(RIGHT), Preparation(), is_square=False)
    other = reference_of(OTHER, tmp_path / "other.npz", is_of_before=True)
    with pytest.raises(UserError, match=r"with other settings \(quick_gelu False -> True\)"):
        check_reference(other, clip_extractor(OTHER), Preparation(), is_square=True)


def test_references_tell_all_settings_of_all_features(tmp_path: Path) -> None:
    from diffdistill.eval.features.extractors import DinoV2

    small, large = (replace(pixels(), label="dinov2-vitl14", features=DinoV2(size=size)) for size in (224, 518))
    made = compute_reference(Few(), small, Preparation())
    save_reference(made, tmp_path / "r.npz")
    read = open_reference(tmp_path / "r.npz", label="dinov2-vitl14")
    check_reference(read, small, Preparation(), is_square=True)
    with pytest.raises(UserError, match=r"size 224 -> 518"):
        check_reference(read, large, Preparation(), is_square=True)
