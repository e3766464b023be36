"""Networks that take w as input, around every base: they start as the base, leave it whole, and train what they say."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path as FilePath

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.closed_forms import random
from torch import Tensor, nn

from diffdistill.attention import attention
from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.guidance.policies import AdaptiveGuidance, Interval
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.sampling import Heun
from diffdistill.networks.adapters import (
    AdaptedConfig,
    AdapterConfig,
    CrossAttention,
    attach_adapters,
    save_adapters,
    without_adapters,
)
from diffdistill.networks.diffusers_unet import DiffusersUNetConfig
from diffdistill.networks.dit import DiTConfig
from diffdistill.networks.edm_unet import ADM, DDPMPP
from diffdistill.networks.guided import GuidedBase, GuidedConfig, blocks_of, take_weights
from diffdistill.networks.mlp import MLPConfig
from diffdistill.networks.recompute import set_recompute
from diffdistill.networks.unet import UNetConfig
from diffdistill.settings.schema import UserError

SHAPE, CLASSES, BATCH = (1, 8, 8), 3, 4
BASES = {
    "unet": UNetConfig(channels=(8, 16)),
    "ddpmpp": DDPMPP(channels=8, multipliers=(1, 2), blocks=1, attention_resolutions=(4,)),
    "adm": ADM(channels=8, multipliers=(1, 2), blocks=1, attention_resolutions=(4,), head_channels=8),
    "dit": DiTConfig(patch=2, width=16, depth=2, heads=2),
    "mlp": MLPConfig(width=16, blocks=2),
}
KINDS: dict[str, Callable[..., GuidedConfig | AdaptedConfig]] = {
    "embedding": lambda base: GuidedConfig(base=base, width=8),
    "offset": lambda base: AdaptedConfig(base=base, adapter=AdapterConfig(kind="offset", width=8, placement="all")),
    "cross_attention": lambda base: AdaptedConfig(
        base=base, adapter=AdapterConfig(kind="cross_attention", width=8, heads=2, placement="all")
    ),
}
on_every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
of_every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
of_adapters = pytest.mark.parametrize("kind", [KINDS["offset"], KINDS["cross_attention"]], ids=["offset", "attention"])
SCALE = torch.linspace(0.5, 6, BATCH)


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Away from the start, so that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module


def built(config: GuidedConfig | AdaptedConfig, *, trained: bool = False) -> GuidedBase:
    """A network over a base of random weights; trained: its own parts are random too."""
    torch.manual_seed(0)
    net = config.build(SHAPE, CLASSES, 0.1)
    shaken(net.base)
    if trained:
        for name, part in net.named_children():
            if name != "base":
                shaken(part, seed=1)
    return net.eval()


def inputs(scale: Tensor | None = SCALE) -> tuple[Tensor, Tensor, Cond]:
    x, times = random(BATCH, *SHAPE).float(), torch.linspace(-1, 1, BATCH)
    return x, times, Cond(label=torch.arange(BATCH) % CLASSES, guidance_input=scale)


def entries(net: nn.Module, scale: Tensor | None) -> list[Tensor]:
    """What each of a network's three entries gives."""
    arguments = inputs(scale)
    return [net(*arguments), net.features(*arguments), *net.forward_with_features(*arguments)]


@on_every_base
@of_every_kind
def test_a_new_one_is_the_base_bit_for_bit_whatever_the_scale(base, kind):
    net = built(kind(base))
    for found, expected in zip(entries(net, SCALE), entries(net.base, None), strict=True):
        assert torch.equal(found, expected)


@on_every_base
@of_every_kind
def test_a_trained_one_without_a_scale_is_the_base_bit_for_bit(base, kind):
    net = built(kind(base), trained=True)
    for found, expected in zip(entries(net, None), entries(net.base, None), strict=True):
        assert torch.equal(found, expected)


@on_every_base
@of_every_kind
def test_a_trained_one_depends_on_each_sample_s_own_scale(base, kind):
    net = built(kind(base), trained=True)
    with torch.no_grad():
        first = net(*inputs())
        changed = SCALE.clone()
        changed[1] = 2.0
        second = net(*inputs(changed))
    is_same = [torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(first, second, strict=True)]
    assert is_same == [True, False, True, True]


@of_every_kind
def test_the_base_is_left_as_it_was_even_by_a_call_that_fails(kind):
    net = built(kind(BASES["unet"]), trained=True)
    expected = entries(net.base, None)
    with pytest.raises(RuntimeError):
        net(torch.zeros(BATCH, 5, 8, 8), *inputs()[1:])
    for found, before in zip(entries(net.base, None), expected, strict=True):
        assert torch.equal(found, before)


@of_every_kind
def test_a_copy_computes_with_its_own_weights(kind):
    net = built(kind(BASES["unet"]), trained=True)
    twin = deepcopy(net)
    expected = net(*inputs())
    for parameter in net.parameters():
        parameter.data.zero_()
    assert torch.equal(twin(*inputs()), expected)


