"""A script and its config are the same run, so that the tutorial cannot drift from what is measured."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from diffdistill.settings.values import dump
from diffdistill.training.config import RunConfig, load_config

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts").glob("train_*.py"))
LOGGING = ("log_every", "preview_every", "checkpoint_every", "keep_checkpoints")


def settings(config: RunConfig) -> dict[str, Any]:
    """The config as plain values, without the run's folder and how it is logged."""
    plain: dict[str, Any] = dump(config)
    train = {name: value for name, value in plain["train"].items() if name not in LOGGING}
    return plain | {"run": "", "train": train}


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_a_script_builds_the_run_of_its_config(file: Path) -> None:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    packaged = ROOT / "configs" / file.stem.removeprefix("train_") / "digits.yaml"
    assert settings(script.config) == settings(load_config(packaged))


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*/digits*.yaml")), ids=lambda file: file.parent.name)
def test_a_packaged_digits_config_trains_on_one_thread(file: Path) -> None:
    assert load_config(file).train.num_threads == 1, "so small a network is slower on two, much so on a busy machine"
