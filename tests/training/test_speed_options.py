"""Each setting of `speed`, the optimisers' forms and several averages: they change no result that they should not.

Equal means bit for bit where the arithmetic is the same. Where it is not, the tolerance says why.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM
from diffdistill.exported.sample import SampleOptions, run_sample
from diffdistill.inference.image_generator import SampleRequest
from diffdistill.models.load import load_model
from diffdistill.networks import ADM, DDPMPP, DiffusersUNetConfig, DiTConfig, MLPConfig, UNetConfig
from diffdistill.networks.analytic import Mixture
from diffdistill.networks.grid import GridConfig
from diffdistill.networks.recompute import set_recompute
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import dump
from diffdistill.storage.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from diffdistill.training.config import OptimizerConfig, RunConfig
from diffdistill.training.ema import EMA, EMAConfig
from diffdistill.training.memory.counting import SavedTensors
from diffdistill.training.optimizers import make_optimizer, optimizer_tensors, restore_optimizer
from diffdistill.training.speed import options
from diffdistill.training.speed.options import SpeedConfig, apply_speed, store_in_bf16
from diffdistill.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]

ROUNDING = 1e-5  # float32's, of sums taken in another order, relative to the largest number
DIFFUSERS = {
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 8,
    "dropout": 0.3,
}
NETWORKS: dict[str, Any] = {
    "unet": UNetConfig(channels=(8, 16), dropout=0.3),
    "ddpmpp": DDPMPP(channels=8, multipliers=(1, 2), blocks=1, attention_resolutions=(4,), dropout=0.3),
    "adm": ADM(channels=8, multipliers=(1, 2), blocks=1, attention_resolutions=(4,), head_channels=8, dropout=0.3),
    "dit": DiTConfig(width=16, depth=3, heads=2),
    "mlp": MLPConfig(width=16, blocks=3),
    "diffusers_unet": DiffusersUNetConfig(options=DIFFUSERS),
}
SHAPE, CLASSES, BATCH = (1, 8, 8), 3, 4
MIXED = "model.network={name: unet, channels: [8, 16], dropout: 0.2}"


def denoiser(network: str) -> Denoiser:
    """Small, of random weights, so that every part matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Denoiser(NETWORKS[network].build(SHAPE, CLASSES, 0.1), EDM(), "edm")
        for parameter in made.parameters():
            nn.init.normal_(parameter, 0, 0.2)
    return made


def numbers(size: int = BATCH) -> tuple[Tensor, Tensor, Cond]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, *SHAPE, generator=generator)
    return x, torch.linspace(0.1, 5, size, dtype=torch.float64), Cond(label=torch.arange(size) % CLASSES)


def gradients(player: Denoiser, want: str = "both") -> tuple[dict[str, Tensor], int]:
    """Of a loss on output and features, with respect to weights and input; and the bytes kept for them."""
    x, t, cond = numbers()
    x.requires_grad_()
    torch.manual_seed(2)
    with SavedTensors(player.parameters()) as saved:
        made = {"x0": player, "features": player.features, "both": player.with_features}[want](x, t, cond)
        outputs = made if isinstance(made, tuple) else (made,)
        loss = sum(((output - 0.5) ** 2).mean() for output in outputs)
    loss.backward()
    found = {"x": x.grad, "loss": loss.detach()}
    found |= {name: p.grad for name, p in player.named_parameters() if p.grad is not None}
    return found, saved.peak


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def assert_close(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float) -> None:
    assert first.keys() == second.keys()
    size = max(float(value.abs().max()) for value in first.values())
    assert max(float((first[name] - second[name]).abs().max()) for name in first) <= tolerance * size


def weights(trainer: Trainer) -> dict[str, Tensor]:
    modules = trainer.trained | {group: ema.module for group, ema in trainer.assembly.emas.items()}
    return {
        f"{p}.{name}": value.clone() for p, module in modules.items() for name, value in module.state_dict().items()
    }


