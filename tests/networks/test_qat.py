"""Quantisation-aware students: which layers, whose rounding, what checkpoints and exports hold; by torchao where it is
installed, and everywhere by a stand-in for the two classes of it that training uses."""

import json
import sys
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig
from support.method_matrix import origin, train
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Network
from diffdistill.export.quantised import FACTS
from diffdistill.export.run import ExportOptions, write
from diffdistill.models.load import load_model
from diffdistill.networks import qat
from diffdistill.networks.dit import DiTConfig
from diffdistill.networks.qat import QuantisedTraining, fake_quantise, on_grid, quantised_layers, stored_bytes
from diffdistill.settings.schema import UserError
from diffdistill.training.trainer import Trainer

TORCHAOS = qat._torchao
HAS_TORCHAO = find_spec("torchao") is not None


class Rounding(nn.Module):
    """As torchao's: the greatest of a group is half the range, and what is beyond is cut, its gradient too."""

    def __init__(self, config: QuantisedTraining) -> None:
        super().__init__()
        self.config = config

    def forward(self, weight: Tensor) -> Tensor:
        low, high = -(2 ** (self.config.bits - 1)), 2 ** (self.config.bits - 1) - 1
        rows = weight.reshape(-1, self.config.group or weight.shape[1])
        scale = rows.detach().abs().amax(1, keepdim=True) / ((high - low) / 2)
        steps = (rows.detach() / scale).round()
        kept = torch.where(steps == steps.clamp(low, high), rows, rows.detach())
        return (steps.clamp(low, high) * scale + (kept - kept.detach())).reshape(weight.shape)


class Layer(nn.Linear):
    """As torchao's linear layer of rounded weights."""

    @classmethod
    def from_linear(cls, layer: nn.Linear, activation: None, config: QuantisedTraining) -> "Layer":
        made = cls(layer.in_features, layer.out_features, bias=layer.bias is not None)
        made.weight, made.bias, made.weight_fake_quantizer = layer.weight, layer.bias, Rounding(config)
        return made

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight_fake_quantizer(self.weight), self.bias)