def gradients(net: nn.Module) -> dict[str, Tensor]:
    net.zero_grad()
    net(*inputs()).square().sum().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@of_every_kind
def test_recomputed_blocks_give_the_same_gradients(kind):
    net = built(kind(BASES["unet"]), trained=True)
    expected = gradients(net)
    set_recompute(net)
    found = gradients(net)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value)


@of_every_kind
def test_a_compiled_one_gives_the_same_gradients_and_still_has_its_base(kind):
    net = built(kind(BASES["unet"]), trained=True)
    plain, expected = net(*inputs(None)), gradients(net)
    net.compile(backend="eager")
    found = gradients(net)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert torch.equal(net(*inputs(None)), plain)


# The embedding


def test_every_weight_of_a_guided_network_is_trained():
    net = built(KINDS["embedding"](BASES["unet"]), trained=True).train()
    assert gradients(net).keys() == dict(net.named_parameters()).keys()


@of_every_kind
def test_the_student_starts_from_its_teacher_s_weights_or_from_another_student_s(kind):
    nets = (built(kind(BASES["mlp"])).base, built(kind(BASES["mlp"]), trained=True))
    teacher, other = (Denoiser(net, EDM(), "edm") for net in nets)
    student = Denoiser(kind(BASES["mlp"]).build(SHAPE, CLASSES, 0.1).eval(), EDM(), "edm")
    take_weights(student, teacher)
    assert torch.equal(student.net(*inputs()), teacher.net(*inputs(None)))
    take_weights(student, other)
    assert torch.equal(student.net(*inputs()), other.net(*inputs()))


def test_a_base_that_is_not_made_of_blocks_is_refused():
    options = {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4}
    options |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    with pytest.raises(UserError, match=r"network\.base: DiffusersUNet has no blocks"):
        GuidedConfig(base=DiffusersUNetConfig(options=options)).build(SHAPE, CLASSES, 0.1)


# Adapters


@on_every_base
@of_adapters
def test_the_adapters_alone_are_trained(base, kind):
    net = built(kind(base), trained=True).train()
    found = gradients(net)
    assert {name for name in found if name.startswith("base.")} == set()
    assert found.keys() == {name for name, _ in net.named_parameters() if not name.startswith("base.")}
    assert not net.base.training  # its dropout would be fitted


def test_adapters_stand_behind_the_blocks_with_attention_unless_told_otherwise():
    some, every = (
        built(AdaptedConfig(base=BASES["unet"], adapter=AdapterConfig(placement=place)))
        for place in ("attention", "all")
    )
    assert len(some.adapters) == sum(bool(block.heads) for block in blocks_of(some.base)) == 4
    assert len(every.adapters) == len(blocks_of(every.base)) == 8


def test_a_base_without_attention_needs_adapters_behind_all_blocks():
    with pytest.raises(UserError, match=r"network\.placement: this base has no blocks with attention; use all"):
        AdaptedConfig(base=BASES["mlp"]).build(SHAPE, CLASSES, 0.1)


def test_an_offset_is_the_same_at_every_position_and_attention_is_not():
    h, tokens = random(2, 9, 16).float(), random(2, 2, 8, seed=1).float()
    offset, attention = (
        built(KINDS[kind](BASES["unet"]), trained=True).adapters[-1] for kind in ("offset", "cross_attention")
    )
    h = h[..., : attention.query.in_features]
    assert offset(h, tokens).shape[1] == 1
    assert bool((attention(h, tokens).std(1) > 0).all())


