"""Sharded players: each process holds its part, and a run, its checkpoints and its pictures are as if it held all."""

import errno
import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from equal import apart, train
from safetensors.torch import save_file
from support.fleet import run_together
from support.stand_ins import save_stand_in
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.diffusion.denoiser import Denoiser, freeze
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.prompt_table import PromptTable
from diffdistill.distillation.averages import follow
from diffdistill.distillation.derivatives import along
from diffdistill.distributed.processes import find_processes
from diffdistill.distributed.sharded import is_sharded, whole
from diffdistill.distributed.stopping import TrainingError
from diffdistill.eval.records.record import read_records
from diffdistill.models.load import load_model
from diffdistill.models.teachers import open_pipeline
from diffdistill.networks.dit import DiTConfig
from diffdistill.networks.lora import lora_of
from diffdistill.networks.mlp import MLPConfig
from diffdistill.networks.unet import UNetConfig
from diffdistill.settings.schema import UserError
from diffdistill.storage.checkpoint import CheckpointError, list_checkpoints, load_checkpoint
from diffdistill.storage.shard_files import read_shards
from diffdistill.training.assembly import assemble
from diffdistill.training.config import RunConfig
from diffdistill.training.memory.prediction import MemoryPlan, PlayerBytes, in_each_of, plan_memory, rehearse
from diffdistill.training.plan import plan
from diffdistill.training.sharding import filled, outline, shard
from diffdistill.training.trainer import Trainer

ROUNDING = 1e-6  # of the largest weight, where the order of a sum changes
SGD = "optimizers={default: {name: sgd, lr: 0.1, betas: [0.9, 0.999]}}"
SHARDED = "speed.shard=all"

Tensors = dict[str, Tensor]


def run_on(count: int, config: RunConfig, **options: Any) -> None:
    run_together(count, lambda: Trainer(config, quiet=True, **options).run())


def checkpoints(config: RunConfig) -> list[Path]:
    return list_checkpoints(Path(config.run) / "checkpoints")


def tensors_in(checkpoint: Path) -> Tensors:
    loaded = load_checkpoint(checkpoint).tensors
    return {f"{group}.{name}": t for group, tensors in loaded.items() for name, t in tensors.items()}


def end_of(config: RunConfig) -> Tensors:
    return tensors_in(checkpoints(config)[-1])


def distance(first: Tensors, second: Tensors) -> float:
    assert first.keys() == second.keys()
    return apart({n: t.numpy() for n, t in first.items()}, {n: t.numpy() for n, t in second.items()})


# What is trained


@pytest.mark.parametrize(
    "settings",
    [
        ("train.micro_batch_size=2", SGD),
        ("speed.activation_checkpointing=true", "train.steps=2", SGD),
        (SGD.replace("}}", ", clip_norm: 0.01}}"),),
        (SGD.replace("}}", ", clip_value: 1.0e-4}}"),),
        ("speed.teacher_device=cpu", SGD),
    ],
    ids=["accumulation", "recomputed", "clipped by norm", "clipped by value", "teacher offloaded"],
)
def test_two_processes_with_a_half_each_train_as_one(
    make_config: MakeConfig, teacher: Path, settings: tuple[str, ...]
) -> None:
    blocks = (f"teacher={teacher}",) if "speed.activation_checkpointing=true" in settings else ()
    alone, two = (make_config("dmd2", *settings, *blocks, *more) for more in ((), (SHARDED,)))
    ends = [run_together(n, partial(train, config, is_wide=False))[0] for n, config in ((1, alone), (2, two))]
    assert apart(*ends) <= ROUNDING


@pytest.mark.parametrize("method", ["scm", "mean_flow", "free_flow"])
def test_two_with_a_half_each_take_the_derivatives_of_one(make_config: MakeConfig, method: str) -> None:
    """In float64, where the order of a sum is all that can differ."""
    alone, two = (make_config(method, SGD, "train.steps=2", *more) for more in ((), (SHARDED,)))
    ends = [run_together(n, partial(train, config, is_wide=True))[0] for n, config in ((1, alone), (2, two))]
    assert apart(*ends) <= 1e-13


