"""The moving average of weights: its first update, its half-life, and what it leaves alone."""

from dataclasses import replace
from pathlib import Path as FilePath
from types import SimpleNamespace

import pytest
import torch
from conftest import MakeConfig
from torch import nn

from diffdistill.distillation.method import Update
from diffdistill.training.config import find_config, load_config
from diffdistill.training.ema import EMA, EMAConfig, share_of_start
from diffdistill.training.notes import notes_on_averages
from diffdistill.training.trainer import Trainer


def weights(value: float) -> nn.Module:
    module = nn.Linear(3, 2).double()
    nn.init.constant_(module.weight, value)
    nn.init.constant_(module.bias, -value)
    return module


def average_after(config: EMAConfig, updates: int, batch_images: int, first_images_seen: int) -> float:
    """Start at 0 and follow weights of 1."""
    ema = EMA(weights(0.0), config)
    for i in range(updates):
        ema.update(weights(1.0), images_seen=first_images_seen + i * batch_images, batch_images=batch_images)
    assert torch.equal(ema.module.bias, -ema.module.weight[:, 0])
    return ema.module.weight[0, 0].item()


def test_the_first_update_copies():
    ema, source = EMA(weights(0.25), EMAConfig()), weights(0.7)
    ema.update(source, images_seen=0, batch_images=128)
    assert torch.equal(ema.module.weight, source.weight)


def test_half_of_the_old_weights_is_left_after_the_half_life():
    config = EMAConfig(halflife_images=1000, ramp=0)
    assert average_after(config, 10, 100, 0) == pytest.approx(0.5, rel=1e-12)
    assert average_after(config, 20, 100, 0) == pytest.approx(0.75, rel=1e-12)


def test_the_half_life_does_not_depend_on_the_batch_size():
    config = EMAConfig(halflife_images=1000, ramp=0)
    assert average_after(config, 40, 25, 0) == pytest.approx(average_after(config, 1, 1000, 0), rel=1e-12)


def test_the_half_life_is_at_most_the_ramp_s_share_of_the_images_seen():
    config = EMAConfig(halflife_images=500_000, ramp=0.05)
    assert average_after(config, 1, 128, 20_000) == pytest.approx(1 - 0.5 ** (128 / 1000), rel=1e-12)


def test_the_ramp_ends_at_the_full_half_life():
    config = EMAConfig(halflife_images=1000, ramp=0.05)
    assert average_after(config, 1, 128, 10**6) == pytest.approx(1 - 0.5 ** (128 / 1000), rel=1e-12)


def test_the_average_is_frozen_and_owns_its_weights():
    source = weights(0.5)
    ema = EMA(source, EMAConfig())
    assert not ema.module.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert ema.module.weight.data_ptr() != source.weight.data_ptr()
    assert source.weight.requires_grad


def test_an_update_leaves_the_weights_that_it_follows_alone():
    ema, source = EMA(weights(0.0), EMAConfig(ramp=0)), weights(1.0)
    ema.update(source, images_seen=0, batch_images=100_000)
    assert torch.equal(source.weight, weights(1.0).weight)


def test_buffers_are_copied():
    source = nn.BatchNorm1d(2)
    ema = EMA(source, EMAConfig())
    source.running_mean.fill_(3.0)
    ema.update(source, images_seen=10**9, batch_images=1)
    assert torch.equal(ema.module.running_mean, source.running_mean)


# How much of the start is left at the end


def left_by_averaging(config: EMAConfig, update: Update, num_steps: int, batch: int) -> float:
    """Start at 1 and follow weights of 0, as the trainer does."""
    ema, source = EMA(weights(1.0), config), weights(0.0)
    for step in range(num_steps):
        if update.is_due(step, step * batch):
            ema.update(source, images_seen=step * batch, batch_images=batch * update.every)
    return ema.module.weight[0, 0].item()


