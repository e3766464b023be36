"""Sweeps: what is refused before anything is written, a grid that is stopped and goes on, and the comparison."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import Result
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

from diffdistill.commands import sweep, sweep_picture
from diffdistill.commands.cli import app
from diffdistill.commands.sweep import Axis, file_name, parse_axes, run_sweep
from diffdistill.commands.sweep_picture import spread
from diffdistill.distributed.stopping import TrainingError
from diffdistill.eval.evaluation import digits
from diffdistill.eval.protocols.packaged import DIGITS_PIXELS
from diffdistill.inference.draw import sample_images
from diffdistill.models.load import load_model
from diffdistill.training.config import RunConfig, load_config
from diffdistill.training.reports import log
from diffdistill.training.reports.log import RunLog
from diffdistill.training.trainer import Trainer

WriteConfig = Callable[..., Path]

TINY = ("train.steps=2", "train.log_every=1", "trackers=[]", "health={every: 1, samples: 8}")
GRID = ("--sweep", "gan_weight=0.01,0.1", "--sweep", "generator.lr=1e-4,1e-3")
NAMES = [
    f"method.gan_weight={weight},optimizers.generator.lr={rate}"
    for weight in ("0.01", "0.1")
    for rate in ("0.0001", "0.001")
]


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["train", *map(str, arguments)])


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    return found


def assert_refused(result: Result, folder: Path, *fragments: str) -> None:
    assert result.exit_code == 2, result.output
    assert [fragment for fragment in fragments if fragment not in result.stderr] == [], result.stderr
    assert not folder.exists(), "something was written"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol with 200 samples instead of 1,800, and no curves."""
    few = dataclasses.replace(DIGITS_PIXELS, num_images=200)
    monkeypatch.setattr(digits, "DIGITS_PIXELS", few)
    monkeypatch.setattr(log, "draw_curves", lambda *_, **__: None)  # these have tests of their own


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what happens before it is drawn."""
    monkeypatch.setattr(sweep, "draw_sweep", lambda *_, **__: None)


@pytest.fixture
def config(write_config: WriteConfig) -> Path:
    """A config file of a DMD2 run of two steps; its run is `tmp_path / "run"`."""
    return write_config("dmd2", *TINY)


@pytest.fixture
def parsed(config: Path) -> RunConfig:
    return load_config(config)


class PlantedFault:
    """Stops the training of the runs whose folder ends with `where`, after a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException) -> None:
        self.is_active, self.trained = True, []  # type: ignore[var-annotated]
        step = Trainer.train_step

        def train_step(trainer: Trainer, log: RunLog | None = None) -> None:
            self.trained.append(trainer.folder.name)
            step(trainer, log)
            if self.is_active and trainer.folder.name.endswith(where):
                raise error

        monkeypatch.setattr(Trainer, "train_step", train_step)


def test_a_grid_of_two_by_two_is_run_and_compared(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    save = sweep_picture.save_figure
    monkeypatch.setattr(sweep_picture, "save_figure", lambda fig, file: figures.append(fig) or save(fig, file))
    result = call(config, *GRID)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "run"
    assert sorted(p.name for p in folder.iterdir()) == sorted([*NAMES, "sweep.json", "sweep.png"])
    told = record(folder)
    assert told["grid"] == {"method.gan_weight": [0.01, 0.1], "optimizers.generator.lr": [1e-4, 1e-3]}
    assert [run["name"] for run in told["runs"]] == NAMES
    assert {run["status"] for run in told["runs"]} == {"done"}
    for run in told["runs"]:
        assert list(run["scores"]) == ["fd_pixels", "precision", "recall"]
        assert list(run["losses"]) == ["generator loss", "fake loss"]
        assert {"diversity", "std ratio", "fake lag"} <= run["health"].keys()
        saved = load_config(folder / run["name"] / "config.yaml")
        assert saved.method.gan_weight == run["values"]["method.gan_weight"]  # type: ignore[attr-defined]
        assert saved.optimizer("generator").lr == run["values"]["optimizers.generator.lr"]
    shown = click.unstyle(result.stdout)
    assert "run 4 of 4" in shown
    assert [
        name for name in ("gan_weight", "FD pixels", "generator loss", "diversity", "warnings") if name not in shown
    ] == []
    (figure,) = figures
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:3] == ["FD pixels", "precision", "recall"]
    assert {"diversity", "generator loss", "fake loss"} <= set(titles)
    assert all(len(axes.get_lines()) == 2 for axes in figure.axes), "one line for each rate"
    assert len(figure.images) == 4
    captions = [text.get_text() for text in figure.texts]
    assert "gan_weight = 0.01, lr = 0.0001" in captions
    assert Image.open(folder / "sweep.png").height > 500


