"""A last layer of N times the width, around every base."""

import pytest
import torch
from support.closed_forms import random
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM
from diffdistill.networks.dit import DiTConfig
from diffdistill.networks.edm_unet import ADM, DDPMPP
from diffdistill.networks.grid import Grid, GridConfig, last_layer, start_from
from diffdistill.networks.lora import LoRA, LoRAConfig, LoRASettings, merge_lora
from diffdistill.networks.mlp import MLPConfig
from diffdistill.networks.unet import UNetConfig
from diffdistill.settings.schema import UserError

SHAPE, CLASSES, BATCH, PLACES = (2, 8, 8), 3, 4, 3
BASES = {
    "unet": UNetConfig(channels=(8, 16)),
    "unet of patches": UNetConfig(channels=(8, 16), patch=2),
    "ddpmpp": DDPMPP(channels=8, multipliers=(1, 2), blocks=1, attention_resolutions=(4,)),
    "adm": ADM(channels=8, multipliers=(1, 2), blocks=1, attention_resolutions=(4,), head_channels=8),
    "dit": DiTConfig(patch=2, width=16, depth=2, heads=2, learn_sigma=True),
    "mlp": MLPConfig(width=16, blocks=2),
}
on_every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
X, T = random(BATCH, *SHAPE).float(), torch.linspace(0.1, 5, BATCH, dtype=torch.float64)
COND = Cond(label=torch.tensor([0, 1, 2, 0]))
COPIES = X.repeat(1, PLACES, 1, 1)


def shake(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def made(base: object) -> tuple[Denoiser, Denoiser]:
    """A teacher of random weights, and a grid that starts as it."""
    torch.manual_seed(0)
    teacher = Denoiser(base.build(SHAPE, CLASSES, 0.1), EDM(), "edm")  # type: ignore[attr-defined]
    shake(teacher)
    student = Denoiser(GridConfig(base=base, places=PLACES).build(SHAPE, CLASSES, 0.1), EDM(), "edm")  # type: ignore[arg-type]
    start_from(student, teacher)
    return teacher.eval(), student.eval()


def outputs(student: Denoiser) -> Tensor:
    return student(COPIES, T, COND).unflatten(1, (PLACES, SHAPE[0]))


@on_every_base
@torch.no_grad()
def test_all_outputs_start_as_the_teacher_s(base: object) -> None:
    teacher, student = made(base)
    expected = teacher(X, T, COND)
    assert float((expected - X).abs().max()) > 0.01
    assert torch.equal(outputs(student), expected[:, None].expand(-1, PLACES, -1, -1, -1))
    assert torch.equal(student(X, T, COND), expected)


@on_every_base
@torch.no_grad()
def test_each_output_is_that_of_a_last_layer_of_its_own(base: object) -> None:
    teacher, student = made(base)
    net = student.net
    assert isinstance(net, Grid)
    shake(net.head)
    found = outputs(student)
    layer = last_layer(teacher)
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    assert layer.bias is not None
    assert net.head.bias is not None
    weight, bias = layer.weight.clone(), layer.bias.clone()
    for place, (more, offset) in enumerate(
        zip(net.head.weight.chunk(PLACES), net.head.bias.chunk(PLACES), strict=True)
    ):
        layer.weight.copy_(weight + more)
        layer.bias.copy_(bias + offset)
        torch.testing.assert_close(found[:, place], teacher(X, T, COND), rtol=1e-4, atol=1e-5)
    assert torch.equal(student(X, T, COND), found[:, -1])


@torch.no_grad()
def test_guidance_is_of_each_output() -> None:
    teacher, student = made(BASES["unet"])
    expected = teacher(X, T, COND, guidance=3.0)
    found = student(COPIES, T, COND, guidance=3.0).unflatten(1, (PLACES, SHAPE[0]))
    torch.testing.assert_close(found, expected[:, None].expand_as(found), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_features_are_the_base_s() -> None:
    teacher, student = made(BASES["unet"])
    assert torch.equal(student.features(X, T, COND), teacher.features(X, T, COND))
    estimate, features = student.with_features(X, T, COND)
    assert torch.equal(estimate, teacher(X, T, COND))
    assert torch.equal(features, teacher.features(X, T, COND))


def test_over_factors_the_head_is_trained_and_the_base_is_not() -> None:
    teacher, _ = made(BASES["unet"])
    lora = LoRAConfig(base=BASES["unet"], lora=LoRASettings(rank=2))
    student = Denoiser(GridConfig(base=lora, places=PLACES).build(SHAPE, CLASSES, 0.1), EDM(), "edm").eval()
    net = student.net
    assert isinstance(net, Grid)
    assert isinstance(net.base, LoRA)
    net.base.mount(teacher.net)
    start_from(student, teacher)
    assert torch.equal(student(X, T, COND), teacher(X, T, COND))
    outputs(student)[:, 1].square().sum().backward()
    gradients = net.head.weight.grad
    assert gradients is not None
    assert [bool(part.any()) for part in gradients.chunk(PLACES)] == [False, True, False]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    with torch.no_grad():
        shake(student)
        torch.testing.assert_close(outputs(merge_lora(student)), outputs(student), rtol=1e-4, atol=1e-4)


def test_a_base_that_names_no_last_layer_is_refused() -> None:
    with pytest.raises(UserError, match=r"network.base: Identity names no last layer"):
        last_layer(nn.Identity())


def test_an_error_inside_leaves_no_hook() -> None:
    _, student = made(BASES["mlp"])
    with pytest.raises(RuntimeError):
        student.net(torch.zeros(2, 2, 3, 3), torch.zeros(2), Cond())
    assert not last_layer(student.net)._forward_hooks
