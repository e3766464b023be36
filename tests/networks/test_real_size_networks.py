"""DDPM++, ADM and DiT: their real sizes on the meta device, their behaviour tiny; and EDM's augmentation."""

import math

import pytest
import torch
from conftest import MakeConfig
from support.closed_forms import random
from torch import Tensor, nn

from diffdistill.diffusion.augmentation import NUM_LABELS, augment, draw_motion
from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.networks.dit import DiT, DiTConfig
from diffdistill.networks.edm_unet import ADM, DDPMPP, NCSNPP, EDMUNet
from diffdistill.settings.schema import UserError
from diffdistill.training.trainer import Trainer

SHAPE = (2, 8, 8)
CLASSES = 3
BATCH = 3
TINY = {
    "ddpmpp": DDPMPP(channels=8, multipliers=(1, 2), blocks=1, attention_resolutions=(4,), augment_dim=9),
    "ncsnpp": NCSNPP(channels=8, multipliers=(1, 2), blocks=1, attention_resolutions=(4,), augment_dim=9),
    "adm": ADM(
        channels=8,
        multipliers=(1, 2),
        blocks=1,
        attention_resolutions=(4,),
        head_channels=8,
        dropout=0.5,
        augment_dim=9,
    ),
    "dit": DiTConfig(patch=2, width=16, depth=3, heads=2),
}
on_every_network = pytest.mark.parametrize("name", TINY)
on_every_unet = pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "adm"])


