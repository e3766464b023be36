"""What is wrong with a config is said once, by place, value and choices, before anything is written."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.data.digits import Digits
from diffdistill.data.image_folder import ImageFolder
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import dump_yaml, parse_yaml
from diffdistill.training.config import OptimizerConfig, RunConfig, find_config, load_config, parse_config, read_config
from diffdistill.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]
WriteConfig = Callable[..., Path]
Command = Callable[..., Result]


def run(method: str, *arguments: object) -> Result:
    verb = "pretrain" if method == "pretrain" else "train"
    return CliRunner().invoke(app, [verb, *map(str, arguments)])


def assert_refused(result: Result, *fragments: str) -> None:
    """Exit code 2 and one message that holds the fragments, in order."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("error:") == 1
    assert "Traceback" not in result.stderr
    place = 0
    for fragment in fragments:
        found = result.stderr.find(fragment, place)
        assert found >= 0, f"{fragment!r} is not in, or not in this order in:\n{result.stderr}"
        place = found + len(fragment)


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file's content by path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


BAD_SETTINGS = [
    ("pretrain", ["train.step=3"], ["train.step: unknown key", "did you mean 'steps'?", "global_batch_size"]),
    ("pretrain", ["stepss=3"], ["stepss: unknown key", "choices: run, method, data"]),
    ("dmd2", ["method.gan_wieght=1"], ["method.gan_wieght: unknown key", "did you mean 'gan_weight'?"]),
    ("pretrain", ["model.network.witdh=3"], ["model.network.witdh", "did you mean 'width'? (choices: name, width"]),
    ("pretrain", ["train.steps=true"], ["train.steps = True: input should be a valid integer"]),
    ("pretrain", ["train.steps=2.5"], ["train.steps = 2.5: input should be a valid integer"]),
    ("pretrain", ["optimizers.teacher.lr=fast"], ["optimizers.teacher.lr = 'fast'", "valid number"]),
    ("pretrain", ["optimizers.teacher.lr='1e-3'"], ["optimizers.teacher.lr = '1e-3'", "valid number"]),
    ("pretrain", ["optimizers.teacher.lr=-1e-3"], ["optimizers.teacher.lr = -0.001", "greater than 0"]),
    (
        "pretrain",
        ["optimizers.teacher.name=adamm"],
        ["optimizers.teacher.name = 'adamm'", "'adam', 'adamw', 'radam', 'sgd'"],
    ),
    ("pretrain", ["run=3"], ["run = 3", "valid string"]),
    ("dmd2", ["method.fake_updates=0"], ["method.fake_updates = 0", "greater than or equal to 1"]),
    ("dmd2", ["method.guidance=.nan"], ["method.guidance = nan", "finite number"]),
    ("dmd2", ["method.guidance=-.inf"], ["method.guidance = -inf", "finite number"]),
    (
        "dmd2",
        ["method.name=dmd3"],
        ["method.name = 'dmd3'", "did you mean 'dmd2'?", "choices: agd, boot, cdm, consistency, "],
    ),
    ("dmd2", ["method=dmd2"], ["method = 'dmd2'", "should be an object"]),
    ("dmd2", ["method.steps.later_ratios=[9.0]"], ["method.steps", "must decrease: [2.5, 9.0]"]),
    ("pretrain", ["model.network.name=vit"], ["model.network.name = 'vit'", "choices: unet, "]),
    ("pretrain", ["data.name=cifar"], ["data.name = 'cifar'", "digits"]),
    ("pretrain", ["optimizers={}"], ["optimizers", "at least 1 item"]),
    # What only shows when the parts are put together.
    (
        "pretrain",
        ["model.network={name: unet, channels: [8, 8, 8, 8, 8], attention: [no, no, no, no, no]}"],
        ["network.channels: 5 resolutions", "multiples of 16; the images are 8 x 8"],
    ),
    ("pretrain", ["model.path={name: flow}"], ["predicts: 'edm' does not fit the path; choose from flow, x0, eps"]),
    (
        "pretrain",
        ["train.micro_batch_size=3"],
        ["train.global_batch_size = 8", "train.micro_batch_size = 3"],
    ),
    (
        "pretrain",
        ["train.micro_batch_size=16"],
        ["train.global_batch_size = 8", "train.micro_batch_size = 16"],
    ),
    ("pretrain", ["model=null"], ["either `model` (to pretrain) or `teacher` (to distil), not both or neither"]),
    ("pretrain", ["teacher=runs/other"], ["teacher = 'runs/other': no such folder"]),
    ("dmd2", ["teacher=null"], ["either `model` (to pretrain) or `teacher`"]),
    ("dmd2", ["optimizers={generator: {lr: 1e-3}}"], ["optimizers: none for the player 'fake'", "`default`"]),
    ("dmd2", ["optimizers.fakes={lr: 1e-3}"], ["optimizers.fakes: no such player", "generator, fake, discriminator"]),
    # Overrides.
    ("pretrain", ["train.steps"], ["override 'train.steps': write key.sub=value"]),
    ("pretrain", ["=3"], ["override '=3': write key.sub=value"]),
    ("pretrain", ["run.x=3"], ["override 'run.x=3': 'run' is a value"]),
    ("pretrain", ["train.steps=[3"], ["override 'train.steps=[3'", "not valid YAML"]),
    ("pretrain", ["--checkpoint=step-00000001"], ["--checkpoint: goes with --resume"]),
]


