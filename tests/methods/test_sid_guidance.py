"""SiD's guidance: the four scales of long-short guidance, Zero-CFG and Anti-CFG, and the classes that are left out."""

import pytest
import torch
from support.closed_forms import Affine, LearnedGaussian, averaged_by, normal_nodes, numbers, pairs, random
from support.tiny_players import BATCH, CLASSES, PATH, SHAPE, scene, small_teacher
from torch import Tensor

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.distillation.losses import denoising_loss
from diffdistill.distillation.method import Batch, Players, Problem
from diffdistill.methods.sid import SiD
from diffdistill.networks.analytic import Mixture, mixture_denoiser
from diffdistill.settings.schema import UserError

UNIT = FewSteps(init_noise="unit")
GUIDED = dict.fromkeys(("guidance", "fake_training_guidance", "fake_guidance", "residual_guidance"), 2.0)
ZERO = SiD(steps=UNIT, guidance=1.0, fake_training_guidance=0.0, fake_guidance=0.0, residual_guidance=0.0)


def test_the_teacher_is_guided_by_kappa_4_and_the_fake_score_by_kappa_2_and_3() -> None:
    method = SiD(guidance=4.0, fake_guidance=2.0, residual_guidance=-1.0, weight="one", loss_scale=1.0, alpha=0.7)
    players, draw, batch = scene(method)
    t, label = draw["t"], Cond(label=draw["label"])
    x = players.generator(2.5 * draw["z"], torch.full_like(t, 2.5), label)
    x_t = PATH.diffuse(x, draw["eps"], t)

    def guided(who: str, scale: float) -> Tensor:
        with_class, without = players[who](x_t, t, label), players[who](x_t, t, players.teacher.unconditional(label))
        return without + scale * (with_class - without)

    gap = guided("teacher", 4.0) - guided("fake", 2.0)
    values = gap * (guided("fake", -1.0) - x) + 0.3 * gap**2
    found = method.generator_loss(players, draw, batch).total
    torch.testing.assert_close(found, values.flatten(1).sum(1).mean(), rtol=1e-10, atol=1e-12)


def test_the_fake_score_is_trained_by_kappa_1_on_its_guided_estimate() -> None:
    method = SiD(**GUIDED, fake_class_dropout=0.0)
    players, draw, batch = scene(method)
    x = players.generator(2.5 * draw["fake z"], torch.full((BATCH,), 2.5), Cond(label=draw["fake label"]))
    numbers_of = (x, draw["fake eps"], draw["fake t"], Cond(label=draw["fake label"]))
    expected = denoising_loss(players.fake, *numbers_of, weight="edm", guidance=2.0)
    found = method.fake_loss(players, draw, batch)
    torch.testing.assert_close(found.logs["denoising"], expected.detach(), rtol=1e-6, atol=0)  # t in float32 here
    unguided = denoising_loss(players.fake, *numbers_of, weight="edm")
    assert (found.logs["denoising"] - unguided).abs() > 1e-4


@pytest.mark.parametrize("kappa", [4.5, -1.0])
def test_at_any_kappa_but_zero_the_trained_optimum_is_the_generator_s_denoiser(kappa: float) -> None:  # I1
    """Where the guided means are the generator's, no parameter of the fake score has a gradient."""
    z, eps, weights = pairs(normal_nodes(), normal_nodes())
    best, without, tau = numbers(-0.4, 0.6), 0.1, 0.9
    draw = {"fake z": z[:, None], "fake eps": eps[:, None], "fake t": torch.full_like(z, 1.3), "step": torch.tensor(0)}
    draw |= {"fake label": torch.ones(len(z), dtype=torch.int64), "fake is_dropped": torch.zeros(len(z)).bool()}

    def gradients(kappa: float, trained: float) -> Tensor:
        means = without + (best - without) / kappa
        fake = Denoiser(LearnedGaussian([*means.tolist(), without], tau**2), PATH, "x0")
        original = fake.forward
        fake.forward = lambda *given, **named: averaged_by(original(*given, **named), weights)  # type: ignore[method-assign]
        generator = Denoiser(Affine(best.tolist(), tau), PATH, "x0")
        method = SiD(steps=UNIT, fake_training_guidance=trained)
        players = Players(teacher=fake, fake=fake, generator=generator)
        method.fake_loss(players, draw, Batch(torch.empty(0))).total.backward()
        return torch.cat([fake.net.mean.grad[1:], fake.net.variance.grad[None]])

    assert gradients(kappa, kappa).abs().max() < 1e-12
    assert gradients(kappa, kappa + 0.5).abs().min() > 1e-3


