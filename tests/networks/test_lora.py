"""One frozen base under factors of each player's own: its networks, its gradients, and what copies of it hold."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser, freeze
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Method, Players, Problem
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.sid import SiD
from diffdistill.networks import ADM, AnyNetwork, DiTConfig, GuidedConfig, MLPConfig, SignalConfig, UNetConfig
from diffdistill.networks.lora import (
    LoRAConfig,
    LoRASettings,
    fingerprint,
    lora_of,
    merge_lora,
    with_lora,
    without_lora,
)
from diffdistill.networks.recompute import recomputable_blocks, set_recompute
from diffdistill.settings.schema import UserError
from diffdistill.training.ema import EMA, EMAConfig
from diffdistill.training.memory.counting import storage_bytes

SHAPE, CLASSES = (1, 8, 8), 3
SETTINGS = LoRASettings(rank=3, alpha=6)
NETWORKS = {
    "unet": UNetConfig(channels=(8, 16)),
    "adm": ADM(channels=8, multipliers=(1, 2), blocks=1, attention_resolutions=(4,), head_channels=8),
    "dit": DiTConfig(width=16, depth=2, heads=2),
    "mlp": MLPConfig(width=16, blocks=2),
}
METHODS: dict[str, Method] = {"field": DMD2(gan_weight=0, guidance=2.0), "through the networks": SiD(guidance=2.0)}
LOSSES = ("generator", "fake")
FLOAT32 = 1e-6  # of the largest gradient: one rounding


def make_teacher(network: str = "unet") -> Denoiser:
    """Small, of random weights, so that every part matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = NETWORKS[network].build(SHAPE, CLASSES, 0.1)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.15)
    teacher = Denoiser(net, EDM(), "edm")
    freeze(teacher)
    return teacher