def after(config: RunConfig, steps: int, *, resume: bool = False) -> Trainer:
    trainer = Trainer(config, resume=resume)
    while trainer.step < steps:
        trainer.train_step()
    return trainer


def trained(config: RunConfig, steps: int = 2) -> dict[str, Tensor]:
    return weights(after(config, steps))


@pytest.fixture(scope="session")
def unet_teacher(make_config: MakeConfig) -> str:
    """A checkpoint of a tiny U-Net with dropout."""
    return str(after(make_config("pretrain", MIXED), 1).save())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("want", ["x0", "features", "both"])
def test_recomputed_blocks_give_the_same_gradients_dropout_included(network: str, want: str) -> None:
    plain, recomputed = denoiser(network), denoiser(network)
    assert set_recompute(recomputed.net)
    expected, bytes_before = gradients(plain, want)
    found, bytes_after = gradients(recomputed, want)
    assert_same(expected, found)
    assert bytes_after < bytes_before


def test_checkpointing_trains_every_player_as_without(make_config: MakeConfig, unet_teacher: str) -> None:
    expected = trained(make_config("dmd2", f"teacher={unet_teacher}"))
    found = trained(make_config("dmd2", f"teacher={unet_teacher}", "speed.activation_checkpointing=true"))
    assert_same(expected, found)


def test_a_copy_of_a_recomputed_network_computes_with_its_own_weights() -> None:
    original = denoiser("unet").eval()
    set_recompute(original.net)
    twin = copy.deepcopy(original)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.zero_()
    assert not torch.equal(original(*numbers()), twin(*numbers()))


def test_checkpointing_a_network_without_blocks_is_refused() -> None:
    mixture = Mixture(EDM(), torch.ones(2), torch.zeros(2, 4), torch.ones(2))
    with pytest.raises(UserError, match=r"speed.activation_checkpointing: teacher's network Mixture has no blocks"):
        apply_speed(SpeedConfig(activation_checkpointing=True), {}, {"teacher": Denoiser(mixture, EDM(), "x0")})


@pytest.mark.parametrize("network", [pytest.param("unet", marks=pytest.mark.full), "mlp", "diffusers_unet"])
def test_compiled_players_give_the_same_gradients(network: str) -> None:
    """eager: the captured graphs run operation by operation, so with the same arithmetic."""
    plain, compiled = denoiser(network), denoiser(network)
    apply_speed(SpeedConfig(compile="eager"), {"generator": compiled}, {})
    for want in ("both", "features"):
        assert_same(gradients(plain, want)[0], gradients(compiled, want)[0])