@pytest.mark.parametrize(("method", "arguments", "message"), BAD_SETTINGS, ids=lambda value: str(value)[:40])
def test_a_bad_setting_is_refused_before_anything_is_written(
    write_config: WriteConfig, tmp_path: Path, method: str, arguments: list[str], message: list[str]
) -> None:
    file = write_config(method)
    before = fingerprint(tmp_path)
    assert_refused(run(method, file, *arguments), *message)
    assert fingerprint(tmp_path) == before
    assert not (tmp_path / "run").exists()


def test_a_config_stands_over_its_base(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    own, base = tmp_path / "own.yaml", tmp_path / "sub" / "base.yaml"
    base.write_text("base: dmd2/digits\ntrain: {steps: 7, global_batch_size: 8}\ndata: {name: digits, split: test}\n")
    own.write_text(
        "base: sub/base.yaml\nrun: mine\nmethod: {fake_updates: 3}\nhealth: null\n"
        "data: {name: image_folder, path: pictures}\noptimizers: {generator: {lr: 1e-5}}\n"
    )
    found, packaged = load_config(own, ["train.steps=5"]), load_config(find_config("dmd2/digits"))
    assert found.run == "mine"
    assert found.method == replace(packaged.method, fake_updates=3)  # type: ignore[type-var]
    assert found.data == ImageFolder(path="pictures"), "of another name: nothing of the base's is left"
    assert found.health is None
    assert found.optimizers["generator"] == replace(packaged.optimizers["generator"], lr=1e-5)
    assert found.optimizers["default"] == packaged.optimizers["default"]
    assert found.train == replace(packaged.train, steps=5, global_batch_size=8)


@pytest.mark.parametrize(
    ("base", "own", "merged"),
    [
        ("{lr: 1, decay: linear}", "{name: adamw, lr: 2}", {"name": "adamw", "lr": 2, "decay": "linear"}),
        ("{lr: 1, decay: linear}", "{name: adam}", {"name": "adam", "lr": 1, "decay": "linear"}),
        ("{name: radam, lr: 1, eps: 1}", "{lr: 2}", {"name": "radam", "lr": 2, "eps": 1}),
        ("{name: radam, lr: 1}", "{name: radam, eps: 2}", {"name": "radam", "lr": 1, "eps": 2}),
        ("{name: radam, lr: 1, eps: 1}", "{name: sgd, lr: 2}", {"name": "sgd", "lr": 2}),
    ],
)
def test_a_group_gives_way_to_another_name_alone(tmp_path: Path, base: str, own: str, merged: dict[str, Any]) -> None:
    (tmp_path / "base.yaml").write_text(f"optimizers: {{default: {base}}}\n")
    (tmp_path / "own.yaml").write_text(f"base: base.yaml\noptimizers: {{default: {own}}}\n")
    assert read_config(tmp_path / "own.yaml") == {"optimizers": {"default": merged}}


def test_of_several_bases_the_lowest_is_the_first_to_be_written_over(tmp_path: Path) -> None:
    (tmp_path / "low.yaml").write_text("data: {name: digits, split: test}\n")
    (tmp_path / "middle.yaml").write_text("base: low.yaml\ndata: {cache: mine}\n")
    (tmp_path / "own.yaml").write_text("base: middle.yaml\ndata: {name: image_folder, path: pictures}\n")
    assert read_config(tmp_path / "own.yaml") == {"data": {"name": "image_folder", "path": "pictures"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: dmd2/sd16\n", "dmd2/sd16: no such file, nor a packaged config; nearest: dmd2/sd15"),
        ("base: {name: x}\n", "base = {'name': 'x'}: name a packaged config"),
        ("base: own.yaml\n", "base: more than 8 nested bases, or a cycle"),
        ("base: dmd2/digits\nstepz: 1\n", "stepz: unknown key"),
    ],
)
def test_a_base_that_cannot_be_one_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "own.yaml")
    assert message in str(caught.value)


