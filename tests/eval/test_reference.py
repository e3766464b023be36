"""References and protocols: computed once, written whole, imported from other tools, and refused where they lie."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.made_features import normal
from support.pictures import NAMES, by_class, encode, pictures, write_folder
from torch import Tensor
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.data.digits import Digits
from diffdistill.data.image_folder import ImageFolder
from diffdistill.eval.evaluation import digits
from diffdistill.eval.evaluation.real import find_reference, open_real_images, parse_weights, write_references
from diffdistill.eval.evaluation.reference import RealFeatures, compute_reference, open_reference, save_reference
from diffdistill.eval.features.extractors import (
    CifarResNet,
    DinoV2,
    Extractor,
    Inception,
    OpenClip,
    Pixels,
    load_extractor,
    register,
)
from diffdistill.eval.features.resize import levels
from diffdistill.eval.images.files import open_images
from diffdistill.eval.metrics.distances import frechet_from_features, frechet_from_summaries
from diffdistill.eval.metrics.moments import Summary
from diffdistill.eval.metrics.neighbours import precision_recall
from diffdistill.eval.metrics.settings import Cmmd, Frechet, InceptionScore, KernelDistance, PrecisionRecall
from diffdistill.eval.metrics.sides import MissingFeaturesError
from diffdistill.eval.protocols.packaged import DIGITS_PIXELS, PROTOCOLS, find_protocol
from diffdistill.eval.protocols.protocol import Captions, Labels, Preparation, Protocol, Reference
from diffdistill.eval.records.record import protocol_id
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import dump, dump_yaml, validate

PLAIN = Preparation()
D = 4


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFDISTILL_REFERENCES", str(tmp_path / "references"))
    return tmp_path / "references"


def corners(images: Tensor) -> Tensor:
    return torch.stack([images[:, 0, 0, 0], images[:, 1, -1, 0], images[:, 2, 0, -1], images.mean((1, 2, 3))], 1)


EXTRACTOR = Extractor(label="corners", network=corners, prepare=levels, num_features=D, sha256="a" * 64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "f", {f"{n:03d}.png": encode(p) for n, p in enumerate(pictures(40)[0])})


@pytest.fixture
def made(folder: Path) -> RealFeatures:
    return compute_reference(open_images(folder, PLAIN), EXTRACTOR, PLAIN, batch_size=7)


def all_features() -> Tensor:
    return corners(torch.from_numpy(pictures(40)[0]).permute(0, 3, 1, 2).float())


def test_a_reference_is_the_mean_the_scatter_and_the_features_of_its_images(made: RealFeatures) -> None:
    features = all_features()
    assert made.features is not None
    assert torch.equal(made.features, features)
    assert torch.allclose(made.summary.mean, features.double().mean(0), rtol=1e-12)
    assert torch.allclose(made.summary.covariance, features.double().T.cov(), rtol=1e-10)
    assert (made.about.num_images, made.about.weights_sha256) == (40, "a" * 64)


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_batches_change_no_bit_of_a_reference(batch: int, folder: Path, made: RealFeatures) -> None:
    again = compute_reference(open_images(folder, PLAIN), EXTRACTOR, PLAIN, batch_size=batch)
    assert torch.equal(again.summary.scatter, made.summary.scatter)
    assert again.about == made.about


def test_a_written_reference_is_read_back_bit_for_bit(made: RealFeatures, tmp_path: Path) -> None:
    save_reference(made, tmp_path / "new" / "r.npz")
    read = open_reference(tmp_path / "new" / "r.npz", label="corners")
    assert read.features is not None
    assert torch.equal(read.features, all_features())
    assert torch.equal(read.summary.mean, made.summary.mean)
    assert torch.equal(read.summary.scatter, made.summary.scatter)
    assert read.about == replace(made.about, origin=str(tmp_path / "new" / "r.npz"))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["r.npz"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    made: RealFeatures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "new" / "r.npz"
    save_reference(made, file)
    before = file.read_bytes()

    def full(handle: Any, **arrays: Any) -> None:
        handle.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        save_reference(made, file)
    assert [file.read_bytes() for file in (tmp_path / "new").iterdir()] == [before]


def test_the_hash_is_of_the_prepared_pixels_wherever_they_lie(folder: Path, made: RealFeatures, tmp_path: Path) -> None:
    np.savez(tmp_path / "same.npz", images=pictures(40)[0])
    same = compute_reference(open_images(tmp_path / "same.npz", PLAIN), EXTRACTOR, PLAIN)
    assert same.about.images_sha256 == made.about.images_sha256
    how = Preparation(crop="centre_square", side=16, filter="lanczos")
    assert compute_reference(open_images(folder, how), EXTRACTOR, how).about.images_sha256 != same.about.images_sha256


def test_features_that_were_not_kept_are_missed_and_not_made_up(folder: Path) -> None:
    some = compute_reference(open_images(folder, PLAIN), EXTRACTOR, PLAIN, batch_size=7, kept_features=10)
    assert some.summary.count == 40
    assert torch.equal(some.rows(10), all_features()[:10])
    with pytest.raises(MissingFeaturesError, match="features of 10 of its 40 images, and 40 are needed"):
        some.rows()
    none = compute_reference(open_images(folder, PLAIN), EXTRACTOR, PLAIN, kept_features=0)
    with pytest.raises(MissingFeaturesError):
        none.rows(1)


def test_no_images_make_no_reference() -> None:
    class Nothing:
        origin, notes = "nothing", ""

        def __len__(self) -> int:
            return 0

        def rows(self, index: Tensor) -> Tensor:
            raise AssertionError

    with pytest.raises(UserError, match="nothing: holds no images"):
        compute_reference(Nothing(), EXTRACTOR, PLAIN)


@pytest.mark.parametrize("tool", ["EDM", "clean-fid", "pytorch-fid", "ADM"])
def test_other_tools_statistics_give_the_distance_of_their_features(tool: str, tmp_path: Path) -> None:
    real, fake = normal(50, D), normal(60, D, seed=1) + 0.3
    mean, cov = real.mean(0).numpy(), np.cov(real.numpy(), rowvar=False)  # what each of them stores
    more = {"arr_0": np.zeros((3, 8, 8, 3), np.uint8), "mu_s": np.zeros(7)} if tool == "ADM" else {}
    np.savez(tmp_path / "r.npz", mu=mean, sigma=cov, **more)
    read = open_reference(tmp_path / "r.npz", label="inception-clean", num_images=50)
    found = frechet_from_summaries(Summary.of(fake), read.summary)
    assert found == pytest.approx(frechet_from_features(fake, real), rel=1e-12)


def test_clean_fids_features_for_kid_are_features(tmp_path: Path) -> None:
    features = normal(30, D).float()
    np.savez(tmp_path / "r.npz", feats=features.numpy())
    read = open_reference(tmp_path / "r.npz", label="inception-clean")
    assert torch.equal(read.rows(), features)
    assert read.summary.count == 30


EYE = np.eye(D)
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "other keys": ({"feature": EYE, "cov": EYE}, r"has the arrays cov, feature; a reference has mean"),
    "NaN in mu": ({"mu": np.full(D, np.nan), "sigma": EYE}, "mu: NaN or infinite"),
    "infinite sigma": ({"mu": np.zeros(D), "sigma": np.full((D, D), np.inf)}, "sigma: NaN or infinite"),
    "NaN features": ({"feats": np.full((5, D), np.nan, np.float32)}, "feats: NaN or infinite"),
    "shapes that do not fit": ({"mu": np.zeros(D), "sigma": np.eye(3)}, "they do not fit"),
    "no numbers": ({"mu": np.array(["a"]), "sigma": EYE}, "it must be floats of 1 axes"),
    "integers": ({"mu": np.zeros(D, int), "sigma": EYE}, "it must be floats"),
    "empty": ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "they do not fit"),
    "objects": ({"mu": np.array([{}], dtype=object), "sigma": EYE}, "cannot be read as .npz"),
    "about that is no JSON": ({"about": np.array("{"), "mean": EYE}, "about: no JSON"),
    "about of another kind": ({"about": np.array('{"label": 3}'), "mean": EYE}, "about: .* fault"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_reference_is_one_clear_message(name: str, tmp_path: Path) -> None:
    arrays, message = BROKEN[name]
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(UserError, match=message) as caught:
        open_reference(tmp_path / "r.npz", label="corners", num_images=50)
    assert "r.npz" in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"no npz", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_npz_is_one_clear_message(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "r.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"r\.npz: (no such file|cannot be read as \.npz)"):
        open_reference(tmp_path / "r.npz", label="corners")


def altered(file: Path, **arrays: Any) -> None:
    with np.load(file) as known:
        np.savez(file, **{**dict(known), **arrays})


def test_a_reference_that_contradicts_itself_is_refused(made: RealFeatures, tmp_path: Path) -> None:
    file = tmp_path / "r.npz"
    for arrays, message in (
        ({"count": np.int64(39)}, "count = 39: about says 40"),
        ({"features": np.zeros((40, 3), np.float32)}, r"features are \[40, 3\]"),
        ({"features": np.zeros((41, D), np.float32)}, r"features are \[41, 4\]"),
        ({"scatter": np.zeros((3, 3))}, "they do not fit"),
    ):
        save_reference(made, file)
        altered(file, **arrays)
        with pytest.raises(UserError, match=message):
            open_reference(file, label="corners")


def test_imported_statistics_need_the_number_of_their_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "r.npz", mu=np.zeros(D), sigma=EYE)
    with pytest.raises(UserError, match=r"does not state its number of images; .*reference\.num_images"):
        open_reference(tmp_path / "r.npz", label="inception-clean")


PROTOCOL = Protocol(
    name="corners",
    num_images=30,
    reference=Reference(name="mine", dataset="mine", split="train", num_images=40),
    metrics=(Frechet(features=register(EXTRACTOR)), PrecisionRecall(features=register(EXTRACTOR))),
)


@pytest.mark.parametrize(("key", "value"), [("name", "../../x"), ("name", "/x"), ("file", "../../x"), ("file", "/x")])
def test_a_reference_does_not_lead_out_of_its_folder(key: str, value: str) -> None:
    told = dump(PROTOCOL)
    told["reference"][key] = value
    with pytest.raises(UserError, match=rf"reference\.{key}"):
        validate(Protocol, told, origin="stranger.yaml")


def test_one_command_computes_what_an_evaluation_then_finds(folder: Path, own_folder: Path) -> None:
    yaml = folder.parent / "corners.yaml"
    yaml.write_text(dump_yaml(PROTOCOL))
    with pytest.raises(
        UserError, match=r"there is no .*mine-corners\.npz; compute it with: diffdistill reference IMAGES"
    ):
        find_reference(PROTOCOL, EXTRACTOR)
    refused = CliRunner().invoke(app, ["eval", str(folder), "--protocol", str(yaml)])
    assert f"diffdistill reference IMAGES --protocol {yaml}, IMAGES being mine's train split" in refused.output
    done = CliRunner().invoke(app, ["reference", str(folder), "--protocol", str(yaml)])
    assert done.exit_code == 0, done.output
    assert [file.name for file in own_folder.iterdir()] == ["mine-corners.npz"]
    assert torch.equal(find_reference(PROTOCOL, EXTRACTOR).rows(), all_features())


def test_a_reference_is_of_as_many_images_as_the_protocol_names(
    folder: Path, made: RealFeatures, tmp_path: Path
) -> None:
    save_reference(made, tmp_path / "r.npz")
    assert PROTOCOL.reference is not None
    fewer, more = (replace(PROTOCOL, reference=replace(PROTOCOL.reference, num_images=n)) for n in (30, 50))
    with pytest.raises(UserError, match="is of 40 images; corners compares with 30"):
        find_reference(fewer, EXTRACTOR, place=tmp_path / "r.npz")
    yaml = tmp_path / "more.yaml"
    yaml.write_text(dump_yaml(more))
    done = CliRunner().invoke(app, ["reference", str(folder), "--protocol", str(yaml)])
    assert done.exit_code == 2
    assert "holds 40 images; corners compares with 50" in done.output


def test_a_reference_of_other_weights_or_another_preparation_is_refused(made: RealFeatures, tmp_path: Path) -> None:
    save_reference(made, tmp_path / "r.npz")
    other = replace(EXTRACTOR, sha256="b" * 64)
    with pytest.raises(UserError, match=f"computed with weights {'a' * 64}, not with {'b' * 64}"):
        find_reference(PROTOCOL, other, place=tmp_path / "r.npz")
    cropped = replace(PROTOCOL, preparation=Preparation(crop="centre_square", side=16, filter="lanczos"))
    with pytest.raises(UserError, match=r"prepared as .*'crop': 'none'.* the protocol's are .*'centre_square'"):
        find_reference(cropped, EXTRACTOR, place=tmp_path / "r.npz")
    darker = replace(PROTOCOL, preparation=Preparation(quantiser="floor"))  # real images are quantised already
    assert find_reference(darker, EXTRACTOR, place=tmp_path / "r.npz").summary.count == 40
    with pytest.raises(UserError, match="is a reference of corners, not of pixels"):
        find_reference(PROTOCOL, load_extractor(Pixels()), place=tmp_path / "r.npz")


def test_a_published_file_is_found_by_its_own_name(own_folder: Path) -> None:
    protocol = PROTOCOLS["cifar10-fid50k"]
    extractor = replace(EXTRACTOR, label=Inception(mode="legacy_tensorflow").label)
    with pytest.raises(UserError, match=r"or put https://.*cifar10-32x32\.npz at .*references/cifar10-32x32\.npz"):
        find_reference(protocol, extractor)
    own_folder.mkdir()
    np.savez(own_folder / "cifar10-32x32.npz", mu=np.zeros(D), sigma=EYE)
    assert find_reference(protocol, extractor).summary.count == 50_000


def test_the_digits_protocol_gives_the_numbers_of_the_demos_table() -> None:
    images, _ = Digits(split="train").tensors()
    judged = torch.cat([images, images[:363] * 0.9])
    real = find_reference(DIGITS_PIXELS, load_extractor(Pixels()))
    fake = load_extractor(Pixels())(judged).features
    expected = digits.score(judged)
    assert frechet_from_features(fake, real.rows()) == expected.fd_pixels
    assert precision_recall(real.rows(), fake, k=3) == (expected.precision, expected.recall)
    assert real.summary.count == 1437


def test_digits_are_judged_against_the_split_that_their_protocol_names() -> None:
    test = PROTOCOLS["digits-test-pixels"]
    real = find_reference(test, load_extractor(Pixels())).rows()
    assert torch.equal(torch.as_tensor(real), Digits(split="test").tensors()[0].flatten(1).to(torch.as_tensor(real)))
    assert len(real) == test.reference.num_images == 360
    other = replace(test, name="own", reference=replace(test.reference, split="all", num_images=None))
    with pytest.raises(
        UserError, match=r"protocol own: reference: 1 fault\n  split = 'all': choose from 'train' or 'test'"
    ):
        find_reference(other, load_extractor(Pixels()))


def test_real_images_are_a_folder_or_a_data_set_in_yaml(folder: Path) -> None:
    assert len(open_real_images(str(folder), PROTOCOL)) == 40
    digits_images = open_real_images("{name: digits, split: train}", DIGITS_PIXELS)
    assert torch.equal(digits_images.rows(torch.arange(3)), Digits(split="train").tensors()[0][:3])
    with pytest.raises(UserError, match=r"data\.name = 'cifar11': unknown; did you mean 'cifar10'"):
        open_real_images("{name: cifar11}", PROTOCOL)


@pytest.mark.parametrize(
    ("option", "message"), [("a.pth", "write LABEL=FILE, as in x="), ("y=a.pth", "y is not one of .* features \\(x\\)")]
)
def test_weights_are_given_by_label(option: str, message: str) -> None:
    assert parse_weights(["x=a=b.pth"], ["x"]) == {"x": "a=b.pth"}
    with pytest.raises(UserError, match=message):
        parse_weights([option], ["x"])


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_survives_yaml_and_is_told_from_every_other(name: str, tmp_path: Path) -> None:
    protocol = PROTOCOLS[name]
    file = tmp_path / "p.yaml"
    file.write_text(dump_yaml(protocol))
    assert find_protocol(str(file)) == protocol == find_protocol(name)
    ids = [protocol_id(dump(other)) for other in PROTOCOLS.values()]
    assert len(set(ids)) == len(ids)


FIELDS: dict[str, Any] = {
    "num_images": 1000,
    "first_seed": 1,
    "repeats": 2,
    "headline": "min",
    "labels": Labels(policy="cyclic", num_classes=10),
    "preparation": Preparation(quantiser="round"),
    "metrics": (Frechet(features=Pixels()), PrecisionRecall(features=Pixels(), nearest_k=5)),
    "weights_sha256": {"pixels": "0" * 64},
    "reference_sha256": {"pixels": "0" * 64},
}


@pytest.mark.parametrize("name", FIELDS)
def test_every_choice_makes_another_protocol(name: str) -> None:
    changed = replace(DIGITS_PIXELS, **{name: FIELDS[name]})
    assert protocol_id(dump(changed)) != protocol_id(dump(DIGITS_PIXELS))


def test_three_reference_files_of_imagenet64_are_three_protocols() -> None:
    found = {p.reference.file for p in PROTOCOLS.values() if p.reference and p.name.startswith("imagenet64")}
    assert found == {"imagenet-64x64.npz", "imagenet-64x64-baseline.npz", "VIRTUAL_imagenet64_labeled.npz"}


def test_three_repeats_take_three_ranges_of_seeds() -> None:
    assert PROTOCOLS["cifar10-fid50k"].seed_ranges == ((0, 50_000), (50_000, 100_000), (100_000, 150_000))


def test_only_fids_inception_is_called_fid() -> None:
    assert Frechet(features=Inception()).keys == ("fid",)
    assert Frechet(features=DinoV2()).keys == ("fd-dinov2-vitl14",)
    assert KernelDistance(features=Inception(mode="clean")).keys == ("kid-inception-clean",)


def test_only_fids_inception_gives_the_inception_score_and_only_its_clip_cmmd() -> None:
    assert InceptionScore(features=Inception()).keys == ("is",)
    assert InceptionScore(features=CifarResNet()).keys == ("is-resnet20-cifar",)
    (published,) = PROTOCOLS["coco2014-cmmd30k"].metrics
    assert published.keys == ("cmmd",)
    assert Cmmd(features=OpenClip(model="ViT-B-32", pretrained="openai")).keys == ("mmd-clip-vit-b-32",)
    assert Cmmd(features=Pixels()).keys == ("mmd-pixels",)


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "two metrics of one name": ({"metrics": (Frechet(features=Pixels()),) * 2}, "fd-pixels is named twice"),
    "captions without their policy": ({"captions": Captions(name="a", count=3)}, "captions: go with"),
    "fewer captions than images": (
        {"captions": Captions(name="a", count=3), "labels": Labels(policy="captions")},
        "captions.count = 3: 1800 images need one each",
    ),
    "classes that do not divide": ({"num_images": 1801}, "is no multiple of 10 classes"),
    "a name with blanks": ({"name": "my protocol"}, "name"),
    "no metric": ({"metrics": ()}, "metrics"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_protocol_that_contradicts_itself_is_refused(name: str) -> None:
    change, message = FAULTS[name]
    with pytest.raises(ValueError, match=message):
        replace(DIGITS_PIXELS, **change)


def test_a_users_protocol_may_not_take_the_name_of_another(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(dump_yaml(replace(DIGITS_PIXELS, num_images=1000)))
    with pytest.raises(UserError, match="'digits-pixels': is the name of another protocol"):
        find_protocol(str(file))


def test_unknown_protocols_and_faults_in_a_file_are_told_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown \(choices: digits-pixels, .*or a YAML file"):
        find_protocol("digits")
    file = tmp_path / "p.yaml"
    file.write_text(json.dumps(dump(DIGITS_PIXELS) | {"seeds": 3, "num_images": 0}))
    with pytest.raises(UserError, match=r"(?s)2 faults.*num_images = 0.*seeds: unknown key"):
        find_protocol(str(file))


def test_references_are_written_for_every_kind_of_features(folder: Path, own_folder: Path) -> None:
    from diffdistill.settings.terminal import Console

    both = (Frechet(features=register(EXTRACTOR)), Frechet(features=Pixels()))
    yaml = folder.parent / "both.yaml"
    yaml.write_text(dump_yaml(replace(PROTOCOL, metrics=both)))
    files = write_references(str(folder), str(yaml), console=Console(quiet=True))
    assert [file.name for file in files] == ["mine-corners.npz", "mine-pixels.npz"]
    assert open_reference(files[1], label="pixels").summary.mean.shape == (3072,)


def test_of_a_data_set_as_yaml_the_reference_is_computed_once_for_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFDISTILL_REFERENCES", str(tmp_path / "references"))
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    images, _ = pictures(6)
    folder = write_folder(tmp_path / "real", by_class(images, [0, 1, 0, 1, 0, 1]))
    told = f"{{name: image_folder, path: {folder}, labels: folders, resolution: 8}}"
    protocol = Protocol(
        name="mine",
        num_images=6,
        image_shape=(3, 8, 8),
        reference=Reference(name="mine", dataset=told, split="whole"),
        metrics=(Frechet(features=Pixels()),),
    )
    extractor = load_extractor(Pixels())
    found = find_reference(protocol, extractor)
    pixels = ImageFolder(path=str(folder), resolution=8).load().rows(torch.arange(6)).flatten(1)
    assert torch.allclose(found.summary.mean, pixels.double().mean(0), atol=1e-6)
    assert found.about.class_names == NAMES[:2]
    (file,) = (tmp_path / "references").iterdir()
    content = file.read_bytes()
    assert find_reference(protocol, extractor).about == found.about
    assert file.read_bytes() == content
    next(folder.rglob("*.png")).unlink()
    assert find_reference(protocol, extractor).summary.count == 5, "another content"
    with pytest.raises(UserError, match="holds 5 images; mine compares with 6"):
        find_reference(replace(protocol, reference=replace(protocol.reference, num_images=6)), extractor)
