"""What the tests share: one thread, runs that take a second, and one tiny digits teacher."""

import gc
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.cpu_times import pytest_addoption, pytest_configure  # noqa: F401
from support.digits_runs import train_digits_teacher

from diffdistill.settings.values import apply_overrides, dump_yaml, parse_yaml
from diffdistill.storage.atomic import write_bytes_atomically
from diffdistill.training.config import RunConfig, parse_config
from diffdistill.training.reports import log
from diffdistill.training.reports.curves import CURVES, draw_curves, read_metrics, sections
from diffdistill.training.trainer import Trainer

torch.set_num_threads(1)
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])  # where `diffdistill` is
os.environ["COLUMNS"] = "160"  # of the terminal, so that what is printed does not depend on where the tests run

MakeConfig = Callable[..., RunConfig]
WriteConfig = Callable[..., Path]

SMALL_TRAIN = """
  steps: 4
  global_batch_size: 8
  device: cpu
  log_every: 1
  preview_every: 0
  checkpoint_every: 100
"""

SETTINGS = {
    "pretrain": f"""
method:
  name: pretrain
  time_law: {{name: lognormal, mean: -0.6, std: 1.2}}
  teacher_sampler: {{name: heun, num_steps: 3, rho: 5}}
model:
  network: {{name: mlp, width: 32, blocks: 2}}
  path: {{name: edm, sigma_min: 0.02, sigma_max: 20}}
  sigma_data: 0.75
optimizers:
  teacher: {{lr: 2e-3, betas: [0.9, 0.99]}}
ema: {{halflife_images: 100}}
train: {SMALL_TRAIN}""",
    "dmd2": f"""
method:
  name: dmd2
  steps: {{init_ratio: 2.5}}
  fake_updates: 2
  gan_weight: 0.03
optimizers:
  generator: {{lr: 6e-4}}
  default: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "sid": f"""
method: {{name: sid, steps: {{init_ratio: 2.5}}}}
optimizers:
  generator: {{lr: 6e-4}}
  default: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "sim": f"""
method: {{name: sim, steps: {{init_ratio: 2.5}}}}
optimizers:
  generator: {{lr: 6e-4}}
  default: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "f_distill": f"""
method:
  name: f_distill
  divergence: js
  steps: {{init_ratio: 2.5}}
  fake_updates: 2
  gan_weight: 0.03
  ratio_memory: 0.5
optimizers:
  generator: {{lr: 6e-4}}
  default: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "cdm": f"""
method:
  name: cdm
  steps: {{init_ratio: 10, later_ratios: [2], later_noise: ddim}}
  levels: {{num_steps: [1, 3], time_law: {{name: karras, ratio_min: 0.1, ratio_max: 5}}}}
  guidance: [1, 3]
  fake_follows: 0.01
  anchor_weight: 0.05
  anchor_steps: 2
  anchor_sampler: {{name: ddim, num_steps: 6}}
optimizers:
  generator: {{lr: 6e-4}}
  default: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "uni_instruct": f"""
method: {{name: uni_instruct, divergence: kl, steps: {{init_ratio: 2.5}}, gan_weight: 0.03, ratio_memory: 0.5}}
optimizers:
  generator: {{lr: 6e-4}}
  default: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "hyper_sd": f"""
method:
  name: hyper_sd
  stages:
    - {{segments: 2, num_steps: 2, adversarial_weight: 0.1}}
    - {{segments: 1, grid_steps: 2, score_weight: 0.5}}
  steps: {{num_steps: 1, grid: {{num_steps: 4, spacing: karras}}}}
  guidance: [1, 3]
optimizers:
  default: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "boot": f"""
method:
  name: boot
  time_law: {{name: karras, ratio_min: 0.02, ratio_max: 20}}
  guidance: [1, 3]
  takes_guidance: true
optimizers:
  generator: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "free_flow": f"""
method:
  name: free_flow
  guidance: [1, 3]
  prediction_time_law: {{name: karras, ratio_min: 0.02, ratio_max: 20}}
  fake_updates: 2
optimizers:
  generator: {{lr: 6e-4}}
  default: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "scm": f"""
method: {{name: scm, steps: {{init_ratio: 10}}, guidance: 2, warmup: 2}}
optimizers:
  default: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "rcm": f"""
method:
  name: rcm
  steps: {{init_ratio: 10, later_ratios: [2]}}
  levels: {{num_steps: [1, 3], order: capped}}
  guidance: [1, 3]
  warmup: 1
  fake_updates: 1
optimizers:
  generator: {{lr: 6e-4}}
  default: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "consistency": f"""
method: {{name: consistency, steps: {{init_ratio: 10}}, guidance: 2, curriculum: {{name: doubling, first: 4, last: 8}}}}
optimizers:
  default: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "tdm": f"""
method:
  name: tdm
  steps: {{init_ratio: 10, later_ratios: [2], later_noise: ddim}}
  guidance: [1, 3]
optimizers:
  generator: {{lr: 6e-4}}
  default: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "rectified_flow": f"""
method: {{name: rectified_flow, pairs: 12, pair_sampler: {{name: heun, num_steps: 3, rho: 5}}}}
optimizers:
  generator: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "mean_flow": f"""
method: {{name: mean_flow, steps: {{init_ratio: 10}}, velocity: data, guidance: 2, kappa: 0.5, width: 8}}
optimizers:
  generator: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "pi_flow": f"""
method: {{name: pi_flow, steps: {{num_steps: 2}}, places: 3, mixing_steps: 3, guidance: 2}}
optimizers:
  generator: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "tsm": f"""
method: {{name: tsm, student_sampler: {{name: heun, num_steps: 3, rho: 5}}}}
model:
  network: {{name: mlp, width: 16, blocks: 1}}
  path: {{name: edm, sigma_min: 0.02, sigma_max: 20}}
  sigma_data: 0.75
optimizers:
  student: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "regression": f"""
method: {{name: regression, pairs: 12, pair_sampler: {{name: heun, num_steps: 3, rho: 5}}}}
optimizers:
  generator: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "pso": f"""
method: {{name: pso, steps: {{init_ratio: 5, later_ratios: [1]}}, form: online, beta: 50}}
optimizers:
  generator: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "preference_field": f"""
method: {{name: preference_field, steps: {{init_ratio: 2.5}}, fake_updates: 2}}
optimizers:
  generator: {{lr: 6e-4}}
  default: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "score_field": f"""
method: {{name: score_field, steps: {{init_ratio: 2.5}}, weight: sigma/alpha, fake_updates: 2}}
optimizers:
  generator: {{lr: 6e-4}}
  default: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "forget": f"""
method:
  name: forget
  base: {{name: dmd2, steps: {{init_ratio: 2.5}}, fake_updates: 2, gan_weight: 0}}
  forgotten: [3]
  share: 0.5
optimizers:
  generator: {{lr: 6e-4}}
  default: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "ddk": f"""
method:
  name: ddk
  base: {{name: dmd2, steps: {{init_ratio: 2.5}}, fake_updates: 2, gan_weight: 0}}
  every: 2
optimizers:
  generator: {{lr: 6e-4}}
  default: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "diversity": f"""
method:
  name: diversity
  base: {{name: dmd2, steps: {{init_ratio: 2.5}}, fake_updates: 2, gan_weight: 0}}
  weight: 0.5
optimizers:
  generator: {{lr: 6e-4}}
  default: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "msd": f"""
method:
  name: msd
  base: {{name: dmd2, steps: {{init_ratio: 2.5}}, fake_updates: 2, gan_weight: 0.03}}
  num_students: 2
optimizers:
  generator: {{lr: 6e-4}}
  default: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "disback": f"""
method:
  name: disback
  base: {{name: dmd2, steps: {{init_ratio: 2.5}}, fake_updates: 2, gan_weight: 0.03}}
  path_length: 3
  recording_interval: 2
  backtracking_interval: 1
optimizers:
  generator: {{lr: 6e-4}}
  default: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "agd": f"""
method:
  name: agd
  adapter: {{width: 8, placement: all}}
  steps: {{name: heun, num_steps: 3, rho: 5}}
  guidance: [1, 4]
  trajectories: 6
optimizers:
  default: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "merge_teachers": f"""
method:
  name: merge_teachers
  steps: {{name: heun, num_steps: 3, rho: 5}}
  width: 8
optimizers:
  default: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
    "guidance_distill": f"""
method:
  name: guidance_distill
  steps: {{name: heun, num_steps: 3, rho: 5}}
  width: 8
optimizers:
  default: {{lr: 1e-3}}
ema: {{halflife_images: 100, ramp: 0}}
train: {SMALL_TRAIN}""",
}