def trained(denoiser: Denoiser, seed: int) -> Denoiser:
    """With factors other than at the start, at which B is zero."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in denoiser.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=rng)
    return denoiser


def called(denoiser: Denoiser) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    x, t = torch.randn(4, *SHAPE, generator=rng), torch.tensor([0.1, 0.5, 2.0, 10.0])
    return denoiser(x, t, Cond(label=torch.tensor([0, 1, 2, CLASSES])))


def tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_player_starts_as_the_teacher_bit_for_bit(network: str) -> None:
    teacher = make_teacher(network)
    assert torch.equal(called(with_lora(teacher, SETTINGS)), called(teacher))


@pytest.mark.parametrize("network", NETWORKS)
def test_players_share_every_tensor_of_the_base_and_own_their_factors_alone(network: str) -> None:
    teacher = make_teacher(network)
    players = [with_lora(teacher, SETTINGS) for _ in range(2)]
    base = {id(tensor) for tensor in tensors(teacher)}
    for player in players:
        found = lora_of(player)
        assert found is not None
        assert {id(tensor) for tensor in found.base_tensors()} == base
        assert not {id(tensor) for tensor in tensors(player)} & base
        assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in player.state_dict())
        assert all(parameter.requires_grad for parameter in player.parameters())
    assert not {id(tensor) for tensor in tensors(players[0])} & {id(tensor) for tensor in tensors(players[1])}


def test_factors_change_their_player_and_nobody_else() -> None:
    teacher = make_teacher()
    before, other = called(teacher), with_lora(teacher, SETTINGS)
    changed = called(trained(with_lora(teacher, SETTINGS), 1))
    assert (changed - before).abs().max() > 0.01
    assert torch.equal(called(teacher), before)
    assert torch.equal(called(other), before)


def test_merged_weights_are_w_plus_alpha_over_rank_b_a() -> None:
    teacher = make_teacher("dit")
    player = trained(with_lora(teacher, SETTINGS), 1)
    factors = player.state_dict()
    a, b = (factors[f"net.adapters.blocks.1.qkv.lora_{factor}.weight"] for factor in "AB")
    expected = teacher.net.get_submodule("blocks.1.qkv").weight + 6 / 3 * b @ a
    torch.testing.assert_close(merge_lora(player).net.get_submodule("blocks.1.qkv").weight, expected)


@pytest.mark.parametrize("network", NETWORKS)
def test_merged_weights_are_the_same_function(network: str) -> None:
    player = trained(with_lora(make_teacher(network), SETTINGS), 1)
    merged = merge_lora(player)
    assert merged.state_dict().keys() == make_teacher(network).state_dict().keys()
    torch.testing.assert_close(called(merged), called(player), rtol=0, atol=2e-5)  # sums in another order


def test_merging_leaves_the_shared_base_as_it_was() -> None:
    teacher = make_teacher()
    before = deepcopy(teacher.state_dict())
    merge_lora(trained(with_lora(teacher, SETTINGS), 1))
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_a_copy_shares_the_base_and_has_factors_of_its_own() -> None:
    player = trained(with_lora(make_teacher(), SETTINGS), 1)
    copy = deepcopy(player)
    before, found, other = called(player), lora_of(copy), lora_of(player)
    assert found is not None
    assert other is not None
    assert {id(tensor) for tensor in found.base_tensors()} == {id(tensor) for tensor in other.base_tensors()}
    assert torch.equal(called(trained(copy, 1)), before)
    trained(copy, 2)
    assert not torch.equal(called(copy), before)
    assert torch.equal(called(player), before)


def test_an_average_follows_the_factors_and_leaves_the_base_alone() -> None:
    teacher = make_teacher()
    player = with_lora(teacher, SETTINGS)
    ema, before = EMA(player, EMAConfig(halflife_images=1, ramp=0), "cpu"), deepcopy(teacher.state_dict())
    start = called(ema.module)
    trained(player, 1)
    ema.update(player, images_seen=8, batch_images=1)
    half = lora_of(ema.module)
    assert half is not None
    for average, parameter, initial in zip(
        ema.module.parameters(), player.parameters(), with_lora(teacher, SETTINGS).parameters(), strict=True
    ):
        if not initial.any():  # B, which began at zero
            torch.testing.assert_close(average, parameter / 2)
    assert not torch.equal(called(ema.module), start)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_three_players_and_an_average_hold_little_more_than_the_base() -> None:
    with torch.random.fork_rng():
        net = UNetConfig(channels=(64, 128)).build(SHAPE, CLASSES, 0.1)
    teacher = Denoiser(net, EDM(), "edm")
    freeze(teacher)
    settings = LoRASettings(rank=2)
    generator, fake = with_lora(teacher, settings), with_lora(teacher, settings)
    copies = [with_lora(deepcopy(teacher), settings) for _ in range(3)]

    def held(*players: Denoiser) -> int:
        found = [lora_of(player) for player in players]
        return storage_bytes(
            t
            for p, lora in zip(players, found, strict=True)
            for t in (*tensors(p), *(lora.base_tensors() if lora else ()))
        )

    assert held(teacher, generator, fake, deepcopy(generator)) < 0.45 * held(*copies)


# Gradients, against three whole copies that carry peft's layers


def whole_copy(player: Denoiser) -> Denoiser:
    """Weights and factors of its own, as peft makes them without us."""
    found = lora_of(player)
    assert found is not None
    network = next(name for name in NETWORKS if type(make_teacher(name).net) is type(found.shared_tree))
    net = make_teacher(network).net
    names = [name.removesuffix(".lora_A.weight") for name in found.adapters.state_dict() if "lora_A" in name]
    inject_adapter_in_model(
        LoraConfig(r=SETTINGS.rank, lora_alpha=6, target_modules=f"({'|'.join(names)})".replace(".", r"\.")), net
    )
    state = {name.replace(".weight", ".default.weight"): t.clone() for name, t in found.adapters.state_dict().items()}
    unknown = net.load_state_dict(state, strict=False).unexpected_keys
    assert not unknown
    return Denoiser(net, player.path, player.predicts)


def gradients(method: Method, players: Players, who: str) -> dict[str, Tensor]:
    """Of one of the method's losses, by peft's names."""
    problem = Problem(SHAPE, CLASSES, EDM(), teacher=players.teacher, batch_size=4)
    draw = method.draw(StepRandom(0, 0, torch.arange(4)), problem)
    for name in LOSSES:
        for parameter_name, parameter in players[name].named_parameters():
            parameter.requires_grad_(name == who and "lora_" in parameter_name)
            parameter.grad = None
    method.call(f"{who}_loss", players, draw, Batch(torch.empty(0))).total.backward()
    return {
        name.removeprefix("net.").removeprefix("adapters.").replace(".default", ""): p.grad
        for name, p in players[who].named_parameters()
        if p.grad is not None
    }


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The greatest difference, to the greatest gradient."""
    assert found.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    return max(float((found[name] - expected[name]).abs().max()) for name in expected) / scale


