"""A frozen base in fewer bits under LoRA's factors: by a stand-in everywhere, by bitsandbytes and torchao where they
are installed (both have kernels for CPUs)."""

import sys
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_config
from equal import apart
from numpy.typing import NDArray
from support.fleet import run_together
from support.stand_ins import save_stand_in
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.distributed.sharded import is_sharded, whole
from diffdistill.models.teachers import open_pipeline
from diffdistill.networks import quantised
from diffdistill.networks.lora import LoRASettings, lora_of, merge_lora, with_lora
from diffdistill.networks.quantised import dequantised, is_quantised, quantise, stored
from diffdistill.settings.schema import UserError
from diffdistill.training.assembly import assemble
from diffdistill.training.config import RunConfig
from diffdistill.training.memory.counting import SavedTensors, storage_bytes
from diffdistill.training.memory.prediction import in_each_of, module_bytes, plan_memory
from diffdistill.training.plan import plan
from diffdistill.training.trainer import Trainer

CPU = torch.device("cpu")
KINDS = [
    "stand-in",
    *(["nf4"] if find_spec("bitsandbytes") else []),
    *(["int8", "fp8"] if find_spec("torchao") else []),
]


class State:
    """As bitsandbytes keeps its scales."""

    def __init__(self, scale: Tensor) -> None:
        self.absmax, self.code, self.offset, self.nested = scale, None, None, False


class StandIn(nn.Linear):
    """int8 with a scale a row, dequantised at each call."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, plain(self.weight).to(x.dtype), self.bias)


def plain(weight: Any) -> Tensor:
    found: Tensor = weight.data.float() * weight.quant_state.absmax
    return found


def make_stand_in(layer: nn.Linear, dtype: torch.dtype, device: torch.device) -> nn.Module:
    made = StandIn(layer.in_features, layer.out_features, bias=layer.bias is not None)
    scale = layer.weight.data.abs().amax(1, keepdim=True) / 127
    made.weight = nn.Parameter((layer.weight.data / scale).round().to(torch.int8), requires_grad=False)
    made.weight.quant_state = State(scale)  # type: ignore[attr-defined]
    made.bias = layer.bias
    return made.to(device)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(quantised, "SMALLEST", 200)  # the stand-ins' layers are 16 wide
    if request.param == "stand-in":
        monkeypatch.setitem(quantised.MAKERS, "nf4", make_stand_in)  # type: ignore[arg-type]
        monkeypatch.setattr(quantised, "dequantise_nf4", plain)
        return "nf4"
    return str(request.param)


@pytest.fixture
def teacher(tmp_path: Path) -> Denoiser:
    return open_pipeline(save_stand_in("dit", tmp_path / "dit")).load_denoiser()


def inputs(denoiser: Denoiser) -> tuple[Tensor, Tensor, Cond]:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, torch.full((2,), 500.0), denoiser.class_cond(torch.tensor([1, 2]))


def stirred(denoiser: Denoiser) -> Denoiser:
    """Factors that do something, which they do not at their start."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=rng))
    return denoiser


def dequantised_copy(denoiser: Denoiser) -> Denoiser:
    """The same denoiser, its base in plain weights."""
    copy = deepcopy(denoiser, {id(t): t for t in denoiser.parameters()})
    for name, part in [*copy.named_modules()]:
        if is_quantised(part):
            copy.set_submodule(name, dequantised(part))
    return copy