@pytest.mark.parametrize("base", ["unet", "mlp"])
def test_a_compiled_grid_of_outputs_gives_the_same_gradients(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last layer is widened by a hook for the length of a call, which no graph may hold."""
    monkeypatch.setitem(NETWORKS, "grid", GridConfig(base=NETWORKS[base], places=3))
    plain, compiled = denoiser("grid"), denoiser("grid")
    apply_speed(SpeedConfig(compile="eager"), {"generator": compiled}, {})
    for want in ("x0", "both", "features", "x0"):
        assert_same(gradients(plain, want)[0], gradients(compiled, want)[0])


def test_a_grid_over_a_network_without_blocks_is_not_left_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "grid", GridConfig(base=NETWORKS["mlp"], places=3))
    monkeypatch.setattr(options, "recomputable_blocks", lambda _: [])
    with pytest.raises(UserError, match=r"speed.compile: .* has no blocks; leave it out"):
        apply_speed(SpeedConfig(compile="eager"), {"generator": denoiser("grid")}, {})


def test_compiled_players_train_as_plain_ones(make_config: MakeConfig) -> None:
    """Through every mode: frozen, watched at the input alone, without gradient, and copied for the average."""
    expected = trained(make_config("dmd2"))
    assert_same(expected, trained(make_config("dmd2", "speed.compile=eager", "speed.activation_checkpointing=true")))


def test_channels_last_changes_the_layout_and_no_more_than_rounding() -> None:
    plain, changed = denoiser("unet"), denoiser("unet")
    apply_speed(SpeedConfig(channels_last=True), {"generator": changed}, {})
    assert changed.net.encoder[0].conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    # Without dropout, whose mask is drawn in the order of the memory.
    assert_close(gradients(plain.eval())[0], gradients(changed.eval())[0], ROUNDING)


def test_channels_last_is_refused_for_an_mlp(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"speed.channels_last: teacher's network MLP has no convolutions"):
        Trainer(make_config("pretrain", "speed.channels_last=true"))


def test_a_bf16_teacher_is_the_teacher_under_autocast_from_half_the_bytes() -> None:
    plain, half = denoiser("unet").eval(), denoiser("unet").eval()
    store_in_bf16(half)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(*numbers())
    found = half(*numbers())
    assert torch.equal(found, expected)
    assert found.dtype == torch.float32
    matrices = [p for p in half.parameters() if p.ndim > 1]
    assert {p.dtype for p in matrices} == {torch.bfloat16}


def test_a_bf16_teacher_leaves_field_and_players_in_float32(make_config: MakeConfig, unet_teacher: str) -> None:
    config = make_config("dmd2", f"teacher={unet_teacher}", "speed.teacher_dtype=bf16")
    trainer, plain = Trainer(config), Trainer(make_config("dmd2", f"teacher={unet_teacher}"))
    assert {p.dtype for module in trainer.trained.values() for p in module.parameters()} == {torch.float32}
    fields = []
    for run in (trainer, plain):
        for player in run.players.values():
            player.eval()
        images, cond = run.plan.real(0, 8)
        micro = run.assembly.iteration.micro_batch(0, 0, images, cond, 8)
        for parameter in run.players.fake.parameters():
            nn.init.normal_(parameter, 0, 0.05, generator=torch.Generator().manual_seed(0))
        fields.append(run.method.field(run.players, micro.draw, torch.zeros(8, *SHAPE)))
    assert fields[0].dtype == torch.float32
    apart = float((fields[0] - fields[1]).norm() / fields[1].norm())
    assert 0 < apart < 2**-6, "bf16 has 8 bits of mantissa; the field is a difference of two close numbers"


def test_a_bf16_teacher_is_refused_where_there_is_none(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"speed.teacher_dtype = 'bf16': this method has no teacher"):
        Trainer(make_config("pretrain", "speed.teacher_dtype=bf16"))


@pytest.mark.parametrize("name", ["adam", "adamw", "radam", "sgd"])
def test_every_form_of_an_optimiser_takes_the_same_steps(make_config: MakeConfig, name: str) -> None:
    def by(form: str) -> dict[str, Tensor]:
        options = f"{{name: {name}, implementation: {form}, lr: 1e-3, betas: [0.9, 0.99], weight_decay: 0.01}}"
        return trained(make_config("pretrain", f"optimizers.teacher={options}"), 3)

    usual = by("auto")
    assert_same(usual, by("fused" if name.startswith("adam") else "loop"))
    for form in ("foreach", "loop") if name == "radam" else ("fused", "foreach", "loop"):
        assert_close(usual, by(form), ROUNDING)


def test_radam_steps_as_its_paper_says(make_config: MakeConfig) -> None:
    """Liu et al. 2020, algorithm 2: by the first moment alone while the variance of the second is unknown."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = make_optimizer(nn.ParameterList([weight]), OptimizerConfig(name="radam", lr=0.1, betas=(0.9, 0.99)))
    value, first, second = weight.detach().clone(), torch.zeros(2).double(), torch.zeros(2).double()
    limit = 2 / (1 - 0.99) - 1
    for step in range(1, 12):
        gradient = weight.detach() ** 3
        weight.grad = gradient.clone()
        optimizer.step()
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
        move, length = first / (1 - 0.9**step), limit - 2 * step * 0.99**step / (1 - 0.99**step)
        if length > 5:
            rectified = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
            move = move * rectified**0.5 * (1 - 0.99**step) ** 0.5 / (second.sqrt() + 1e-8)
        value = value - 0.1 * move
        torch.testing.assert_close(weight.detach(), value, rtol=1e-9, atol=0)


def test_radam_has_no_fused_form() -> None:
    with pytest.raises(ValueError, match=r"implementation = 'fused': torch has no fused radam"):
        OptimizerConfig(name="radam", lr=1.0, implementation="fused")


def test_an_8_bit_optimiser_names_the_package_that_is_missing(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"adam8bit needs bitsandbytes: pip install 'diffdistill\[8bit\]'"):
        Trainer(make_config("pretrain", "optimizers.teacher.name=adam8bit"))


def test_an_8_bit_optimiser_says_that_it_needs_a_gpu(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=SimpleNamespace()))
    with pytest.raises(UserError, match=r"adamw8bit needs a CUDA GPU; use adamw"):
        Trainer(make_config("pretrain", "optimizers.teacher.name=adamw8bit"))


