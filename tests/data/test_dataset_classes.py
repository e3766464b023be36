"""What a torch Dataset calls its classes is known, through plain parts and sums of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.pictures import encode, write_folder
from torch.utils.data import ConcatDataset, Dataset, Subset, random_split

from diffdistill.data.classes import class_names_of, with_teachers_classes
from diffdistill.data.torch_dataset import DatasetImages, as_source
from diffdistill.settings.schema import UserError

KNOWN = ("cat", "dog", "fox")


class Pets(Dataset[Any]):
    """Images of one grey level each, labelled in turn."""

    target_transform: Any = None

    def __init__(self, **said: Any) -> None:
        self.__dict__.update(said)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> Any:
        if number >= len(self):
            raise IndexError
        label = number % 2
        return torch.full((3, 2, 2), 60 * number, dtype=torch.uint8), (self.target_transform or int)(label)


def names(dataset: Any, **options: Any) -> tuple[str, ...]:
    return class_names_of(as_source(dataset, **options))


TWO = Pets(classes=["dog", "fox"])


def test_the_names_are_those_of_torchvisions_attributes() -> None:
    assert names(TWO) == ("dog", "fox")
    assert names(Pets(class_to_idx={"fox": 1, "dog": 0})) == ("dog", "fox")
    assert names(Pets(classes=["dog", "fox"], class_to_idx={"dog": 1, "fox": 0})) == ("fox", "dog")  # by it they count
    synonyms = {"tench": 0, "Tinca tinca": 0, "goldfish": 1}
    assert names(Pets(classes=[("tench", "Tinca tinca"), ("goldfish",)], class_to_idx=synonyms)) == (
        "tench, Tinca tinca",
        "goldfish",
    )
    assert names(Pets(classes=["dog", "fox"]), class_names=["a", "b"]) == ("a", "b")
    assert names(Pets(classes=["dog", "fox"]), class_names=()) == ()


def test_what_says_no_names_of_the_labels_has_none() -> None:
    for said in ({}, {"classes": ["only"]}, {"classes": [3, 4]}, {"classes": "ab"}, {"classes": ["0", "1"]}):
        assert names(Pets(**said)) == (), said


def test_classes_that_the_dataset_itself_numbers_otherwise_name_no_labels() -> None:
    """Its first two are labelled 1 and 2; nothing tells a part with labels 0 and 1 from that."""
    for numbers in ({"dog": 1, "fox": 2}, {"dog": 1, "fox": 0, "hen": 7}):
        assert names(Pets(classes=["dog", "fox"], class_to_idx=numbers)) == (), numbers
    assert names(Pets(classes=["dog", "fox"], class_to_idx={"dog": 0, "fox": 1, "hen": 7})) == ("dog", "fox")


def test_an_image_folder_of_torchvision(tmp_path: Path) -> None:
    folders = pytest.importorskip("torchvision").datasets.ImageFolder
    picture = encode(Image.new("RGB", (4, 4), "red"), "PNG")
    root = write_folder(tmp_path / "f", {f"{name}/{n}.png": picture for name in ("fox", "dog") for n in range(2)})
    source = as_source(folders(str(root)))
    assert (class_names_of(source), source.num_classes) == (("dog", "fox"), 2)
    assert source.to(torch.device("cpu")).class_names == ("dog", "fox")  # type: ignore[attr-defined]


def test_parts_and_sums_keep_the_names_where_labels_stay() -> None:
    assert names(Subset(TWO, [1, 2, 3])) == ("dog", "fox")
    assert names(random_split(TWO, [3, 1], torch.Generator().manual_seed(0))[0]) == ("dog", "fox")
    assert names(ConcatDataset([TWO, Subset(TWO, [0])])) == ("dog", "fox")
    assert names(ConcatDataset([TWO, Pets(classes=["dog", "fox", "hen"])])) == ("dog", "fox")  # the numbers agree
    assert names(ConcatDataset([TWO, Pets()])) == ()
    source = as_source(Subset(Pets(classes=list(KNOWN)), [0, 1]))
    assert (source.num_classes, class_names_of(source)) == (2, ("cat", "dog"))


def test_parts_that_count_in_different_ways_are_refused() -> None:
    both = ConcatDataset([TWO, Pets(classes=["cat", "dog"])])
    with pytest.raises(UserError, match=r"different names for the same labels: dog, fox, and cat, dog; .*class_names="):
        as_source(both)
    assert names(both, class_names=["a", "b"]) == ("a", "b")


def test_labels_that_a_transform_changes_have_no_names() -> None:
    turned = Pets(classes=["dog", "fox"], target_transform=lambda label: 1 - label)
    for dataset in (turned, Subset(turned, [0, 1]), ConcatDataset([TWO, turned])):
        source = as_source(dataset)
        assert class_names_of(source) == ()
        (note,) = source.notes  # type: ignore[attr-defined]
        assert "has a target_transform, so its class names are not taken; give class_names=..." in note
    nameless = Pets(target_transform=lambda label: 1 - label)
    assert as_source(nameless).notes == ()  # type: ignore[attr-defined]


def test_fewer_names_than_labels_are_refused() -> None:
    with pytest.raises(UserError, match="class_names: 1 names, but there is a label 1"):
        as_source(TWO, class_names=["dog"])


def test_a_dataset_is_matched_with_the_teacher_by_name() -> None:
    source = as_source(TWO)
    made, (note,) = with_teachers_classes(source, KNOWN)
    assert isinstance(made, DatasetImages)
    assert made.labels is not None
    assert made.labels.tolist() == [1, 2, 1, 2]
    assert (made.num_classes, class_names_of(made)) == (3, KNOWN)
    assert made.key != source.key
    assert torch.equal(made.rows(torch.arange(4)), source.rows(torch.arange(4)))
    assert note.endswith("by name: 1 = dog, 2 = fox")
    with pytest.raises(UserError, match="the teacher knows no class fox"):
        with_teachers_classes(source, ("cat", "dog"))


def test_names_make_no_other_content() -> None:
    assert as_source(TWO).key == as_source(Pets()).key
    assert as_source(TWO).num_classes == as_source(Pets()).num_classes
