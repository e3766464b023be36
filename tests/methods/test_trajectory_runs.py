"""Whole runs of the methods that follow trajectories: resume, what is on disk, feedback, rewards."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig
from support.closed_forms import random

from diffdistill.diffusion.cond import NO_COND
from diffdistill.diffusion.sampling import TCD, OneCall
from diffdistill.distillation.rewards import Feedback, contrast, find_reward, register, sharpness
from diffdistill.inference.draw import sample_images
from diffdistill.models.load import load_model, load_players
from diffdistill.settings.schema import UserError
from diffdistill.training.trainer import Trainer


@pytest.mark.parametrize("method", ["hyper_sd", "boot", "free_flow"])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_equals_one_that_was_not_stopped(make_config: MakeConfig, method: str, stop: int) -> None:
    """For hyper_sd before, at and after the beginning of its second stage."""
    whole = make_config(method, "train.steps=4")
    parts = replace(whole, run=f"{whole.run}-parts", train=replace(whole.train, steps=stop))
    expected, first = Trainer(whole, quiet=True), Trainer(parts, quiet=True)
    expected.run()
    first.run()
    resumed = Trainer(replace(parts, train=whole.train), resume=True, quiet=True)
    resumed.run()
    for modules, others in (
        (expected.trained, resumed.trained),
        (expected.assembly.plan.followers, resumed.assembly.plan.followers),
    ):
        assert modules.keys() == others.keys()
        for name, module in modules.items():
            for key, value in module.state_dict().items():
                assert torch.equal(value, others[name].state_dict()[key]), f"{name}.{key}"


@pytest.mark.parametrize(
    "method",
    [
        "tdm",
        "consistency",
        "rectified_flow",
        "pi_flow",
        "pso",
        "preference_field",
        "score_field",
        "forget",
        "diversity",
    ],
)
def test_a_run_that_lost_its_end_comes_to_the_same_end_again(make_config: MakeConfig, method: str) -> None:
    """Of the same length: the curriculum of `consistency` goes by it."""
    config = make_config(method, "train.steps=4", "train.checkpoint_every=2")
    first = Trainer(config, quiet=True)
    first.run()
    shutil.rmtree(Path(config.run) / "checkpoints" / "step-00000004")
    resumed = Trainer(config, resume=True, quiet=True)
    resumed.run()
    for name, module in first.trained.items():
        for key, value in module.state_dict().items():
            assert torch.equal(value, resumed.trained[name].state_dict()[key]), f"{name}.{key}"


def test_a_hyper_sd_run_moves_every_player_and_samples_by_tcd(make_config: MakeConfig) -> None:
    config = make_config("hyper_sd")
    trainer = Trainer(config, quiet=True)
    modules = trainer.trained | trainer.assembly.plan.followers
    before = {name: [p.clone() for p in module.parameters()] for name, module in modules.items()}
    trainer.run()
    assert set(modules) == {"generator", "discriminator", "fake", "target", "solver"}
    for name, module in modules.items():
        assert any(not torch.equal(p, q) for p, q in zip(module.parameters(), before[name], strict=True)), name
    model = load_model(config.run)
    assert isinstance(model.spec.sampler, TCD)
    assert sample_images(model, count=3).isfinite().all()


def test_an_earlier_run_s_student_is_the_next_run_s_start_and_solver(make_config: MakeConfig) -> None:
    earlier = make_config("hyper_sd")
    Trainer(earlier, quiet=True).run()
    later = Trainer(make_config("hyper_sd", f"init={earlier.run}"), quiet=True)
    student = load_players(earlier.run).denoisers["generator"].state_dict()
    for name in ("generator", "target", "solver"):
        module = (later.trained | later.assembly.plan.followers)[name]
        assert all(torch.equal(value, student[key]) for key, value in module.state_dict().items())


def test_a_boot_run_s_student_loads_and_is_told_the_scale_at_sampling(make_config: MakeConfig) -> None:
    config = make_config("boot", "optimizers.generator.lr=0.05")
    Trainer(config, quiet=True).run()
    model = load_model(config.run)
    assert isinstance(model.spec.sampler, OneCall)
    images = {w: sample_images(model, count=3, guidance=w) for w in (1.0, 3.0)}
    assert images[1.0].isfinite().all()
    assert not torch.equal(images[1.0], images[3.0])


def test_feedback_brings_the_images_to_its_threshold(make_config: MakeConfig) -> None:
    config = make_config("hyper_sd", "train.steps=60", "method.stages=[{segments: 1}]", "optimizers.default.lr=0.01")
    assert config.teacher is not None
    start = float(contrast(sample_images(load_model(config.teacher), count=64), NO_COND).mean())
    rewarded = replace(config.method, feedback=(Feedback(reward="contrast", threshold=2 * start, weight=10.0),))
    Trainer(replace(config, method=rewarded, ema=None), quiet=True).run()
    made = float(contrast(sample_images(load_model(config.run), count=64), NO_COND).mean())
    assert made > 1.5 * start


# Rewards


def test_feedback_ends_at_the_threshold_and_has_the_reward_s_gradient_below_it() -> None:
    x = random(4, 1, 3, 3).requires_grad_()
    missing = Feedback(reward="contrast", threshold=9.0, weight=2.0).loss(x, NO_COND)
    torch.testing.assert_close(missing, 2 * (9 - contrast(x, NO_COND)).mean())
    (gradient,) = torch.autograd.grad(missing, x)
    (wanted,) = torch.autograd.grad(-2 * contrast(x, NO_COND).mean(), x)
    torch.testing.assert_close(gradient, wanted)
    assert Feedback(reward="contrast", threshold=0.0).loss(x, NO_COND) == 0


def test_contrast_and_sharpness_are_what_they_say() -> None:
    flat, stripes = torch.zeros(1, 1, 4, 4), torch.tensor([[1.0, -1.0]]).repeat(4, 2)[None, None]
    assert contrast(flat, NO_COND) == 0
    assert sharpness(flat, NO_COND) == 0
    assert sharpness(stripes, NO_COND) == 1  # 2 to the right, 0 below
    torch.testing.assert_close(contrast(stripes, NO_COND), stripes.std()[None])


def test_a_registered_reward_is_found_by_its_name_and_keeps_it() -> None:
    register("mean of the test", lambda images, cond: images.flatten(1).mean(1))
    assert find_reward("mean of the test")(torch.ones(2, 1, 2, 2), NO_COND).tolist() == [1, 1]
    with pytest.raises(ValueError, match="registered already"):
        register("mean of the test", lambda images, cond: images.flatten(1).sum(1))


def test_an_unknown_reward_is_refused_with_the_choices() -> None:
    with pytest.raises(UserError, match=r"'beauty' is unknown; choose from contrast"):
        find_reward("beauty")
