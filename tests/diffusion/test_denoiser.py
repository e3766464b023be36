"""Denoisers: preconditioning, guidance, feature taps, and the analytic ones against autograd."""

import math

import pytest
import torch
from diffusers import UNet2DModel
from support.closed_forms import on_every_path, random
from torch import Tensor, nn

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser, freeze
from diffdistill.diffusion.path import EDM, Path, VPCosine
from diffdistill.networks.analytic import Mixture, gaussian_denoiser, gaussian_flow, mixture_denoiser
from diffdistill.networks.diffusers_unet import DiffusersUNet
from diffdistill.networks.mlp import MLPConfig
from diffdistill.networks.unet import UNetConfig
from diffdistill.settings.schema import UserError

SHAPE = (1, 8, 8)
CLASSES = 3
BATCH = 4


def make_network(name: str, *, class_dropout: float = 0.1, num_classes: int = CLASSES) -> nn.Module:
    """A small network in float64 whose weights are all random, so that every input matters."""
    if name == "diffusers_unet":
        model = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=num_classes + 1 if num_classes else None,
        )
        net: nn.Module = DiffusersUNet(model, num_classes, has_null_condition=class_dropout > 0)
    elif name == "unet":
        net = UNetConfig(channels=(8, 16)).build(SHAPE, num_classes, class_dropout)
    else:
        net = MLPConfig(width=16, blocks=3).build(SHAPE, num_classes, class_dropout)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.double().parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return net


def make_denoiser(name: str = "unet", *, class_dropout: float = 0.1, num_classes: int = CLASSES) -> Denoiser:
    net = make_network(name, class_dropout=class_dropout, num_classes=num_classes)
    return freeze(Denoiser(net, EDM(), "edm"))


def inputs() -> tuple[Tensor, Tensor, Cond]:
    t = torch.tensor([0.1, 0.5, 2.0, 20.0], dtype=torch.float64)
    return random(BATCH, *SHAPE), t, Cond(label=torch.tensor([0, 1, 2, 1]))


def batches_seen(module: nn.Module) -> list[int]:
    """The batch size of every later call of `module`."""
    seen: list[int] = []
    module.register_forward_hook(lambda _, arguments, __: seen.append(len(arguments[0])))
    return seen


on_every_network = pytest.mark.parametrize("name", ["unet", "mlp", "diffusers_unet"])


class Recorder(nn.Module):
    """A network that halves its input and remembers what it was given."""

    accepts = frozenset[str]()
    num_classes = 0
    has_null_condition = False
    resolution_multiple = 1

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        self.x, self.time_input = x, time_input
        return x / 2


def test_edm_preconditioning_follows_its_formula():
    net, x, sigma, data = Recorder(), random(BATCH, *SHAPE), inputs()[1], 0.7
    found = Denoiser(net, EDM(), "edm", sigma_data=data)(x, sigma)
    s = sigma.reshape(-1, 1, 1, 1)
    skip, out = data**2 / (s**2 + data**2), s * data / (s**2 + data**2).sqrt()
    scaled = x / (s**2 + data**2).sqrt()
    # float64 and about ten operations.
    torch.testing.assert_close(net.x, scaled, rtol=1e-13, atol=0)
    torch.testing.assert_close(net.time_input, sigma.log() / 4, rtol=1e-13, atol=0)
    torch.testing.assert_close(found, skip * x + out * scaled / 2, rtol=1e-12, atol=1e-14)


@on_every_path
def test_other_predictions_see_the_unscaled_input_and_the_path_s_time_input(path):
    net, x = Recorder(), random(2, 3)
    t = path.time_of_ratio(torch.tensor([0.5, 2.0], dtype=torch.float64))
    found = Denoiser(net, path, "eps")(x, t)
    torch.testing.assert_close(net.x, x, rtol=0, atol=0)
    torch.testing.assert_close(net.time_input, path.time_input(t), rtol=0, atol=0)
    torch.testing.assert_close(found, (x - path.sigma(t)[:, None] * x / 2) / path.alpha(t)[:, None])


