"""Classes are drawn by the names that a reference or a protocol has for them, not by their places."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from support.pictures import encode, write_folder
from torch import Tensor

from diffdistill.data import ImageFolder
from diffdistill.data.source import MappedImages
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM
from diffdistill.eval.evaluation.bench import make_bench
from diffdistill.eval.evaluation.command import EvalOptions, open_place
from diffdistill.eval.evaluation.real import FirstImages, write_references
from diffdistill.eval.evaluation.reference import open_reference
from diffdistill.eval.evaluation.workers import find_workers
from diffdistill.eval.features.extractors import Pixels
from diffdistill.eval.images.files import DataImages, open_images
from diffdistill.eval.images.generate import SampledImages
from diffdistill.eval.metrics.settings import Frechet
from diffdistill.eval.protocols.packaged import find_protocol
from diffdistill.eval.protocols.protocol import Labels, Preparation, Protocol, Reference
from diffdistill.eval.records.record import ModelRecord
from diffdistill.networks.mlp import MLPConfig
from diffdistill.settings.schema import UserError, schema
from diffdistill.settings.terminal import Console
from diffdistill.settings.values import dump, dump_yaml

SHAPE = (3, 4, 4)
KNOWN = ("cat", "dog", "fox")


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DIFFDISTILL_REFERENCES", str(tmp_path / "references"))


def folder(root: Path, *names: str) -> Path:
    pictures = {
        f"{name}/{n}.png": encode(Image.new("RGB", (4, 4), (20 * n, len(name), ord(name[0]))), "PNG")
        for name in names
        for n in range(2)
    }
    return write_folder(root, pictures)


def known(labels: Labels, **changes: Any) -> Protocol:
    reference = Reference(name="pets", dataset="pets", split="all")
    settings = {"name": "pets", "num_images": 6, "image_shape": SHAPE, "labels": labels, "reference": reference}
    return Protocol(**(settings | {"metrics": (Frechet(features=Pixels()),)} | changes))


ASKED: list[Tensor] = []


@schema
class Echo:
    """A sampler that keeps the classes that it is asked for, in ASKED."""

    name: Literal["echo"] = "echo"
    num_evaluations: int = 1

    def __call__(self, denoiser: Denoiser, noise: Tensor, cond: Any, **options: Any) -> Tensor:
        ASKED.append(cond.label)
        return noise


def sampled(protocol: Protocol, names: tuple[str, ...], wanted: tuple[str, ...], count: int = 3, **more: Any) -> Any:
    denoiser = Denoiser(MLPConfig(width=8, blocks=1).build(SHAPE, count, 0.1), EDM(), "edm")
    return SampledImages(
        denoiser=denoiser,
        sampler=Echo(),  # type: ignore[arg-type]
        protocol=protocol,
        image_shape=SHAPE,
        model=ModelRecord(source="pets-run"),
        class_names=names,
        wanted=wanted,
        **more,
    )


def drawn(images: Any) -> list[int]:
    ASKED.clear()
    images.take(0, torch.arange(6))
    (labels,) = ASKED
    return list(labels.tolist())


def write(place: str, protocol: Protocol, tmp_path: Path) -> str:
    """Returns what was printed."""
    (tmp_path / "p.yaml").write_text(dump_yaml(protocol))
    console = Console(record=True, width=200)
    write_references(place, str(tmp_path / "p.yaml"), console=console)
    return console.export_text()


def test_a_reference_keeps_the_names_of_the_classes_that_its_images_are_of(tmp_path: Path) -> None:
    protocol = known(Labels(policy="cyclic", num_classes=2))
    pets = folder(tmp_path / "pets", "fox", "dog")
    for place in (str(pets), f"{{name: image_folder, path: {pets}, labels: folders}}"):
        assert "the names of its classes are kept: dog, fox" in write(place, protocol, tmp_path)
        file = next((tmp_path / "references").glob("*.npz"))
        assert open_reference(file, label="pixels").about.class_names == ("dog", "fox")
        file.unlink()
    write(f"{{name: image_folder, path: {pets}, labels: none}}", protocol, tmp_path)
    assert open_reference(file, label="pixels").about.class_names == ()


def test_references_of_before_hold_no_names_and_are_read(tmp_path: Path) -> None:
    write(str(folder(tmp_path / "pets", "fox", "dog")), known(Labels(policy="cyclic", num_classes=2)), tmp_path)
    file = next((tmp_path / "references").glob("*.npz"))
    arrays = dict(np.load(file))
    about = json.loads(str(arrays["about"][()]))
    assert about.pop("class_names") == ["dog", "fox"]
    np.savez(file, **(arrays | {"about": np.array(json.dumps(about))}))
    assert open_reference(file, label="pixels").about.class_names == ()


def test_the_names_are_those_of_the_images_that_count(tmp_path: Path) -> None:
    plain = open_images(folder(tmp_path / "pets", *KNOWN), Preparation())
    assert plain.class_names() == KNOWN
    assert FirstImages(plain, 3).class_names() == ("cat", "dog")
    assert open_images(folder(tmp_path / "shards", "00000", "00001"), Preparation()).class_names() == ()
    assert open_images(tmp_path / "pets" / "cat", Preparation()).class_names() == ()
    numbered = ImageFolder(path=str(folder(tmp_path / "n", "1", "3")), labels="folders").load()
    assert DataImages("n", numbered, Preparation()).class_names() == ("1", "3")
    images = np.zeros((2, 3, 4, 4), np.uint8)
    full = MappedImages(images, torch.tensor([0, 1]), key="k", num_classes=2)
    assert DataImages("k", full, Preparation()).class_names() == ()
    assert DataImages("k", MappedImages(images, None, key="k", num_classes=0), Preparation()).class_names() == ()


def test_the_references_classes_are_drawn_by_name(tmp_path: Path) -> None:
    write(str(folder(tmp_path / "pets", "dog", "fox")), known(Labels(policy="cyclic", num_classes=2)), tmp_path)
    for count in (2, 3):  # the protocol counts them, or all that some model knows
        bench = make_bench(known(Labels(policy="cyclic", num_classes=count)), find_workers("cpu"))
        assert bench.class_names == ("dog", "fox")
        assert bench.protocol.labels.num_classes == 2
        images = sampled(bench.protocol, KNOWN, bench.class_names)
        assert drawn(images) == [1, 2, 1, 2, 1, 2]
        assert "classes are drawn by the names that pets's reference has: 1 = dog, 2 = fox" in images.notes
        assert images.sampler_record.settings["classes"] == [1, 2]
        assert drawn(sampled(bench.protocol, ("fox", "dog"), bench.class_names, 2)) == [1, 0, 1, 0, 1, 0]
    with pytest.raises(UserError, match="its reference is of 2 classes, dog, fox, of which num_images = 9"):
        make_bench(known(Labels(policy="class_major", num_classes=3), num_images=9), find_workers("cpu"))


def test_names_that_are_in_their_places_change_nothing() -> None:
    protocol = known(Labels(policy="random", num_classes=3))
    plain, named = sampled(protocol, (), ()), sampled(protocol, KNOWN, KNOWN)
    assert drawn(plain) == drawn(named)
    assert plain.key["sampler"] == named.key["sampler"]
    assert named.notes == ""


def test_a_class_that_the_model_does_not_know_is_refused() -> None:
    protocol = known(Labels(policy="cyclic", num_classes=2))
    with pytest.raises(
        UserError, match=r"pets-run: pets draws .*: the model knows no class hen; it knows 0 = cat, 1 = dog"
    ):
        sampled(protocol, KNOWN, ("dog", "hen"))


def test_where_one_side_has_no_names_a_note_says_what_is_taken() -> None:
    protocol = known(Labels(policy="cyclic", num_classes=3))
    assert "name no classes, which are taken to be 0 = cat, 1 = dog, 2 = fox" in sampled(protocol, KNOWN, ()).notes
    unnamed = sampled(protocol, (), KNOWN)
    assert "holds no names of its classes, which are taken to be 0 = cat, 1 = dog, 2 = fox" in unnamed.notes
    assert drawn(unnamed) == [0, 1, 2, 0, 1, 2]
    with pytest.raises(UserError, match="knows 3 classes; pets is for 2"):
        sampled(known(Labels(policy="cyclic", num_classes=2)), (), ("dog", "fox"))


def test_numbers_with_gaps_are_the_models_numbers() -> None:
    images = sampled(known(Labels(policy="cyclic", num_classes=2)), (), ("1", "3"), 4, classes=(1, 3))
    assert drawn(images) == [1, 3, 1, 3, 1, 3]
    assert "not trained on" not in images.notes
    assert (
        "was not trained on 1 of the classes that pets draws: 2 = fox"
        in sampled(known(Labels(policy="cyclic", num_classes=3)), KNOWN, KNOWN, classes=(0, 1)).notes
    )


def test_a_protocol_may_name_its_classes(tmp_path: Path) -> None:
    named = known(Labels(policy="cyclic", num_classes=2, names=("dog", "fox")))
    (tmp_path / "p.yaml").write_text(dump_yaml(named))
    assert find_protocol(str(tmp_path / "p.yaml")) == named
    write(str(folder(tmp_path / "pets", "fox", "dog")), named, tmp_path)
    assert make_bench(named, find_workers("cpu")).class_names == ("dog", "fox")
    other = replace(named, labels=replace(named.labels, names=("dog", "hen")))
    with pytest.raises(UserError, match="protocol pets: draws dog, hen; its reference is of dog, fox"):
        make_bench(other, find_workers("cpu"))
    with pytest.raises(UserError, match="names: 1 for num_classes = 2"):
        Labels(policy="cyclic", num_classes=2, names=("dog",))


def test_a_protocol_without_names_is_written_as_before() -> None:
    assert dump(known(Labels(policy="cyclic", num_classes=2)))["labels"] == {"policy": "cyclic", "num_classes": 2}


def test_a_run_is_opened_with_the_names_on_both_sides(quick_teacher: Path, tmp_path: Path) -> None:
    protocol = known(Labels(policy="cyclic", num_classes=10, names=tuple("abcdefghij")), image_shape=(1, 8, 8))
    bench = make_bench(replace(protocol, reference=None), find_workers("cpu"))
    found = open_place(str(quick_teacher), bench, EvalOptions())
    assert isinstance(found, SampledImages)
    assert (found.wanted, found.class_names) == (tuple("abcdefghij"), ())