def test_in_bf16_a_half_each_trains_as_all_in_both(make_config: MakeConfig) -> None:
    """It is as near to float32. It cannot be the same: autocast keeps a rounded copy only of weights that are no views,
    and so the gradients of several calls are added up before or after rounding."""
    bf16 = "train.precision=bf16"
    ends = [
        run_together(2, partial(train, make_config("dmd2", SGD, *more), is_wide=False))[0]
        for more in ((bf16,), (bf16, SHARDED), ())
    ]
    assert 10 * ROUNDING < apart(ends[1], ends[2]) <= 1.5 * apart(ends[0], ends[2])


def test_a_teacher_kept_in_bf16_is_shared_out_as_it_is(make_config: MakeConfig) -> None:
    """Its blocks hold weights of two kinds: norms stay in float32."""
    in_both, in_parts = (make_config("dmd2", "speed.teacher_dtype=bf16", SGD, *more) for more in ((), (SHARDED,)))
    for config in (in_both, in_parts):
        run_on(2, config)
    assert distance(end_of(in_both), end_of(in_parts)) <= ROUNDING


def test_two_machines_of_two_share_within_each(make_config: MakeConfig) -> None:
    alone, four = make_config("dmd2", SGD), make_config("dmd2", SGD, "speed.shard=machine")

    def on_two_machines() -> tuple[tuple[int, ...], float]:
        os.environ["LOCAL_WORLD_SIZE"] = "2"  # of a process of its own
        trainer = Trainer(four, quiet=True)
        trainer.run()
        (first, *_) = trainer.assembly.iteration.trained["generator"]
        assert trainer.plan.mesh is not None
        return tuple(trainer.plan.mesh.shape), first.to_local().numel() / first.numel()  # type: ignore[attr-defined]

    assert run_together(4, on_two_machines) == [((2, 2), 0.5)] * 4
    Trainer(alone, quiet=True).run()
    assert distance(end_of(alone), end_of(four)) <= ROUNDING


def bytes_held(config: RunConfig) -> dict[str, int]:
    """What this process holds after a step, by what it is for."""
    trainer = Trainer(config, quiet=True)
    trainer.folder.mkdir(parents=True, exist_ok=True)
    _ = trainer.assembly
    trainer.train_step()
    assert trainer.problem.teacher is not None
    modules = {"teacher": trainer.problem.teacher, "ema": trainer.assembly.emas["ema"].module, **trainer.trained}
    states = {name: module.state_dict() for name, module in modules.items()}
    states["optimizers"] = trainer.assembly.state.tensors()["optimizers"]
    return {name: sum(map(local_bytes, state.values())) for name, state in states.items()}


def local_bytes(tensor: Tensor) -> int:
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part.nbytes


def test_each_process_holds_its_share_of_everything(make_config: MakeConfig, teacher: Path) -> None:
    alone, four = (make_config("dmd2", f"teacher={teacher}", *more) for more in ((), (SHARDED,)))
    everything, shares = bytes_held(alone), run_together(4, lambda: bytes_held(four))
    for name in ("teacher", "ema", "generator", "fake", "optimizers"):
        assert everything[name] > 10_000
        assert sum(share[name] for share in shares) == pytest.approx(everything[name], rel=0.05)  # all have counters
        assert max(share[name] for share in shares) <= 0.35 * everything[name]  # four rows, or one, are not for all


def needs_of(config: RunConfig, count: int) -> MemoryPlan:
    """What doctor says that the first of so many processes needs, found by one."""
    made = assemble(plan(config, resume=None))
    return in_each_of(count, plan_memory(made.plan, made.iteration), made.plan, made.iteration)


def held(config: RunConfig) -> tuple[dict[str, PlayerBytes], int, int]:
    """What this process counts in two steps: its players, its averages, and the storages of all gradients."""
    made = assemble(plan(config, resume=None))
    storages: dict[int, int] = {}

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            storage = (p.grad.to_local() if is_sharded(p.grad) else p.grad).untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()

    for optimizer in made.optimizers.values():
        optimizer.register_step_pre_hook(note)
    counted = rehearse(made)
    return dict(counted.players), counted.averages, sum(storages.values())