def test_a_prediction_that_does_not_fit_the_path_is_refused():
    with pytest.raises(UserError, match="'flow' does not fit the path; choose from edm, x0, eps"):
        Denoiser(Recorder(), EDM(), "flow")


@on_every_network
@pytest.mark.parametrize("scale", [0, 1, 1.5, -1])
def test_guidance_is_the_line_through_both_estimates(name, scale):
    denoiser, (x, t, cond) = make_denoiser(name), inputs()
    null = denoiser.unconditional(cond)
    without, given = denoiser(x, t, null), denoiser(x, t, cond)
    assert (without - given).abs().max() > 1e-3  # or the test would show nothing
    # One batch of 2B may be summed in another order than two of B.
    expected = without + scale * (given - without)
    torch.testing.assert_close(denoiser(x, t, cond, guidance=scale), expected, rtol=1e-10, atol=1e-12)


def test_guidance_may_differ_from_sample_to_sample():
    denoiser, (x, t, cond) = make_denoiser(), inputs()
    scales = [0.0, 1.0, 1.5, -1.0]
    expected = torch.cat([denoiser(x, t, cond, guidance=w)[i : i + 1] for i, w in enumerate(scales)])
    found = denoiser(x, t, cond, guidance=torch.tensor(scales))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@on_every_network
@pytest.mark.parametrize(
    ("scale", "batches"), [(0, [BATCH]), (1, [BATCH]), (1.0, [BATCH]), (1.5, [2 * BATCH]), (-1, [2 * BATCH])]
)
def test_guidance_calls_the_network_once(name, scale, batches):
    denoiser, (x, t, cond) = make_denoiser(name), inputs()
    seen = batches_seen(denoiser.net)
    denoiser(x, t, cond, guidance=scale)
    assert seen == batches


def test_guidance_takes_another_condition_in_the_place_of_no_class():
    denoiser, (x, t, cond) = make_denoiser(), inputs()
    other = Cond(label=torch.tensor([2, 2, 0, 0]))
    expected = 3 * denoiser(x, t, cond) - 2 * denoiser(x, t, other)
    torch.testing.assert_close(denoiser(x, t, cond, guidance=3, uncond=other), expected, rtol=1e-10, atol=1e-12)


@on_every_network
def test_a_network_trained_without_class_dropout_refuses_guidance(name):
    denoiser, (x, t, cond) = make_denoiser(name, class_dropout=0), inputs()
    with pytest.raises(ValueError, match="trained without dropping its condition"):
        denoiser(x, t, cond, guidance=2)


def test_a_network_without_classes_refuses_guidance():
    denoiser, (x, t, _) = make_denoiser(num_classes=0), inputs()
    with pytest.raises(ValueError, match="trained without dropping its condition"):
        denoiser(x, t, guidance=2)


@on_every_network
def test_a_condition_that_the_network_does_not_take_is_refused(name):
    denoiser, (x, t, cond) = make_denoiser(name), inputs()
    with pytest.raises(ValueError, match=r"takes \['label'\], not \['text'\]"):
        denoiser(x, t, Cond(label=cond.label, text=torch.zeros(BATCH, 2, 3)))


def test_a_label_is_refused_by_a_network_without_classes():
    denoiser, (x, t, cond) = make_denoiser(num_classes=0), inputs()
    with pytest.raises(ValueError, match=r"takes \[\], not \['label'\]"):
        denoiser(x, t, cond)


def test_conditions_with_different_parts_cannot_be_joined():
    with pytest.raises(ValueError, match=r"cannot join conditions with \['label'\] and \[\]"):
        Cond.cat(inputs()[2], NO_COND)


@on_every_network
def test_features_and_image_from_one_pass_equal_those_of_two(name):
    denoiser, (x, t, cond) = make_denoiser(name), inputs()
    image, features = denoiser.with_features(x, t, cond)
    assert torch.equal(image, denoiser(x, t, cond))
    assert torch.equal(features, denoiser.features(x, t, cond))


