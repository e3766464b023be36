"""Nothing is written or deleted through a link in a folder of ours, whoever writes, at whatever depth."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.data import cache
from diffdistill.data.pictures import save_grid
from diffdistill.data.shards import build_table
from diffdistill.eval.features.store import FeatureStore, locked
from diffdistill.settings.links import open_plain, refuse_links
from diffdistill.settings.schema import UserError
from diffdistill.storage.atomic import (
    append_text,
    write_bytes_atomically,
    write_tensors,
    write_tensors_atomically,
    write_text_atomically,
)
from diffdistill.storage.checkpoint import Checkpoint, clear_temporary, list_checkpoints, save_checkpoint
from diffdistill.training.trainer import Trainer

TENSORS = {"a": torch.ones(2)}
GRID = torch.zeros(1, 3, 8, 8)


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"players": TENSORS}, {})


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda file: write_text_atomically(file, "mine"),
    "bytes": lambda file: write_bytes_atomically(file, b"mine"),
    "tensors": lambda file: write_tensors_atomically(file, TENSORS),
    "tensors in place": lambda file: write_tensors(file, TENSORS),
    "a line": lambda file: append_text(file, "mine"),
    "opened": lambda file: open_plain(file, "wb"),
    "a picture": lambda file: save_grid(file.with_suffix(".png"), GRID, columns=1),
}


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_that_is_a_link_is_not_written_through(
    tmp_path: Path, write: Callable[[Path], object], is_there: bool
) -> None:
    target, folder = tmp_path / "precious", tmp_path / "ours"
    folder.mkdir()
    if is_there:
        target.write_text("all of it")
    for name in ("file", "file.png"):
        (folder / name).symlink_to(target)
    with pytest.raises(UserError, match=rf"file(\.png)?: is a link to {target}"):
        write(folder / "file")
    assert target.exists() == is_there
    assert not is_there or target.read_text() == "all of it"


@pytest.mark.parametrize("write", list(WRITERS.values())[:3], ids=list(WRITERS)[:3])
def test_a_link_in_the_place_of_a_half_written_file_is_not_followed(
    tmp_path: Path, write: Callable[[Path], object]
) -> None:
    target = tmp_path / "precious"
    target.write_text("all of it")
    (tmp_path / ".file.writing").symlink_to(target)
    write(tmp_path / "file")
    assert target.read_text() == "all of it"
    assert (tmp_path / "file").is_file()


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes here")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text_atomically(pipe, "mine")
    assert os.read(reader, 100) == b"mine"
    os.close(reader)
    assert pipe.is_fifo()


PLACES = ("previews", "previews/step-00000001.png", "checkpoints", "tensorboard", "a/b/c/d")


@pytest.mark.parametrize("place", PLACES)
def test_a_run_refuses_links_out_of_its_folder_at_any_depth(
    tmp_path: Path, make_config: MakeConfig, place: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ".writing-step-00000001").mkdir()
    config = make_config("pretrain", f"run={tmp_path / 'run'}", "train.steps=1")
    link = tmp_path / "run" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    with pytest.raises(UserError, match=rf"{place}: is a link to {outside}"):
        Trainer(config, quiet=True).run()
    assert [entry.name for entry in outside.iterdir()] == [".writing-step-00000001"]


@pytest.mark.parametrize("place", ["previews", "checkpoints"])
def test_a_link_that_is_made_while_a_run_trains_is_not_followed(
    tmp_path: Path, make_config: MakeConfig, place: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    trainer = Trainer(make_config("pretrain", "train.steps=1"), quiet=True)
    trainer.folder.mkdir(parents=True)
    (trainer.folder / place).symlink_to(outside)
    with pytest.raises(UserError, match=f"{place}: is a link"):
        trainer.save_preview() if place == "previews" else trainer.save()
    assert list(outside.iterdir()) == []


def test_links_that_stay_inside_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "latest").symlink_to("run-1")
    (tmp_path / "best").symlink_to(tmp_path / "wandb")
    refuse_links(tmp_path)
    refuse_links(tmp_path / "absent")
    beside = tmp_path.with_name(f"{tmp_path.name}-beside")  # whose name begins with the folder's
    (tmp_path / "out").symlink_to(beside)
    with pytest.raises(UserError, match="out: is a link"):
        refuse_links(tmp_path)


def test_nothing_is_deleted_through_linked_checkpoints(tmp_path: Path) -> None:
    real, linked = tmp_path / "real", tmp_path / "checkpoints"
    for step in (1, 2):
        save_checkpoint(real, checkpoint(step), keep=5)
    (real / ".writing-step-00000003").mkdir()
    linked.symlink_to(real)
    clear_temporary(linked)
    with pytest.raises(UserError, match="checkpoints: is a link"):
        save_checkpoint(linked, checkpoint(3), keep=1)
    assert len(list(real.iterdir())) == 3


def test_a_linked_step_is_no_checkpoint_and_its_target_stays(tmp_path: Path) -> None:
    kept = save_checkpoint(tmp_path / "elsewhere", checkpoint(1), keep=1)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step-00000001").symlink_to(kept)
    (folder / ".writing-step-00000002").symlink_to(kept)
    for step in (2, 3):
        save_checkpoint(folder, checkpoint(step), keep=1)
    assert [found.name for found in list_checkpoints(folder)] == ["step-00000003"]
    assert (kept / "state.json").is_file()


def test_prepared_data_and_shards_are_not_written_through_links(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "cache"
    outside.mkdir()
    root.mkdir()
    (root / cache.SOURCES).symlink_to(outside)
    with pytest.raises(UserError, match="sources: is a link"):
        cache.remember(root, "fingerprint", "key")
    (root / "table").symlink_to(outside)
    with pytest.raises(UserError, match="table: is a link"):
        build_table(root, "table", 2, rows_per_shard=1, start=lambda: lambda a, b: TENSORS, title="", about={})
    assert list(outside.iterdir()) == []


def test_features_are_not_written_through_links(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "features"
    outside.mkdir()
    root.mkdir()
    (root / "seeds-0-2").symlink_to(outside)
    with pytest.raises(UserError, match="seeds-0-2: is a link"):
        FeatureStore(root / "seeds-0-2", 2).write(0, TENSORS)
    with pytest.raises(UserError, match="seeds-0-2: is a link"), locked(root):
        pass
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("inside", ["run-1", "sweep.json"])
def test_a_sweep_is_not_written_through_links(tmp_path: Path, write_config: Callable[..., Path], inside: str) -> None:
    file, folder = write_config("pretrain", "train.steps=1"), tmp_path / "sweep"
    folder.mkdir()
    (folder / inside).symlink_to(tmp_path / "outside")
    told = CliRunner().invoke(app, ["train", str(file), f"run={folder}", "--sweep", "train.seed=0,1"])
    assert told.exit_code == 2
    assert f"{inside}: is a link" in told.output
    assert not (tmp_path / "outside").exists()


def test_images_of_an_evaluation_are_not_saved_through_links(tmp_path: Path, quick_teacher: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "teacher").symlink_to(tmp_path / "outside")
    arguments = ["eval", str(quick_teacher), "--protocol", "digits-pixels", "--save-images", str(images)]
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 2, told.output
    assert "is a link" in told.output
    assert not (tmp_path / "outside").exists()


def test_a_file_that_another_run_removes_meanwhile_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [(str(tmp_path), ["checkpoints"], [".state-1.tmp"])]
    monkeypatch.setattr("diffdistill.settings.links.os.walk", lambda _: iter(found))
    refuse_links(tmp_path)
