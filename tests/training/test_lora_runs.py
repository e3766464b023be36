"""Runs with `lora`: what they train, what their checkpoints hold, and how they go on."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig, small_config
from safetensors.torch import load_file
from torch import Tensor

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.models.load import load_model, load_players
from diffdistill.networks.lora import lora_of
from diffdistill.settings.schema import UserError
from diffdistill.storage.checkpoint import find_damage
from diffdistill.training.assembly import assemble
from diffdistill.training.config import RunConfig
from diffdistill.training.memory.prediction import MemoryPlan, plan_memory
from diffdistill.training.plan import plan
from diffdistill.training.trainer import Trainer

LORA = "lora.default={rank: 2}"
WITH_LORA = (
    *("dmd2", "hyper_sd", "boot", "disback", "guidance_distill"),
    *(
        pytest.param(name, marks=pytest.mark.full)
        for name in (
            "sid",
            "sim",
            "f_distill",
            "uni_instruct",
            "cdm",
            "rcm",
            "free_flow",
            "regression",
            "msd",
            "scm",
            "mean_flow",
            "pi_flow",
            "tdm",
            "consistency",
            "rectified_flow",
            "pso",
            "preference_field",
            "score_field",
            "forget",
            "ddk",
            "diversity",
            "merge_teachers",
        )
    ),
)
TINY = ("train.steps=2", "train.global_batch_size=4")


def trained(config: RunConfig, **options: bool | str) -> Trainer:
    trainer = Trainer(config, quiet=True, **options)
    trainer.run()
    return trainer


def newest(run: str, group: str) -> dict[str, Tensor]:
    """Of a run's newest checkpoint."""
    target = sorted((Path(run) / "checkpoints").glob("step-*"))[-1]
    assert find_damage(target) is None
    return load_file(target / f"{group}.safetensors")


def same(first: Denoiser, second: Denoiser) -> bool:
    x, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 1.0, 5.0])
    cond = first.class_cond(torch.tensor([0, 1, 2]))
    with torch.no_grad():
        return torch.equal(first.eval()(x, t, cond), second.eval()(x, t, cond))


@pytest.mark.parametrize("method", WITH_LORA)
def test_every_method_trains_factors_and_saves_no_weight_of_the_teacher(make_config: MakeConfig, method: str) -> None:
    config = make_config(method, LORA, *TINY)
    before = load_model(config.teacher).denoiser.state_dict()
    trainer = Trainer(config, quiet=True)
    assert trainer.plan.teacher is not None
    teacher = trainer.plan.teacher.denoiser
    weights = {id(tensor) for tensor in (*teacher.net.parameters(), *teacher.net.buffers())}
    trainer.run()
    student = trainer.trained[config.method.student]
    found = lora_of(student)
    assert found is not None
    assert {id(tensor) for tensor in found.base_tensors()} == weights
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    of_base = [name for name in newest(config.run, "players") if name.rpartition("net.")[2] in before]
    assert of_base == []
    assert trainer.ema is not None
    assert same(load_model(config.run).denoiser, trainer.ema.module)


@pytest.mark.parametrize("method", ["pretrain", "tsm", "agd"])
def test_a_method_that_has_nothing_to_put_factors_on_says_so(make_config: MakeConfig, method: str) -> None:
    with pytest.raises(UserError, match=f"lora: .*{method}.*leave it out"):
        Trainer(make_config(method, LORA), quiet=True)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(make_config: MakeConfig) -> None:
    settings = (LORA, "train.global_batch_size=4", "train.checkpoint_every=2")
    whole, halved = make_config("dmd2", *settings), make_config("dmd2", *settings)
    trained(whole)
    trained(replace(halved, train=replace(halved.train, steps=2)))
    trained(halved, resume=True)
    for group in ("players", "ema", "optimizers"):
        found, expected = newest(halved.run, group), newest(whole.run, group)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("in_factors", "in_full"), [("fake", "generator"), ("generator", "fake")])
def test_a_mixed_run_trains_the_named_player_in_factors_and_the_other_in_full(
    make_config: MakeConfig, in_factors: str, in_full: str
) -> None:
    config = make_config("dmd2", f"lora.{in_factors}={{rank: 2}}", *TINY)
    trainer = trained(config)
    saved = {name for name in newest(config.run, "players") if not name.startswith("discriminator.")}
    assert {name.partition(".")[0] for name in saved if ".lora_" in name} == {in_factors}
    full = {name.removeprefix(f"{in_full}.") for name in saved if name.startswith(in_full)}
    assert full == load_model(config.teacher).denoiser.state_dict().keys()
    players = load_players(config.run).denoisers
    assert same(players["fake"], trainer.players.fake)
    assert trainer.ema is not None
    assert same(players["generator"], trainer.ema.module)


@pytest.mark.full
@pytest.mark.parametrize(("in_factors", "in_full"), [("fake", "generator"), ("generator", "fake")])
@pytest.mark.parametrize("method", ["sid", "sim", "f_distill", "hyper_sd", "disback"])
def test_every_method_with_a_fake_score_trains_one_of_them_in_factors(
    make_config: MakeConfig, method: str, in_factors: str, in_full: str
) -> None:
    trainer = Trainer(make_config(method, f"lora.{in_factors}={{rank: 2}}"), quiet=True)
    players = trainer.players
    assert lora_of(players[in_factors])
    assert lora_of(players[in_full]) is None
    before = {name: [p.clone() for p in players[name].parameters()] for name in (in_factors, in_full)}
    trainer.run()
    for name, parameters in before.items():
        pairs = zip(players[name].parameters(), parameters, strict=True)
        assert any(not torch.equal(now, then) for now, then in pairs), name


