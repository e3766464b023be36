"""Classes are matched by name, and those without an image are known."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.pictures import encode, write_folder

from diffdistill.data import HuggingFace, ImageFolder, Npz
from diffdistill.data.classes import (
    class_names_of,
    classes_with_images,
    note_empty,
    numbers_among,
    same_names,
    with_teachers_classes,
)
from diffdistill.data.source import LatentImages, MappedImages
from diffdistill.settings.schema import UserError

KNOWN = ("elk", "heron", "newt", "\u00fcnn")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))


def folders(root: Path, *names: str) -> MappedImages:
    files = {
        f"{name}/{n}.png": encode(Image.new("RGB", (8, 8), (20 * n, len(name), ord(name[0]))), "PNG")
        for name in names
        for n in range(2)
    }
    return ImageFolder(path=str(write_folder(root, files)), labels="folders").load()


def test_prepared_images_keep_the_names_of_their_classes(tmp_path: Path) -> None:
    for _ in range(2):  # prepared, and opened again
        source = folders(tmp_path / "f", "newt", "elk")
        assert source.class_names == ("elk", "newt")
    assert source.to(torch.device("cpu")).class_names == ("elk", "newt")


def test_labels_of_a_table_and_of_class_labels_have_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    source = folders(tmp_path / "f", "newt")
    (tmp_path / "l.csv").write_text("file,label\nnewt/0.png,b\nnewt/1.png,a\n")
    by_table = ImageFolder(path=str(tmp_path / "f"), labels="csv", labels_file=str(tmp_path / "l.csv")).load()
    assert by_table.class_names == ("a", "b")
    cells = [{"bytes": encode(Image.fromarray(row.transpose(1, 2, 0)), "PNG"), "path": None} for row in source.images]
    kinds = {"image": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y", "z"])}
    table = datasets.Dataset.from_dict({"image": cells, "kind": [2, 0]}, features=datasets.Features(kinds))
    table.save_to_disk(str(tmp_path / "h"))
    found = HuggingFace(path=str(tmp_path / "h"), label_column="kind").load()
    assert found.class_names == ("x", "y", "z")
    assert classes_with_images(found) == (0, 2)


def test_a_part_of_the_classes_gets_the_teachers_numbers(tmp_path: Path) -> None:
    source = folders(tmp_path / "f", "newt", "heron")
    made, (note,) = with_teachers_classes(source, KNOWN)
    assert made.labels is not None
    assert made.labels.tolist() == [1, 1, 2, 2]
    assert (made.num_classes, class_names_of(made)) == (4, KNOWN)
    assert torch.equal(made.rows(torch.arange(4)), source.rows(torch.arange(4)))
    assert made.key != source.key
    assert "matched with the teacher's by name: 1 = heron, 2 = newt" in note
    assert note_empty(made, of_teacher=range(4))[0].endswith(
        "the teacher's are drawn all the same: 0 = elk, 3 = \u00fcnn"
    )


def test_the_same_classes_are_left_as_they_are(tmp_path: Path) -> None:
    source = folders(tmp_path / "f", *KNOWN)
    assert with_teachers_classes(source, KNOWN) == (source, ())
    assert with_teachers_classes(source, [unicodedata.normalize("NFD", name) for name in KNOWN]) == (source, ())


def test_the_first_of_the_teachers_classes_keep_their_key(tmp_path: Path) -> None:
    source = folders(tmp_path / "f", "elk", "heron")
    made, _ = with_teachers_classes(source, KNOWN)
    assert (made.key, made.num_classes) == (source.key, 4)


def test_a_class_that_the_teacher_does_not_know_is_refused_with_those_that_it_does(tmp_path: Path) -> None:
    source = folders(tmp_path / "f", "elk", "gnu", "newt", "\u00fcnn")
    with pytest.raises(UserError, match=r"the teacher knows no class gnu; it knows 0 = elk, 1 = heron, 2 = newt, 3 = "):
        with_teachers_classes(source, KNOWN)


def test_without_names_on_one_side_numbers_are_taken_with_a_note(tmp_path: Path) -> None:
    named, numbered = folders(tmp_path / "f", "elk", "newt"), folders(tmp_path / "g", "0", "1")
    for source, known, said in ((named, (), "holds no names"), (numbered, KNOWN, "labels are numbers")):
        same, (note,) = with_teachers_classes(source, known)
        assert same is source
        assert said in note


def test_names_are_compared_as_text_where_that_is_the_only_one() -> None:
    decomposed = unicodedata.normalize("NFD", "\u00fcnn")
    assert numbers_among([decomposed], KNOWN) == (3,)
    assert numbers_among(["\u00fcnn"], [decomposed, "\u00fcnn"]) == (1,)
    with pytest.raises(UserError, match="two classes have the name of one"):
        numbers_among([decomposed, "\u00fcnn"], KNOWN)
    assert same_names(["a"], [])
    assert not same_names(["a", "b"], ["b", "a"])


def test_names_that_are_the_numbers_say_nothing() -> None:
    images = LatentImages(
        [torch.zeros(2, 1, 1, 1)], torch.tensor([0, 1]), key="k", num_classes=2, class_names=("0", "1")
    )
    assert class_names_of(images) == ()


def test_classes_without_an_image_are_named(tmp_path: Path) -> None:
    source = folders(tmp_path / "f", "1", "2", "5")
    assert (source.num_classes, classes_with_images(source)) == (6, (1, 2, 5))
    assert note_empty(source, of_teacher=None) == ("data: 3 of 6 classes have no image; they are not drawn: 0, 3, 4",)
    assert note_empty(source, of_teacher=(1, 2, 5)) == ()
    assert note_empty(source, of_teacher=()) == ()
    file = tmp_path / "a.npz"
    np.savez(file, images=np.zeros((2, 8, 8, 3), np.uint8), labels=np.arange(2))
    assert note_empty(Npz(path=str(file)).load(), of_teacher=None) == ()


def test_names_that_are_numbers_mean_the_classes_of_a_teacher_without_names() -> None:
    pixels = np.zeros((3, 1, 2, 2), np.uint8)
    source = MappedImages(pixels, torch.tensor([0, 1, 1]), key="k", num_classes=2, class_names=("3", "5"))
    made, (note,) = with_teachers_classes(source, (), num_classes=10)
    assert made.labels is not None
    assert made.labels.tolist() == [3, 5, 5]
    assert (made.num_classes, class_names_of(made)) == (10, ())
    assert made.key != source.key
    assert note == "data: classes are matched with the teacher's by name: 3 = 3, 5 = 5"
    same, (note,) = with_teachers_classes(source, (), num_classes=2)
    assert same is source
    assert note.endswith("holds no names of its classes, which are taken to be 0 = 3, 1 = 5")


def test_of_classes_of_one_name_each_is_the_one_in_its_place() -> None:
    """ImageNet has two that are called crane."""
    known = ("crane", "newt", "crane")
    assert numbers_among(("crane", "newt", "crane"), known) == (0, 1, 2)
    assert numbers_among(("crane", "newt"), known) == (0, 1)
    with pytest.raises(UserError, match="knows several classes of the name crane; rename them"):
        numbers_among(("newt", "crane"), known)


def test_imagenets_folders_are_in_the_order_of_its_classes() -> None:
    folders = ("n01440764", *(f"n02{number:06d}" for number in range(998)), "n15075141")
    words = ("tench, Tinca tinca", *(f"thing {number}" for number in range(998)), "toilet tissue, bathroom tissue")
    assert numbers_among(folders, words) == numbers_among(words, folders) == tuple(range(1000))
    assert numbers_among(folders[::-1], folders) == tuple(range(999, -1, -1))
    with pytest.raises(UserError, match="knows no class n01440764"):
        numbers_among(folders[:10], words)


def test_words_in_another_order_than_imagenets_folders_are_not_taken_for_them() -> None:
    """Folders named by words are counted by the alphabet, and a thousand other ids are other classes."""
    folders = ("n01440764", *(f"n02{number:06d}" for number in range(998)), "n15075141")
    words = ("tench", *(f"animal {number}" for number in range(998)), "toilet tissue")
    swapped = (folders[0], folders[2], folders[1], *folders[3:])
    others = tuple(f"n{number:08d}" for number in range(1000))
    for names, known in ((sorted(words), folders), (folders, sorted(words, reverse=True)), (others, words)):
        with pytest.raises(UserError, match="knows no class"):
            numbers_among(names, known)
    with pytest.raises(UserError, match="knows no class"):
        numbers_among(swapped, words)
