"""An exported folder knows the names of its classes, and so does what is made of a pipeline that has some."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.stand_ins import save_stand_in

from diffdistill.diffusion.sampling import TCD
from diffdistill.export import run as command
from diffdistill.export.record import RECORD, read_record
from diffdistill.export.run import ExportOptions, export
from diffdistill.exported.image_generators import CodeImageGenerator, open_image_generator
from diffdistill.inference.image_generator import SampleRequest
from diffdistill.models.load import load_model
from diffdistill.models.spec import TrainedModel
from diffdistill.models.teachers import open_pipeline
from diffdistill.settings.schema import UserError

NAMES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "k\u00e4fer")
KNOWN = (2, 5, 9)
"""The classes that the model is said to be trained on."""


@pytest.fixture(scope="module")
def named_folder(quick_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export, with code of its own, of a run whose classes have names."""
    folder = tmp_path_factory.mktemp("named") / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "load_model", lambda place, **options: named(load_model(place, **options)))
        export(str(quick_teacher), folder, ExportOptions(kind="self-contained", is_verified=False))
    return folder


def named(model: TrainedModel) -> TrainedModel:
    return replace(model, spec=replace(model.spec, class_names=NAMES, classes=KNOWN))


def generator(place: Path, *labels: Any) -> Any:
    return open_image_generator(str(place), SampleRequest(labels=labels, trusts_code=True))


def test_a_self_contained_folder_takes_names(named_folder: Path, quick_teacher: Path) -> None:
    index = torch.arange(3)
    own = generator(quick_teacher, 5)(index).clamp(-1, 1)
    for label in ("fox", "5", 5):
        torch.testing.assert_close(generator(named_folder, label)(index), own, atol=1e-5, rtol=0)
    decomposed = generator(named_folder, "ka\u0308fer")
    assert isinstance(decomposed, CodeImageGenerator)
    assert decomposed.told_classes == "9 = k\u00e4fer"
    with pytest.raises(UserError, match="--label yak: unknown class; the model knows 2 = cat, 5 = fox, 9 = k"):
        generator(named_folder, "yak")


def test_its_default_is_the_classes_that_it_was_trained_on(named_folder: Path, quick_teacher: Path) -> None:
    made = generator(named_folder)
    torch.testing.assert_close(
        made(torch.arange(6)), generator(quick_teacher, *KNOWN)(torch.arange(6)).clamp(-1, 1), atol=1e-5, rtol=0
    )
    assert made.told_classes == "2 = cat, 5 = fox, 9 = k\u00e4fer"
    pipeline = made.pipeline
    noise = torch.randn(3, *pipeline.model.image_shape, generator=torch.Generator().manual_seed(0))

    def drawn(labels: Any) -> torch.Tensor:
        return pipeline(class_labels=labels, latents=noise, output_type="pt").images  # type: ignore[no-any-return]

    for labels in (None, ["cat", 5, "ka\u0308fer"], torch.tensor(KNOWN)):
        assert torch.equal(drawn(labels), drawn(list(KNOWN)))
    assert torch.equal(drawn(["fox"] * 3), drawn([5] * 3))
    with pytest.raises(ValueError, match="'yak' is not the name of exactly one class"):
        drawn("yak")


def test_its_record_and_card_say_the_names(named_folder: Path) -> None:
    record = read_record(named_folder)
    assert record is not None
    assert (record.class_names, record.classes) == (NAMES, KNOWN)
    card = (named_folder / "README.md").read_text(encoding="utf-8")
    assert "## Classes\n\n`class_labels`: 2 = cat, 5 = fox, 9 = k\u00e4fer. " in card
    assert json.loads((named_folder / "model" / "config.json").read_text())["class_names"] == list(NAMES)


def test_a_folder_of_before_says_none_and_works(quick_teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    export(str(quick_teacher), folder, ExportOptions(kind="self-contained", is_verified=False))
    assert not {"class_names", "classes"} & json.loads((folder / RECORD).read_text()).keys()
    assert not {"class_names", "classes"} & json.loads((folder / "model" / "config.json").read_text()).keys()
    assert "## Classes" not in (folder / "README.md").read_text()
    made = generator(folder)
    assert made.told_classes == ""
    assert list(made.told) == list(range(10))


def test_the_names_of_a_dit_pipeline_are_the_teachers_and_the_exports(tmp_path: Path) -> None:
    place = save_stand_in("dit", tmp_path / "dit")
    assert open_pipeline(place).spec.class_names == ()
    names = tuple(f"thing {number}" for number in range(1000))
    index = json.loads((place / "model_index.json").read_text())

    def write(table: Any) -> None:
        (place / "model_index.json").write_text(json.dumps(index | {"id2label": table}))

    for wrong in ({"0": "one of many"}, {str(number): number for number in range(1000)}, ["a"] * 1000, None):
        write(wrong)
        assert open_pipeline(place).spec.class_names == ()
    write({str(number): name for number, name in enumerate(reversed(names))})
    model = load_model(place)
    assert model.spec.class_names == names[::-1]
    own = replace(model, spec=replace(model.spec, class_names=names, sampler=TCD(num_steps=2, init_noise="unit")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "load_model", lambda place, **options: own)
        export(str(place), tmp_path / "stock", ExportOptions(kind="stock", is_verified=False))
    assert load_model(tmp_path / "stock").spec.class_names == names
    with pytest.raises(UserError, match="--label thing: unknown class"):
        generator(tmp_path / "stock", "thing")
    assert generator(tmp_path / "stock", "thing 7").labels.tolist() == [7]