def test_every_run_of_the_picture_starts_from_the_same_noise(config: Path, tmp_path: Path) -> None:
    run_sweep(config, [], ["gan_weight=0.01,0.1"], quiet=True)
    models = [load_model(tmp_path / "run" / f"method.gan_weight={value}") for value in ("0.01", "0.1")]
    first, second = (sample_images(model, count=4) for model in models)
    assert float((first - second).abs().max()) < 0.2, "two steps from one teacher, on one noise, lie close together"
    again = sweep_picture.sample_sheet(tmp_path / "run" / "method.gan_weight=0.01")
    assert again.tobytes() == sweep_picture.sample_sheet(tmp_path / "run" / "method.gan_weight=0.01").tobytes()


def test_a_sweep_that_was_killed_goes_on_where_it_stood(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_picture: None
) -> None:
    planted = PlantedFault(monkeypatch, NAMES[1][-40:], KeyboardInterrupt())
    folder = tmp_path / "run"
    stopped = call(config, *GRID, "train.checkpoint_every=1")
    assert stopped.exit_code == 130
    assert "the sweep stopped in run 2 of 4; resume it with the same command and --resume" in stopped.output
    assert [run["status"] for run in record(folder)["runs"]] == ["done", "stopped", "pending", "pending"]
    assert call(config, *GRID, "train.checkpoint_every=1").exit_code == 2, "without --resume it is refused"
    planted.is_active, planted.trained = False, []
    result = call(config, *GRID, "train.checkpoint_every=1", "--resume")
    assert result.exit_code == 0, result.output
    assert planted.trained == [name for name in NAMES[1:] for _ in range(2)], "the finished one is not trained again"
    assert [run["status"] for run in record(folder)["runs"]] == 4 * ["done"]