@pytest.mark.parametrize("positions", [1, 9])
def test_attention_to_two_tokens_by_its_gates_is_attention(positions):
    """Equal in double precision, at one position as at many, though the products are in another order."""
    h, tokens = random(2, positions, 16), random(2, 2, 8, seed=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = CrossAttention(width=8, channels=16, heads=2).double()
        torch.nn.init.normal_(layer.project.weight)
        torch.nn.init.normal_(layer.project.bias)
    q, k, v = (
        part.unflatten(2, (2, 4)).transpose(1, 2) for part in (layer.query(h), *layer.key_value(tokens).chunk(2, 2))
    )
    expected = layer.project(attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(h, tokens), expected, rtol=1e-10, atol=1e-12)


def denoiser(kind: Callable[..., AdaptedConfig], base: str = "unet") -> Denoiser:
    return Denoiser(built(kind(BASES[base]), trained=True), EDM(), "edm", sigma_data=0.75)


def estimates(denoiser: Denoiser, guidance: float) -> Tensor:
    x, _, cond = inputs(None)
    with torch.no_grad():
        return denoiser(x, torch.linspace(0.1, 5, BATCH), cond, guidance=guidance)


@of_adapters
def test_adapters_off_give_the_base_s_own_guidance_bit_for_bit(kind):
    adapted = denoiser(kind)
    base = Denoiser(adapted.net.base, EDM(), "edm", sigma_data=0.75)
    for scale in (0.0, 1.0, 3.0):
        assert torch.equal(estimates(without_adapters(adapted), scale), estimates(base, scale))


@of_adapters
def test_a_file_of_adapters_holds_nothing_of_the_base(kind, tmp_path):
    adapted, file = denoiser(kind), tmp_path / "adapters.safetensors"
    save_adapters(adapted, file)
    with safe_open(file, "pt") as opened:
        names = set(opened.keys())
    assert names == {name for name in adapted.net.state_dict() if not name.startswith("base.")}


@of_adapters
def test_adapters_from_a_file_are_the_same_on_their_base_and_work_on_another_checkpoint_of_it(kind, tmp_path):
    adapted, file = denoiser(kind), tmp_path / "adapters.safetensors"
    save_adapters(adapted, file)
    again = attach_adapters(without_adapters(deepcopy(adapted)), file)
    assert torch.equal(estimates(again, 3.0), estimates(adapted, 3.0))

    other = without_adapters(deepcopy(adapted))
    shaken(other, seed=7)
    plain = estimates(other, 1.0)
    combined = attach_adapters(other, file)
    assert not torch.equal(estimates(combined, 3.0), estimates(adapted, 3.0))
    assert torch.equal(estimates(without_adapters(combined), 1.0), plain)


def test_adapters_of_another_architecture_are_refused(tmp_path):
    file = tmp_path / "adapters.safetensors"
    save_adapters(denoiser(KINDS["offset"]), file)
    other = Denoiser(BASES["dit"].build(SHAPE, CLASSES, 0.1), EDM(), "edm")
    with pytest.raises(UserError, match="the weights are of another architecture"):
        attach_adapters(other, file)


@pytest.mark.parametrize("content", [b"not safetensors", None], ids=["garbage", "other tensors"])
def test_a_file_without_adapters_is_refused(content: bytes | None, tmp_path: FilePath):
    file = tmp_path / "file.safetensors"
    if content is None:
        save_file({"a": torch.zeros(1)}, file)
    else:
        file.write_bytes(content)
    with pytest.raises(UserError, match="not an adapter file"):
        attach_adapters(without_adapters(denoiser(KINDS["offset"])), file)


def test_a_network_without_adapters_has_none_to_save(tmp_path):
    plain = Denoiser(BASES["mlp"].build(SHAPE, CLASSES, 0.1), EDM(), "edm")
    with pytest.raises(UserError, match="MLP: this network has no adapters"):
        save_adapters(plain, tmp_path / "file.safetensors")


# Guidance by w as input


def watched(adapted: Denoiser) -> list[Cond]:
    """The condition of every later call of the network."""
    seen: list[Cond] = []
    adapted.net.register_forward_hook(lambda _, arguments, __: seen.append(arguments[2]))
    return seen


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, -1.0])
def test_the_scale_is_fed_to_the_network_in_one_call_of_one_row_a_sample(scale):
    adapted = denoiser(KINDS["offset"])
    seen = watched(adapted)
    estimates(adapted, scale)
    assert [cond.guidance_input.tolist() for cond in seen] == [[scale] * BATCH]


def test_a_scale_for_each_sample_is_fed_as_it_is():
    adapted = denoiser(KINDS["offset"])
    seen = watched(adapted)
    estimates(adapted, SCALE)
    assert torch.equal(seen[0].guidance_input, SCALE)


def test_a_scale_that_the_condition_names_stays():
    adapted = denoiser(KINDS["offset"])
    x, _, cond = inputs(SCALE)
    seen = watched(adapted)
    adapted(x, torch.ones(BATCH), cond)
    assert torch.equal(seen[0].guidance_input, SCALE)


def test_a_sampler_guides_such_a_network_by_one_evaluation_a_call_and_an_interval_lowers_its_scale():
    adapted = denoiser(KINDS["offset"])
    seen = watched(adapted)
    noise, cond = random(BATCH, *SHAPE).float(), inputs(None)[2]
    with torch.no_grad():
        Heun(num_steps=3)(adapted, noise, cond, guidance=3.0)
        assert [float(cond.guidance_input[0]) for cond in seen] == [3.0] * 5
        seen.clear()
        Heun(num_steps=3)(adapted, noise, cond, guidance=Interval(scale=3.0, ratio_low=1.0, ratio_high=10.0))
    assert [float(cond.guidance_input[0]) for cond in seen] == [1.0, 3.0, 3.0, 1.0, 1.0]


def test_a_policy_that_needs_both_estimates_is_refused():
    with pytest.raises(UserError, match="takes the scale as input"):
        AdaptiveGuidance(scale=2.0).begin(denoiser(KINDS["offset"]), inputs(None)[2])


def test_a_config_of_adapters_says_which_width_its_heads_divide():
    with pytest.raises(ValueError, match="heads = 3 must divide width = 8"):
        AdapterConfig(kind="cross_attention", width=8, heads=3)