def test_null_trains_a_player_in_full_where_the_default_is_factors(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config("sid", LORA, "lora.fake=null"), quiet=True)
    assert lora_of(trainer.players.generator)
    assert lora_of(trainer.players.fake) is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lora.critic={rank: 2}", "lora.critic: no such player; choose from generator, fake, discriminator, default"),
        ("lora.discriminator={rank: 2}", "lora.discriminator: does not start from the teacher"),
        ("lora.default={rank: 0}", "lora.default.rank = 0: input should be greater than or equal to 1"),
        ("lora.default={targets: [to_k]}", r"lora.targets = \('to_k',\): no such layer in MLP"),
    ],
)
def test_a_wrong_setting_is_named(make_config: MakeConfig, setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trainer(make_config("dmd2", setting), quiet=True)


@pytest.fixture
def moved(quick_teacher: Path, tmp_path: Path) -> RunConfig:
    """A run with LoRA on a teacher that a test may damage."""
    shutil.copytree(quick_teacher, tmp_path / "teacher")
    config = small_config("sid", tmp_path / "run", LORA, *TINY, teacher=tmp_path / "teacher")
    trained(config)
    return config


def test_factors_without_their_base_are_refused_by_its_name(moved: RunConfig) -> None:
    assert moved.teacher is not None
    shutil.rmtree(moved.teacher)
    with pytest.raises(UserError, match=r"holds only LoRA factors, and their base cannot be read: .*teacher"):
        load_model(moved.run)


def test_factors_over_a_base_that_has_changed_are_refused(moved: RunConfig) -> None:
    assert moved.teacher is not None
    shutil.rmtree(moved.teacher)
    trained(small_config("pretrain", Path(moved.teacher), "train.steps=10", "train.seed=1"))
    with pytest.raises(UserError, match=r"their base, .*teacher.*, has changed"):
        load_model(moved.run)
    longer = replace(moved, train=replace(moved.train, steps=3))
    with pytest.raises(UserError, match="holds other weights than when this run began"):
        Trainer(longer, resume=True, quiet=True)
    with pytest.raises(UserError, match="has changed since this run started"):
        Trainer(longer, resume=True, quiet=True, allow_changes=True)


def test_a_run_begins_with_the_factors_of_an_earlier_one_over_the_same_base(make_config: MakeConfig) -> None:
    first = make_config("sid", LORA, *TINY)
    trained(first)
    trainer = Trainer(make_config("dmd2", f"init={first.run}", LORA), quiet=True)
    assert trainer.plan.teacher is not None
    found = lora_of(trainer.players.fake)
    assert found is not None
    assert found.base_tensors()[0] is next(trainer.plan.teacher.denoiser.net.parameters())
    assert same(trainer.players.fake, load_players(first.run).denoisers["fake"])
    assert same(trainer.players.generator, load_model(first.run).denoiser)


def test_a_run_that_was_trained_in_full_is_no_start_for_factors(make_config: MakeConfig) -> None:
    first = make_config("sid", *TINY)
    trained(first)
    with pytest.raises(UserError, match="init: its fake was trained in full"):
        Trainer(make_config("dmd2", f"init={first.run}", LORA), quiet=True)


def test_a_student_in_factors_can_be_a_teacher(make_config: MakeConfig, tmp_path: Path) -> None:
    first = make_config("sid", LORA, *TINY)
    trained(first)
    trainer = trained(small_config("regression", tmp_path / "run", LORA, *TINY, teacher=Path(first.run)))
    student = lora_of(trainer.trained["generator"])
    assert student is not None
    assert same(load_model(tmp_path / "run").denoiser, trainer.student)


@pytest.mark.parametrize(
    "speed",
    [
        ("speed.teacher_dtype=bf16",),
        ("speed.activation_checkpointing=true",),
        ("speed.ema_device=cpu", "train.micro_batch_size=2"),
        pytest.param(("speed.compile=eager",), marks=pytest.mark.full),
    ],
    ids=lambda settings: settings[0],
)
def test_factors_go_with_the_settings_of_speed(make_config: MakeConfig, speed: Sequence[str]) -> None:
    config = make_config("hyper_sd", LORA, *TINY, *speed)
    assert all(torch.isfinite(tensor).all() for tensor in newest(trained(config).folder, "players").values())


def planned(config: RunConfig) -> MemoryPlan:
    assembly = assemble(plan(config))
    return plan_memory(assembly.plan, assembly.iteration)


def test_the_memory_plan_counts_the_base_once(make_config: MakeConfig) -> None:
    factors, full = (planned(make_config("sid", *extra)) for extra in ((LORA,), ()))
    assert factors.players["teacher"] == full.players["teacher"]
    assert factors.players["generator"].weights < 0.2 * full.players["generator"].weights
    assert factors.players["fake"].optimizer < 0.2 * full.players["fake"].optimizer
