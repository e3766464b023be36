"""Files of weights have the permissions that the umask gives all others."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig
from safetensors.torch import save_file

from diffdistill.eval.features.store import FeatureStore
from diffdistill.storage.atomic import follow_umask, write_tensors
from diffdistill.storage.shard_files import write_shards
from diffdistill.training.trainer import Trainer

TENSORS = {"a": torch.ones(3)}
WRITERS: dict[str, Callable[[Path], object]] = {
    "tensors": lambda place: write_tensors(place / "a.safetensors", TENSORS, {"format": "pt"}),
    "features": lambda place: FeatureStore(place, 3).write(0, TENSORS),
    "shards": lambda place: write_shards(place / "group", TENSORS),
}


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> set[int]:
    return {file.stat().st_mode & 0o777 for file in folder.rglob("*") if file.is_file() and ".lock" not in file.name}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_of_tensors_follows_the_umask(tmp_path: Path, umask: int, write: Callable[[Path], object]) -> None:
    write(tmp_path)
    assert modes(tmp_path) == {0o666 & ~umask}


def test_all_files_of_a_run_follow_the_umask(make_config: MakeConfig, umask: int) -> None:
    config = make_config("dmd2", "train.steps=1", "method.regression_weight=0.1", "method.regression_pairs=8")
    Trainer(config, quiet=True).run()
    assert (Path(config.run) / "prepared.safetensors").is_file()
    assert modes(Path(config.run)) == {0o666 & ~umask}


def test_what_others_wrote_into_an_export_is_opened_as_far_as_the_umask_says(tmp_path: Path, umask: int) -> None:
    (tmp_path / "unet").mkdir()
    save_file(TENSORS, tmp_path / "unet" / "model.safetensors")
    (tmp_path / "run.sh").write_text("")
    (tmp_path / "run.sh").chmod(0o755)
    follow_umask(tmp_path)
    assert modes(tmp_path / "unet") == {0o666 & ~umask}
    assert (tmp_path / "run.sh").stat().st_mode & 0o100
    assert not list(tmp_path.rglob(".umask"))
