"""Checkpoints know their classes by name: what is distilled, resumed and sampled means the same by them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_config
from PIL import Image
from support.pictures import encode, write_folder
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.data.order import DataOrder
from diffdistill.eval.board.report import report_page
from diffdistill.eval.features.extractors import Pixels
from diffdistill.eval.images.places import SamplingOptions, open_run
from diffdistill.eval.metrics.settings import Frechet
from diffdistill.eval.protocols.protocol import Labels, Protocol
from diffdistill.inference.draw import check_labels, number_of, sample_images
from diffdistill.inference.image_generator import ModelImageGenerator, SampleRequest
from diffdistill.models.load import load_model
from diffdistill.settings.schema import UserError
from diffdistill.storage.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from diffdistill.training.plan import Plan, plan
from diffdistill.training.trainer import Trainer

LEVELS = {"heron": 40, "newt": 130, "owl": 220, "1": 40, "3": 220}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def data(root: Path, *names: str) -> str:
    """Four grey images of each class, as the setting `data`."""
    files = {
        f"{name}/{n}.png": encode(Image.new("L", (8, 8), LEVELS.get(name, 90) + n), "PNG")
        for name in names
        for n in range(4)
    }
    place = write_folder(root, files)
    return f"data={{name: image_folder, path: {place}, labels: folders, channels: 1, resolution: 8}}"


def pretrained(root: Path, *names: str) -> Path:
    config = small_config("pretrain", root / "teacher", data(root / "images", *names), "train.steps=1")
    Trainer(config, quiet=True).run()
    return root / "teacher"


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of heron, newt and owl."""
    return pretrained(tmp_path_factory.mktemp("named"), "heron", "newt", "owl")


@pytest.fixture(scope="module")
def gappy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of the folders 1 and 3: four classes, two of them empty."""
    return pretrained(tmp_path_factory.mktemp("gappy"), "1", "3")


def forget_names(run: Path) -> None:
    """Make a checkpoint one of before there were names."""
    target = list_checkpoints(run / "checkpoints")[-1]
    whole = load_checkpoint(target)
    del whole.state["model"]["class_names"]
    save_checkpoint(target.parent, whole, keep=None)


def distilled(teacher: Path, root: Path, *names: str) -> Plan:
    return plan(small_config("dmd2", root / "run", data(root / "part", *names), teacher=teacher))


def test_a_checkpoint_and_its_students_hold_the_names(named: Path, tmp_path: Path) -> None:
    assert load_model(named).spec.class_names == ("heron", "newt", "owl")
    made = distilled(named, tmp_path, "heron", "newt", "owl")
    assert made.spec.class_names == ("heron", "newt", "owl")
    assert made.inputs.notes == ()


def test_real_images_of_fewer_classes_have_the_teachers_numbers(
    named: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = distilled(named, tmp_path, "newt", "owl")
    images, cond = made.real(0, 8)
    assert cond.label is not None
    expected = {1: LEVELS["newt"], 2: LEVELS["owl"]}
    for image, label in zip(images, cond.label.tolist(), strict=True):
        assert 0 <= round(float((image.mean() + 1) * 127.5)) - expected[label] < 4
    told = capsys.readouterr().err
    assert "matched with the teacher's by name: 1 = newt, 2 = owl" in told
    assert "1 of 3 classes have no image" in told


def test_a_class_of_another_name_is_refused(named: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the teacher knows no class eel; it knows 0 = heron, 1 = newt, 2 = owl"):
        distilled(named, tmp_path, "eel", "heron", "owl")


def test_a_checkpoint_without_names_is_read_as_before_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = pretrained(tmp_path, "heron", "owl")
    forget_names(teacher)
    assert load_model(teacher).spec.class_names == ()
    made = distilled(teacher, tmp_path, "heron", "owl")
    assert made.spec.class_names == ()
    assert "holds no names of its classes, which are taken to be 0 = heron, 1 = owl" in capsys.readouterr().err


def test_a_run_is_not_resumed_with_its_classes_renamed(tmp_path: Path) -> None:
    teacher = pretrained(tmp_path, "heron", "owl")
    renamed = tmp_path / "images/newt"
    (tmp_path / "images/heron").rename(renamed)
    config = small_config("pretrain", teacher, data(tmp_path / "images"), "train.steps=2")
    with pytest.raises(UserError, match="differ from those at the start of the run: 0 = heron, 1 = owl and 0 = newt"):
        plan(config, resume=True)


def test_classes_without_an_image_are_not_drawn(gappy: Path) -> None:
    spec = load_model(gappy).spec
    assert (spec.num_classes, spec.classes) == (4, (1, 3))
    assert ModelImageGenerator(load_model(gappy), SampleRequest()).labels.tolist() == [1, 3]


def test_a_students_labels_are_those_its_teacher_knows(gappy: Path, tmp_path: Path) -> None:
    made = distilled(gappy, tmp_path, "1", "3")
    drawn = made.problem.label_of(torch.linspace(0.01, 0.99, 50))
    assert sorted(set(drawn.tolist())) == [1, 3]
    assert made.spec.classes == (1, 3)


def test_where_all_classes_have_images_draws_and_order_are_as_ever(named: Path, tmp_path: Path) -> None:
    made = distilled(named, tmp_path, "heron", "newt", "owl")
    assert made.problem.classes == ()
    index = DataOrder(made.source, made.config.train.seed).rows(0, 40)
    assert torch.equal(made.order.rows(0, 40), index)


def test_an_evaluation_says_which_of_its_classes_a_model_never_saw(gappy: Path) -> None:
    labels = Labels(policy="cyclic", num_classes=4)
    protocol = Protocol(
        name="p", num_images=4, image_shape=(1, 8, 8), labels=labels, metrics=(Frechet(features=Pixels()),)
    )
    opened = open_run(gappy, protocol, SamplingOptions(), torch.device("cpu"))
    assert "was not trained on 2 of the classes that p draws: 0, 2" in opened.notes


def test_a_sample_is_asked_for_by_name_or_number(named: Path) -> None:
    model = load_model(named)
    by_name = sample_images(model, count=2, label="newt")
    assert torch.equal(by_name, sample_images(model, count=2, label=1))
    assert torch.equal(by_name, sample_images(model, count=2, label=np.int64(1)))  # type: ignore[arg-type]
    assert ModelImageGenerator(model, SampleRequest(labels=("owl", "0"))).labels.tolist() == [2, 0]
    with pytest.raises(UserError, match="--label gnu: unknown class; the model knows 0 = heron, 1 = newt, 2 = owl"):
        ModelImageGenerator(model, SampleRequest(labels=("gnu",)))


def test_a_name_of_several_classes_is_not_called_unknown() -> None:
    """ImageNet has two that are called crane; it is no synonym of another's."""
    names = ("crane", "newt, eft", "crane", "owl, eft")
    for label, told in (("crane", "0 = crane, 2 = crane"), ("eft", "1 = newt, eft, 3 = owl, eft")):
        assert number_of(label, names) == label
        with pytest.raises(
            UserError, match=f"--label {label}: several classes have this name, {told}; give the number"
        ):
            check_labels([label], range(4), 4, names)


def test_the_command_line_and_the_report_show_the_names(named: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "s.png")
    made = CliRunner().invoke(
        app, ["sample", str(named), "--label", "owl", "--label", "1", "--count", "2", "--out", out]
    )
    assert made.exit_code == 0, made.output
    assert "2 = owl, 1 = newt" in made.output
    assert "heron, newt, owl" in report_page(named)