def blank_curves(folder: Path, *, title: str) -> Path | None:
    """The file alone: drawing is four fifths of a run of a few steps. Tests of the drawing ask for `drawn_curves`."""
    if not sections(read_metrics(folder / "metrics.jsonl")):
        return None
    write_bytes_atomically(folder / CURVES, title.encode())
    return folder / CURVES


pytest.MonkeyPatch().setattr(log, "draw_curves", blank_curves)


@pytest.fixture
def drawn_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw their curves, as they do outside the tests."""
    monkeypatch.setattr(log, "draw_curves", draw_curves)


def pytest_collection_finish() -> None:
    """What is loaded stays: nobody need look through it for garbage again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests by a profiler first: behind others in one process it saw no call, for a reason that is not known yet."""
    items.sort(key=lambda item: item.path.parts[-2:] != ("project", "test_path.py"))


def small_config(method: str, run: Path, *overrides: str, teacher: Path | None = None) -> RunConfig:
    """A run of a few steps on a tiny network, changed by overrides as on the command line."""
    settings = parse_yaml(SETTINGS[method], origin="the tests' settings")
    settings |= {"run": str(run)} | ({"teacher": str(teacher)} if teacher else {})
    if method == "merge_teachers":
        settings["teachers"] = {"other": str(teacher)}  # which it cannot do without
    return parse_config(apply_overrides(settings, overrides))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder of a digits teacher, a tiny U-Net trained for ten steps."""
    folder = tmp_path_factory.mktemp("shared") / "teacher"
    network = "model.network={name: unet, channels: [8, 16]}"
    Trainer(small_config("pretrain", folder, network, "train.steps=10"), quiet=True).run()
    return folder