@pytest.mark.parametrize(
    ("shard", "lora"),
    [("all", "{}"), ("all", "{default: {rank: 2}}"), ("none", "{}")],
    ids=["shards", "factors over shards", "replicas"],
)
def test_doctor_s_plan_for_two_processes_is_what_the_first_of_two_holds(
    make_config: MakeConfig, teacher: Path, shard: str, lora: str
) -> None:
    config = make_config("dmd2", f"teacher={teacher}", f"lora={lora}", f"speed.shard={shard}", "train.steps=2")
    alone, each = (needs_of(config, count) for count in (1, 2))
    first, second = run_together(2, partial(held, config))
    assert each.players == first[0]
    assert each.averages == first[1]
    ratio = first[0]["teacher"].weights / alone.players["teacher"].weights
    assert 0.45 <= ratio <= 0.55 if shard == "all" else ratio == 1
    assert all(other.weights <= first[0][name].weights for name, other in second[0].items())
    assert (each.gathered > 0) == (shard == "all")
    if shard == "none":  # gradients lie in DDP's buckets, of each update its own
        assert each.buckets > 0
        assert each.buckets == pytest.approx(first[2], abs=64)
        assert each.total == alone.total + each.buckets - max_gradients(alone)
    else:
        assert set(each.replicated) == {name for name in ("generator", "fake") if lora != "{}"}
        assert each.total < alone.total


def max_gradients(needs: MemoryPlan) -> int:
    """That the plan of one process counts, of the update that needs most."""
    without = replace(needs, players={n: replace(p, gradients=0) for n, p in needs.players.items()})
    return needs.total - without.total


# LoRA's base


LORA = "lora={default: {rank: 2}}"


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("dmd2", (LORA, "train.micro_batch_size=2")),
        ("dmd2", ("lora={generator: {rank: 2}, fake: null}", "train.steps=2")),
        ("dmd2", (LORA, "speed.teacher_dtype=bf16", "train.steps=2")),
        ("scm", (LORA, "train.steps=2")),
    ],
    ids=["factors", "beside a player in full", "over a teacher in bf16", "with a derivative"],
)
def test_factors_over_a_base_in_parts_are_those_over_a_whole_one(
    make_config: MakeConfig, method: str, settings: tuple[str, ...]
) -> None:
    whole, parts = (make_config(method, SGD, *settings, *more) for more in ((), (SHARDED,)))
    ends = [run_together(2, partial(train, config, is_wide=False)) for config in (whole, parts)]
    assert any("lora_A" in name for name in ends[0][0])
    assert apart(ends[1][0], ends[1][1]) == 0
    assert apart(ends[0][0], ends[1][0]) <= ROUNDING


def where_the_base_lies(config: RunConfig) -> tuple[int, float]:
    """After a step: networks that stand over the base, and the bytes that this process holds for it, of all of it."""
    trainer = Trainer(config, quiet=True)
    trainer.folder.mkdir(parents=True, exist_ok=True)
    _ = trainer.assembly
    trainer.train_step()
    assert trainer.problem.teacher is not None
    over = [*trainer.trained.values(), trainer.assembly.emas["ema"].module]
    trees = [trainer.problem.teacher.net, *(found.shared_tree for found in map(lora_of, over) if found)]
    weights = [p for tree in trees for n, p in tree.named_parameters() if "lora_" not in n]
    assert all(is_sharded(weight) for weight in weights)
    held = {part.to_local().untyped_storage().data_ptr(): local_bytes(part) for part in weights}  # type: ignore[attr-defined]
    return len(trees), sum(held.values()) / sum(weight.nbytes for weight in trees[0].parameters())


def test_the_players_in_factors_stand_over_one_base_in_parts(make_config: MakeConfig, teacher: Path) -> None:
    config = make_config("dmd2", LORA, f"teacher={teacher}", SHARDED)
    for networks, share in run_together(2, partial(where_the_base_lies, config)):
        assert networks == 4  # of teacher, generator, fake score and average
        assert 0.45 <= share <= 0.55


