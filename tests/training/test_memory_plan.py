"""What a run will need: to the byte where it can be, and within a tenth for activations; against real steps."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from click.testing import Result
from torch import nn
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.training.config import OptimizerConfig, RunConfig, load_config
from diffdistill.training.memory.advice import advise
from diffdistill.training.memory.counting import LiveTensors, SavedTensors
from diffdistill.training.memory.lora_over_nf4 import RANK, with_factors_over_nf4
from diffdistill.training.memory.prediction import (
    Growth,
    MemoryPlan,
    in_each_of,
    optimizer_bytes,
    plan_memory,
    rehearse,
)
from diffdistill.training.optimizers import make_optimizer
from diffdistill.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]
WriteConfig = Callable[..., Path]

TOLERANCE = 0.1
NETWORKS = {
    "unet": "{name: unet, channels: [8, 16], dropout: 0.1}",
    "mlp": "{name: mlp, width: 32, blocks: 2}",
    "ddpmpp": "{name: ddpmpp, channels: 8, multipliers: [1, 2], blocks: 1, attention_resolutions: [4]}",
    "dit": "{name: dit, width: 32, depth: 2, heads: 2}",
    "wide-dit": "{name: dit, width: 512, depth: 1, heads: 4}",
}


@pytest.fixture(scope="module")
def teacher_of(make_config: MakeConfig) -> Callable[[str], str]:
    """`teacher_of("dit")`: a checkpoint of this network, untrained."""

    @cache
    def run(network: str) -> str:
        return str(Trainer(make_config("pretrain", f"model.network={NETWORKS[network]}")).save())

    return run


def planned(trainer: Trainer) -> MemoryPlan:
    return plan_memory(trainer.plan, trainer.assembly.iteration)


def advice(trainer: Trainer, needs: MemoryPlan, memory: int) -> list[str]:
    return advise(trainer.plan, trainer.assembly.iteration, needs, memory)


@pytest.fixture
def new_trainer(make_config: MakeConfig, teacher_of: Callable[[str], str]) -> Callable[..., Trainer]:
    """A trainer that has not begun, of this method and network."""

    def make(method: str, network: str, *overrides: str) -> Trainer:
        place = "model.network=" + NETWORKS[network] if method == "pretrain" else f"teacher={teacher_of(network)}"
        return Trainer(make_config(method, place, *overrides))

    return make


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", ["pretrain", "dmd2"])
def test_the_plan_is_what_two_steps_need(new_trainer: Callable[..., Trainer], method: str, network: str) -> None:
    trainer = new_trainer(method, network, "train.global_batch_size=16", "train.micro_batch_size=8")
    plan = planned(trainer)
    counted = rehearse(trainer.assembly)
    assert plan.players == counted.players, "weights, gradients and optimiser states are exact"
    assert plan.averages == counted.averages > 0
    assert plan.peak_activations == pytest.approx(counted.activations, rel=TOLERANCE)
    assert len(counted.seconds) == 2


@pytest.mark.parametrize(
    "setting",
    [
        "train.precision=bf16",
        "speed.activation_checkpointing=true",
        "speed.teacher_dtype=bf16",
        "speed.channels_last=true",
        "method.gan_features=teacher",
        "method={name: dmd2, gan_weight: 0, regression_weight: 1, regression_pairs: 20}",
        "method.steps={init_ratio: 2.5, later_ratios: [1.0]}",
        "optimizers.default={name: sgd, lr: 0.1, betas: [0.9, 0.999]}",
        "more_emas={long: {}}",
    ],
)
def test_the_plan_knows_the_settings(new_trainer: Callable[..., Trainer], setting: str) -> None:
    trainer = new_trainer("dmd2", "unet", setting)
    plan = planned(trainer)
    counted = rehearse(trainer.assembly)
    assert plan.players == counted.players
    assert plan.averages == counted.averages
    assert plan.peak_activations == pytest.approx(counted.activations, rel=TOLERANCE)


@pytest.mark.parametrize("setting", ["train.precision=fp32", "speed.activation_checkpointing=true"])
def test_the_total_is_near_to_what_is_alive_at_the_peak(new_trainer: Callable[..., Trainer], setting: str) -> None:
    """Not a bound: gradients of activations come on top, and weights' gradients come when activations go."""
    trainer = new_trainer("dmd2", "unet", "train.global_batch_size=64", setting)
    plan = planned(trainer)
    trainer.train_step(), trainer.train_step()  # as many as it takes to make the optimisers' states
    with LiveTensors() as alive:
        trainer.train_step()
    resident = plan.averages + sum(player.weights + player.optimizer for player in plan.players.values())
    assert plan.total == pytest.approx(resident + alive.peak, rel=0.15)


def test_planning_leaves_the_run_as_it_was(new_trainer: Callable[..., Trainer]) -> None:
    plain, other = new_trainer("dmd2", "unet"), new_trainer("dmd2", "unet")
    advice(other, planned(other), 0)
    for trainer in (plain, other):
        trainer.train_step()
    for name, module in plain.trained.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, other.trained[name].state_dict()[key])