def test_zero_cfg_asks_the_fake_score_without_the_class_and_the_teacher_with_it() -> None:
    players, draw, batch = scene(ZERO)
    asked: dict[str, list[Tensor]] = {"teacher": [], "fake": []}
    for name, labels in asked.items():
        players[name].net.register_forward_hook(lambda _, given, __, labels=labels: labels.append(given[2].label))
    ZERO.generator_loss(players, draw, batch)
    ZERO.fake_loss(players, draw, batch)
    assert len(asked["fake"]) == 2
    assert all((label == CLASSES).all() for label in asked["fake"])
    assert [label.tolist() for label in asked["teacher"]] == [draw["label"].tolist()]


def mixture(*means: float) -> Denoiser:
    """Three Gaussians on the line, the first and the last of class 0."""
    classes = torch.tensor([0, 1, 0])
    return mixture_denoiser(PATH, numbers(0.2, 0.5, 0.3), numbers(*means)[:, None], numbers(0.2, 0.1, 0.4), classes)


def test_zero_cfg_s_field_is_a_classifier_s_plus_the_matching_of_all_images() -> None:
    """sigma^2 times the slope of log p(c|x) + log p(x) - log q(x), each from its own density."""
    teacher, fake, generator = (
        mixture(-1, 0.5, 2),
        mixture(0.3, -0.8, 1),
        Denoiser(Affine([0.3, -0.2], 0.9), PATH, "x0"),
    )
    t, label, z, eps = numbers(0.3, 0.7, 1.5, 2.5), torch.tensor([0, 1, 1, 0]), random(4, 1), random(4, 1, seed=1)
    x_t = (numbers(0.3, -0.2)[label][:, None] + 0.9 * z + t[:, None] * eps).requires_grad_()
    p, q = teacher.net, fake.net
    assert isinstance(p, Mixture)
    assert isinstance(q, Mixture)
    joint = torch.stack([p.log_prob(x_t, t, Cond(label=torch.full((4,), c))) for c in (0, 1)], 1)
    log_class = torch.log_softmax(joint + numbers(0.5, 0.5).log(), 1)[torch.arange(4), label]
    whole = Cond(label=torch.full((4,), 2))
    total = log_class + p.log_prob(x_t, t, whole) - q.log_prob(x_t, t, NO_COND)
    (slope,) = torch.autograd.grad(total.sum(), x_t)
    draw = {"z": z, "eps": eps, "t": t, "label": label, "step": torch.tensor(0)}
    logs = ZERO.generator_loss(
        Players(teacher=teacher, fake=fake, generator=generator), draw, Batch(torch.empty(0))
    ).logs
    torch.testing.assert_close(logs["gap"], (t[:, None] ** 2 * slope).abs().mean(), rtol=1e-10, atol=0)


def test_the_generator_s_loss_leaves_out_no_class() -> None:
    method = SiD(fake_guidance=2.0, residual_guidance=2.0)
    players, draw, batch = scene(method)
    totals = [
        method.generator_loss(players, draw | {"fake is_dropped": torch.full((BATCH,), is_dropped)}, batch).total
        for is_dropped in (False, True)
    ]
    assert torch.equal(*totals)


@pytest.mark.parametrize(("scale", "some"), [(1.0, False), (2.0, True)])
def test_the_fake_score_loses_classes_only_where_it_is_guided(scale: float, some: bool) -> None:
    method = SiD(fake_guidance=scale, residual_guidance=scale, fake_class_dropout=1.0)
    players, draw, batch = scene(method)
    labels: list[Tensor] = []
    players.fake.net.register_forward_hook(lambda _, given, __: labels.append(given[2].label))
    method.fake_loss(players, draw, batch)
    assert bool((labels[0] == CLASSES).all()) == some


def test_a_sample_that_loses_its_class_is_made_without_it_too() -> None:
    """As in SiD-LSG's training loop, which empties prompts before it asks the generator."""
    method = SiD(fake_guidance=2.0, residual_guidance=2.0)
    players, draw, batch = scene(method)
    draw |= {"fake is_dropped": torch.arange(BATCH) % 2 == 0}
    asked: dict[str, list[Tensor]] = {"generator": [], "fake": []}
    for name, labels in asked.items():
        players[name].net.register_forward_hook(lambda _, given, __, labels=labels: labels.append(given[2].label))
    method.fake_loss(players, draw, batch)
    expected = torch.where(draw["fake is_dropped"], CLASSES, draw["fake label"]).tolist()
    assert [labels[0].tolist() for labels in asked.values()] == [expected, expected]


@pytest.mark.parametrize("name", sorted(GUIDED))
def test_a_scale_is_refused_by_name_with_a_teacher_that_always_saw_its_class(name: str) -> None:
    teacher = small_teacher()
    teacher.net.has_null_condition = False
    with pytest.raises(UserError, match=rf"method.{name}: 2.0 needs a model trained with class_dropout > 0"):
        SiD(**{name: 2.0}).players(Problem(SHAPE, CLASSES, PATH, teacher=teacher))