def test_a_run_in_factors_over_parts_goes_on_from_any_checkpoint_and_is_read_by_one_process(
    make_config: MakeConfig,
) -> None:
    often = ("train.steps=2", "train.checkpoint_every=1", "train.preview_every=2", SGD, LORA)
    stay, parts = (make_config("dmd2", *often, *more) for more in ((), (SHARDED,)))
    run_on(2, stay)
    run_on(2, parts)
    end = end_of(parts)
    assert distance(end_of(stay), end) <= ROUNDING
    assert [name for name in end if name.startswith("ema.") and "lora_" not in name] == []
    previews = [Path(config.run) / "previews/step-00000002.png" for config in (stay, parts)]
    assert previews[0].read_bytes() == previews[1].read_bytes()
    run_on(2, parts, resume="step-00000001")
    assert distance(end, end_of(parts)) == 0
    for name, weight in load_model(parts.run).denoiser.state_dict().items():
        assert torch.equal(weight, end[f"ema.generator.{name}"])


def families() -> list[Any]:
    return [
        pytest.param(family, marks=[] if family == "sd" else pytest.mark.full)
        for family in ("ddpm", "dit", "sd", "sdxl", "pixart", "sd3", "flux", "sana")
    ]


def asked_for(denoiser: Denoiser, conditions: PromptTable | None) -> list[Tensor]:
    """D, the tap, both at once and the gradient by all, for some noise."""
    denoiser.run_with(conditions=conditions)
    side = 32 if "Sana" in type(denoiser.net).__name__ else 8
    shape = (2, denoiser.net.channels, side, side)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).requires_grad_()  # type: ignore[arg-type]
    t = torch.full((2,), 0.4 * float(denoiser.path.t_max), dtype=torch.float64)
    cond = denoiser.class_cond(torch.zeros(2, dtype=torch.int64))
    made, tap, both = denoiser(x, t, cond), denoiser.features(x, t, cond), denoiser.with_features(x, t, cond)
    (made.square().mean() + tap.square().mean() + both[0].mean() + both[1].mean()).backward()
    assert x.grad is not None
    gradients = [whole(p.grad) for p in denoiser.parameters() if p.grad is not None]
    return [part.detach() for part in (made, tap, *both, x.grad, *gradients)]


@pytest.mark.parametrize("family", families())
def test_a_diffusers_network_in_parts_is_the_same(tmp_path: Path, family: str) -> None:
    opened = open_pipeline(save_stand_in(family, tmp_path))
    conditions = opened.conditions(["a red fox", "two dogs"]) if opened.family.takes_text else None

    def compare() -> list[float]:
        find_processes("cpu")
        plain, parts = (load_model(tmp_path).denoiser.requires_grad_() for _ in range(2))
        shard([parts], init_device_mesh("cpu", (2,)))
        expected, found = asked_for(plain, conditions), asked_for(parts, conditions)
        return [
            float((e - f).norm() / e.norm()) for e, f in zip(expected, found, strict=True) if float(e.norm()) > 1e-6
        ]

    for differences in run_together(2, compare):
        assert len(differences) > 20
        assert max(differences) <= 1e-5


