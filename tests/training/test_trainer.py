"""The loop: who steps when, on what, at which rate, and what happens to a loss that is not finite."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.short_runs import ACCUMULATION, trained, weights
from torch import Tensor, nn

from diffdistill.data.pictures import CAPTION_HEIGHT, GAP
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.distillation.method import Batch, Draw, Loss, Players
from diffdistill.distributed.stopping import TrainingError
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.f_distill import FDistill
from diffdistill.methods.pretrain import Pretrain
from diffdistill.networks.discriminator import Head
from diffdistill.training.config import OptimizerConfig, RunConfig
from diffdistill.training.optimizers import learning_rate
from diffdistill.training.reports.log import RunLog
from diffdistill.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]

SGD = tuple(
    f"optimizers.{player}={{name: sgd, lr: 0.1, betas: [0, 0.999]}}" for player in ("generator", "default", "teacher")
)


def sgd_for(method: str) -> list[str]:
    return [setting for setting in SGD if ("teacher" in setting) == (method == "pretrain")]


@pytest.mark.parametrize("method", ["pretrain", "dmd2"])
def test_two_micro_batches_of_8_train_as_one_batch_of_16(make_config: MakeConfig, method: str) -> None:
    common = ("train.global_batch_size=16", *sgd_for(method))
    start = weights(Trainer(make_config(method, *common)))
    whole = weights(trained(make_config(method, *common), 3))
    parts = weights(trained(make_config(method, *common, "train.micro_batch_size=8"), 3))
    size = max(float(value.abs().max()) for value in whole.values())
    moved = max(float((whole[name] - start[name]).abs().max()) for name in whole)
    apart = max(float((whole[name] - parts[name]).abs().max()) for name in whole)
    assert moved > 1000 * ACCUMULATION * size, "nothing was trained, so nothing was compared"
    assert apart <= ACCUMULATION * size


def test_the_seed_alone_decides_how_networks_begin(make_config: MakeConfig) -> None:
    first = weights(Trainer(make_config("dmd2")))
    torch.rand(1)
    again, other = weights(Trainer(make_config("dmd2"))), weights(Trainer(make_config("dmd2", "train.seed=1")))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first if name.startswith("discriminator"))


@pytest.mark.parametrize("updates", [1, 3])
def test_exactly_k_fake_updates_are_taken_to_one_of_the_generator(make_config: MakeConfig, updates: int) -> None:
    trainer = Trainer(make_config("dmd2", f"method.fake_updates={updates}"))
    taken: list[str] = []
    for name, optimizer in trainer.assembly.optimizers.items():
        optimizer.register_step_post_hook(lambda *_, name=name: taken.append(name))
    for _ in range(2 * updates):
        trainer.train_step()
    assert taken == 2 * (["generator"] + updates * ["fake", "discriminator"])


def test_only_the_players_of_an_update_have_dropout_when_its_statistics_and_its_loss_are_asked_for(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, set[str]]] = []

    def note(function: str) -> None:
        original = getattr(FDistill, function)

        def noted(self: FDistill, players: Players, *rest: Any) -> Any:
            asked.append((function, {name for name, player in players.items() if player.training}))
            return original(self, players, *rest)

        monkeypatch.setattr(FDistill, function, noted)

    for function in ("ratios", "generator_loss", "fake_loss"):
        note(function)
    trainer = Trainer(make_config("f_distill", "method.fake_updates=1", "train.micro_batch_size=4"))
    for _ in range(2):
        trainer.train_step()
    who = {"ratios": {"generator"}, "generator_loss": {"generator"}, "fake_loss": {"fake", "discriminator"}}
    assert asked == 2 * [(name, players) for name, players in who.items() for _ in range(2)]


def test_the_same_player_is_never_asked_twice_about_one_input_in_a_step(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(make_config("dmd2"))
    names: dict[nn.Module, str] = {module: name for name, module in trainer.players.items()}
    asked: list[tuple[str, str]] = []

    def note(module: nn.Module, *inputs: Tensor | None) -> None:
        content = b"".join(x.detach().numpy().tobytes() for x in inputs if x is not None)
        asked.append((names[module], hashlib.sha256(content).hexdigest()))

    evaluate, judge = Denoiser._evaluate, Head.forward

    def noted_evaluate(self: Denoiser, x_t: Tensor, t: Tensor, cond: Any, *more: Any) -> Any:
        note(self, x_t, t, cond.label)
        return evaluate(self, x_t, t, cond, *more)

    def noted_judge(self: Head, features: Tensor) -> Tensor:
        note(self, features)
        return judge(self, features)

    monkeypatch.setattr(Denoiser, "_evaluate", noted_evaluate)
    monkeypatch.setattr(Head, "forward", noted_judge)
    trainer.train_step()
    assert len(set(asked)) == len(asked)
    # fake: the field, the generator's GAN, its own denoising, and the GAN on real and generated images.
    assert Counter(name for name, _ in asked) == {"generator": 1, "teacher": 1, "fake": 4, "discriminator": 2}


def test_every_epoch_is_another_permutation_of_the_images(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def look_only(self: Pretrain, players: Players, draw: Draw, batch: Batch) -> Loss:
        seen.append(batch.images)
        return Loss(sum(p.sum() for p in players.teacher.parameters()) * 0.0)

    monkeypatch.setattr(Pretrain, "teacher_loss", look_only)
    config = make_config("pretrain", "train.global_batch_size=500")
    trained(config, 6)
    everything = config.data.tensors()[0].flatten(1)
    count = len(everything)
    first, second = (torch.cat(seen)[i * count : (i + 1) * count].flatten(1) for i in (0, 1))
    assert not torch.equal(first, second)
    for epoch in (first, second):
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, everything.tolist()))


def test_the_rate_warms_up_and_falls_to_zero_at_the_end() -> None:
    linear = OptimizerConfig(lr=2.0, warmup_steps=4, decay="linear", decay_start=0.5)
    cosine = OptimizerConfig(lr=2.0, decay="cosine", decay_start=0.0)
    constant = OptimizerConfig(lr=2.0)
    assert [learning_rate(linear, step, 20) for step in (0, 1, 3, 10, 15, 20)] == [0.5, 1.0, 2.0, 2.0, 1.0, 0.0]
    assert [learning_rate(cosine, step, 20) for step in (0, 10, 20)] == pytest.approx([2.0, 1.0, 0.0], abs=1e-15)
    assert learning_rate(cosine, 5, 20) == pytest.approx(1 + math.cos(math.pi / 4), rel=1e-15)
    assert {learning_rate(constant, step, 20) for step in range(20)} == {2.0}


def test_optimisers_step_at_the_scheduled_rate(make_config: MakeConfig) -> None:
    config = make_config("pretrain", "optimizers.teacher.warmup_steps=2", "optimizers.teacher.decay=linear")
    trainer = Trainer(config)
    rates = []
    trainer.assembly.optimizers["teacher"].register_step_post_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    for _ in range(4):
        trainer.train_step()
    assert rates == [1e-3, 2e-3, 2e-3, 1e-3]


def test_the_average_forgets_by_the_images_that_the_student_trained_on(make_config: MakeConfig) -> None:
    config = make_config("dmd2", "ema={halflife_images: 100, ramp: 0}")
    start, trainer = weights(Trainer(config)), trained(config, 2)  # one generator update for 2 x 8 images
    kept = 0.5 ** (16 / 100)
    assert trainer.ema is not None
    for name, average in trainer.ema.module.state_dict().items():
        before, after = start[f"generator.{name}"], trainer.trained["generator"].state_dict()[name]
        torch.testing.assert_close(average, kept * before + (1 - kept) * after, rtol=1e-5, atol=1e-7)  # one rounding


def test_with_a_ramp_the_average_begins_as_a_copy(make_config: MakeConfig) -> None:
    trainer = trained(make_config("pretrain", "ema={halflife_images: 100, ramp: 0.05}"), 1)
    for name, average in trainer.student.state_dict().items():
        assert torch.equal(average, trainer.trained["teacher"].state_dict()[name])


def test_gradients_are_clipped_for_each_player_as_it_asks(make_config: MakeConfig) -> None:
    norm, value = 1e-4, 1e-7
    trainer = Trainer(
        make_config(
            "dmd2",
            "method.fake_updates=1",
            f"optimizers.generator.clip_norm={norm}",
            f"optimizers.fake={{lr: 1e-3, clip_value: {value}}}",
        )
    )
    gradients: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            gradients[name] = torch.cat([p.grad.flatten().clone() for p in optimizer.param_groups[0]["params"]])

        return hook

    for name, optimizer in trainer.assembly.optimizers.items():
        optimizer.register_step_pre_hook(keep(name))
    for _ in range(2):  # at the first step the fake score is the teacher still, and the generator's gradient nothing
        trainer.train_step()
    assert float(gradients["generator"].norm()) == pytest.approx(norm, rel=1e-3)  # torch divides by norm + 1e-6
    assert float(gradients["fake"].abs().max()) == pytest.approx(value, rel=1e-6)
    assert float(gradients["discriminator"].abs().max()) > 100 * value


class Poison:
    """Makes one loss of DMD2 infinite or NaN while `is_active`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, loss: str, factor: float = math.nan) -> None:
        self.is_active = True
        real = getattr(DMD2, loss)

        def poisoned(method: DMD2, players: Players, draw: Draw, batch: Batch) -> Loss:
            made: Loss = real(method, players, draw, batch)
            return Loss(made.total * factor, made.logs, made.carry) if self.is_active else made

        monkeypatch.setattr(DMD2, loss, poisoned)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_named_and_its_update_skipped(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    factor: float,
) -> None:
    trainer = Trainer(make_config("dmd2"))
    poison = Poison(monkeypatch, "generator_loss", factor)
    start, log = weights(trainer), RunLog(tmp_path, title="", start_step=0, num_steps=4, quiet=True)
    trainer.train_step(log)
    message = capsys.readouterr().err
    assert f"step 0, player generator: generator_loss (total = {factor})" in message
    assert "skipped" in message
    after = weights(trainer)
    assert all(torch.equal(after[name], start[name]) for name in start if name.startswith("generator"))
    assert not all(torch.equal(after[name], start[name]) for name in start if name.startswith("fake"))
    assert trainer.ema is not None
    assert all(
        torch.equal(value, start[f"generator.{name}"]) for name, value in trainer.ema.module.state_dict().items()
    )
    poison.is_active = False
    trainer.train_step(log), trainer.train_step(log)
    assert not all(torch.equal(weights(trainer)[name], start[name]) for name in start if name.startswith("generator"))