@on_every_network
def test_features_alone_do_not_run_the_decoder(name):
    denoiser, (x, t, cond) = make_denoiser(name), inputs()
    late = {
        "unet": lambda net: [*net.decoder, net.output],
        "mlp": lambda net: [net.blocks[-1], net.output],
        "diffusers_unet": lambda net: [*net.model.up_blocks, net.model.conv_out],
    }[name](denoiser.net)
    counts = [batches_seen(module) for module in late]
    denoiser.features(x, t, cond)
    assert not any(counts)
    denoiser.with_features(x, t, cond)
    assert all(len(count) == 1 for count in counts)


@on_every_network
def test_features_leave_no_hook_behind(name):
    denoiser, (x, t, cond) = make_denoiser(name), inputs()
    denoiser.features(x, t, cond)
    denoiser.with_features(x, t, cond)
    assert not any(module._forward_hooks for module in denoiser.modules())


@on_every_network
def test_features_have_a_gradient_by_the_image(name):
    denoiser, (x, t, cond) = make_denoiser(name), inputs()
    x.requires_grad_()
    denoiser.features(x, t, cond).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().min() > 0


def test_features_of_two_conditions_at_once_are_refused():
    denoiser, (x, t, cond) = make_denoiser(), inputs()
    with pytest.raises(ValueError, match="use guidance 0 or 1"):
        denoiser.features(x, t, cond, guidance=2)


@on_every_network
def test_samples_do_not_see_one_another(name):
    denoiser, (x, t, cond) = make_denoiser(name), inputs()
    alone = torch.cat([denoiser(x[i : i + 1], t[i : i + 1], cond[i : i + 1]) for i in range(BATCH)])
    torch.testing.assert_close(denoiser(x, t, cond), alone, rtol=1e-10, atol=1e-12)


@on_every_network
@pytest.mark.parametrize("predicts", ["edm", "x0", "eps"])
def test_the_estimate_is_float32_under_bfloat16_autocast(name, predicts):
    denoiser, (x, t, cond) = freeze(Denoiser(make_network(name), EDM(), predicts)).float(), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = denoiser(x.float(), t, cond)
    assert found.dtype == torch.float32
    plain = denoiser(x.float(), t, cond)
    assert not torch.equal(found, plain)  # autocast did run
    torch.testing.assert_close(found, plain, rtol=0.05, atol=0.05 * plain.abs().max().item())  # 8 bits, ten layers


@pytest.mark.parametrize(
    ("channels", "message"),
    [((18, 32), "18 must be a multiple of 4"), ((32, 52), "52 must be a multiple of 4 and of its 3 attention heads")],
)
def test_a_unet_refuses_channels_that_it_cannot_share_out(channels, message):
    with pytest.raises(ValueError, match=f"channels: {message}"):
        UNetConfig(channels=channels)


@pytest.mark.parametrize("channels", [(4, 8), (12, 36), (68, 20)])
def test_a_unet_runs_with_any_channels_that_it_does_not_refuse(channels):
    net = UNetConfig(channels=channels).build(SHAPE, 0, 0.0).double()
    x, t, _ = inputs()
    assert net(x, t, NO_COND).shape == x.shape


def test_freeze_stops_parameter_gradients_and_lets_input_gradients_through():
    denoiser, (x, t, cond) = make_denoiser("mlp"), inputs()
    denoiser(x.requires_grad_(), t, cond).sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in denoiser.parameters())


# Analytic denoisers


def two_classes(path: Path) -> Denoiser:
    """Two classes of two correlated components each, in the plane."""
    roots = random(4, 2, 2)
    covariances = 0.1 * roots @ roots.transpose(1, 2) + 0.05 * torch.eye(2, dtype=torch.float64)
    weights = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    return mixture_denoiser(path, weights, random(4, 2, seed=1), covariances, torch.tensor([0, 0, 1, 1]))


def plane_points(path: Path, seed: int = 2) -> tuple[Tensor, Tensor]:
    t = path.time_of_ratio(torch.tensor([0.2, 0.7, 1.5, 4, 0.2, 0.7, 1.5, 4], dtype=torch.float64))
    return random(8, 2, seed=seed), t