@pytest.mark.parametrize("network", [DiTConfig(width=16, depth=2, heads=2), UNetConfig(channels=(8, 16))])
def test_the_derivative_of_a_network_in_parts_is_that_of_the_whole_one(network: DiTConfig | UNetConfig) -> None:
    """Before any other call of it, when no weight was ever gathered; and attention's tangent is in it."""

    @torch.no_grad()
    def compare() -> tuple[float, float]:
        find_processes("cpu")
        plain, parts = (make_denoiser(0, network).double() for _ in range(2))
        shard([parts], init_device_mesh("cpu", (2,)))
        torch.manual_seed(1)
        x, direction = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64)
        t = torch.linspace(0.5, 2, 3, dtype=torch.float64)
        cond = plain.class_cond(torch.arange(3))
        [found, expected] = (
            along(lambda x, t, f=f: f(x, t, cond), (x, t), (direction, torch.ones_like(t)), network=f)  # type: ignore[misc]
            for f in (parts, plain)
        )
        step = 1e-5
        ahead, behind = (plain(x + h * direction, t + h, cond) for h in (step, -step))
        differences = (ahead - behind) / (2 * step)
        return (
            max(float((e - f).abs().max()) for e, f in zip(expected, found, strict=True)),
            float((found[1] - differences).norm() / differences.norm()),
        )

    for from_whole, from_differences in run_together(2, compare):
        assert from_whole <= 1e-13
        assert from_differences <= 1e-8


def test_gathered_weights_do_not_outlive_a_change_of_theirs() -> None:
    """An average is looked at, follows, and is looked at again."""

    def look_twice() -> tuple[float, float]:
        find_processes("cpu")
        average, module = (make_denoiser(seed) for seed in (0, 1))
        before, after = seen(average), seen(module)
        parts, others = (make_denoiser(seed) for seed in (0, 1))
        for player in (parts, others):
            shard([player], init_device_mesh("cpu", (2,)))
        first = float((seen(parts) - before).abs().max())
        follow(parts, others, 1.0)
        return first, float((seen(parts) - after).abs().max())

    assert max(map(max, run_together(2, look_twice))) <= 1e-6


def make_denoiser(seed: int, network: DiTConfig | UNetConfig | None = None) -> Denoiser:
    torch.manual_seed(seed)
    size = 8 if network else 4
    net = (network or MLPConfig(width=16, blocks=2)).build((1, size, size), 3, 0.1)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return freeze(Denoiser(net, EDM(sigma_min=0.02, sigma_max=20.0), "edm"))  # type: ignore[return-value]


def seen(denoiser: Denoiser) -> Tensor:
    with torch.no_grad():
        made: Tensor = denoiser(
            torch.ones(3, 1, 4, 4), torch.ones(3, dtype=torch.float64), denoiser.class_cond(torch.arange(3))
        )
    return made


def test_a_whole_copy_is_the_module_s_and_each_process_computes_what_the_others_do_not() -> None:
    def alone() -> float:
        rank = find_processes("cpu").rank
        plain, parts = make_denoiser(0), make_denoiser(0)
        empty = outline(parts)
        assert all(parameter.is_meta for parameter in empty.parameters())
        shard([parts], init_device_mesh("cpu", (2,)))
        copy = filled(empty, parts, torch.device("cpu"))
        made = [seen(copy) for _ in range(3 * rank)]  # type: ignore[arg-type]
        return max((float((one - seen(plain)).abs().max()) for one in made), default=0.0)

    assert run_together(2, alone) == [0.0, 0.0]


# What a run writes


def test_previews_health_and_evaluation_are_those_of_one_process(make_config: MakeConfig) -> None:
    look = (
        *("train.steps=2", "train.preview_every=1", "health={every: 1, samples: 32}", "trackers=[]"),
        "eval={protocol: digits-pixels, every: 1, num_images: 300}",
    )
    alone, two = make_config("dmd2", SGD, *look), make_config("dmd2", SGD, *look, SHARDED)
    Trainer(alone, quiet=True).run()
    run_on(2, two)
    logged = [
        [json.loads(line) for line in (Path(config.run) / "metrics.jsonl").read_text().splitlines()]
        for config in (alone, two)
    ]
    named = [name for name in logged[0][0] if name.startswith(("health/", "generator/", "fake/"))]
    assert any(name.startswith("health/") for name in named)
    for name in named:
        assert logged[1][0][name] == pytest.approx(logged[0][0][name], rel=1e-3, abs=1e-5)
    assert sorted(file.name for file in (Path(two.run) / "previews").iterdir()) == [
        "step-00000001.png",
        "step-00000002.png",
    ]
    one, other = (read_records(Path(config.run) / "eval.jsonl") for config in (alone, two))
    for first, second in zip(one, other, strict=True):
        assert second.metrics["fd-pixels"].values == pytest.approx(first.metrics["fd-pixels"].values, rel=1e-3)


