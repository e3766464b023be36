"""Several blocks of a network at once, and discriminator heads on them."""

import pytest
import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser, Network, freeze
from diffdistill.diffusion.path import EDM
from diffdistill.networks.discriminator import Heads, features_shapes, make_head
from diffdistill.networks.dit import DiTConfig
from diffdistill.networks.edm_unet import ADM, DDPMPP
from diffdistill.networks.guided import Guided, GuidedConfig
from diffdistill.networks.lora import LoRA, LoRASettings
from diffdistill.networks.mlp import MLPConfig
from diffdistill.networks.taps import fastgen_transformer
from diffdistill.networks.unet import UNetConfig
from diffdistill.settings.schema import UserError

SHAPE = (1, 8, 8)
CLASSES = 3
UNET = UNetConfig(channels=(8, 16))
NETWORKS = {
    "unet": UNET,
    "ddpmpp": DDPMPP(channels=8, multipliers=(1, 2), blocks=1, attention_resolutions=(4,)),
    "dit": DiTConfig(width=16, depth=4, heads=2),
    "mlp": MLPConfig(width=16, blocks=3),
    "guided": GuidedConfig(base=UNET, width=8),
    "lora": UNET,
}
on_every_network = pytest.mark.parametrize("name", NETWORKS)


def make_denoiser(name: str) -> Denoiser:
    """Of random weights, so that every block matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net: Network = NETWORKS[name].build(SHAPE, CLASSES, 0.1)  # type: ignore[attr-defined]
        net = LoRA(LoRASettings(rank=2), net) if name == "lora" else net
        for parameter in net.parameters():
            nn.init.normal_(parameter, 0, 0.2)
    return freeze(Denoiser(net, EDM(), "edm"))  # type: ignore[return-value]


def inputs() -> tuple[Tensor, Tensor, Cond]:
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64), Cond(label=torch.arange(3))


def blocks_of(denoiser: Denoiser) -> list[tuple[str, nn.Module]]:
    """Every block with its name, in the order of calls."""
    net: nn.Module = denoiser.net
    net = net.base if isinstance(net, Guided) else net.shared_tree if isinstance(net, LoRA) else net
    groups = ("encoder", "decoder") if hasattr(net, "encoder") else ("blocks",)
    return [(f"{group}.{i}", block) for group in groups for i, block in enumerate(getattr(net, group))]


def watched(denoiser: Denoiser) -> list[list[Tensor]]:
    """The outputs of every block's calls from now on."""
    outputs: list[list[Tensor]] = []
    for _, block in blocks_of(denoiser):
        outputs.append([])
        block.register_forward_hook(lambda _, __, output, kept=outputs[-1]: kept.append(output))
    return outputs


@on_every_network
def test_every_block_can_be_tapped_by_number_and_by_name(name: str) -> None:
    denoiser, (x, t, cond) = make_denoiser(name), inputs()
    names = tuple(place for place, _ in blocks_of(denoiser))
    outputs = watched(denoiser)
    x0, tapped = denoiser.with_features(x, t, cond, taps=tuple(range(len(names))))
    assert [len(calls) for calls in outputs] == [1] * len(names)
    for feature, [output] in zip(tapped, outputs, strict=True):
        assert feature.ndim == 4
        same = output.transpose(1, 2) if output.ndim == 3 else output  # tokens
        assert torch.equal(feature.flatten(), same.flatten())
    for other in (denoiser.features(x, t, cond, taps=names), denoiser.features(x, t, cond, taps=(*range(len(names)),))):
        assert all(map(torch.equal, tapped, other))
    assert torch.equal(x0, denoiser(x, t, cond))


@on_every_network
def test_the_middle_is_what_is_tapped_by_default(name: str) -> None:
    denoiser, (x, t, cond) = make_denoiser(name), inputs()
    [middle] = denoiser.features(x, t, cond, taps=("middle",))
    assert torch.equal(middle, denoiser.features(x, t, cond))
    assert torch.equal(middle, denoiser.with_features(x, t, cond)[1])


@on_every_network
def test_taps_come_in_the_order_named_and_what_is_behind_the_last_does_not_run(name: str) -> None:
    denoiser, (x, t, cond) = make_denoiser(name), inputs()
    outputs = watched(denoiser)
    second, first = denoiser.features(x, t, cond, taps=(1, 0))
    assert [len(calls) for calls in outputs] == [1, 1] + [0] * (len(outputs) - 2)
    assert torch.equal(first, denoiser.features(x, t, cond, taps=(0,))[0])
    assert torch.equal(second, denoiser.features(x, t, cond, taps=(1,))[0])
    [last] = denoiser.features(x, t, cond, taps=(-1,))
    assert torch.equal(last, denoiser.features(x, t, cond, taps=(len(outputs) - 1,))[0])