def test_an_8_bit_optimiser_has_no_other_forms() -> None:
    with pytest.raises(ValueError, match=r"implementation = 'fused': adam8bit has only its own"):
        OptimizerConfig(name="adam8bit", lr=1.0, implementation="fused")


def test_8_bit_optimisers_and_channels_last_are_refused_together(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"speed.channels_last: does not work with 8-bit optimisers"):
        make_config("pretrain", "optimizers.teacher.name=adam8bit", "speed.channels_last=true")


def test_states_with_whole_numbers_and_shared_tables_come_back() -> None:
    """As bitsandbytes keeps them: an int for the step, one table for all parameters."""
    module = nn.Linear(3, 2)
    first, second = (torch.optim.SGD(module.parameters(), lr=1.0) for _ in range(2))
    table = torch.arange(4.0)
    for parameter in module.parameters():
        first.state[parameter] = {"step": 7, "state1": torch.ones(6, dtype=torch.uint8), "qmap1": table}
    saved = optimizer_tensors(first)
    assert len({value.data_ptr() for value in saved.values()}) == len(saved) == 6
    restore_optimizer(second, saved)
    for parameter in module.parameters():
        entry = second.state[parameter]
        assert type(entry["step"]) is int
        assert entry["step"] == 7
        assert torch.equal(entry["qmap1"], table)


def test_moments_come_back_in_their_parameters_layout() -> None:
    """Fused Adam walks through weights and moments side by side."""
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    options = OptimizerConfig(lr=0.1, betas=(0.9, 0.99))
    first, twin = make_optimizer(module, options), copy.deepcopy(module)
    module(torch.randn(2, 3, 5, 5)).square().sum().backward()
    first.step()
    saved = {
        name: value.clone(memory_format=torch.contiguous_format) for name, value in optimizer_tensors(first).items()
    }
    twin.load_state_dict(module.state_dict())
    second = make_optimizer(twin, options)
    restore_optimizer(second, saved)
    for parameter, other in zip(module.parameters(), twin.parameters(), strict=True):
        other.grad = parameter.grad.clone()
    first.step(), second.step()
    assert_same(dict(module.named_parameters()), dict(twin.named_parameters()))


def test_averages_on_the_cpu_are_the_same(make_config: MakeConfig) -> None:
    assert_same(trained(make_config("dmd2")), trained(make_config("dmd2", "speed.ema_device=cpu")))


@pytest.mark.gpu
def test_an_average_on_the_cpu_follows_a_module_on_the_gpu() -> None:
    module = denoiser("unet").cuda()
    on_cpu, on_gpu = EMA(module, EMAConfig(), "cpu"), EMA(module, EMAConfig())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    for ema in (on_cpu, on_gpu):
        ema.update(module, images_seen=10**7, batch_images=100_000)
    assert {p.device.type for p in on_cpu.module.parameters()} == {"cpu"}
    copied = on_cpu.on(torch.device("cuda"))
    assert {p.device.type for p in copied.parameters()} == {"cuda"}
    assert_close(dict(copied.named_parameters()), dict(on_gpu.module.named_parameters()), ROUNDING)


SEVERAL = ("ema={halflife_images: 100, ramp: 0}", "more_emas={long: {halflife_images: 1000, ramp: 0}}")