@pytest.mark.parametrize(
    "options",
    [
        OptimizerConfig(lr=0.1),
        OptimizerConfig(lr=0.1, name="adamw", implementation="loop"),
        OptimizerConfig(lr=0.1, name="radam"),
        OptimizerConfig(lr=0.1, name="sgd", betas=(0.9, 0.999)),
        OptimizerConfig(lr=0.1, name="sgd"),
    ],
    ids=["adam", "adamw", "radam", "sgd with momentum", "sgd"],
)
def test_an_optimiser_s_state_is_known_to_the_byte(options: OptimizerConfig) -> None:
    module = nn.Sequential(nn.Linear(5, 7), nn.Conv2d(3, 4, 3))
    optimizer = make_optimizer(module, options)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [value for entry in optimizer.state.values() for value in entry.values() if value is not None]
    assert optimizer_bytes(list(module.parameters()), options) == sum(value.nbytes for value in state)


def test_8_bit_moments_are_a_byte_a_number_and_a_scale_a_block() -> None:
    module = nn.Linear(100, 100)  # 10,000 weights; the bias is too small for it
    options = OptimizerConfig(lr=0.1, name="adam8bit")
    assert optimizer_bytes(list(module.parameters()), options) == 2 * 256 * 4 + 2 * (10_000 + 4 * 40) + 2 * 4 * 100


def test_saved_tensors_are_counted_once_and_until_the_graph_lets_go() -> None:
    weight = torch.randn(10, requires_grad=True)
    with SavedTensors([weight]) as saved:
        made = (weight * weight).exp()  # keeps the weight, twice, and the exponential's result
        assert saved.live == saved.peak == made.nbytes
        total = (made * made).sum()  # keeps the result again
        assert saved.live == made.nbytes
    total.backward()
    del made, total
    assert (saved.live, saved.peak) == (0, 40)


def test_live_tensors_are_counted_until_they_are_gone() -> None:
    given = torch.zeros(100)
    with LiveTensors() as alive:
        first = given + 1
        second = first.view(10, 10).mul_(2)
        assert alive.live == 400
        third = second @ second
        assert alive.live == 800
        del third
        assert alive.live == 400
    del first, second
    assert (alive.live, alive.peak) == (0, 800)


def test_growth_goes_through_what_was_measured() -> None:
    growth = Growth.through(two=160, three=190)
    assert [growth.at(size) for size in (1, 2, 10)] == [130, 160, 400]


def taken(lines: list[str]) -> list[str]:
    return [line.partition("=")[0] for line in lines]


def test_advice_begins_with_the_micro_batch_which_changes_no_result(new_trainer: Callable[..., Trainer]) -> None:
    trainer = new_trainer("dmd2", "unet", "train.global_batch_size=32")
    plan = planned(trainer)
    half = replace(plan, micro_batch_size=16)
    assert advice(trainer, plan, half.total) == [f"train.micro_batch_size=16: {half.total / 2**20:.2f} MiB"]


SETTINGS = (
    "speed.teacher_dtype=bf16",
    "train.precision=bf16",
    "speed.ema_device=cpu",
    "speed.activation_checkpointing=true",
)


def test_advice_goes_on_until_it_fits(new_trainer: Callable[..., Trainer]) -> None:
    trainer = new_trainer("dmd2", "unet", "train.micro_batch_size=1")
    plan = planned(trainer)
    assert advice(trainer, plan, plan.total) == []
    assert taken(advice(trainer, plan, plan.total - 1)) == ["speed.teacher_dtype"]
    lines = advice(trainer, plan, 1000)
    assert taken(lines)[:4] == taken(list(SETTINGS))
    assert lines[-1].endswith("take a smaller network")


def test_advice_holds_when_it_is_followed(new_trainer: Callable[..., Trainer]) -> None:
    """The predicted total of each setting is the plan of a run that has it, and those before it."""
    trainer = new_trainer("dmd2", "unet", "train.micro_batch_size=1")
    lines = advice(trainer, planned(trainer), 1000)
    for count, line in enumerate(lines[:4], 1):
        followed: MemoryPlan = planned(new_trainer("dmd2", "unet", "train.micro_batch_size=1", *SETTINGS[:count]))
        assert line == f"{SETTINGS[count - 1]}: {followed.total / 2**20:.2f} MiB"


def test_advice_ends_with_factors_over_a_base_in_nf4(new_trainer: Callable[..., Trainer]) -> None:
    """Their weights, gradients, moments and averages are those of a run that has them; the base is arithmetic."""
    settings = ("train.micro_batch_size=1", "method.gan_weight=0")
    trainer, lora = (
        new_trainer("dmd2", "wide-dit", *settings, *more)
        for more in ((), (f"lora.default={{rank: {RANK}, targets: linear}}",))
    )
    lines, real = advice(trainer, planned(trainer), 1000), planned(lora)
    assert lines[-1].startswith(
        "factors over one base in the place of copies, lora={default: {rank: 64, targets: linear}}"
    )
    assert lines[-1].endswith("still too much: take a smaller network")
    found = with_factors_over_nf4(trainer.plan, trainer.assembly.iteration, planned(trainer))
    assert found is not None
    assert {name: found.players[name] for name in ("generator", "fake")} == {
        name: real.players[name] for name in ("generator", "fake")
    }
    assert found.averages == real.averages
    assert found.players["teacher"].weights < real.players["teacher"].weights / 4
    assert with_factors_over_nf4(lora.plan, lora.assembly.iteration, real) is None