@on_every_path
@pytest.mark.parametrize("label", [None, 0, 1, 2], ids=["no label", "first class", "second class", "no class"])
def test_the_score_of_a_mixture_is_the_gradient_of_its_log_density(path, label):
    denoiser, (x, t) = two_classes(path), plane_points(path)
    cond = NO_COND if label is None else Cond(label=torch.full((8,), label))
    x.requires_grad_()
    (expected,) = torch.autograd.grad(denoiser.net.log_prob(x, t, cond).sum(), x)
    score = denoiser.convert(denoiser(x, t, cond), "score", x, t).detach()
    torch.testing.assert_close(score, expected, rtol=1e-8, atol=1e-9)  # at ratio 0.2 the score cancels two terms


def test_the_density_of_a_mixture_sums_to_one():
    denoiser, side = two_classes(VPCosine()), torch.linspace(-8, 8, 401, dtype=torch.float64)
    x = torch.cartesian_prod(side, side)
    t = torch.full((len(x),), 0.4, dtype=torch.float64)
    density = denoiser.net.log_prob(x, t, Cond(label=torch.ones(len(x), dtype=torch.int64))).exp()
    # The trapezoid rule on a smooth, decaying function is exact to round-off.
    assert density.sum().item() * (16 / 400) ** 2 == pytest.approx(1, rel=1e-10)


def test_no_class_is_the_whole_mixture():
    denoiser, (x, t) = two_classes(EDM()), plane_points(EDM())
    null = Cond(label=torch.full((8,), denoiser.net.num_classes))
    torch.testing.assert_close(denoiser(x, t, null), denoiser(x, t), rtol=1e-12, atol=1e-12)


def test_samples_of_a_mixture_have_its_class_means():
    count = 20_000
    denoiser = two_classes(EDM())
    law = denoiser.net
    assert isinstance(law, Mixture)
    uniform = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = law.sample(uniform, random(count, 2, seed=4), Cond(label=torch.ones(count, dtype=torch.int64)))
    expected = (3 * law.means[2] + 4 * law.means[3]) / 7
    # Five standard errors.
    assert bool(((x.mean(0) - expected).abs() < 5 * x.std(0) / math.sqrt(count)).all())


@on_every_path
@pytest.mark.parametrize("scale", [0, 1, 1.5, -1, 7.5])
def test_guiding_between_two_gaussians_of_one_covariance_gives_the_gaussian_on_their_line(path, scale):
    root, means = random(3, 3), random(2, 3, seed=1)
    covariance = root @ root.T
    pair = mixture_denoiser(path, torch.ones(2), means, covariance.expand(2, 3, 3), torch.tensor([0, 1]))
    mean = means[0] + scale * (means[1] - means[0])
    _, t = plane_points(path)
    x, first, second = random(8, 3, seed=2), *(Cond(label=torch.full((8,), label)) for label in (0, 1))
    found = pair(x, t, second, guidance=scale, uncond=first)
    torch.testing.assert_close(found, gaussian_denoiser(path, mean, covariance)(x, t), rtol=1e-9, atol=1e-10)


@on_every_path
def test_a_gaussian_s_flow_ends_where_it_started_after_going_there_and_back(path):
    root, mean = random(3, 3), random(3, seed=1)
    x, (_, t) = random(8, 3, seed=2), plane_points(path)
    s = path.time_of_ratio(torch.full((8,), 0.4, dtype=torch.float64))
    there = gaussian_flow(path, mean, root @ root.T, x, t, s)
    torch.testing.assert_close(gaussian_flow(path, mean, root @ root.T, there, s, t), x, rtol=1e-9, atol=1e-10)


def test_an_analytic_denoiser_says_that_it_has_no_features():
    denoiser, (x, t) = two_classes(EDM()), plane_points(EDM())
    with pytest.raises(ValueError, match="no features"):
        denoiser.features(x, t)
