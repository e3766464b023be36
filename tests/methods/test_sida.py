"""SiDA: adversarial score identity distillation, with the fake score's bottleneck as its discriminator."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import MakeConfig
from support.short_runs import ACCUMULATION, trained, weights
from support.tiny_players import BATCH, CLASSES, PATH, SHAPE, due, learned, scene, small_teacher
from torch import Tensor, nn

from diffdistill.diffusion.augmentation import augment, draw_motion
from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Batch, Players, Problem
from diffdistill.methods import sid
from diffdistill.methods.sid import SiD, bottleneck_logits
from diffdistill.training.trainer import Trainer

METHOD = SiD(gan_weight=0.01)
PIXELS = 16


def test_the_logits_are_the_mean_over_channels_of_the_bottleneck() -> None:
    features = torch.arange(24.0).reshape(1, 2, 3, 4)
    torch.testing.assert_close(bottleneck_logits(features), torch.arange(12.0).reshape(1, 3, 4) + 6)


def logits_at(players, images: Tensor, eps: Tensor, t: Tensor, label: Tensor) -> Tensor:
    return players.fake.features(PATH.diffuse(images, eps, t), t, Cond(label=label)).mean(1)


def test_the_adversarial_share_is_that_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    players, draw, batch = scene(METHOD)
    assert sid.MAX_LOGIT == 10  # the authors' code
    monkeypatch.setattr(sid, "MAX_LOGIT", 0.1)  # some of these logits are beyond it
    t, cond = draw["t"], Cond(label=draw["label"])
    x = players.generator(2.5 * draw["z"], torch.full_like(t, 2.5), cond)
    logits = logits_at(players, x, draw["eps"], t, draw["label"])
    teacher = players.teacher(PATH.diffuse(x, draw["eps"], t), t, cond)
    nu = (x - teacher).abs().mean((1, 2, 3))
    assert logits.abs().max() > 0.1
    adversarial = F.binary_cross_entropy_with_logits(logits.clamp(-0.1, 0.1), torch.ones_like(logits))
    identity = replace(METHOD, gan_weight=0.0).generator_loss(players, draw, batch).total
    expected = 0.5 * identity + 0.5 * 0.01 * PIXELS * (1 / nu).mean() * adversarial
    found = METHOD.generator_loss(players, draw, batch)
    torch.testing.assert_close(found.total, expected, rtol=1e-10, atol=0)


def test_real_and_generated_images_are_compared_at_one_time_noise_and_class() -> None:
    players, draw, batch = scene(METHOD)
    t, eps, label = draw["fake t"], draw["fake eps"], batch.cond.label
    x = players.generator(2.5 * draw["fake z"], torch.full_like(t, 2.5), Cond(label=label)).detach()
    real, fake = (logits_at(players, images, eps, t, label) for images in (batch.images, x))
    bce = F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
    bce = (bce + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))) / 2
    weight = 1 / t**2 + 4
    error = players.fake(PATH.diffuse(x, eps, t), t, Cond(label=label)) - x
    denoising = (weight * (error**2).sum((1, 2, 3))).mean()
    found = METHOD.fake_loss(players, draw, batch).total
    torch.testing.assert_close(found, denoising + weight.mean() * bce, rtol=1e-10, atol=0)


def test_the_generator_s_loss_reaches_the_generator_alone() -> None:
    players, draw, batch = scene(METHOD)
    due(players, "generator")
    METHOD.generator_loss(players, draw, batch).total.backward()
    assert learned(players) == {"generator"}


def test_the_fake_score_s_loss_reaches_the_fake_score_alone() -> None:
    players, draw, batch = scene(METHOD)
    due(players, "generator", "fake")
    METHOD.fake_loss(players, draw, batch).total.backward()
    assert learned(players) == {"fake"}


def test_without_a_gan_no_real_image_and_no_bottleneck_is_asked_for() -> None:
    assert not SiD().needs_images
    assert METHOD.needs_images
    assert "gan" not in SiD().fake_loss(*scene(SiD())).logs


@pytest.mark.parametrize(("step", "is_on"), [(24, False), (25, True)])
def test_the_adversarial_share_begins_after_so_many_images(step: int, is_on: bool) -> None:
    method = replace(METHOD, gan_start_images=200)
    problem = Problem(SHAPE, CLASSES, PATH, teacher=small_teacher(), batch_size=8)
    draw = method.draw(StepRandom(0, step, torch.arange(step * 8, step * 8 + BATCH)), problem)
    assert bool(draw["is_gan_on"]) == is_on
    players, numbers, batch = scene(method)
    assert ("gan" in method.generator_loss(players, numbers | {"is_gan_on": draw["is_gan_on"]}, batch).logs) == is_on


def test_the_generator_waits_for_so_many_images_and_its_optimiser_with_it(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config("sid", "method.generator_start_images=16"))
    taken: list[str] = []
    for name, optimizer in trainer.assembly.optimizers.items():
        optimizer.register_step_post_hook(lambda *_, name=name: taken.append(name))
    for _ in range(4):
        trainer.train_step()
    assert taken == ["fake", "fake", "fake", "generator", "fake", "generator"]


def test_two_micro_batches_of_8_train_as_one_batch_of_16(make_config: MakeConfig) -> None:
    sgd = [f"optimizers.{player}={{name: sgd, lr: 3e-3, betas: [0, 0.999]}}" for player in ("generator", "default")]
    common = ("method.gan_weight=0.01", "train.global_batch_size=16", *sgd)
    start = weights(Trainer(make_config("sid", *common)))
    whole = weights(trained(make_config("sid", *common), 2))
    parts = weights(trained(make_config("sid", *common, "train.micro_batch_size=8"), 2))
    size = max(float(value.abs().max()) for value in whole.values())
    moved = max(float((whole[name] - start[name]).abs().max()) for name in whole)
    apart = max(float((whole[name] - parts[name]).abs().max()) for name in whole)
    assert moved > 1000 * ACCUMULATION * size
    assert apart <= ACCUMULATION * size


def test_a_guided_fake_score_is_refused_beside_the_discriminator() -> None:
    with pytest.raises(ValueError, match="the discriminator takes one condition"):
        SiD(gan_weight=0.01, fake_guidance=2.0)


class Told(nn.Module):
    """A `Network` whose bottleneck is its input, and which keeps what it is told of augmentation."""

    accepts, num_classes, has_null_condition, resolution_multiple = frozenset({"label", "augmentation"}), 3, False, 1

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        self.seen.append((x, cond.augmentation))
        return self.scale * x

    def features(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        return self(x, time_input, cond)

    def forward_with_features(self, x: Tensor, time_input: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        return self(x, time_input, cond), x


def test_real_images_are_moved_by_numbers_of_their_own_and_the_fake_score_is_told_how() -> None:
    method = replace(METHOD, fake_augment=0.9)
    made = {name: Denoiser(Told(), PATH, "x0") for name in ("teacher", "generator", "fake")}
    problem = Problem(SHAPE, CLASSES, PATH, teacher=made["teacher"], batch_size=BATCH)
    draw = method.draw(StepRandom(0, 0, torch.arange(BATCH)), problem)
    assert not torch.equal(draw["fake motion"], draw["real motion"])
    images, label = torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(3)), torch.zeros(BATCH).long()
    method.fake_loss(Players(**made), draw, Batch(images, Cond(label=label)))
    (_, of_fake), (real, of_real) = made["fake"].net.seen
    moved, expected = augment(images, draw["real motion"])
    assert torch.equal(of_real, expected)
    assert not torch.equal(of_fake, of_real)
    torch.testing.assert_close(real, PATH.diffuse(moved, draw["fake eps"], draw["fake t"]))


def test_numbers_of_one_set_of_images_do_not_depend_on_the_other_s() -> None:
    rng = StepRandom(0, 0, torch.arange(5000))
    plain, real = draw_motion(rng, 0.5), draw_motion(rng, 0.5, "real ")
    assert torch.equal(plain, draw_motion(rng, 0.5, ""))
    both = torch.stack([plain[:, 2], real[:, 2]])  # of the scale
    assert float(torch.corrcoef(both)[0, 1].abs()) < 0.05