def test_on_request_the_first_loss_that_is_not_finite_stops_the_run(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    Poison(monkeypatch, "fake_loss")
    trainer = Trainer(make_config("dmd2", "train.on_nonfinite=stop"), quiet=True)
    with pytest.raises(TrainingError, match=r"step 0, player fake: fake_loss \(total = nan\)"):
        trainer.run()


@pytest.mark.parametrize("loss", ["generator_loss", "fake_loss"])
def test_a_player_that_is_skipped_too_often_stops_the_run_even_if_others_go_on(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    Poison(monkeypatch, loss)
    trainer = Trainer(make_config("dmd2", "train.steps=20", "train.max_skips=3"), quiet=True)
    with pytest.raises(TrainingError, match=rf"{loss}.*3 updates in a row"):
        trainer.run()


def test_a_finite_loss_between_resets_the_count_of_skips(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison = Poison(monkeypatch, "fake_loss")
    trainer = Trainer(make_config("dmd2", "train.max_skips=2"))
    for is_bad in (True, False, True, False):
        poison.is_active = is_bad
        trainer.train_step()
    assert trainer.step == 4


def test_bf16_trains_and_keeps_weights_in_float32_whatever_ran_before(make_config: MakeConfig) -> None:
    full = weights(trained(make_config("dmd2"), 2))
    half = weights(trained(make_config("dmd2", "train.precision=bf16"), 2))
    assert {value.dtype for value in half.values()} == {torch.float32}
    assert all(bool(value.isfinite().all()) for value in half.values())
    assert any(not torch.equal(half[name], full[name]) for name in full), "bf16 was not used"
    # Adam's steps are about lr = 1e-3 whatever the gradient's size: two of them, in either direction.
    assert max(float((half[name] - full[name]).abs().max()) for name in full) < 5e-3


def test_the_preview_shows_samples_teacher_and_fake_side_by_side(make_config: MakeConfig) -> None:
    file = Trainer(make_config("dmd2")).save_preview()
    width, height = 10 * (48 + GAP), 4 * (48 + GAP)  # 40 digits of 8 x 8, six times enlarged
    assert Image.open(file).size == (3 * width + 2 * 8, CAPTION_HEIGHT + height)


def test_a_run_reports_on_time_and_keeps_the_newest_checkpoints(make_config: MakeConfig) -> None:
    settings = ("train.steps=6", "train.log_every=2", "train.preview_every=3", "train.checkpoint_every=1")
    config = make_config("dmd2", *settings, "train.keep_checkpoints=2")
    newest = Trainer(config, quiet=True).run()
    folder = Path(config.run)
    assert newest == folder / "checkpoints" / "step-00000006"
    assert sorted(p.name for p in newest.parent.iterdir()) == ["step-00000005", "step-00000006"]
    assert sorted(p.name for p in (folder / "previews").iterdir()) == ["step-00000003.png", "step-00000006.png"]
    assert list((folder / "tensorboard").iterdir())
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