def test_each_of_several_averages_is_what_it_would_be_alone(make_config: MakeConfig) -> None:
    both = trained(make_config("dmd2", *SEVERAL))
    alone = trained(make_config("dmd2", "ema={halflife_images: 1000, ramp: 0}"))
    first = trained(make_config("dmd2", SEVERAL[0]))
    for name in (name for name in first if name.startswith("ema.")):
        assert torch.equal(both[name], first[name])
        assert torch.equal(both[name.replace("ema.", "ema-long.")], alone[name])
        assert name.endswith("num_batches_tracked") or not torch.equal(first[name], alone[name])


def test_the_first_average_samples_and_the_others_load_by_name(make_config: MakeConfig) -> None:
    trainer = after(make_config("dmd2", *SEVERAL), 2)
    assert trainer.student is trainer.assembly.emas["ema"].module
    folder = trainer.save()
    expected = weights(trainer)
    for group, found in (
        ("ema", load_model(folder)),
        ("ema-long", load_model(folder, ema="long")),
        ("generator", load_model(folder, use_ema=False)),
    ):
        state = {f"{group}.{name}": value for name, value in found.denoiser.state_dict().items()}
        assert_same(state, {name: value for name, value in expected.items() if name.startswith(f"{group}.")})
    picture = Path(trainer.folder) / "long.png"
    run_sample(str(folder), SampleOptions(SampleRequest(ema="long"), picture, count=1))
    assert picture.exists()
    with pytest.raises(UserError, match=r"no EMA 'short'; choose from: long"):
        load_model(folder, ema="short")


def test_more_averages_need_a_first_one(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="more_emas: needs `ema`"):
        make_config("dmd2", "ema=null", SEVERAL[1])
    with pytest.raises(UserError, match="more_emas"):
        make_config("dmd2", "more_emas={../up: {}}")


@pytest.mark.parametrize(
    "settings",
    [("speed.ema_device=cpu", "speed.activation_checkpointing=true"), ("speed.channels_last=true",)],
    ids=["averages on the CPU and recomputed", "channels last"],
)
def test_a_resumed_run_equals_one_that_was_not(
    make_config: MakeConfig, unet_teacher: str, settings: tuple[str, ...]
) -> None:
    config = make_config("dmd2", f"teacher={unet_teacher}", *SEVERAL, *settings)
    after(config, 2).save()
    found = load_checkpoint(after(config, 4, resume=True).save()).tensors
    expected = load_checkpoint(after(replace(config, run=f"{config.run}-whole"), 4).save()).tensors
    assert {"ema", "ema-long"} <= expected.keys()
    for group in expected:
        assert_same(dict(expected[group]), dict(found[group]))


def test_speed_may_change_on_resume_but_not_the_teacher_s_numbers(make_config: MakeConfig) -> None:
    config = make_config("dmd2")
    after(config, 1).save()
    again = (f"run={config.run}", f"teacher={config.teacher}")
    Trainer(make_config("dmd2", *again, "speed.activation_checkpointing=true", "speed.ema_device=cpu"), resume=True)
    with pytest.raises(UserError, match=r"speed\.teacher_dtype: was 'fp32', now 'bf16'"):
        Trainer(make_config("dmd2", *again, "speed.teacher_dtype=bf16"), resume=True)


def test_a_checkpoint_from_before_these_settings_resumes(make_config: MakeConfig) -> None:
    trainer = after(make_config("dmd2"), 1)
    saved = load_checkpoint(trainer.save())
    old = {name: value for name, value in dump(trainer.config).items() if name not in ("speed", "more_emas")}
    folder = Path(trainer.config.run) / "checkpoints"
    save_checkpoint(folder, Checkpoint(saved.step, saved.tensors, {**saved.state, "config": old}), keep=1)
    resumed = Trainer(trainer.config, resume=True, quiet=True)
    assert resumed.step == 1
    assert_same(saved.tensors["players"], resumed.assembly.state.tensors()["players"])
