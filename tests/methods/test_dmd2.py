"""DMD2: properties of its field, which loss reaches whom, who is asked how often, and the regression's pairs."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from support.closed_forms import one_gaussian, random
from support.tiny_players import (
    BATCH,
    CLASSES,
    EVERYTHING,
    MULTI_STEP,
    PATH,
    SHAPE,
    due,
    learned,
    scene,
    small_teacher,
    watch,
)
from torch import Tensor, nn

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import VPCosine
from diffdistill.diffusion.sampling import FewSteps, Heun
from diffdistill.distillation.losses import denoising_loss, gan_discriminator_loss, gan_generator_loss
from diffdistill.distillation.method import Players, Problem
from diffdistill.methods.dmd2 import DMD2
from diffdistill.networks.analytic import mixture_denoiser
from diffdistill.settings.schema import UserError

# Properties of the field


def field_of(method: DMD2, teacher: Denoiser, fake: Denoiser, *, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    draw = {"eps": eps, "t": t, "label": torch.zeros(len(x), dtype=torch.int64)}
    return method.field(Players(teacher=teacher, fake=fake), draw, x)


@pytest.mark.parametrize("network", ["gaussian", "mlp"])
def test_a_fake_that_is_the_unguided_teacher_pushes_nothing(network):
    teacher = one_gaussian(0.7, 0.5) if network == "gaussian" else small_teacher()
    shape = (1,) if network == "gaussian" else SHAPE
    x, eps, t = random(5, *shape), random(5, *shape, seed=1), torch.linspace(0.1, 5, 5, dtype=torch.float64)
    assert not field_of(DMD2(), teacher, deepcopy(teacher), x=x, eps=eps, t=t).any()


def test_scaling_images_and_denoisers_together_leaves_the_field_unchanged():
    x, eps, t = random(5, 1), random(5, 1, seed=1), torch.linspace(0.3, 3, 5, dtype=torch.float64)
    plain = field_of(DMD2(), one_gaussian(0.7, 0.5), one_gaussian(-0.4, 0.9), x=x, eps=eps, t=t)
    k = 7.0
    scaled = field_of(
        DMD2(), one_gaussian(0.7 * k, 0.5 * k), one_gaussian(-0.4 * k, 0.9 * k), x=k * x, eps=eps, t=k * t
    )
    torch.testing.assert_close(scaled, plain, rtol=1e-10, atol=0)


def test_alpha_power_one_multiplies_the_field_by_alpha():
    path = VPCosine()
    teacher, fake = one_gaussian(0.7, 0.5, path), one_gaussian(-0.4, 0.9, path)
    x, eps, t = random(5, 1), random(5, 1, seed=1), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    plain, paper = (field_of(DMD2(alpha_power=power), teacher, fake, x=x, eps=eps, t=t) for power in (0, 1))
    torch.testing.assert_close(paper, path.alpha(t)[:, None] * plain, rtol=1e-12, atol=0)


class Constant(nn.Module):
    """A network that says the same of every input."""

    accepts = frozenset[str]()
    num_classes = 0
    has_null_condition = False
    resolution_multiple = 1

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        return self.value


def test_an_image_that_the_teacher_leaves_alone_has_a_finite_field():
    x, t = random(3, 4), torch.ones(3, dtype=torch.float64)
    teacher, fake = (Denoiser(Constant(value), PATH, "x0") for value in (x, x + 0.5))
    field = field_of(DMD2(normaliser_minimum=1e-2), teacher, fake, x=x, eps=random(3, 4, seed=1), t=t)
    torch.testing.assert_close(field, torch.full_like(x, 50), rtol=1e-12, atol=0)


@pytest.mark.parametrize("who", ["teacher", "fake"])
@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_a_broken_estimate_of_one_sample_pushes_nothing_and_leaves_the_others_alone(who, fault):
    x, t = random(3, 4), torch.ones(3, dtype=torch.float64)
    estimates = {"teacher": random(3, 4, seed=1), "fake": random(3, 4, seed=2)}

    def pushed() -> Tensor:
        players = {name: Denoiser(Constant(value), PATH, "x0") for name, value in estimates.items()}
        return field_of(DMD2(), **players, x=x, eps=random(3, 4, seed=3), t=t)

    expected = pushed()
    expected[1] = 0
    estimates[who][1, 2] = fault
    assert torch.equal(pushed(), expected)


# Whom a loss reaches


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_the_generator_s_loss_reaches_the_generator_alone(features):
    players, draw, batch = scene(replace(EVERYTHING, gan_features=features))
    due(players, "generator")
    EVERYTHING.generator_loss(players, draw, batch).total.backward()
    assert learned(players) == {"generator"}
    assert all(p.grad is None for name in players if name != "generator" for p in players[name].parameters())


@pytest.mark.parametrize("carried", [True, False], ids=["with the generator's sample", "with a sample of its own"])
def test_the_fake_score_s_loss_reaches_the_fake_score_and_the_discriminator_alone(carried):
    players, draw, batch = scene(EVERYTHING)
    carry = EVERYTHING.generator_loss(players, draw, batch).carry if carried else {}
    due(players, "generator", "fake", "discriminator")  # nothing but the losses themselves holds gradients back
    EVERYTHING.fake_loss(players, draw | carry, batch).total.backward()
    assert learned(players) == {"fake", "discriminator"}
    assert all(p.grad is None for p in players.generator.parameters())


def test_without_a_gan_the_generator_s_loss_reaches_the_generator_alone_even_if_all_may_learn():
    method = DMD2(gan_weight=0.0)
    players, draw, batch = scene(method)
    due(players, *players)
    method.generator_loss(players, draw, batch).total.backward()
    assert learned(players) == {"generator"}


def test_with_features_of_the_teacher_the_fake_score_s_loss_trains_it_by_denoising_alone():
    method = replace(EVERYTHING, gan_features="teacher")
    players, draw, batch = scene(method)
    due(players, "fake", "discriminator")
    method.fake_loss(players, draw, batch).total.backward()
    found = [p.grad.clone() for p in players.fake.parameters()]
    players.fake.zero_grad()
    replace(method, gan_weight=0.0).fake_loss(players, draw, batch).total.backward()
    for gradient, parameter in zip(found, players.fake.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_gan_features_are_those_of_the_named_network(features):
    method = replace(EVERYTHING, gan_features=features, regression_weight=0.0)
    players, draw, batch = scene(method)
    taps = dict.fromkeys(("fake", "teacher"), 0)
    for name in taps:
        original = players[name].net.features

        def counted(*arguments, name=name, original=original):
            taps[name] += 1
            return original(*arguments)

        players[name].net.features = counted
    method.generator_loss(players, draw, batch)
    assert taps == {"fake": 0, "teacher": 0} | {features: 1}
    method.fake_loss(players, draw, batch)
    assert taps == {"fake": 0, "teacher": 0} | {features: 2}  # real and generated images in one pass


def test_without_a_gan_the_fake_score_s_loss_is_the_denoising_loss_of_the_samples():
    method = DMD2(gan_weight=0.0)
    players, draw, batch = scene(method)
    t = method.steps.times(PATH).expand(BATCH)
    cond = Cond(label=draw["label"])
    x = players.generator(draw["z"] * t[0], t, cond)
    expected = denoising_loss(players.fake, x, draw["fake eps"], draw["fake t"], cond, weight="edm")
    assert torch.equal(method.fake_loss(players, draw, batch).total, expected)


def test_the_losses_are_the_sum_of_their_weighted_parts():
    players, draw, batch = scene(EVERYTHING)
    generator = EVERYTHING.generator_loss(players, draw, batch)
    fake = EVERYTHING.fake_loss(players, draw, batch)
    method = replace(EVERYTHING, gan_weight=0.7, gan_fake_weight=0.3, regression_weight=2.0)
    parts = generator.logs["matching"] + 0.7 * generator.logs["gan"] + 2 * generator.logs["regression"]
    found = method.generator_loss(players, draw, batch).total
    torch.testing.assert_close(found.detach(), parts, rtol=1e-12, atol=0)
    parts = fake.logs["denoising"] + 0.3 * fake.logs["gan"]
    torch.testing.assert_close(method.fake_loss(players, draw, batch).total.detach(), parts, rtol=1e-12, atol=0)


def test_the_gan_sees_noised_samples_with_their_classes_and_noised_images_with_theirs():
    method = replace(EVERYTHING, regression_weight=0.0)
    players, draw, batch = scene(method)
    x = method.generator_loss(players, draw, batch).carry["x"]

    def logits(images: Tensor, call: str, cond: Cond) -> Tensor:
        noised = PATH.diffuse(images, draw[f"{call} eps"], draw[f"{call} t"])
        return players.discriminator(players.fake.features(noised, draw[f"{call} t"], cond))

    made = Cond(label=draw["label"])
    expected = gan_generator_loss(logits(x, "gan", made))
    torch.testing.assert_close(method.generator_loss(players, draw, batch).logs["gan"], expected.detach())
    expected = gan_discriminator_loss(logits(batch.images, "gan real", batch.cond), logits(x, "gan fake", made))
    torch.testing.assert_close(method.fake_loss(players, draw, batch).logs["gan"], expected.detach())


def test_a_part_of_weight_zero_has_no_network_and_draws_nothing():
    method = DMD2(gan_weight=0.0)
    players, draw, _ = scene(method)
    assert "discriminator" not in players
    assert not method.needs_images
    assert not [name for name in draw if "gan" in name or "pair" in name]


# Who steps, and who is asked


def test_there_are_exactly_so_many_fake_updates_to_one_generator_update():
    updates = DMD2(fake_updates=5).updates
    steps = {update.loss: sum(i % update.every == 0 for i in range(60)) for update in updates}
    assert steps == {"generator_loss": 12, "fake_loss": 60}
    assert [update.loss for update in updates] == ["generator_loss", "fake_loss"]  # on a shared iteration


@pytest.mark.parametrize(
    ("gan_weight", "critics"), [(0.0, ("fake",)), (1e-3, ("fake", "discriminator"))], ids=["no gan", "gan"]
)
def test_the_discriminator_steps_with_the_fake_score(gan_weight, critics):
    generator, fake = DMD2(gan_weight=gan_weight).updates
    assert generator.players == ("generator",)
    assert fake.players == critics


def test_a_step_of_both_updates_makes_the_generator_s_sample_once():
    method = replace(EVERYTHING, regression_weight=0.0)
    players, draw, batch = scene(method)
    calls = watch(players)
    carry = method.generator_loss(players, draw, batch).carry
    method.fake_loss(players, draw | carry, batch)
    assert [name for name, _ in calls].count("generator") == 1


def test_the_carried_sample_is_what_the_fake_score_s_loss_would_have_made_itself():
    players, draw, batch = scene(EVERYTHING)
    carry = EVERYTHING.generator_loss(players, draw, batch).carry
    assert not carry["x"].requires_grad
    with_carry, without = (EVERYTHING.fake_loss(players, d, batch).total for d in (draw | carry, draw))
    assert torch.equal(with_carry, without)


@pytest.mark.parametrize("steps", [FewSteps(), MULTI_STEP], ids=["one step", "three steps"])
@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_no_network_is_called_twice_on_the_same_input(steps, features):
    method = replace(EVERYTHING, steps=steps, gan_features=features)
    players, draw, batch = scene(method)
    draw["step"] = torch.tensor(steps.num_evaluations - 1)
    calls = watch(players)
    carry = method.generator_loss(players, draw, batch).carry
    method.fake_loss(players, draw | carry, batch)
    assert len(calls) >= 9
    assert len(set(calls)) == len(calls)


def test_the_guided_teacher_is_called_once_with_both_conditions():
    method = DMD2(gan_weight=0.0, guidance=2.0)
    players, draw, batch = scene(method)
    sizes: list[int] = []
    players.teacher.net.register_forward_hook(lambda _, arguments, __: sizes.append(len(arguments[0])))
    method.generator_loss(players, draw, batch)
    assert sizes == [2 * BATCH]


def test_guidance_is_refused_with_a_teacher_that_always_saw_its_class():
    teacher = small_teacher()
    teacher.net.has_null_condition = False
    with pytest.raises(UserError, match=r"method.guidance: 2.0 needs a model trained with class_dropout > 0"):
        DMD2(guidance=2.0, gan_weight=0.0).players(Problem(SHAPE, CLASSES, PATH, teacher=teacher))


def test_a_gan_is_refused_with_a_teacher_that_has_no_features():
    with pytest.raises(UserError, match="gan: an analytic denoiser has no features"):
        DMD2().players(Problem((1,), 0, PATH, teacher=one_gaussian(0.7, 0.5)))


def test_generator_and_fake_score_start_as_the_teacher_and_own_their_weights():
    teacher = small_teacher()
    made = DMD2(gan_weight=0.0).players(Problem(SHAPE, CLASSES, PATH, teacher=teacher))
    for module in made.values():
        for parameter, source in zip(module.parameters(), teacher.parameters(), strict=True):
            assert torch.equal(parameter, source)
            assert parameter.data_ptr() != source.data_ptr()
            assert parameter.requires_grad
            assert not source.requires_grad


# Regression


def test_the_regression_s_pairs_are_the_teacher_s_samples_of_their_noise():
    method = DMD2(gan_weight=0.0, guidance=2.0, regression_weight=0.25, regression_pairs=300)
    classes = torch.arange(CLASSES)
    teacher = mixture_denoiser(PATH, torch.ones(CLASSES), random(CLASSES, 16), 0.1 + classes.double(), classes)
    stored = method.prepare(Problem(SHAPE, CLASSES, PATH, teacher=teacher), seed=3)
    assert {name: len(value) for name, value in stored.items()} == {"noise": 300, "image": 300, "label": 300}
    with torch.no_grad():
        expected = Heun()(teacher, stored["noise"], Cond(label=stored["label"]), guidance=2.0)
    # float64, but other batch sizes sum in another order, 35 evaluations long.
    torch.testing.assert_close(stored["image"], expected, rtol=1e-10, atol=1e-10)


def test_the_regression_is_zero_for_a_generator_that_makes_the_teacher_s_samples():
    class Sampling(Denoiser):
        def forward(self, x: Tensor, t: Tensor, cond: Cond = NO_COND, **_):
            return Heun()(small_teacher(), x / t[0], cond, guidance=2.0)

    players, draw, batch = scene(EVERYTHING)
    perfect = Players(**{**players, "generator": Sampling(players.generator.net, PATH, "edm")})
    logs = EVERYTHING.generator_loss(perfect, draw, batch).logs
    assert logs["regression"].item() < 1e-8  # the pairs were made in float32
    assert EVERYTHING.generator_loss(players, draw, batch).logs["regression"].item() > 1e-4


def test_without_regression_nothing_is_prepared():
    assert DMD2().prepare(Problem(SHAPE, CLASSES, PATH, teacher=small_teacher()), seed=0) == {}