# Checkpoints


def test_a_run_moves_over_one_two_four_and_one_processes(make_config: MakeConfig) -> None:
    stay, moved = make_config("dmd2", SGD, "train.steps=8"), make_config("dmd2", SGD, "train.steps=2", SHARDED)
    Trainer(stay, quiet=True).run()
    Trainer(moved, quiet=True).run()
    for steps, count in ((4, 2), (6, 4), (8, 1)):
        assert (checkpoints(moved)[-1] / "players").is_dir() == (count in (4, 1))  # what the ones before have written
        run_on(count, make_config("dmd2", SGD, f"train.steps={steps}", f"run={moved.run}", SHARDED), resume=True)
    assert distance(end_of(stay), end_of(moved)) <= ROUNDING


def test_parts_go_on_with_all_in_each_process_and_the_other_way_round(make_config: MakeConfig) -> None:
    stay, moved = make_config("dmd2", SGD, "train.steps=6"), make_config("dmd2", SGD, "train.steps=2", SHARDED)
    Trainer(stay, quiet=True).run()
    run_on(2, moved)
    run_on(2, make_config("dmd2", SGD, "train.steps=4", f"run={moved.run}"), resume=True)
    run_on(2, make_config("dmd2", SGD, "train.steps=6", f"run={moved.run}", SHARDED), resume=True)
    assert distance(end_of(stay), end_of(moved)) <= ROUNDING


@pytest.fixture(scope="module")
def in_parts(make_config: MakeConfig) -> RunConfig:
    config = make_config("dmd2", "train.steps=3", "train.checkpoint_every=2", SHARDED)
    run_on(2, config)
    return config


def test_what_comes_back_is_what_was_written_bit_for_bit(in_parts: RunConfig) -> None:
    before = end_of(in_parts)

    def come_back() -> float:
        trainer = Trainer(in_parts, resume=True, quiet=True)
        _ = trainer.assembly
        groups = trainer.assembly.state.tensors().items()
        return distance(before, {f"{g}.{name}": whole(t) for g, tensors in groups for name, t in tensors.items()})

    assert any("exp_avg_sq" in name for name in before)
    for count in (1, 2, 4):
        assert run_together(count, come_back) == [0.0] * count


def test_resumed_from_an_earlier_checkpoint_it_ends_the_same(make_config: MakeConfig, in_parts: RunConfig) -> None:
    config = make_config("dmd2", "train.steps=3", "train.checkpoint_every=2", SHARDED)
    run_on(2, config)
    run_on(2, config, resume="step-00000002")
    assert distance(end_of(in_parts), end_of(config)) == 0


def test_a_run_in_parts_is_a_model_like_any_other(in_parts: RunConfig) -> None:
    newest = checkpoints(in_parts)[-1]
    assert len(list((newest / "players").glob("*.safetensors"))) == 2
    averages = load_checkpoint(newest).tensors["ema"]
    for name, weight in load_model(in_parts.run).denoiser.state_dict().items():
        assert torch.equal(weight, averages[f"generator.{name}"])


def test_parts_become_one_file_a_group(in_parts: RunConfig, tmp_path: Path) -> None:
    command = ["gather", in_parts.run, "--out", str(tmp_path / "whole")]
    assert CliRunner().invoke(app, command).exit_code == 0
    (made,) = list_checkpoints(tmp_path / "whole" / "checkpoints")
    files = {"ema", "optimizers", "players"}
    assert {file.name for file in made.iterdir()} == {
        "state.json",
        "manifest.json",
        *(f"{f}.safetensors" for f in files),
    }
    assert distance(tensors_in(made), end_of(in_parts)) == 0
    assert load_checkpoint(made).state == load_checkpoint(checkpoints(in_parts)[-1]).state
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2
    assert "holds checkpoints already" in again.output