def shared_players(network: str) -> Players:
    teacher = make_teacher(network)
    return Players(
        teacher=teacher,
        generator=trained(with_lora(teacher, SETTINGS), 1),
        fake=trained(with_lora(teacher, SETTINGS), 2),
    )


def copied_players(shared: Players) -> Players:
    return Players(
        teacher=deepcopy(shared.teacher), generator=whole_copy(shared.generator), fake=whole_copy(shared.fake)
    )


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("who", LOSSES)
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("network", ["unet", "dit"])
def test_gradients_are_those_of_three_copies(network: str, kind: str, who: str, recomputed: bool) -> None:
    shared = shared_players(network)
    expected = gradients(METHODS[kind], copied_players(shared), who)
    if recomputed:
        for player in shared.values():
            set_recompute(player)
    assert apart(gradients(METHODS[kind], shared, who), expected) < FLOAT32


def test_a_teacher_whose_factors_are_left_on_would_be_noticed() -> None:
    shared = shared_players("unet")
    expected = gradients(METHODS["field"], copied_players(shared), "generator")
    wrong = Players(**{**shared, "teacher": freeze(deepcopy(shared.fake))})
    assert apart(gradients(METHODS["field"], wrong, "generator"), expected) > 0.1


def test_the_generators_loss_leaves_no_gradient_on_teacher_and_fake_score() -> None:
    shared = shared_players("unet")
    gradients(METHODS["through the networks"], shared, "generator")
    assert all(parameter.grad is None for name in ("teacher", "fake") for parameter in shared[name].parameters())


# Settings


def test_blocks_of_a_player_are_its_own_to_change_and_to_recompute() -> None:
    teacher = make_teacher()
    player = with_lora(teacher, SETTINGS)
    assert set_recompute(player)
    assert all(block.is_recomputed for block in recomputable_blocks(player))
    assert not any(block.is_recomputed for block in recomputable_blocks(teacher))


@pytest.mark.parametrize(
    ("targets", "ends"),
    [
        ("attention", {"qkv", "project"}),
        ("linear", {"0", "2", "embed_label", "modulate"}),
        (("qkv", "embed_time.2"), {"qkv", "2"}),
    ],
)
def test_targets_are_chosen_by_kind_or_by_the_ends_of_their_names(
    targets: str | tuple[str, ...], ends: set[str]
) -> None:
    player = with_lora(make_teacher(), replace(SETTINGS, targets=targets))
    names = {name.partition(".lora_")[0].rpartition(".")[2] for name in player.state_dict()}
    assert names == ends


def test_targets_that_no_layer_has_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"lora.targets = \('to_k',\): no such layer in UNet.*qkv"):
        with_lora(make_teacher(), replace(SETTINGS, targets=("to_k",)))


def test_factors_of_a_base_in_half_precision_are_in_float32() -> None:
    teacher = make_teacher("dit").to(torch.bfloat16)
    player = with_lora(teacher, SETTINGS)
    assert {parameter.dtype for parameter in player.parameters()} == {torch.float32}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_a_network_s_config_is_given_back_without_factors_however_deep_they_are(network: AnyNetwork) -> None:
    inner = LoRAConfig(base=network, lora=SETTINGS)
    assert without_lora(network) == network
    assert without_lora(inner) == network
    assert without_lora(SignalConfig(base=GuidedConfig(base=inner))) == SignalConfig(base=GuidedConfig(base=network))


def test_a_fingerprint_tells_bases_apart() -> None:
    base = make_teacher().net
    other = deepcopy(base)
    assert fingerprint(base) == fingerprint(other)
    next(iter(other.parameters())).data[0] += 1e-3
    assert fingerprint(base) != fingerprint(other)