def test_gradients_of_factors_are_those_over_the_dequantised_base(kind: str, teacher: Denoiser) -> None:
    whole = module_bytes(teacher)
    students = [stirred(with_lora(teacher, LoRASettings(rank=2, targets="linear"))) for _ in range(2)]
    loras = [found for found in map(lora_of, students) if found]
    made = quantise(teacher.net, [lora.shared_tree for lora in loras], kind, dtype=torch.float32, device=CPU)  # type: ignore[arg-type]
    assert made
    assert module_bytes(teacher) < whole
    base = dequantised_copy(teacher)
    reference = stirred(with_lora(base, LoRASettings(rank=2, targets="linear")))
    assert not any(is_quantised(part) for part in reference.modules())
    found = []
    for student in (*students, reference):
        x, t, cond = inputs(student)
        x.requires_grad_()
        loss = student(x, t, cond).square().mean()
        found.append([loss.detach(), *torch.autograd.grad(loss, [x, *student.parameters()])])
    assert len(found[0]) > 10
    for one, two, wanted in zip(*found, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, wanted, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(teacher(*inputs(teacher)), base(*inputs(teacher)), rtol=2e-5, atol=1e-6)


def test_all_players_share_one_quantised_layer_and_own_their_factors_alone(kind: str, teacher: Denoiser) -> None:
    student = stirred(with_lora(teacher, LoRASettings(rank=2, targets="linear")))
    factors = {name: value.clone() for name, value in student.state_dict().items()}
    lora = lora_of(student)
    assert lora is not None
    made = quantise(teacher.net, [lora.shared_tree], kind, dtype=torch.float32, device=CPU)  # type: ignore[arg-type]
    weights = {id(layer.weight) for layer in made.values()}
    for tree in (teacher.net, lora.shared_tree, deepcopy(lora).shared_tree):
        assert {id(part.weight) for part in tree.modules() if is_quantised(part)} == weights
    assert student.state_dict().keys() == factors.keys()
    assert all(torch.equal(value, factors[name]) for name, value in student.state_dict().items())
    x, t, cond = inputs(student)
    merged = merge_lora(student)
    assert lora_of(merged) is None
    torch.testing.assert_close(merged(x, t, cond), student(x, t, cond), rtol=1e-4, atol=1e-5)


def test_bytes_are_counted_with_their_scales_and_what_autograd_keeps(kind: str, teacher: Denoiser) -> None:
    """bitsandbytes dequantises again in the backward pass; elsewhere autograd keeps what was dequantised."""
    made = quantise(teacher.net, [], kind, dtype=torch.float32, device=CPU)  # type: ignore[arg-type]
    layer = next(iter(made.values()))
    parts = stored(layer.weight)
    assert len(parts) > 1
    assert all(type(part) in (Tensor, nn.Parameter) or part.dtype == torch.uint8 for part in parts)
    assert storage_bytes([layer.weight]) == sum(part.nbytes for part in parts)
    x = torch.randn(3, layer.in_features, requires_grad=True)
    with SavedTensors(teacher.parameters()) as saved:
        y = layer(x).sum()
    plain_bytes = 4 * layer.in_features * layer.out_features
    does_again = kind == "nf4" and not isinstance(layer, StandIn)
    assert saved.peak <= x.nbytes + (0 if does_again else plain_bytes)
    y.backward()


# bitsandbytes' kernel for CPUs takes no layers as narrow as the stand-in's in bf16, in which a run computes.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "nf4"], indirect=True)
def test_a_run_over_a_quantised_base(kind: str, tmp_path: Path) -> None:
    save_stand_in("dit", tmp_path / "dit")
    data = "data={name: digits}"
    settings = ("train.steps=2", "train.global_batch_size=2", "train.micro_batch_size=null", "method.gan_weight=0")
    run = tmp_path / "run"
    lora, dtype = "lora.default={rank: 2, targets: linear}", f"speed.teacher_dtype={kind}"
    flat = "method.steps={init_ratio: 10}"
    config = small_config("dmd2", run, data, *settings, lora, dtype, flat, teacher=tmp_path / "dit")
    trainer = Trainer(config, quiet=True)
    bases = [lora_of(player) for player in trainer.trained.values()]
    assert all(base and any(is_quantised(part) for part in base.shared_tree.modules()) for base in bases)
    trainer.run()
    again = Trainer(config, resume=True, quiet=True)  # the base's fingerprint is that of its whole weights
    assert again.step == 2


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "nf4"], indirect=True)
@pytest.mark.parametrize("fake", ["{rank: 2, targets: linear}", "null"], ids=["factors", "beside a player in full"])
def test_processes_that_share_out_the_rest_of_a_quantised_base_train_as_those_that_do_not(
    kind: str, fake: str, tmp_path: Path
) -> None:
    """The layers in few bits are whole in each; so is what a preview is drawn with."""
    save_stand_in("dit", tmp_path / "dit")
    settings = (
        *("data={name: digits}", "train.steps=2", "train.global_batch_size=4", "train.micro_batch_size=null"),
        *(
            "method.gan_weight=0",
            "method.steps={init_ratio: 10}",
            "train.preview_every=2",
            f"speed.teacher_dtype={kind}",
        ),
        f"lora={{generator: {{rank: 2, targets: linear}}, fake: {fake}}}",
        "optimizers={default: {name: sgd, lr: 0.1, betas: [0, 0.999]}}",
    )

    def trained(config: RunConfig) -> tuple[dict[str, NDArray[Any]], int]:
        """What is trained, and the bytes of the base that this process holds."""
        trainer = Trainer(config, quiet=True)
        trainer.run()
        assert trainer.problem.teacher is not None
        few = {name for name, part in trainer.problem.teacher.net.named_modules() if is_quantised(part)}
        assert few
        for name, weight in trainer.problem.teacher.net.named_parameters():
            is_packed = name.rpartition(".")[0] in few
            assert is_sharded(weight) == (config.speed.shard == "all" and not is_packed), name
        states = {n: module.state_dict() for n, module in trainer.trained.items()}
        ends = {f"{n}.{name}": whole(t).numpy() for n, state in states.items() for name, t in state.items()}
        return ends, module_bytes(trainer.problem.teacher)

    configs = [
        small_config("dmd2", tmp_path / shard, *settings, f"speed.shard={shard}", teacher=tmp_path / "dit")
        for shard in ("none", "all")
    ]
    ((in_both, all_of_it), _), ((in_parts, held), (others, _)) = (
        run_together(2, partial(trained, config)) for config in configs
    )
    assert any("lora_A" in name for name in in_both)
    assert apart(in_both, in_parts) <= 1e-6
    assert apart(in_parts, others) == 0
    made = assemble(plan(configs[1], resume=None))
    needs = in_each_of(2, plan_memory(made.plan, made.iteration), made.plan, made.iteration)
    assert held == needs.players["teacher"].weights < all_of_it
    previews = [tmp_path / shard / "previews" / "step-00000002.png" for shard in ("none", "all")]
    assert previews[0].read_bytes() == previews[1].read_bytes()


def test_what_cannot_be_is_said(teacher: Denoiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "SMALLEST", 10**6)
    with pytest.raises(UserError, match="has no linear layer of 1,000,000 weights"):
        quantise(teacher.net, [], "nf4", dtype=torch.float32, device=CPU)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr(quantised, "SMALLEST", 200)
    with pytest.raises(UserError, match=r"nf4 needs bitsandbytes: pip install 'diffdistill\[8bit\]'"):
        quantise(teacher.net, [], "nf4", dtype=torch.float32, device=CPU)
    with pytest.raises(UserError, match=r"int8 or fp8 needs torchao"):
        quantise(teacher.net, [], "fp8", dtype=torch.float32, device=CPU)
    save_stand_in("dit", tmp_path / "dit")
    more = ("speed.teacher_dtype=nf4", "speed.teacher_device=cpu", "method.gan_weight=0")
    with pytest.raises(UserError, match=r"speed.teacher_dtype = 'nf4': does not work with"):
        Trainer(small_config("dmd2", tmp_path / "run", *more, teacher=tmp_path / "dit"), quiet=True)