def test_what_could_not_be_gathered_can_be_gathered_again(
    in_parts: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    command = ["gather", in_parts.run, "--out", str(tmp_path / "whole")]
    with monkeypatch.context() as patched:
        patched.setattr("diffdistill.storage.checkpoint.write_tensors", full)
        assert "the disk is full" in CliRunner().invoke(app, command).output
    assert CliRunner().invoke(app, command).exit_code == 0


def damaged(in_parts: RunConfig, folder: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(checkpoints(in_parts)[-1], folder / "step-00000003"))


def test_a_flipped_bit_and_a_missing_part_are_named(in_parts: RunConfig, tmp_path: Path) -> None:
    for number, change in enumerate((flip, Path.unlink)):
        copy = damaged(in_parts, tmp_path / str(number))
        part = sorted((copy / "ema").iterdir())[0]
        change(part)
        with pytest.raises(CheckpointError, match=r"damaged: .*shard-00001"):
            load_checkpoint(copy)


def test_a_file_that_the_manifest_does_not_know_is_not_read(in_parts: RunConfig, tmp_path: Path) -> None:
    copy = damaged(in_parts, tmp_path)
    part = sorted((copy / "ema").iterdir())[0]
    shutil.copy(part, part.with_name("copy of it.safetensors"))
    with pytest.raises(CheckpointError, match=r"damaged: ema/copy of it.safetensors is not in the manifest.json"):
        load_checkpoint(copy)


def test_a_run_without_moments_is_gathered_and_goes_on(make_config: MakeConfig, tmp_path: Path) -> None:
    plain = "optimizers={default: {name: sgd, lr: 0.1, betas: [0, 0.999]}}"
    config = make_config("pretrain", "train.steps=1", plain, SHARDED)
    run_on(2, config)
    assert load_checkpoint(checkpoints(config)[-1]).tensors["optimizers"] == {}
    whole_run = tmp_path / "whole"
    assert CliRunner().invoke(app, ["gather", config.run, "--out", str(whole_run)]).exit_code == 0
    longer = make_config("pretrain", "train.steps=2", plain, f"run={whole_run}")
    assert Trainer(longer, resume=True, quiet=True).run().name == "step-00000002"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def test_parts_that_do_not_make_a_whole_are_refused_before_anything_is_allocated(
    in_parts: RunConfig, tmp_path: Path
) -> None:
    """By a manifest that fits them: their author means harm, or has lost a file."""
    first, second = sorted((damaged(in_parts, tmp_path) / "players").iterdir())
    first.unlink()
    with pytest.raises(UserError, match="its parts are incomplete"):
        read_shards(second.parent, lambda _: None)
    far = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [2**40]}})}
    save_file({"w": torch.ones(1)}, tmp_path / "far.safetensors", metadata=far)
    with pytest.raises(UserError, match="w: its parts are incomplete"):
        read_shards(tmp_path, lambda _: None)
    for offsets in ((2, 2), (0, 1), (0, 3)):  # twice the same, over each other, with a gap
        folder = tmp_path / f"{offsets}"
        folder.mkdir()
        for number, offset in enumerate(offsets):
            where = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [offset]}})}
            save_file({"w": torch.ones(2)}, folder / f"{number}.safetensors", metadata=where)
        with pytest.raises(UserError, match="w: its parts are incomplete"):
            read_shards(folder, lambda _: None)
    for text in ("[]", "{", '{"w": 3}', '{"w": {"saved_offsets": ["a"]}}', '{"w": {"saved_offsets": [-1]}}'):
        save_file({"w": torch.ones(1)}, tmp_path / "far.safetensors", metadata={"DCP_SHARDING_INFO": text})
        with pytest.raises(UserError, match=f"{tmp_path}: cannot be read"):
            read_shards(tmp_path, lambda _: None)


