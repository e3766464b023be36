"""A teacher and data that a program gives as objects: trained, resumed with the same, refused with any others."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fleet import run_together
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import diffdistill as dd
from diffdistill.commands.cli import app
from diffdistill.data.digits import Digits
from diffdistill.diffusion.guidance_rules import Renormalised
from diffdistill.methods.dmd2 import DMD2
from diffdistill.models import given as given_models
from diffdistill.networks import given as given_networks
from diffdistill.networks.lora import LoRASettings
from diffdistill.storage.checkpoint import read_state
from diffdistill.training.config import json_schema


class Plain(nn.Module):
    """A module that knows nothing of this package."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inner = nn.Conv2d(13, 4, 3, padding=1)
            self.outer = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        told = torch.cat([nn.functional.one_hot(label, 11).to(x.dtype), time[:, None]], 1)
        maps = told[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return self.outer(self.inner(torch.cat([x, maps], 1)).relu())


def plain_teacher(seed: int = 0, tap: str | None = "inner") -> dd.Denoiser:
    return dd.as_denoiser(Plain(seed), dd.EDM(), "edm", num_classes=10, has_null_condition=True, tap=tap)


def equal_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def dataset(count: int = 64) -> TensorDataset:
    images, labels = Digits().tensors()
    return TensorDataset(images[:count], labels[:count])


def config(run: Path, steps: int, **changes: Any) -> dd.RunConfig:
    settings: dict[str, Any] = {
        "run": str(run),
        "method": DMD2(steps=dd.FewSteps(init_ratio=2.5)),
        "optimizers": {"default": dd.OptimizerConfig(lr=1e-3)},
        "train": dd.TrainConfig(steps=steps, global_batch_size=8, device="cpu", preview_every=0, checkpoint_every=2),
    }
    return dd.RunConfig(**{**settings, **changes})


def train(run: Path, steps: int, resume: bool = False, **objects: Any) -> Path:
    return dd.Trainer(config(run, steps), quiet=True, resume=resume, **objects).run()


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes this process one that has been given nothing."""

    def clear() -> None:
        monkeypatch.setattr(given_networks, "_GIVEN", {})
        monkeypatch.setattr(given_models, "_SPECS", {})
        monkeypatch.setattr("diffdistill.data.given._GIVEN", {})

    clear()
    return clear


def test_a_run_from_objects_is_resumed_with_the_same_bit_for_bit(tmp_path: Path, forget: Callable[[], None]) -> None:
    teacher = plain_teacher()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    whole = train(tmp_path / "whole", 4, teacher=teacher, data=dataset())
    train(tmp_path / "half", 2, teacher=teacher, data=dataset())
    forget()
    resumed = train(tmp_path / "half", 4, resume=True, teacher=plain_teacher(), data=dataset())
    equal_tensors(dd.load_model(whole).denoiser.state_dict(), dd.load_model(resumed).denoiser.state_dict())
    equal_tensors(teacher.state_dict(), before)
    assert teacher.training
    assert all(weight.requires_grad for weight in teacher.parameters())
    state = read_state(resumed)
    assert state["teacher"] == state["config"]["teacher"]
    assert state["config"]["data"]["kind"] == "TensorDataset"


def test_the_run_s_own_config_goes_on_with_the_objects(tmp_path: Path, forget: Callable[[], None]) -> None:
    train(tmp_path / "run", 2, teacher=plain_teacher(), data=dataset())
    forget()
    told = dd.load_config(tmp_path / "run" / "config.yaml", ["train.steps=3"])
    last = dd.Trainer(told, quiet=True, resume=True, teacher=plain_teacher(), data=dataset()).run()
    assert last.name == "step-00000003"


def test_a_source_of_images_is_taken_as_it_is(tmp_path: Path) -> None:
    source = Digits().load()
    settings = dd.with_objects(config(tmp_path / "run", 1), plain_teacher(), source)
    assert dd.plan(settings).source.key == source.key
    assert not (tmp_path / "run").exists()


OTHERS: list[tuple[dict[str, Any], str]] = [
    (
        {"data": dataset()},
        r"teacher: the run started with 'object:\w{32}', and now has None; .* dd.Trainer\(config, teach",
    ),
    (
        {"teacher": plain_teacher(seed=1), "data": dataset()},
        r"teacher: the run started with 'object:\w{32}', and now has 'object:\w{32}'; an object is identified by",
    ),
    ({"teacher": plain_teacher()}, "data.name: was 'given', now 'digits'"),
    (
        {"teacher": plain_teacher(), "data": dataset(63)},
        "the images or labels under `data` differ from those at the start of the run",
    ),
]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("objects") / "run"
    train(run, 1, teacher=plain_teacher(), data=dataset())
    return run


@pytest.mark.parametrize(("objects", "said"), OTHERS)
def test_a_run_does_not_go_on_with_other_objects(begun: Path, objects: dict[str, Any], said: str) -> None:
    with pytest.raises(dd.UserError, match=said):
        train(begun, 2, resume=True, **objects)


def test_a_program_that_was_given_nothing_says_what_to_give(begun: Path, forget: Callable[[], None]) -> None:
    """The command line, which cannot have them, and programs."""
    file = begun / "config.yaml"
    done = CliRunner().invoke(app, ["train", str(file), "train.steps=2", "--resume"])
    assert done.exit_code == 2
    said = " ".join(done.stderr.split())
    assert "is an object from a Python program, which is not on the disk; resume from Python" in said
    assert "dd.Trainer(config, teacher=..., resume=True)" in said
    needs_data = dd.load_config(file, ["run=elsewhere"])
    with pytest.raises(
        dd.UserError, match=r"data: is a TensorDataset object from a Python program.*data=\.\.\., resume"
    ):
        dd.Trainer(needs_data, teacher=plain_teacher())
    forget()
    for command in (["sample", str(begun), "--out", "x.png"], ["export", str(begun), "--out", "x"]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 2
        assert "network: is a Plain object from a Python program, which a config cannot build" in " ".join(
            done.stderr.split()
        )
    dd.give_teacher(plain_teacher(), image_shape=(1, 8, 8))
    assert dd.sample_images(dd.load_model(begun), count=2).shape == (2, 1, 8, 8)


def test_a_student_of_an_object_is_not_exported_and_the_reason_is_said(begun: Path, tmp_path: Path) -> None:
    with pytest.raises(dd.UserError, match=r"its Plain is an object from a Python program, .*; register a network"):
        dd.export_model(str(begun), tmp_path / "out", dd.ExportOptions())
    assert not (tmp_path / "out").exists()


def test_factors_of_lora_stand_over_an_object(tmp_path: Path, forget: Callable[[], None]) -> None:
    lora = {"default": LoRASettings(rank=2)}
    trainer = dd.Trainer(config(tmp_path / "run", 1, lora=lora), teacher=plain_teacher(), data=dataset(), quiet=True)
    trainer.run()
    equal_tensors(dd.load_model(tmp_path / "run").denoiser.state_dict(), trainer.student.state_dict())
    forget()
    with pytest.raises(dd.UserError, match=r"network: is a Plain object from a Python program"):
        dd.load_model(tmp_path / "run")


def test_a_teacher_may_be_one_of_our_networks(quick_teacher: Path, tmp_path: Path) -> None:
    """Given as an object it trains as it does from its folder."""
    from_folder = dd.Trainer(config(tmp_path / "a", 1, teacher=str(quick_teacher)), quiet=True)
    from_object = dd.Trainer(config(tmp_path / "b", 1), teacher=dd.load_model(quick_teacher).denoiser, quiet=True)
    for trainer in (from_folder, from_object):
        trainer.run()
    equal_tensors(from_object.student.state_dict(), from_folder.student.state_dict())


class Prompted(Plain):
    accepts, num_classes, has_null_condition, resolution_multiple = frozenset({"text"}), 0, False, 1


REFUSED: list[tuple[Any, str]] = [
    (Plain(), r"teacher: Plain is not a Denoiser; use dd.as_denoiser\(module, path, predicts\) first"),
    (dd.Denoiser(Prompted(), dd.EDM(), "edm"), "teacher: the network takes text, which an object lacks"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("teacher", "said"), REFUSED)
def test_what_can_be_no_teacher_is_refused(tmp_path: Path, teacher: Any, said: str) -> None:
    with pytest.raises(dd.UserError, match=said):
        dd.Trainer(config(tmp_path / "run", 1), teacher=teacher)


def test_two_teachers_and_images_of_another_shape_are_refused(tmp_path: Path, quick_teacher: Path) -> None:
    with pytest.raises(dd.UserError, match=r"teacher = .*: another is passed as an object; use one of the two"):
        dd.Trainer(config(tmp_path / "run", 1, teacher=str(quick_teacher)), teacher=plain_teacher())
    wide = TensorDataset(-torch.ones(4, 1, 8, 16), torch.tensor([0, 1, 2, 9]))
    with pytest.raises(dd.UserError, match=r"data: images are \(1, 8, 16\), but the teacher's are \(1, 8, 8\)"):
        dd.Trainer(config(tmp_path / "run", 1, teacher=str(quick_teacher)), data=wide)
    assert not (tmp_path / "run").exists()


def test_a_discriminator_needs_a_tap(tmp_path: Path) -> None:
    with pytest.raises(dd.UserError, match=r"gan: a discriminator reads features; name a submodule with as_denoiser"):
        dd.Trainer(config(tmp_path / "run", 1), teacher=plain_teacher(tap=None), quiet=True)
    with pytest.raises(dd.UserError, match=r"tap = 'iner': Plain has no such submodule; did you mean 'inner'"):
        plain_teacher(tap="iner")


def test_a_module_s_features_are_its_tap_s(tmp_path: Path) -> None:
    teacher = plain_teacher()
    x, t, cond = torch.randn(2, 1, 8, 8), torch.ones(2), dd.Cond(label=torch.tensor([1, 10]))
    features = teacher.features(x, t, cond)
    both = teacher.with_features(x, t, cond)
    assert features.shape == (2, 4, 8, 8)
    equal_tensors({"x0": both[0], "tap": both[1]}, {"x0": teacher(x, t, cond), "tap": features})
    with pytest.raises(ValueError, match="this network has the one that `as_denoiser` was given"):
        teacher.features(x, t, cond, taps=(0, 1))


def test_the_editors_schema_has_no_objects() -> None:
    assert "given" not in json_schema().lower().split('"')
    with pytest.raises(dd.UserError, match="network 'given': diffdistill uses this name"):
        dd.register_network(given_networks.GivenNetwork)


def test_a_given_teacher_keeps_its_rule_of_guidance_and_has_another_place_for_it() -> None:
    teacher = plain_teacher()
    linear = dd.give_teacher(teacher, image_shape=(1, 8, 8))
    teacher.run_with(guidance_rule=Renormalised())
    place = dd.give_teacher(teacher, image_shape=(1, 8, 8))
    found = dd.load_model(place)
    assert place != linear
    assert found.denoiser.runtime.guidance_rule == found.spec.model.guidance_rule == Renormalised()
    assert found.spec.build().runtime.guidance_rule == Renormalised()  # as a student of it is


def test_rows_are_read_once_the_processes_have_met_and_agree(tmp_path: Path) -> None:
    """Hours of reading else go before the word that another process was started otherwise, or not at all."""
    read: list[int] = []

    class Watched(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            read.append(index)
            found: tuple[Tensor, ...] = super().__getitem__(index)
            return found

    watched = Watched(*dataset().tensors)

    def apart() -> tuple[str, int]:
        seed = int(os.environ["RANK"])
        settings = replace(config(tmp_path / "run", 1), train=dd.TrainConfig(steps=1, global_batch_size=4, seed=seed))
        with pytest.raises(dd.UserError) as raised:
            dd.Trainer(settings, teacher=plain_teacher(), data=watched, quiet=True)
        return str(raised.value), len(read)

    for said, count in run_together(2, apart):
        assert "train.seed: 0 in process 0, 1 in process 1" in said
        assert count == 0
