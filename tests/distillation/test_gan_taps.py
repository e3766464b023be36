"""A discriminator that reads several blocks, in the methods that have one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from support.tiny_players import due, learned, scene
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.distillation.method import Batch, Players
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.f_distill import FDistill
from diffdistill.networks.discriminator import Heads
from diffdistill.settings.schema import UserError
from diffdistill.training.trainer import Trainer

METHODS: dict[str, Any] = {
    "dmd2": DMD2(gan_weight=1.0, gan_fake_weight=1.0),
    "dmd2 on the teacher": DMD2(gan_weight=1.0, gan_fake_weight=1.0, gan_features="teacher"),
    "f_distill": FDistill(gan_weight=1.0),
    "f_distill on the teacher": FDistill(gan_weight=1.0, gan_features="teacher"),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
BLOCKS = (0, "middle", -1)


def same_scene(method: Any) -> tuple[Players, dict[str, Tensor], Batch]:
    """`scene`, with the same new heads every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return scene(method)


@every_method
def test_one_tap_of_the_middle_is_the_bottleneck(method: Any) -> None:
    found = []
    for taps in (None, ("middle",)):
        made = replace(method, gan_taps=taps)
        players, draw, batch = same_scene(made)
        found.append([made.call(loss, players, draw, batch).total for loss in ("generator_loss", "fake_loss")])
    assert found[0] == found[1]


@every_method
def test_the_logit_of_real_and_generated_images_is_the_mean_of_the_heads(method: Any) -> None:
    """The discriminator's whole loss by hand, from the features of each block."""
    made = replace(method, gan_taps=BLOCKS)
    players, draw, batch = same_scene(made)
    x = made.generator_loss(players, draw, batch).carry["x"]
    heads, judge = players.discriminator, players[made.gan_features]
    assert isinstance(heads, Heads)
    logits = []
    for images, call, label in ((batch.images, "gan real ", batch.cond.label), (x, "gan fake ", draw["label"])):
        x_t = players.teacher.path.diffuse(images, draw[f"{call}eps"], draw[f"{call}t"])
        read = judge.features(x_t, draw[f"{call}t"], Cond(label=label), taps=BLOCKS)  # type: ignore[operator]
        logits.append(sum(head(block) for head, block in zip(heads.heads, read, strict=True)) / len(BLOCKS))
    real, fake = logits
    by_hand = torch.nn.functional.softplus(-real).mean() + torch.nn.functional.softplus(fake).mean()
    found = made.fake_loss(players, {**draw, "x": x}, batch).logs["gan"]
    torch.testing.assert_close(found, by_hand.detach(), rtol=1e-9, atol=1e-12)


@every_method
def test_losses_of_each_head_are_averaged(method: Any) -> None:
    """Both sides' losses of two heads: the mean of what each head has alone, as in FastGen."""
    taps = (0, "middle")
    made = replace(method, gan_taps=taps, gan_head_losses="of_each")
    players, draw, batch = same_scene(made)
    x = made.generator_loss(players, draw, batch).carry["x"]
    both = [made.generator_loss(players, draw, batch), made.fake_loss(players, {**draw, "x": x}, batch)]
    alone = []
    for tap, head in zip(taps, players.discriminator.heads, strict=True):
        of_one = replace(method, gan_taps=(tap,))
        single = same_scene(of_one)[0]
        single["discriminator"].heads[0].load_state_dict(head.state_dict())  # type: ignore[union-attr]
        alone.append([of_one.generator_loss(single, draw, batch), of_one.fake_loss(single, {**draw, "x": x}, batch)])
    for found, first, second in zip(both, *alone, strict=True):
        mean = (first.logs["gan"] + second.logs["gan"]) / 2
        torch.testing.assert_close(found.logs["gan"], mean, rtol=1e-9, atol=1e-12)
    together = replace(made, gan_head_losses="of_mean")
    players.discriminator.loss = "of_mean"
    assert (together.generator_loss(players, draw, batch).logs["gan"] - both[0].logs["gan"]).abs() > 1e-6


def test_the_ratio_is_of_the_mean_logit_however_the_losses_are_taken() -> None:
    method = FDistill(gan_weight=0.0, divergence="js", gan_taps=BLOCKS)
    players, draw, batch = same_scene(method)
    totals = []
    for loss in ("of_mean", "of_each"):
        players.discriminator.loss = loss
        totals.append(method.generator_loss(players, draw, batch).total)
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-12, atol=1e-14)


@every_method
def test_every_head_learns_and_the_generator_hears_of_it(method: Any) -> None:
    made = replace(method, gan_taps=BLOCKS)
    players, draw, batch = same_scene(made)
    due(players, "discriminator", "fake")
    made.fake_loss(players, draw, batch).total.backward()
    for head in players.discriminator.heads:
        assert any(p.grad is not None and bool(p.grad.any()) for p in head.parameters())
    for module in players.values():
        module.zero_grad()
    due(players, "generator")
    made.generator_loss(players, draw, batch).total.backward()
    assert learned(players) == {"generator"}


def test_a_block_that_is_not_there_is_refused(make_config: MakeConfig) -> None:
    with pytest.raises(
        UserError, match=r"gan: taps: 'nowhere' is not a block of this network; choose from middle, 0 to"
    ):
        Trainer(make_config("dmd2", "method.gan_taps=[nowhere]"), quiet=True)
    with pytest.raises(UserError, match=r"method.gan_taps"):
        make_config("dmd2", "method.gan_taps=[]")
    with pytest.raises(UserError, match=r"method.gan_taps.*'fastgen'"):
        make_config("dmd2", "method.gan_taps=nowhere")


@pytest.mark.parametrize(("name", "heads"), [("dmd2", "of_each"), ("f_distill", "of_mean")])
def test_a_run_with_several_taps_resumes(make_config: MakeConfig, tmp_path: Path, name: str, heads: str) -> None:
    ends = []
    chosen = {"of_mean": "[0, middle]", "of_each": "fastgen"}[heads]
    for folder, steps in (("whole", (2,)), ("parts", (1, 2))):
        for number in steps:
            options = (f"method.gan_taps={chosen}", f"method.gan_head_losses={heads}", f"train.steps={number}")
            options = (*options, f"run={tmp_path / folder}")
            trainer = Trainer(make_config(name, *options), resume=len(steps) > 1 and number == 2, quiet=True)
            trainer.run()
        ends.append(trainer.trained["discriminator"].state_dict())
    assert len(ends[0]) > 4
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
