"""Models that were moved since a checkpoint was written: what is in them decides, not where they lie."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import small_config
from torch import Tensor
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.diffusion.sampling import OneCall
from diffdistill.exported.sample import teacher_of
from diffdistill.models.load import load_model
from diffdistill.models.places import content_of, settle_places
from diffdistill.settings.schema import UserError
from diffdistill.storage import checkpoint as checkpoints
from diffdistill.storage.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from diffdistill.training.config import RunConfig
from diffdistill.training.trainer import Trainer

Setting = Callable[..., RunConfig]
TEACHER, RUN = Path("runs/teacher"), Path("runs/one")


@pytest.fixture
def setting(tmp_path: Path, quick_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    """In a working folder with runs/teacher: a student's config, all of its paths relative."""
    shutil.copytree(quick_teacher, tmp_path / TEACHER)
    monkeypatch.chdir(tmp_path)

    def made(*overrides: str, run: Path = RUN, teacher: Path = TEACHER, method: str = "sid") -> RunConfig:
        return small_config(method, run, "trackers=[]", "health=null", *overrides, teacher=teacher)

    return made


def train(config: RunConfig, *, resume: bool = False, allow_changes: bool = False) -> dict[str, Tensor]:
    """The end of a run."""
    Trainer(config, resume=resume, allow_changes=allow_changes, quiet=True).run()
    last = load_checkpoint(list_checkpoints(Path(config.run) / "checkpoints")[-1])
    return {f"{group}.{name}": t for group, tensors in last.tensors.items() for name, t in tensors.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def other_weights(folder: Path) -> None:
    """Another teacher at the same place, with a checkpoint of the same name."""
    shutil.rmtree(folder)
    Trainer(small_config("pretrain", folder, "train.steps=10", "train.seed=1"), quiet=True).run()


def forget_contents(run: Path) -> None:
    """Make the newest checkpoint as older versions wrote it, which knew no hashes."""
    target = list_checkpoints(run / "checkpoints")[-1]
    whole = load_checkpoint(target)
    state = {key: value for key, value in whole.state.items() if key != "sha256"}
    save_checkpoint(target.parent, Checkpoint(whole.step, whole.tensors, state), keep=None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, quick_teacher: Path) -> dict[str, Tensor]:
    """The end of a run that nothing happens to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    return train(small_config("sid", run, "trackers=[]", "health=null", teacher=quick_teacher))


@pytest.mark.parametrize("folder", [".", "sub"])
def test_a_resumed_run_takes_its_teacher_from_where_it_is_now(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Tensor], folder: str
) -> None:
    train(setting("train.steps=2"))
    TEACHER.rename("runs/moved")
    (tmp_path / folder).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / folder)
    up = Path("." if folder == "." else "..")
    config = setting(teacher=up / "runs/moved", run=up / RUN)
    assert equal(train(config, resume=True), whole)
    assert (
        load_checkpoint(list_checkpoints(up / RUN / "checkpoints")[-1])
        .state["teacher"]
        .startswith(str(up / "runs/moved"))
    )


def test_a_tree_that_was_moved_as_a_whole_is_found_from_the_run(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(setting("train.steps=2"))
    Path("runs").rename("elsewhere")
    monkeypatch.chdir("/")
    run = tmp_path / "elsewhere" / "one"
    place, _ = teacher_of(str(run))
    assert place.startswith(str(tmp_path / "elsewhere" / "teacher" / "checkpoints" / "step-"))


def test_a_teacher_that_was_trained_on_is_taken_at_its_step_of_then(setting: Setting, whole: dict[str, Tensor]) -> None:
    train(setting("train.steps=2"))
    (step,) = (TEACHER / "checkpoints").iterdir()
    later = step.with_name("step-99999999")
    other = TEACHER.with_name("other")
    shutil.copytree(TEACHER, other)
    other_weights(other)
    shutil.copytree(next((other / "checkpoints").iterdir()), later)
    TEACHER.rename("runs/moved")
    assert equal(train(setting(teacher=Path("runs/moved")), resume=True), whole)


def test_other_weights_are_refused_or_taken_with_a_word(setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    train(setting("train.steps=2"))
    other_weights(TEACHER)
    with pytest.raises(UserError, match=r"teacher: runs/teacher/.* holds other weights than when this run began"):
        Trainer(setting(), resume=True, quiet=True)
    trainer = Trainer(setting(), resume=True, quiet=True, allow_changes=True)
    assert "holds other weights" in capsys.readouterr().err
    assert trainer.plan.teacher is not None
    assert trainer.plan.sha256["teacher"] == content_of(trainer.plan.teacher.source)


def test_a_teacher_that_is_gone_is_named_with_what_to_do(setting: Setting) -> None:
    train(setting("train.steps=2"))
    shutil.rmtree(TEACHER)
    with pytest.raises(UserError, match=r"teacher: no such folder \(looked for runs/teacher/.*teacher=PATH"):
        Trainer(setting(), resume=True, quiet=True)
    with pytest.raises(UserError, match=r"teacher = 'runs/nowhere': no such folder"):
        Trainer(setting(teacher=Path("runs/nowhere")), resume=True, quiet=True)


def test_a_checkpoint_without_hashes_takes_the_place_that_is_allowed(
    setting: Setting, whole: dict[str, Tensor]
) -> None:
    train(setting("train.steps=2"))
    forget_contents(RUN)
    TEACHER.rename("runs/moved")
    moved = setting(teacher=Path("runs/moved"))
    with pytest.raises(UserError, match="teacher: was 'runs/teacher', now 'runs/moved'"):
        Trainer(moved, resume=True, quiet=True)
    assert equal(train(moved, resume=True, allow_changes=True), whole)


def test_a_run_to_start_from_may_be_gone_once_the_run_has_begun(setting: Setting) -> None:
    train(setting("train.steps=1", run=Path("runs/first")))
    train(setting("init=runs/first", "train.steps=1"))
    Path("runs/first").rename("runs/moved")
    moved = setting("init=runs/moved", "train.steps=2")
    one = train(moved, resume=True)  # the same weights: no change of the config
    shutil.rmtree("runs/moved")
    again = Trainer(moved, resume=True, quiet=True)
    kept = {f"players.generator.{name}": tensor for name, tensor in again.players.generator.state_dict().items()}
    assert equal(kept, {name: tensor for name, tensor in one.items() if name.startswith("players.generator.")})


@pytest.mark.parametrize(
    ("place", "makes"), [("runs/digits-regression", "regression/digits"), ("runs/no-config-s", "CONFIG")]
)
def test_a_run_to_start_from_that_is_not_there_is_named_with_what_makes_it(
    setting: Setting, place: str, makes: str
) -> None:
    told = f"init = '{place}': no such folder; `diffdistill train {makes} run={place}` makes one, or name another run"
    with pytest.raises(UserError, match=told):
        Trainer(setting(f"init={place}"), quiet=True)
    assert not RUN.exists() or not any(RUN.iterdir())


def test_the_teachers_images_come_from_where_it_is_now(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(setting("train.steps=2"))
    sub = tmp_path / "sub"
    sub.mkdir()
    monkeypatch.chdir(sub)
    sample = ["sample", "../runs/one", "--count", "2", "--device", "cpu"]
    first = CliRunner().invoke(app, [*sample, "--teacher", "--out", "first.png"])
    assert first.exit_code == 0, first.stderr
    (tmp_path / TEACHER).rename(tmp_path / "moved")
    gone = CliRunner().invoke(app, [*sample, "--teacher"])
    assert gone.exit_code == 2
    assert "--teacher-from FOLDER" in gone.stderr
    second = CliRunner().invoke(app, [*sample, "--teacher-from", "../moved", "--out", "second.png"])
    assert second.exit_code == 0, second.stderr
    file = tmp_path / RUN / "config.yaml"
    file.write_text(file.read_text().replace("teacher: runs/teacher", "teacher: ../moved"))
    third = CliRunner().invoke(app, [*sample, "--teacher", "--out", "third.png"])
    assert third.exit_code == 0, third.stderr


def test_factors_find_their_base_from_another_folder(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(setting("train.steps=2", "lora.default={rank: 2}"))
    weights = load_model(RUN).denoiser.state_dict()
    monkeypatch.chdir("/")
    found = load_model(tmp_path / RUN).denoiser.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in weights.items())


def test_a_models_pipeline_and_encoder_are_found_from_its_run(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(setting("train.steps=2"))
    (tmp_path / "models" / "encoder").mkdir(parents=True)
    monkeypatch.chdir("/")
    target = list_checkpoints(tmp_path / RUN / "checkpoints")[-1]
    state = json.loads((target / checkpoints.STATE).read_text())
    spec = load_model(target).spec
    said = replace(spec, text_encoder="models/encoder", pipeline="models/none", sampler=OneCall())
    found = settle_places(said, target, state)
    assert found.text_encoder == str(tmp_path / "models" / "encoder")
    assert found.pipeline == "models/none"