LISTS: dict[str, tuple[int | str, ...]] = {
    "unet": ("encoder.0", "encoder.2"),
    "ddpmpp": ("encoder.0", "encoder.2"),
    "dit": (2, 3),
    "mlp": (1, 2),
    "guided": ("encoder.0", "encoder.2"),
    "lora": ("encoder.0", "encoder.2"),
}


@on_every_network
def test_fastgen_s_list_names_blocks_of_the_network(name: str) -> None:
    denoiser, (x, t, cond) = make_denoiser(name), inputs()
    found = denoiser.features(x, t, cond, taps="fastgen")
    assert len(found) == len(LISTS[name])
    assert all(map(torch.equal, found, denoiser.features(x, t, cond, taps=LISTS[name])))
    assert len(make_head(denoiser, SHAPE, "fastgen").heads) == len(found)  # type: ignore[arg-type]


def test_fastgen_s_lists_are_the_published_ones() -> None:
    """CIFAR-10: 0, 1, 2, the last of four blocks at 32, 16 and 8; ImageNet-64: the last; 30 and 45 of 57 and 60."""
    assert (fastgen_transformer(60), fastgen_transformer(57, published=57)) == ((30, 45), (30, 45))
    with torch.device("meta"):
        cifar = DDPMPP().build((3, 32, 32), 10, 0.0)
        imagenet = ADM().build((3, 64, 64), 1000, 0.0)
    blocks = {own.rsplit(".", 2)[0]: theirs.split(".")[1] for own, theirs in cifar.edm_names().items()}
    names = [blocks[f"encoder.{i}"] for i in cifar.fastgen_taps]
    assert names == ["32x32_block3", "16x16_block3", "8x8_block3"]
    assert imagenet.fastgen_taps == (len(imagenet.encoder) - 1,)


@pytest.mark.parametrize("tap", [99, -99, "decoder.7"])
def test_a_tap_that_is_no_block_is_refused_with_the_choices(tap: int | str) -> None:
    denoiser, (x, t, cond) = make_denoiser("unet"), inputs()
    with pytest.raises(ValueError, match=rf"taps: {tap!r} is not a block .* middle, 0 to \d, or by name encoder.0, "):
        denoiser.features(x, t, cond, taps=(0, tap))
    with pytest.raises(UserError, match=rf"gan: taps: {tap!r}"):
        make_head(denoiser, SHAPE, (tap,))


def test_no_taps_at_all_are_refused() -> None:
    denoiser, (x, t, cond) = make_denoiser("unet"), inputs()
    with pytest.raises(ValueError, match="taps: name at least one block"):
        denoiser.features(x, t, cond, taps=())


@on_every_network
def test_heads_read_several_blocks_and_their_logits_are_averaged(name: str) -> None:
    denoiser, (x, t, cond) = make_denoiser(name), inputs()
    taps = (0, "middle", -1)
    heads = make_head(denoiser, SHAPE, taps)
    assert isinstance(heads, Heads)
    features = denoiser.features(x, t, cond, taps=taps)
    assert [tuple(feature.shape[1:]) for feature in features] == list(features_shapes(denoiser, SHAPE, taps))
    each = [head(feature) for head, feature in zip(heads.heads, features, strict=True)]
    assert torch.equal(heads(features), torch.stack(each).mean(0))
    assert heads(features).shape == (3,)


def test_every_head_and_the_image_get_a_gradient() -> None:
    denoiser, (x, t, cond) = make_denoiser("unet"), inputs()
    heads = make_head(denoiser, SHAPE, (0, "middle", -1))
    heads(denoiser.features(x.requires_grad_(), t, cond, taps=(0, "middle", -1))).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(head.layers[0].weight.grad.abs().sum() > 0 for head in heads.heads)


def test_a_head_of_the_bottleneck_alone_is_as_ever() -> None:
    denoiser = make_denoiser("unet")
    head = make_head(denoiser, SHAPE)
    assert {name.split(".")[0] for name in head.state_dict()} == {"layers"}
    assert features_shapes(denoiser, SHAPE) == ((16, 4, 4),)


def test_a_network_that_knows_the_bottleneck_alone_is_called_without_taps() -> None:
    class Old(nn.Module):
        accepts: frozenset[str] = frozenset()
        num_classes, has_null_condition, resolution_multiple = 0, False, 1

        def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
            return x

        def features(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
            return 2 * x

        def forward_with_features(self, x: Tensor, time_input: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
            return x, 2 * x

    denoiser, (x, t, _) = Denoiser(Old(), EDM(), "x0"), inputs()  # type: ignore[arg-type]
    assert torch.equal(denoiser.features(x, t), 2 * x)
    assert torch.equal(denoiser.with_features(x, t)[1], 2 * x)