def test_a_run_that_fails_is_named_and_the_others_go_on(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hidden-value")
    planted = PlantedFault(monkeypatch, "=0.03", RuntimeError("no kernel, hidden-value"))
    result = call(config, "--sweep", "gan_weight=0.01,0.03,0.1")
    assert result.exit_code == 1
    assert "1 of 3 runs failed:\n  method.gan_weight=0.03: RuntimeError: no kernel, ***" in result.stderr
    folder = tmp_path / "run"
    assert [run["status"] for run in record(folder)["runs"]] == ["done", "failed", "done"]
    trace = (folder / "method.gan_weight=0.03" / "error.txt").read_text()
    assert trace.startswith("Traceback")
    assert "hidden-value" not in trace + (folder / "sweep.json").read_text() + result.output
    assert (folder / "sweep.png").exists()
    planted.is_active, planted.trained = False, []
    assert call(config, "--sweep", "gan_weight=0.01,0.03,0.1", "--resume").exit_code == 0
    assert set(planted.trained) == {"method.gan_weight=0.03"}
    assert not (folder / "method.gan_weight=0.03" / "error.txt").exists()


def test_a_run_that_cannot_train_any_more_is_a_failure_with_its_words(
    config: Path, monkeypatch: pytest.MonkeyPatch, no_picture: None
) -> None:
    PlantedFault(monkeypatch, "=0.1", TrainingError("step 1: not finite"))
    with pytest.raises(TrainingError, match=r"1 of 2 runs failed:\n  method\.gan_weight=0\.1: step 1: not finite"):
        run_sweep(config, [], ["gan_weight=0.01,0.1"], quiet=True)


@pytest.mark.parametrize(
    ("sweeps", "fragments"),
    [
        (
            ["gan_weight=0.1,-1,soft"],
            [
                "2 of 3 combinations cannot be run; none was started",
                "method.gan_weight = -1: input should be greater than or equal to 0",
                "method.gan_weight = 'soft': input should be a valid number",
            ],
        ),
        (["micro_batch_size=4,3"], ["train.micro_batch_size=3: train.global_batch_size = 8: must be a multiple"]),
        (["optimizers.nobody.lr=1,2"], ["optimizers.nobody: no such player"]),
        (
            ["lr=1e-3"],
            ["--sweep lr: could be any of optimizers.generator.lr, optimizers.default.lr; write one of them"],
        ),
        (["gan_weigth=1"], ["--sweep gan_weigth: no such setting; did you mean gan_weight"]),
        (["method.gan_weigth=1"], ["method.gan_weigth: unknown key; did you mean 'gan_weight'"]),
        (["gan_weight"], ["--sweep 'gan_weight': write key=value,value"]),
        (["gan_weight="], ["--sweep 'gan_weight=': gives no value"]),
        (["gan_weight=0.1,0.10"], ["gives 0.1 more than once"]),
        (["gan_weight=[1"], ["--sweep 'gan_weight=[1': not valid YAML"]),
        (["run=a,b"], ["--sweep run: every run of a sweep has its own folder already"]),
        (["gan_weight=1", "method.gan_weight=2"], ["method.gan_weight and method.gan_weight set the same key"]),
        (["ema.ramp=0", "ema=null"], ["ema and ema.ramp set the same key; give one of them"]),
    ],
)
def test_a_bad_sweep_is_refused_before_anything_is_written(
    config: Path, tmp_path: Path, sweeps: list[str], fragments: list[str]
) -> None:
    options = [option for sweep in sweeps for option in ("--sweep", sweep)]
    assert_refused(call(config, *options), tmp_path / "run", *fragments)


def test_a_checkpoint_cannot_be_named_for_a_sweep(config: Path, tmp_path: Path) -> None:
    result = call(config, *GRID, "--resume", "--checkpoint", "step-00000001")
    assert_refused(result, tmp_path / "run", "resume a sweep with --resume alone")


def test_a_sweep_does_not_move_into_a_run(config: Path, parsed: RunConfig) -> None:
    Trainer(parsed, quiet=True).run()
    result = call(config, *GRID)
    assert result.exit_code == 2
    assert f"{parsed.run}: holds a run already; choose another `run` for the sweep" in result.stderr


def test_values_are_yaml_and_keys_may_be_short(parsed: RunConfig) -> None:
    sweeps = ["gan_weight=1e-3,2", "ema=null,{halflife_images: 5, ramp: 0}", "default.betas=[0, 0.9],[0.5, 0.99]"]
    assert parse_axes(sweeps, parsed) == [
        Axis("method.gan_weight", (1e-3, 2)),
        Axis("ema", (None, {"halflife_images": 5, "ramp": 0})),
        Axis("optimizers.default.betas", ([0, 0.9], [0.5, 0.99])),
    ]


def test_names_are_safe_as_file_names_and_different_for_different_values() -> None:
    assert file_name({"method.alpha": 0.5, "train.seed": -1}) == "method.alpha=0.5,train.seed=-1"
    assert file_name({"a": True, "b": None, "c": 1e-5}) == "a=true,b=null,c=1e-05"
    odd: list[object] = ["a/b", "a_b", "../..", "a b", "ä", {"name": "mlp", "width": 32}, [0, 0.9], "x" * 300, ""]
    names = [file_name({"key": value}) for value in odd]
    assert len(set(names)) == len(odd)
    assert all(len(name) <= 200 and set(name) <= set(map(chr, range(33, 127))) - set('/\\:*?"<>|') for name in names)
    assert len(file_name({f"a.long.key.number.{n}": n for n in range(30)})) <= 200


def test_numbers_stand_to_scale_where_that_keeps_them_apart() -> None:
    assert spread([0.01, 0.03, 0.1]) == ([0.01, 0.03, 0.1], True)
    assert spread([1, 2, 3]) == ([1, 2, 3], False)
    assert spread([0, 0.001, 1]) == ([0, 1, 2], False)
    assert spread(["null", 1.0]) == ([0, 1], False)
    assert spread([5]) == ([0], False)


def test_models_that_are_no_digits_are_compared_by_their_losses(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(place: str) -> None:
        raise sweep.UserError(f"{place}: the protocol digits-pixels is for digits")

    monkeypatch.setattr(sweep, "evaluate_run", refuse)
    (outcome,) = run_sweep(config, [], ["gan_weight=0.01"], quiet=True)
    assert (outcome.scores, outcome.error, outcome.status) == ({}, None, "done")
    assert list(outcome.losses) == ["generator loss", "fake loss"]
    assert (tmp_path / "run" / "sweep.png").exists()
