"""Dropout as a setting of a player: every place of it, in our networks, diffusers' and under LoRA."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig
from torch import Tensor, nn

from diffdistill.diffusion.cond import NO_COND
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM
from diffdistill.distillation.method import Problem
from diffdistill.networks.dropout import apply_dropout, dropout_of, set_dropout
from diffdistill.networks.edm_unet import DDPMPP
from diffdistill.networks.lora import LoRASettings
from diffdistill.networks.mlp import MLPConfig
from diffdistill.networks.unet import UNetConfig
from diffdistill.settings.schema import UserError
from diffdistill.training.config import RunConfig
from diffdistill.training.plan import plan
from diffdistill.training.trainer import Trainer

SHAPE = (1, 8, 8)
NETWORKS = {
    "unet": UNetConfig(channels=(8, 16), dropout=0.3),
    "ddpmpp": DDPMPP(channels=8, multipliers=(1, 2), blocks=1, attention_resolutions=(4,), dropout=0.3),
}
every_network = pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)


def teacher_of(config: UNetConfig | DDPMPP) -> Denoiser:
    """With random weights everywhere, so that every block matters."""
    net = config.build(SHAPE, 0, 0.0)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data.normal_(0, 0.1, generator=generator)
    return Denoiser(net, EDM(), "edm").eval()


def answer(module: nn.Module, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    x = torch.linspace(-1, 1, 2 * 64).reshape(2, *SHAPE)
    answered: Tensor = module(x, torch.tensor([1.0, 3.0], dtype=torch.float64), NO_COND)
    return answered.detach()


@every_network
@pytest.mark.parametrize("lora", [None, LoRASettings(rank=2)])
def test_at_zero_a_copy_that_trains_answers_as_in_eval_mode(
    config: UNetConfig | DDPMPP, lora: LoRASettings | None
) -> None:
    teacher = teacher_of(config)
    players = Problem(SHAPE, 0, EDM(), teacher=teacher, lora={"default": lora}).copies("generator", "fake")
    apply_dropout(players, {"generator": 0.0, "fake": None})
    assert [dropout_of(players[name]) for name in ("generator", "fake")] == [0.0, 0.3]
    assert dropout_of(teacher) == 0.3
    eval_mode = {name: answer(module.eval()) for name, module in players.items()}
    assert torch.equal(answer(players["generator"].train()), eval_mode["generator"])
    assert not torch.equal(answer(players["fake"].train()), eval_mode["fake"])


@every_network
def test_another_probability_is_the_one_that_the_network_drops_with(config: UNetConfig | DDPMPP) -> None:
    copies = {p: Problem(SHAPE, 0, EDM(), teacher=teacher_of(config)).copies("fake")["fake"] for p in (0.3, 0.6)}
    set_dropout(copies[0.3], 0.6)
    for part in copies[0.6].modules():
        if hasattr(part, "dropout"):
            part.dropout = 0.6
    assert torch.equal(answer(copies[0.3].train(), seed=3), answer(copies[0.6].train(), seed=3))


def test_torch_s_own_modules_are_places_and_lora_s_are_not() -> None:
    net = nn.ModuleDict(
        {"a": nn.Dropout(0.2), "b": nn.Dropout2d(0.4), "lora_dropout": nn.ModuleDict({"x": nn.Dropout(0.9)})}
    )
    assert dropout_of(net) == 0.4
    set_dropout(net, 0.0)
    assert [part.p for part in net.modules() if hasattr(part, "p")] == [0.0, 0.0, 0.9]


def test_the_factors_dropout_stays_what_lora_says() -> None:
    lora = {"default": LoRASettings(rank=2, dropout=0.5)}
    made = Problem(SHAPE, 0, EDM(), teacher=teacher_of(NETWORKS["unet"]), lora=lora).copies("generator")
    apply_dropout(made, {"default": 0.0})
    net = made["generator"].net
    rates = {part.p for part in net.shared_tree.modules() if isinstance(part, nn.Dropout)}  # type: ignore[union-attr]
    assert rates == {0.5}
    assert dropout_of(made["generator"]) == 0.0


def test_a_network_without_dropout_takes_none_but_zero() -> None:
    players = {"fake": MLPConfig(width=8, blocks=1).build(SHAPE, 0, 0.0)}
    assert dropout_of(players["fake"]) is None
    apply_dropout(players, {"fake": 0.0, "default": 0.2})
    with pytest.raises(UserError, match=r"dropout.fake = 0.1: its network has no dropout; use 0 or null"):
        apply_dropout(players, {"fake": 0.1})
    with pytest.raises(UserError, match=r"dropout.fakes: no such player; choose from fake, default"):
        apply_dropout(players, {"fakes": None})


def test_a_diffusers_model_s_dropout_is_its_player_s() -> None:
    from diffusers import UNet2DModel

    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = UNet2DModel(8, 1, 1, block_out_channels=(8, 8), norm_num_groups=4, dropout=0.2, **kinds)
    assert dropout_of(model) == 0.2
    set_dropout(model, 0.0)
    x = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    assert torch.equal(model.train()(x, 3).sample, model.eval()(x, 3).sample)


@pytest.fixture
def with_dropout(make_config: MakeConfig, tmp_path: Path) -> RunConfig:
    """DMD2 from a teacher that drops a third."""
    network = "{name: unet, channels: [8, 16], dropout: 0.3}"
    pretrain = make_config("pretrain", f"model.network={network}", f"run={tmp_path / 'teacher'}", "train.steps=1")
    Trainer(pretrain, quiet=True).run()
    return make_config("dmd2", f"teacher={tmp_path / 'teacher'}", "method.gan_weight=0", "train.steps=2")


@pytest.mark.parametrize(
    ("dropout", "expected"),
    [({}, (0.3, 0.3)), ({"default": 0.0}, (0.0, 0.0)), ({"generator": 0.1, "default": None}, (0.1, 0.3))],
)
def test_a_run_gives_each_player_its_own(
    with_dropout: RunConfig, dropout: dict[str, float | None], expected: tuple[float, float]
) -> None:
    planned = plan(replace(with_dropout, dropout=dropout))
    assert tuple(dropout_of(planned.trained[name]) for name in ("generator", "fake")) == expected


def test_a_resumed_run_drops_as_before(with_dropout: RunConfig, tmp_path: Path) -> None:
    ends = {}
    for name, steps in (("whole", (4,)), ("parts", (2, 4))):
        for number in steps:
            train = replace(with_dropout.train, steps=number)
            config = replace(with_dropout, run=str(tmp_path / name), dropout={"generator": 0.0}, train=train)
            trainer = Trainer(config, resume=number == 4 and name == "parts", quiet=True)
            trainer.run()
        ends[name] = {k: v.clone() for p in ("generator", "fake") for k, v in trainer.trained[p].state_dict().items()}
    assert all(torch.equal(ends["whole"][key], value) for key, value in ends["parts"].items())