def doctor(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["doctor", *map(str, arguments)])


def test_doctor_predicts_counts_and_writes_nothing(write_config: WriteConfig, tmp_path: Path) -> None:
    file = write_config("dmd2")
    result = doctor(file, "train.global_batch_size=16")
    assert result.exit_code == 0, result.output
    for part in ("memory (predicted):", "generator: weights", "EMA:", "activations:", "time (predicted):", "disk:"):
        assert part in result.stdout
    assert [
        line for line in result.stdout.splitlines() if "generator: weights" in line and line.count("as predicted") != 3
    ] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dmd2.yaml"]


def test_doctor_says_what_each_of_several_processes_needs(write_config: WriteConfig, tmp_path: Path) -> None:
    file = write_config("dmd2")
    for shard, divided, whole in (
        (
            "all",
            "divided: weights, gradients, moments and averages by 4 (speed.shard = all)",
            "of weights that are gathered",
        ),
        (
            "none",
            "divided: the batch alone (speed.shard = none)",
            "of gradients, whose space DDP keeps for every update",
        ),
    ):
        result = doctor(file, "train.global_batch_size=16", f"speed.shard={shard}", "--processes", "4")
        assert result.exit_code == 0, result.output
        said = " ".join(result.stdout.split())
        assert "ok 4 processes, by arithmetic:" in said
        assert divided in said
        assert whole in said
        assert "of activations for 4 samples" in said
        assert "accelerate launch --multi_gpu --num_processes 4 -m diffdistill train" in " ".join(result.stderr.split())
    refused = doctor(file, "train.global_batch_size=16", "--processes", "3")
    assert refused.exit_code == 2
    assert "train.global_batch_size = 16: must be a multiple of the 3 processes" in refused.stderr


@pytest.mark.parametrize("option", ["--processes", "--memory"])
def test_doctor_refuses_what_is_of_a_config_without_one(option: str) -> None:
    refused = doctor(option, "8")
    assert refused.exit_code == 2
    assert f"{option}: needs a config; give one" in refused.stderr


def test_advice_for_shards_names_nothing_that_does_not_go_with_them(new_trainer: Callable[..., Trainer]) -> None:
    trainer = new_trainer("dmd2", "unet", "train.micro_batch_size=1", "speed.shard=all")
    alone = planned(trainer)
    each = in_each_of(2, alone, trainer.plan, trainer.assembly.iteration)
    lines = advice(trainer, each, 1000)
    assert taken(lines)[:3] == ["speed.teacher_dtype", "train.precision", "speed.activation_checkpointing"]
    assert not any("8bit" in line or "ema_device" in line for line in lines)
    made = new_trainer("dmd2", "unet", "train.micro_batch_size=1", "speed.shard=all", SETTINGS[0])
    real = in_each_of(2, planned(made), made.plan, made.assembly.iteration)
    assert lines[0] == f"{SETTINGS[0]}: {real.total / 2**20:.2f} MiB"


def test_doctor_says_what_each_player_drops(write_config: WriteConfig, tmp_path: Path) -> None:
    teacher = load_config(
        write_config("pretrain"), ["model.network={name: unet, channels: [8, 16], dropout: 0.3}", "train.steps=1"]
    )
    Trainer(replace(teacher, run=str(tmp_path / "teacher")), quiet=True).run()
    student = (write_config("dmd2"), f"teacher={tmp_path / 'teacher'}", "dropout={generator: 0}", "--memory", "0.0001")
    said = " ".join(doctor(*student).stdout.split())
    assert "ok dropout: generator: 0 (set); fake: 0.3 (of the network that it starts from); discriminator: none" in said


def test_doctor_says_what_to_turn_on(write_config: WriteConfig) -> None:
    result = doctor(write_config("dmd2"), "train.global_batch_size=64", "--memory", "0.0008")
    assert result.exit_code == 1
    assert "FAULT memory (predicted):" in result.stdout
    assert "It does not fit. Turn on, in this order:\n      train.micro_batch_size=" in result.stdout


def test_doctor_looks_at_a_config_whose_run_exists(write_config: WriteConfig, tmp_path: Path) -> None:
    file = write_config("pretrain", "train.steps=1")
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert doctor(file).exit_code == 0


def test_doctor_refuses_a_bad_config(write_config: WriteConfig) -> None:
    result = doctor(write_config("pretrain"), "train.steps=none")
    assert result.exit_code == 2
    assert "train.steps" in result.stderr