@pytest.fixture(scope="session")
def quick_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an MLP, a few times faster."""
    folder = tmp_path_factory.mktemp("shared") / "quick-teacher"
    Trainer(small_config("pretrain", folder, "train.steps=10"), quiet=True).run()
    return folder


@pytest.fixture(scope="session")
def digits_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real one, the packaged U-Net after 600 steps: for the full tests, as it takes a minute."""
    return train_digits_teacher(tmp_path_factory.mktemp("digits") / "teacher")


@pytest.fixture(scope="session")
def make_config(quick_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeConfig:
    """`make_config("dmd2", "train.steps=3")`: a small run in a new folder."""

    def make(method: str, *overrides: str) -> RunConfig:
        run = tmp_path_factory.mktemp("small") / "run"
        return small_config(method, run, *overrides, teacher=quick_teacher if method != "pretrain" else None)

    return make


@pytest.fixture
def write_config(make_config: MakeConfig, tmp_path: Path) -> WriteConfig:
    """The same as a YAML file, for the command line; its run is `tmp_path / "run"`."""

    def write(method: str, *overrides: str) -> Path:
        file = tmp_path / f"{method}.yaml"
        file.write_text(dump_yaml(make_config(method, f"run={tmp_path / 'run'}", *overrides)))
        return file

    return write