def tiny(name: str, *, num_classes: int = CLASSES, class_dropout: float = 0.1) -> EDMUNet | DiT:
    """A new network in float64, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TINY[name].build(SHAPE, num_classes, class_dropout).double().eval()


def perturbed(name: str, **options) -> EDMUNet | DiT:
    """The same with noise on every weight, so that nothing is zero and every input matters."""
    net = tiny(name, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in net.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return net


def inputs(net: nn.Module) -> tuple[Tensor, Tensor, Cond]:
    given = {"label": torch.tensor([0, 2, CLASSES]), "augmentation": random(BATCH, NUM_LABELS, seed=2)}
    cond = Cond(**{part: value for part, value in given.items() if part in net.accepts})
    return random(BATCH, *SHAPE), torch.tensor([-1.5, 0.1, 1.0], dtype=torch.float64), cond


def count_parameters(config, shape: tuple[int, int, int], num_classes: int) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in config.build(shape, num_classes, 0.1).parameters())


# Sizes


@pytest.mark.parametrize(
    ("config", "shape", "num_classes", "original"),
    [
        (DDPMPP.cifar10(), (3, 32, 32), 0, 55_733_891),
        (DDPMPP.cifar10(), (3, 32, 32), 10, 55_735_299),
        (NCSNPP(augment_dim=9), (3, 32, 32), 0, 56_397_827),
        (NCSNPP(augment_dim=9), (3, 32, 32), 10, 56_400_643),
        (NCSNPP(augment_dim=9, multipliers=(1, 2, 2, 2)), (3, 64, 64), 0, 62_761_091),
        (ADM.imagenet64(), (3, 64, 64), 1000, 295_899_267),
    ],
    ids=["CIFAR-10", "CIFAR-10 with classes", "NCSN++", "NCSN++ with classes", "NCSN++ FFHQ", "ImageNet-64"],
)
def test_edm_s_networks_have_exactly_as_many_parameters_as_the_originals(config, shape, num_classes, original):
    # Counted on EDM's own networks with their training settings.
    assert count_parameters(config, shape, num_classes) == original


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (DiTConfig.small(2, learn_sigma=True), 33),
        (DiTConfig.small(4, learn_sigma=True), 33),
        (DiTConfig.base(2, learn_sigma=True), 130),
        (DiTConfig.base(8, learn_sigma=True), 131),
        (DiTConfig.large(2, learn_sigma=True), 458),
        (DiTConfig.extra_large(2, learn_sigma=True), 675),
        (DiTConfig.extra_large(8, learn_sigma=True), 676),
    ],
    ids=lambda value: f"{value.width} wide, patch {value.patch}" if isinstance(value, DiTConfig) else None,
)
def test_dit_has_the_millions_of_parameters_of_the_paper_s_table_4(config, published):
    assert round(count_parameters(config, (4, 32, 32), 1000) / 1e6) == published


def test_dit_xl_2_has_exactly_the_published_number_where_the_fixed_positions_count():
    # Its training script prints 675,129,632, 256 x 1152 of which are the sine-cosine table.
    found = count_parameters(DiTConfig.extra_large(2, learn_sigma=True), (4, 32, 32), 1000)
    assert found + 256 * 1152 == 675_129_632


@pytest.mark.parametrize(
    ("config", "shape", "num_classes", "tensors"),
    [(DDPMPP.cifar10(), (3, 32, 32), 10, 419), (ADM.imagenet64(), (3, 64, 64), 1000, 541)],
    ids=["DDPM++", "ADM"],
)
def test_every_tensor_has_one_name_of_edm_s(config, shape, num_classes, tensors):
    with torch.device("meta"):
        names = config.build(shape, num_classes, 0.0).edm_names()
    assert len(names) == len(set(names.values())) == tensors
    assert {"map_layer0.weight", "map_label.weight", "enc.16x16_block1.qkv.weight", "dec.8x8_in0.proj.bias"} <= set(
        names.values()
    )


# Behaviour


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            DDPMPP(channels=16, multipliers=(1, 2, 2), blocks=2, attention_resolutions=(8, 4), augment_dim=9),
            [-0.06218953, 0.00929906, 0.28678331, 0.27562273],
        ),
        (
            ADM(
                channels=16,
                multipliers=(1, 2, 2),
                blocks=2,
                attention_resolutions=(8, 4),
                head_channels=8,
                augment_dim=9,
            ),
            [0.28040711, 0.33344322, -0.24495038, -0.21725871],
        ),
    ],
    ids=["DDPM++", "ADM"],
)
def test_edm_s_own_network_gives_the_same_pixels_from_the_same_weights(config, expected):
    net = config.build((3, 16, 16), 5, 0.0).eval()
    names = net.edm_names()
    weights = net.state_dict()
    for k, own in enumerate(sorted(names, key=names.__getitem__)):
        values = 0.3 * torch.sin(torch.arange(weights[own].numel(), dtype=torch.float64) * 0.7 + k)
        weights[own].copy_(values.reshape(weights[own].shape))
    x = torch.sin(torch.arange(2 * 3 * 16 * 16, dtype=torch.float32)).reshape(2, 3, 16, 16)
    cond = Cond(label=torch.tensor([1, 3]), augmentation=torch.linspace(-1, 1, 18).reshape(2, 9))
    with torch.no_grad():
        found = net(x, torch.tensor([-0.8, 0.6]), cond)
    # The stored values were computed with EDM's implementation in float32: some forty layers of rounding.
    pixels = torch.stack([*found[0, 0, 0, :2], *found[1, 2, 9, 4:6]])
    torch.testing.assert_close(pixels, torch.tensor(expected), rtol=0, atol=2e-6)


@on_every_network
def test_output_and_features_have_their_shapes(name):
    net = tiny(name)
    output, features = net.forward_with_features(*inputs(net))
    assert output.shape == (BATCH, *SHAPE)
    assert features.shape == (BATCH, 16, 4, 4)


@on_every_network
def test_features_alone_equal_those_beside_the_output_and_leave_the_rest_out(name):
    net = perturbed(name)
    late = net.blocks[-1] if isinstance(net, DiT) else net.decoder[0]
    output, features = net.forward_with_features(*inputs(net))
    assert torch.equal(output, net(*inputs(net)))
    late.register_forward_hook(lambda *_: pytest.fail("the second half ran"))
    assert torch.equal(features, net.features(*inputs(net)))


@on_every_network
def test_a_new_network_gives_almost_nothing(name):
    net = tiny(name)
    assert net(*inputs(net)).abs().max() < {"ddpmpp": 1e-3, "ncsnpp": 1e-3, "adm": 1e-30, "dit": 1e-30}[name]


@on_every_network
def test_no_class_is_no_label(name):
    net = perturbed(name)
    x, t, _ = inputs(net)
    null, none = net(x, t, Cond(label=torch.full((BATCH,), CLASSES))), net(x, t, NO_COND)
    assert torch.equal(null, none)
    assert (net(x, t, Cond(label=torch.zeros(BATCH, dtype=torch.int64))) - none).abs().max() > 1e-3


@on_every_unet
def test_zero_augmentation_labels_are_no_augmentation(name):
    net = perturbed(name)
    x, t, cond = inputs(net)
    label, zeros = Cond(label=cond.label), torch.zeros(BATCH, NUM_LABELS, dtype=torch.float64)
    none = net(x, t, label)
    assert torch.equal(net(x, t, Cond(label=cond.label, augmentation=zeros)), none)
    assert (net(x, t, cond) - none).abs().max() > 1e-3


@on_every_network
def test_a_network_accepts_what_it_was_made_for(name):
    parts = {"augmentation"} if name != "dit" else set()
    assert tiny(name).accepts == parts | {"label"}
    net = tiny(name, num_classes=0)
    assert net.accepts == parts
    assert not net.has_null_condition
    assert net(*inputs(net)).shape == (BATCH, *SHAPE)


@on_every_network
def test_a_gradient_reaches_every_parameter(name):
    net = perturbed(name).train()
    net(*inputs(net)).square().sum().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


@on_every_unet
def test_dropout_is_for_training_only(name):
    net = perturbed(name)
    plain = net(*inputs(net))
    assert torch.equal(plain, net(*inputs(net)))
    torch.manual_seed(0)
    net.train()
    assert not torch.equal(plain, net(*inputs(net)))


@on_every_network
def test_samples_do_not_see_one_another(name):
    net = perturbed(name)
    x, t, cond = inputs(net)
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1], cond[slice(i, i + 1)]) for i in range(BATCH)])
    torch.testing.assert_close(net(x, t, cond), alone, rtol=1e-10, atol=1e-12)


@on_every_network
def test_guidance_works_through_the_denoiser(name):
    denoiser = Denoiser(perturbed(name), EDM(), "edm")
    x, _, cond = inputs(denoiser.net)
    t = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    without, given = denoiser(x, t, denoiser.unconditional(cond)), denoiser(x, t, cond)
    expected = without + 2 * (given - without)
    # One batch of 2B may be summed in another order than two of B.
    torch.testing.assert_close(denoiser(x, t, cond, guidance=2), expected, rtol=1e-9, atol=1e-11)


@on_every_network
def test_images_need_not_be_square(name):
    net = TINY[name].build((2, 8, 12), CLASSES, 0.0)
    output, features = net.forward_with_features(torch.zeros(1, 2, 8, 12), torch.zeros(1), NO_COND)
    assert output.shape == (1, 2, 8, 12)
    assert features.shape == (1, 16, 4, 6)


def test_dit_s_learned_variance_is_left_out():
    net = DiTConfig(width=16, depth=1, heads=2, learn_sigma=True).build(SHAPE, 0, 0.0)
    assert net.output.out_features == 2 * 4 * SHAPE[0]
    nn.init.ones_(net.output.bias)
    assert net(torch.zeros(1, *SHAPE), torch.zeros(1), NO_COND).shape == (1, *SHAPE)


def test_dit_s_patches_come_out_where_they_went_in():
    net = DiTConfig(width=16, depth=1, heads=1).build(SHAPE, 0, 0.0)
    image = random(1, *SHAPE)
    tiles = image.reshape(1, 2, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(1, 16, 8)
    assert torch.equal(net._unpatch(tiles), image)


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (DDPMPP(multipliers=(1, 1, 1)), (3, 18, 16), "multiples of 4"),
        (DDPMPP(), (3, 28, 28), r"attention_resolutions: 16 is none of this network's: \[28, 14, 7\]"),
        (ADM(channels=16), (3, 64, 64), "head_channels = 64: must divide the 32 channels"),
        (DiTConfig(patch=4), (4, 30, 32), "network.patch = 4: must divide"),
    ],
)
def test_what_does_not_fit_is_refused(config, shape, message):
    with torch.device("meta"), pytest.raises(UserError, match=message):
        config.build(shape, 0, 0.0)


# Augmentation


def draws(count: int, first: int = 0) -> StepRandom:
    return StepRandom(7, 3, torch.arange(first, first + count))


def test_without_probability_augmentation_is_the_identity_bit_for_bit():
    images = random(64, 3, 8, 8).float()
    moved, labels = augment(images, draw_motion(draws(64), 0.0))
    assert torch.equal(moved, images)
    assert torch.equal(labels, torch.zeros(64, NUM_LABELS))


@pytest.mark.parametrize(("place", "dimension"), [(0, 3), (1, 2)], ids=["horizontal", "vertical"])
def test_a_flip_is_exact_and_labelled(place, dimension):
    images, motion = random(4, 3, 8, 8).float(), torch.zeros(4, 8, dtype=torch.float64)
    motion[2:, place] = 1
    moved, labels = augment(images, motion)
    assert torch.equal(moved, torch.cat([images[:2], images[2:].flip(dimension)]))
    expected = torch.zeros(4, NUM_LABELS)
    expected[2:, place] = 1
    assert torch.equal(labels, expected)


def test_augmentation_depends_on_the_sample_alone():
    images = random(12, 3, 8, 8).float()
    whole, labels = augment(images, draw_motion(draws(12), 0.5))
    parts = [augment(images[i : i + 4], draw_motion(draws(4, first=i), 0.5)) for i in (0, 4, 8)]
    assert torch.equal(whole, torch.cat([moved for moved, _ in parts]))
    assert torch.equal(labels, torch.cat([label for _, label in parts]))


def test_transforms_come_as_often_as_they_should():
    count, probability = 20_000, 0.12
    found = (draw_motion(draws(count), probability) != 0).double().mean(0)
    p = probability
    expected = torch.tensor([0.5, p / 2, p, p, p / 2, p, p, p], dtype=torch.float64)
    error = (expected * (1 - expected) / count).sqrt()
    assert bool(((found - expected).abs() < 4 * error).all())


def test_sizes_of_the_transforms_are_standard_and_angles_even():
    motion = draw_motion(draws(20_000), 1.0)
    sizes = motion[:, [2, 5, 6, 7]]
    assert sizes.mean(0).abs().max() < 5 / math.sqrt(20_000)
    assert (sizes.std(0) - 1).abs().max() < 5 / math.sqrt(40_000)
    assert motion[:, 3].abs().max() < math.pi
    assert motion[:, 3].std().item() == pytest.approx(math.pi / math.sqrt(3), rel=0.02)  # three standard errors


def moved_by(images: Tensor, **values: float) -> tuple[Tensor, Tensor]:
    names = ("x_flip", "y_flip", "scale", "angle", "stretch_angle", "stretch", "x", "y")
    row = torch.tensor([values.get(name, 0.0) for name in names], dtype=torch.float64)
    return augment(images, row.expand(len(images), 8))


def test_a_quarter_turn_is_against_the_clock():
    images = random(2, 3, 8, 8)
    moved, labels = moved_by(images, angle=math.pi / 2)
    torch.testing.assert_close(moved, images.rot90(1, (2, 3)), rtol=0, atol=1e-12)  # the grid falls on pixels
    expected = torch.tensor([0, 0, 0, -1, 1, 0, 0, 0, 0], dtype=torch.float64).expand(2, 9)
    torch.testing.assert_close(labels, expected, rtol=0, atol=1e-12)


def test_a_translation_is_in_eighths_of_a_side():
    images = random(2, 3, 8, 16)
    moved, labels = moved_by(images, x=1.0, y=-1.0)
    torch.testing.assert_close(moved[:, :, :7, 2:], images[:, :, 1:, :14], rtol=0, atol=1e-12)
    assert labels[0].tolist() == [0, 0, 0, 0, 0, 0, 0, 1, -1]


@pytest.mark.parametrize(
    ("values", "column", "row"),
    [
        ({"scale": 5.0}, 2, 2),
        ({"stretch": 5.0}, 2, 0.5),
        ({"stretch": 5.0, "stretch_angle": math.pi / 2}, 0.5, 2),
    ],
    ids=["scale", "along", "across"],
)
def test_scale_and_stretch_are_powers_of_two_by_a_fifth(values, column, row):
    side = torch.linspace(-1, 1, 33, dtype=torch.float64)
    plane = torch.stack(torch.meshgrid(side, side, indexing="xy"))[None]  # channels: x and y themselves
    moved, _ = moved_by(plane, **values)
    inside = (slice(13, 20), slice(13, 20))  # far from the sides
    torch.testing.assert_close(moved[0, 0][inside], plane[0, 0][inside] / column, rtol=0, atol=1e-12)
    torch.testing.assert_close(moved[0, 1][inside], plane[0, 1][inside] / row, rtol=0, atol=1e-12)


def test_a_turn_keeps_a_disc_round_in_an_oblong_image():
    y, x = torch.meshgrid(torch.arange(24.0) - 11.5, torch.arange(48.0) - 23.5, indexing="ij")
    disc = torch.exp(-(x**2 + y**2) / 18).double()[None, None]
    moved, _ = moved_by(disc, angle=0.7)
    middle = (..., slice(6, 18), slice(18, 30))  # its mirror images come into the corners
    torch.testing.assert_close(moved[middle], disc[middle], rtol=0, atol=2e-2)  # bicubic, a bump three pixels wide


def test_autocast_leaves_the_motion_alone():
    images, motion = random(4, 3, 32, 32).float(), draw_motion(draws(4), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        found, labels = augment(images, motion)
    expected, expected_labels = augment(images, motion)
    assert torch.equal(labels, expected_labels)
    assert torch.equal(found, expected)


NETWORK = "model.network={name: ddpmpp, channels: 8, multipliers: [1, 2], blocks: 1, attention_resolutions: [4], "


def test_pretraining_with_augmentation_does_not_depend_on_the_micro_batch(make_config: MakeConfig):
    settings = (f"{NETWORK} augment_dim: 9, dropout: 0}}", "method.augment=0.5", "train.steps=2", "ema=null")
    found = []
    for size in (8, 4):
        trainer = Trainer(make_config("pretrain", *settings, f"train.micro_batch_size={size}"), quiet=True)
        start = trainer.trained["teacher"].net.embed.augmentation.weight.clone()
        for _ in range(2):
            trainer.train_step()
        found.append(trainer.trained["teacher"].net.embed.augmentation.weight.detach())
        assert not torch.equal(found[-1], start)
    # Adam divides by the gradient's size, so that rounding in the gradient counts: two steps of 2e-3.
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("network", ["model.network={name: mlp}", NETWORK + "augment_dim: 0}"])
def test_augmenting_for_a_network_that_is_not_told_is_refused(make_config: MakeConfig, network):
    with pytest.raises(UserError, match=r"method.augment = 0.12: this network takes no augmentation labels"):
        Trainer(make_config("pretrain", network, "method.augment=0.12"), quiet=True)