def full_in(rank: int, config: RunConfig) -> tuple[str, str]:
    """Save a second time with no room for one process's parts."""
    trainer = Trainer(config, resume=True, quiet=True)
    _ = trainer.assembly
    trainer.train_step()
    write = HuggingFaceStorageWriter.write_data

    def full(self: Any, *arguments: Any) -> Any:
        if trainer.processes.rank == rank:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, *arguments)

    HuggingFaceStorageWriter.write_data = full  # type: ignore[method-assign]  # of a process of its own
    with pytest.raises((OSError, TrainingError)) as raised:
        trainer.save()
    return type(raised.value).__name__, str(raised.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_where_one_process_finds_no_room_all_stop_and_nothing_is_left(make_config: MakeConfig, rank: int) -> None:
    config = make_config("pretrain", "train.steps=1", SHARDED)
    run_on(2, config)
    before = tensors_in(checkpoints(config)[-1])
    longer = make_config("pretrain", "train.steps=2", SHARDED, f"run={config.run}")
    for kind, said in run_together(2, lambda: full_in(rank, longer)):
        assert kind == "OSError"
        assert "No space left on device" in said
        assert f"process {rank}" in said
    assert [file.name for file in (Path(config.run) / "checkpoints").iterdir()] == ["step-00000001"]
    assert distance(before, tensors_in(checkpoints(config)[-1])) == 0
    run_on(2, longer, resume=True)
    assert load_checkpoint(checkpoints(config)[-1]).step == 2


def save_elsewhere(config: RunConfig) -> str:
    """Save with the run's folder on a disk of each process's own."""
    assembly = assemble(plan(config))
    own = replace(config, run=f"{config.run}/{assembly.plan.processes.rank}")
    trainer = Trainer(replace(assembly, plan=replace(assembly.plan, config=own)), quiet=True)
    trainer.train_step()
    with pytest.raises(TrainingError) as raised:
        trainer.save()
    return str(raised.value)


def test_parts_on_another_machine_s_disk_make_no_checkpoint(make_config: MakeConfig) -> None:
    config = make_config("pretrain", "train.steps=1", SHARDED)
    first, second = run_together(2, lambda: save_elsewhere(config))
    assert "lacks files of other processes; `run` must be on a file system that all processes share" in first
    assert second == "the main process failed; see its message"
    assert list((Path(config.run) / "0" / "checkpoints").iterdir()) == []


def end_early(config: RunConfig, moment: str) -> str:
    """What the first process says when the second ends at a moment."""

    def gone(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    with pytest.MonkeyPatch.context() as patched:
        if os.environ["RANK"] == "1":
            patched.setattr(f"diffdistill.training.{moment}", gone)
        with pytest.raises((TrainingError, ZeroDivisionError)) as raised:
            Trainer(config, quiet=True).run()
    return str(raised.value)


@pytest.mark.parametrize("moment", ["trainer.clip", "assembly.filled"])
def test_a_process_that_is_gone_is_said_to_be_gone_whatever_the_others_wait_in(
    make_config: MakeConfig, moment: str
) -> None:
    config = make_config("pretrain", "train.steps=1", "train.preview_every=1", SHARDED)
    assert "another process has exited" in run_together(2, lambda: end_early(config, moment))[0]


# What does not go


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("dmd2", ("speed.compile=eager",), "speed.compile; use none$"),
        ("dmd2", ("speed.channels_last=true",), "speed.channels_last; use none$"),
        ("dmd2", ("speed.ema_device=cpu",), r"speed.ema_device = 'cpu'; use none$"),
        ("dmd2", ("optimizers={default: {name: adam8bit, lr: 1e-3}}",), "optimisers of 8 bits; use none$"),
    ],
)
def test_what_does_not_go_with_parts_is_refused(
    make_config: MakeConfig, method: str, settings: tuple[str, ...], said: str
) -> None:
    config = make_config(method, *settings, SHARDED)
    with pytest.raises(UserError, match=rf"speed.shard = 'all': does not work with {said}"):
        Trainer(config, quiet=True)
    assert not Path(config.run).exists()


def test_one_process_alone_has_nothing_to_share(make_config: MakeConfig) -> None:
    plain, parts = make_config("dmd2"), make_config("dmd2", SHARDED)
    for config in (plain, parts):
        Trainer(config, quiet=True).run()
    assert distance(end_of(plain), end_of(parts)) == 0