@pytest.fixture(params=["torchao" if HAS_TORCHAO else "stand-in"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose layers."""
    if request.param == "stand-in":
        monkeypatch.setattr(qat, "_torchao", lambda settings: (Layer, settings))
    name: str = request.param
    return name


def network() -> Network:
    torch.manual_seed(0)
    net = DiTConfig(patch=2, width=16, depth=2, heads=2).build((1, 8, 8), 3, 0.1)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return net


def called(net: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    made: Tensor = net(
        torch.randn(2, 1, 8, 8, generator=generator), torch.tensor([0.1, 0.9]), Cond(label=torch.tensor([0, 2]))
    )
    return made


def test_the_layers_of_blocks_are_rounded_and_no_first_last_or_embedding():
    names = set(quantised_layers(network(), QuantisedTraining()))
    assert names == {f"blocks.{i}.{part}" for i in (0, 1) for part in ("qkv", "project", "mlp.0", "mlp.2", "modulate")}


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, None), (3, 8)])
def test_a_row_or_group_has_as_many_levels_as_its_bits_and_no_weight_moves_by_more_than_a_step(bits, group):
    net, settings = network(), QuantisedTraining(bits=bits, group=group)
    rounded = deepcopy(net)
    on_grid(rounded, settings)
    for name in quantised_layers(net, settings):
        before, after = (each.get_submodule(name).weight.detach() for each in (net, rounded))
        for old, new in zip(
            before.reshape(-1, group or before.shape[1]), after.reshape(-1, group or before.shape[1]), strict=True
        ):
            step = float(old.abs().max()) / (2 ** (bits - 1) - 0.5)
            assert len(new.unique()) <= 2**bits
            assert float((old - new).abs().max()) <= step / 2 * 1.001
            torch.testing.assert_close(new / step, (new / step).round(), rtol=0, atol=1e-3)
    assert torch.equal(net.output.weight, rounded.output.weight)


def test_what_is_rounded_twice_is_not_what_is_rounded_once():
    """The greatest of a row is cut to a level below its own, so that a second scale is another: nobody rounds again."""
    net, settings = network(), QuantisedTraining(bits=4)
    on_grid(net, settings)
    once = net.blocks[0].qkv.weight.detach().clone()
    on_grid(net, settings)
    assert float((net.blocks[0].qkv.weight - once).abs().max()) > 0.01


def test_training_computes_with_what_is_loaded_and_keeps_names_and_weights():
    net, settings = network(), QuantisedTraining(bits=4)
    trained, loaded = deepcopy(net), deepcopy(net)
    fake_quantise(trained, settings)
    on_grid(loaded, settings)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in trained.state_dict().items())
    assert trained.state_dict().keys() == net.state_dict().keys()
    assert torch.equal(called(trained), called(loaded))
    assert not torch.allclose(called(trained), called(net))


def test_the_gradient_passes_as_if_nothing_was_rounded_but_to_weights_beyond_the_range():
    """Of a loss that is linear in what is rounded: the layer's output."""
    layer, settings = network().blocks[0], QuantisedTraining(bits=4)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    rounded = deepcopy(layer)
    root = nn.Module()
    root.block = rounded
    fake_quantise(root, settings)
    for block in (layer, rounded):
        block.qkv(x).sum().backward()
    weight = layer.qkv.weight.detach()
    is_within = weight.abs() < 0.99 * weight.abs().amax(1, keepdim=True)  # what is cut is at most the greatest
    assert rounded.qkv.weight.grad is not None
    torch.testing.assert_close(rounded.qkv.weight.grad[is_within], layer.qkv.weight.grad[is_within])


def test_bytes_are_of_the_bits_and_a_scale_a_row():
    net = network()
    layers = quantised_layers(net, QuantisedTraining()).values()
    weights, rows = sum(layer.weight.numel() for layer in layers), sum(layer.out_features for layer in layers)
    whole = sum(4 * p.numel() for p in net.parameters())
    assert stored_bytes(net, None) == whole
    assert stored_bytes(net, QuantisedTraining(bits=4)) == whole - 4 * weights + weights // 2 + 4 * rows
    assert stored_bytes(net, QuantisedTraining(bits=8, group=8)) == whole - 4 * weights + weights + 4 * weights // 8


def test_what_cannot_be_rounded_is_refused():
    with pytest.raises(UserError, match=r"qat.group = 5: does not divide the 16 inputs of blocks.0.qkv"):
        fake_quantise(network(), QuantisedTraining(group=5))
    with pytest.raises(UserError, match="qat: Sequential has no linear layer in its blocks"):
        fake_quantise(nn.Sequential(nn.Linear(2, 2)), QuantisedTraining())


def test_without_torchao_one_message_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(qat, "_torchao", TORCHAOS)
    monkeypatch.setitem(sys.modules, "torchao.quantization.qat", None)
    with pytest.raises(UserError, match=r"qat: needs torchao: pip install 'diffdistill\[quant\]'"):
        fake_quantise(network(), QuantisedTraining())


# Runs


@pytest.mark.parametrize("method", ["dmd2", "regression"])
def test_a_run_begins_with_its_full_precision_run_and_is_resumed(make_config: MakeConfig, method: str):
    first = make_config(method, "train.steps=1")
    Trainer(first, quiet=True).run()
    whole = make_config(method, f"init={first.run}", "qat={bits: 4}", "train.steps=2", "ema=null")
    parts = replace(whole, run=f"{whole.run}-parts", train=replace(whole.train, steps=1))
    expected = Trainer(whole, quiet=True)
    start = expected.trained["generator"].state_dict()["net.blocks.0.first.weight"].clone()
    assert torch.equal(start, load_model(first.run).denoiser.state_dict()["net.blocks.0.first.weight"])
    expected.run()
    Trainer(parts, quiet=True).run()
    resumed = Trainer(replace(parts, train=whole.train), resume=True, quiet=True)
    resumed.run()
    for name, value in expected.trained["generator"].state_dict().items():
        assert torch.equal(value, resumed.trained["generator"].state_dict()[name])
    loaded = load_model(whole.run)
    row = loaded.denoiser.state_dict()["net.blocks.0.first.weight"][0]
    assert len(row.unique()) <= 16
    assert loaded.spec.qat == QuantisedTraining(bits=4)
    exact = load_model(whole.run, rounds=False).denoiser.state_dict()
    assert torch.equal(
        exact["net.blocks.0.first.weight"], expected.trained["generator"].state_dict()["net.blocks.0.first.weight"]
    )


def test_a_full_precision_run_after_it_is_one(make_config: MakeConfig):
    first = make_config("dmd2", "qat={bits: 3}", "train.steps=1")
    Trainer(first, quiet=True).run()
    after = make_config("dmd2", f"init={first.run}", "train.steps=1")
    Trainer(after, quiet=True).run()
    assert load_model(after.run).spec.qat is None


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (("lora.default={rank: 2}",), "qat: rounds the student's weights, which lora does not train; use"),
        (("speed.shard=all",), "qat: does not work with speed.shard"),
    ],
)
def test_what_does_not_go_with_it_is_refused(make_config: MakeConfig, overrides: tuple[str, ...], fault: str):
    with pytest.raises(UserError, match=fault):
        Trainer(make_config("dmd2", "qat={bits: 4}", *overrides), quiet=True)


def test_an_export_holds_the_rounded_numbers_and_says_which_layers(tmp_path: Path, make_config: MakeConfig):
    config = make_config("dmd2", "qat={bits: 4}", "train.steps=1")
    Trainer(config, quiet=True).run()
    write(config.run, tmp_path / "out", ExportOptions(kind="self-contained"))
    facts = json.loads((tmp_path / "out" / FACTS).read_text())
    assert (facts["bits"], facts["group"]) == (4, None)
    assert "blocks.0.first" in facts["layers"]
    with pytest.raises(UserError, match="--quantised: is for --kind stock"):
        write(config.run, tmp_path / "other", ExportOptions(kind="self-contained", is_quantised=True))


if HAS_TORCHAO:

    def test_a_stock_folder_holds_the_bits_and_loads_by_diffusers_alone(tmp_path: Path):
        from diffusers import UNet2DConditionModel

        run = train(
            "dmd2", origin("sd", "dmd2", tmp_path / "teacher"), tmp_path / "run", "qat={bits: 4}", "train.steps=1"
        )
        write(str(run), tmp_path / "out", ExportOptions(kind="stock", is_quantised=True))
        found = UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet", torch_dtype=torch.float32)
        wanted = load_model(run).denoiser.net.model
        layers = [
            name
            for name, part in wanted.named_modules()
            if isinstance(part, nn.Linear) and "transformer_blocks" in name
        ]
        assert layers
        for name in layers:
            weight = found.get_submodule(name).weight
            assert "Intx" in type(weight).__name__
            torch.testing.assert_close(weight.dequantize(), wanted.get_submodule(name).weight, rtol=0, atol=1e-6)
