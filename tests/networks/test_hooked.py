"""Guidance adapters behind the blocks of diffusers' models, whose code and weights stay as they are."""

from typing import Any

import pytest
import torch
from support.stand_ins import save_stand_in
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.models.load import load_model
from diffdistill.models.teachers import open_pipeline
from diffdistill.networks.adapters import Adapted, AdapterConfig
from diffdistill.networks.diffusers_model import DiffusersNetwork

BLOCKS = {"ddpm": 4, "dit": 2, "sd": 4, "sdxl": 4, "pixart": 2, "sd3": 2, "sana": 2}
"""Blocks with attention of each stand-in whose network guidance has a meaning to."""

EMBEDDINGS = {
    "ddpm": ("time_embedding", "class_embedding"),
    "dit": ("transformer_blocks.0.norm1.emb",),
    "sd": ("time_embedding",),
    "sdxl": ("time_embedding", "add_embedding"),
    "pixart": ("adaln_single.emb",),
    "sd3": ("time_text_embed",),
    "sana": ("time_embed.emb",),
}
"""The modules whose outputs are together what the model is told of time, and of what it adds to it."""


@pytest.fixture(scope="module", params=BLOCKS)
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Adapted, Cond]:
    """An adapted network whose adapters do something, and a condition for it."""
    options = {"num_classes": 5} if request.param == "ddpm" else {}
    folder = save_stand_in(request.param, tmp_path_factory.mktemp(request.param), **options)
    teacher, opened = load_model(folder).denoiser, open_pipeline(folder)
    if opened.family.takes_text:
        teacher.run_with(conditions=opened.conditions(["a red fox", "two blue birds"]))
    cond = teacher.resolve(teacher.class_cond(torch.tensor([1, 0])))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = Adapted(AdapterConfig(width=8), teacher.net)
        for adapter in net.adapters:
            nn.init.normal_(adapter.layers[-1].weight, std=0.1)
    return request.param, net, cond


def numbers(net: Adapted) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(2)
    shape = (2, net.base.model.config.in_channels, 8, 8)
    return torch.randn(shape, generator=rng), torch.tensor([300.0, 20.0]), torch.tensor([1.5, 4.0])


def told(cond: Cond, scale: Tensor) -> Cond:
    return Cond(**cond.parts(), guidance_input=scale)


def test_every_block_with_attention_has_an_adapter(scene: tuple[str, Adapted, Cond]) -> None:
    family, net, _ = scene
    assert len(net.adapters) == BLOCKS[family]


def test_without_a_scale_it_is_the_base(scene: tuple[str, Adapted, Cond]) -> None:
    _, net, cond = scene
    x, t, _ = numbers(net)
    assert torch.equal(net(x, t, cond), net.base(x, t, cond))


def test_a_new_one_is_the_base_whatever_the_scale(scene: tuple[str, Adapted, Cond]) -> None:
    _, net, cond = scene
    x, t, scale = numbers(net)
    new = Adapted(AdapterConfig(width=8), net.base)
    assert torch.equal(new(x, t, told(cond, scale)), net.base(x, t, cond))


def test_each_block_gives_its_own_output_and_its_adapters(scene: tuple[str, Adapted, Cond]) -> None:
    """Against hooks written out here: h + adapter(code of w, projected embedding)."""
    family, net, cond = scene
    x, t, scale = numbers(net)
    base = net.base
    assert isinstance(base, DiffusersNetwork)
    model, embedding = base.model, {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: embedding.update({name: out}))
        for name in EMBEDDINGS[family]
    ]

    def add(adapter: nn.Module) -> nn.Module:
        def hook(_: nn.Module, __: object, out: Any) -> Any:
            if isinstance(out, tuple):  # the text's tokens and the image's
                return out[0], hook(_, __, out[1])
            seen = net.project(sum(embedding.values()))
            change = adapter(out, torch.stack([net.encode(scale), seen], 1))[:, 0]
            return out + (change[:, None] if out.ndim == 3 else change[..., None, None])

        return hook

    for block, adapter in zip(base.attention_blocks, net.adapters, strict=True):
        handles.append(block.register_forward_hook(add(adapter)))
    expected = base(x, t, cond)
    for handle in handles:
        handle.remove()
    found = net(x, t, told(cond, scale))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert (found - base(x, t, cond)).abs().max() > 1e-3


def test_no_hook_outlives_its_call(scene: tuple[str, Adapted, Cond]) -> None:
    _, net, cond = scene
    x, t, scale = numbers(net)
    net(x, t, told(cond, scale))
    assert not any(module._forward_hooks for module in net.modules())


def test_no_hook_outlives_a_call_that_fails(scene: tuple[str, Adapted, Cond]) -> None:
    _, net, cond = scene
    x, t, scale = numbers(net)
    with pytest.raises(RuntimeError):
        net(x[:, :1], t, told(cond, scale))
    assert not any(module._forward_hooks for module in net.modules())


def test_gradients_reach_the_adapters_alone(scene: tuple[str, Adapted, Cond]) -> None:
    _, net, cond = scene
    x, t, scale = numbers(net)
    net(x, t, told(cond, scale)).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for a in net.adapters for p in a.parameters())
    assert all(p.grad is None for p in net.base.parameters())
    net.zero_grad()