BAD_YAML = [
    ("run: [1, 2", ["not valid YAML", "line 1"]),
    ("run: a\nrun: b\n", ["not valid YAML", "repeated key 'run'", "line 1"]),
    ("train: {steps: 1, steps: 2}", ["not valid YAML", "repeated key 'steps'"]),
    ("run: &a x\nteacher: *a\n", ["not valid YAML", "aliases are not read", "line 2"]),
    ("run: !!python/object/apply:os.system [ls]", ["not valid YAML", "could not determine a constructor"]),
    ("2020-01-01: x", ["not valid YAML", "2020-01-01", "is not a name"]),
    ("data: {1: x}", ["not valid YAML", "1 is not a name"]),
    ("- run", ["must be a mapping of settings, not list"]),
    ("", ["must be a mapping of settings, not NoneType"]),
    ("run: \xff", ["0xff is not UTF-8"]),
    ("run: x", ["3 faults", "method: is required", "optimizers: is required", "train: is required"]),
]


@pytest.mark.parametrize(("text", "message"), BAD_YAML, ids=lambda value: str(value)[:30])
def test_a_file_that_is_no_config_is_refused_with_the_line(tmp_path: Path, text: str, message: list[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(text.encode("latin-1"))
    assert_refused(run("dmd2", file), str(file), *message)
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "value",
    [
        *("9" * 5000, "0x" + "f" * 5000, "-0b" + "1" * 20_000, "0" + "7" * 6000, ":".join(["59"] * 3000)),
        *(":".join(["59"] * 3000) + ".5", "x" * 100_000, "[" * 1500, "{a: " * 500, '"\\ud800"', "1e999", ".nan"),
        "{" + ", ".join(f"k{number}: 1" for number in range(2000)) + "}",
    ],
    ids=lambda value: value[:12],
)
def test_a_hostile_value_is_refused_in_a_few_words(value: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(find_config("pretrain/digits"), [f"train.steps={value}"])
    assert len(str(caught.value)) < 600


def test_a_config_that_is_not_there_is_named_with_the_packaged_ones(tmp_path: Path) -> None:
    assert_refused(run("dmd2", "dmd2/digit"), "dmd2/digit: no such file", "nearest: dmd2/digits, ")
    assert_refused(run("dmd2", tmp_path), f"{tmp_path}: cannot be read")
    assert find_config("dmd2/digits").name == "digits.yaml"


def test_ten_faults_are_all_shown_at_once(write_config: WriteConfig) -> None:
    faults = {
        "train.seed=-1": "train.seed = -1",
        "train.precision=fp16": "train.precision = 'fp16'",
        "train.stepss=3": "train.stepss: unknown key",
        "method.time_law.std=-1": "method.time_law.std = -1",
        "method.class_dropout=2": "method.class_dropout = 2",
        "model.network.width=0": "model.network.width = 0",
        "model.sigma_data=0": "model.sigma_data = 0",
        "optimizers.teacher.betas=[1, 0.9]": "optimizers.teacher.betas[0] = 1",
        "ema.ramp=-1": "ema.ramp = -1",
        "data.split=val": "data.split = 'val'",
    }
    result = run("pretrain", write_config("pretrain"), *faults)
    assert_refused(result, "10 faults")
    assert [message for message in faults.values() if message not in result.stderr] == []


def test_guidance_is_refused_for_a_teacher_without_class_dropout(
    make_config: MakeConfig, write_config: WriteConfig, tmp_path: Path
) -> None:
    teacher = make_config("pretrain", "method.class_dropout=0.0", "train.steps=1")
    Trainer(teacher, quiet=True).run()
    file = write_config("dmd2", f"teacher={teacher.run}")
    assert_refused(run("dmd2", file, "method.guidance=1.5"), "method.guidance: 1.5", "class_dropout > 0; use 1")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("shift", "seen"), [(5, "from 5 to 14"), (-1, "from -1 to 8")])
def test_labels_that_the_teacher_does_not_know_are_refused(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shift: int, seen: str
) -> None:
    images, labels = Digits().tensors()
    monkeypatch.setattr(Digits, "tensors", lambda self: (images, labels + shift))
    assert_refused(run("dmd2", write_config("dmd2")), f"data: labels go {seen}; the teacher has 0 to 9")
    assert not (tmp_path / "run").exists()


def test_images_of_another_size_than_the_teachers_are_refused(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Digits, "tensors", lambda self: (torch.zeros(4, 1, 16, 16), torch.zeros(4, dtype=torch.int64)))
    assert_refused(run("dmd2", write_config("dmd2")), "images are (1, 16, 16), but the teacher's are (1, 8, 8)")


def test_both_a_model_and_a_teacher_are_refused(write_config: WriteConfig, quick_teacher: Path) -> None:
    file = write_config("pretrain")
    assert_refused(
        run("pretrain", file, f"teacher={quick_teacher}"), "either `model` (to pretrain) or `teacher`", "both"
    )


def test_a_teacher_without_a_checkpoint_is_refused(write_config: WriteConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    file = write_config("dmd2")
    assert_refused(run("dmd2", file, f"teacher={tmp_path / 'empty'}"), f"{tmp_path / 'empty'}: holds no checkpoint")
    none = tmp_path / "none"
    makes = f"no such folder; `diffdistill pretrain pretrain/digits run={none}` makes one"
    assert_refused(run("dmd2", file, f"teacher={none}"), f"teacher = '{none}': {makes}", "teacher=PATH")
    imported = (
        f"`diffdistill pretrain CONFIG run={none}` makes one, import-edm or import-sit with --out {none} makes it"
    )
    assert_refused(run("dmd2", "dmd2/sit256", f"teacher={none}"), f"teacher = '{none}': no such folder; {imported}")
    assert_refused(run("dmd2", file, f"teacher={file}"), f"{file}: no such folder")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_written_is_refused(write_config: WriteConfig, tmp_path: Path) -> None:
    blocked = tmp_path / "a file" / "run"  # below a regular file: that stops even the administrator
    blocked.parent.write_text("")
    assert_refused(run("pretrain", write_config("pretrain"), f"run={blocked}"), f"run = '{blocked}': cannot be written")


def test_pretrain_refuses_other_methods(write_config: WriteConfig) -> None:
    result = run("pretrain", write_config("dmd2"))
    assert_refused(result, "method.name = 'dmd2'", "use `diffdistill train`")


CHANGES = [
    ("model.network.width=16", "model.network.width: was 32, now 16"),
    ("optimizers.teacher.lr=5e-4", "optimizers.teacher.lr: was 0.002, now 0.0005"),
    ("train.seed=1", "train.seed: was 0, now 1"),
    ("ema=null", "ema: was {'halflife_images': 100.0, 'ramp': 0.05}, now None"),
]


def test_resuming_shows_what_has_changed_and_leaves_the_run_as_it_was(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    file = write_config("pretrain", "train.steps=2", "train.checkpoint_every=1")
    assert run("pretrain", file).exit_code == 0
    before = fingerprint(tmp_path)
    for setting, message in CHANGES:
        assert_refused(run("pretrain", file, setting, "--resume"), "the config has changed since", message)
    everything = [setting for setting, _ in CHANGES]
    result = run("pretrain", file, *everything, "--resume")
    assert_refused(result)
    assert [message for _, message in CHANGES if message not in result.stderr] == []
    assert_refused(run("pretrain", file), f"{tmp_path / 'run'}: holds a run already; add --resume")
    wrong = run("pretrain", file, "--resume", "--checkpoint=step-00000009")
    assert_refused(wrong, "no checkpoint 'step-00000009'", "step-00000001, step-00000002")
    assert fingerprint(tmp_path) == before
    assert run("pretrain", file, "train.steps=3", "train.log_every=3", "--resume").exit_code == 0


def test_resuming_from_a_damaged_checkpoint_names_a_whole_one(write_config: WriteConfig, tmp_path: Path) -> None:
    file = write_config("pretrain", "train.steps=2", "train.checkpoint_every=1")
    assert run("pretrain", file).exit_code == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-00000002" / "optimizers.safetensors").write_bytes(b"")
    whole = checkpoints / "step-00000001"
    assert_refused(run("pretrain", file, "--resume"), "damaged: optimizers.safetensors", f"before it is {whole}")
    assert run("pretrain", file, "--resume", "--checkpoint=step-00000001").exit_code == 0


@pytest.mark.parametrize("text", ["2e-4", "2E-4", "+2e-4", "0.2e-3", ".2e-3", "0.0002"])
def test_numbers_are_read_with_or_without_a_point(text: str) -> None:
    assert parse_yaml(text, origin="here") == 2e-4


def test_words_and_versions_are_not_taken_for_numbers() -> None:
    assert parse_yaml("[e4, 2e, 1e-, 2e4x, '2e-4']", origin="here") == ["e4", "2e", "1e-", "2e4x", "2e-4"]


@pytest.mark.parametrize("name", ["pretrain/digits", "dmd2/digits"])
def test_a_config_written_out_reads_back_the_same(name: str, tmp_path: Path) -> None:
    config = load_config(find_config(name))
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(config))
    assert load_config(file) == config


def test_the_resolved_config_is_kept_with_the_run(make_config: MakeConfig) -> None:
    config = make_config("dmd2", "train.steps=1")
    Trainer(config, quiet=True).run()
    assert load_config(Path(config.run) / "config.yaml") == config


def test_values_are_checked_in_python_too() -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        OptimizerConfig(lr=-1.0)
    with pytest.raises(ValueError, match="valid number"):
        OptimizerConfig(lr="1e-3")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="config: 1 fault"):
        parse_config([])