@pytest.mark.parametrize(
    ("config", "update"),
    [
        (EMAConfig(halflife_images=2000, ramp=0), Update(("a",), "loss")),
        (EMAConfig(halflife_images=2000, ramp=0), Update(("a",), "loss", every=3)),
        (EMAConfig(halflife_images=2000, ramp=0.5), Update(("a",), "loss", start_images=250)),
        (EMAConfig(halflife_images=100, ramp=0.9), Update(("a",), "loss", every=2, start=5)),
        (EMAConfig(halflife_images=500, ramp=0.05), Update(("a",), "loss")),
    ],
)
def test_the_share_of_the_start_is_what_averaging_leaves_of_it(config: EMAConfig, update: Update) -> None:
    found = share_of_start(config, update, num_steps=37, batch_images=64)
    assert found == pytest.approx(left_by_averaging(config, update, 37, 64), rel=1e-9, abs=1e-300)


def test_a_ramp_from_the_first_image_on_leaves_nothing_of_the_start() -> None:
    assert share_of_start(EMAConfig(ramp=0.05), Update(("a",), "loss"), num_steps=10, batch_images=64) == 0


def test_the_recipes_averages_forget_the_start() -> None:
    """f_distill/cifar10 once kept 13.5 % of it, by a half-life five times too long."""
    for recipe in recipes():
        assert not list(notes_on_averages(load_config(find_config(recipe)))), recipe
    was = load_config(find_config("f_distill/cifar10"), ["ema.halflife_images=56800000"])
    assert "ema: 13.5% of the EMA at step 80000 will still be the initial weights" in next(notes_on_averages(was))


@pytest.mark.parametrize(("start", "advises_ramp"), [(10, True), (80, False), (100, False)])
def test_a_late_updates_average_is_advised_by_the_images_it_follows(
    make_config: MakeConfig, start: int, advises_ramp: bool
) -> None:
    """hyper_sd's critics begin late; a method of one's own may train its student so."""
    config = make_config("dmd2", "ema={halflife_images: 1e6, ramp: 0}", "train.steps=100")
    update = Update(("student",), "loss", start=start)
    late = SimpleNamespace(
        method=SimpleNamespace(student="student", updates=(update,)), train=config.train, emas={"ema": config.ema}
    )
    (note,) = notes_on_averages(late)  # type: ignore[arg-type]
    assert note.endswith(f", or ramp: {EMAConfig().ramp}") == advises_ramp
    if start == 100:
        assert (
            note == "ema: 100.0% of the EMA at step 100 will still be the initial weights; student is not trained yet"
        )
        return
    advised = float(note.split("halflife_images of ")[1].split()[0])
    batch = config.train.global_batch_size
    for halflife, is_enough in ((advised, True), (advised + 2, False)):
        share = share_of_start(EMAConfig(halflife_images=halflife, ramp=0), update, num_steps=100, batch_images=batch)
        assert (share <= 0.03) == is_enough


def test_a_run_of_a_few_images_is_not_told_to_have_a_halflife_of_none(make_config: MakeConfig) -> None:
    config = make_config("pretrain", "ema={halflife_images: 1e6, ramp: 0}", "train.steps=2")
    few = replace(config, train=replace(config.train, global_batch_size=2))
    (note,) = notes_on_averages(few)
    assert "use a halflife_images of 0.79 or less" in note


def test_a_run_says_so_and_what_would_do(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config("dmd2", "ema={halflife_images: 200, ramp: 0}", "train.steps=4", "more_emas={long: {ramp: 0}}")
    first, second = notes_on_averages(config)
    share = 0.5 ** (
        2 * 2 * config.train.global_batch_size / 200
    )  # two updates of the generator, of two iterations each
    assert config.method.fake_updates == 2
    assert first.startswith(
        f"ema: {share:.1%} of the EMA at step 4 will still be the initial weights; use a halflife_images"
    )
    assert second.startswith("more_emas.long: ")
    advised = float(first.split("halflife_images of ")[1].split()[0])
    assert not list(notes_on_averages(replace(config, ema=EMAConfig(halflife_images=advised, ramp=0), more_emas={})))
    Trainer(config).run()
    assert first in " ".join("".join(capsys.readouterr()).split())
    assert (FilePath(config.run) / "warnings.txt").read_text().splitlines()[:2] == [first, second]


def recipes() -> list[str]:
    home = find_config("dmd2/digits").parent.parent
    return sorted(str(file.relative_to(home).with_suffix("")) for file in home.glob("*/*.yaml"))
