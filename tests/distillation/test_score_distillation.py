"""What the score-distillation methods share: their numbers, samples, and that they go on where they stopped."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig
from support.closed_forms import on_every_path, random
from support.tiny_players import BATCH, CLASSES, MULTI_STEP, PATH, SHAPE, scene
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.path import Path as NoisePath
from diffdistill.diffusion.path import expand
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Method, Problem
from diffdistill.distillation.score_distillation import (
    fake_sample,
    judged_sample,
    matching_field,
    mean_of_finite,
    shielded,
)
from diffdistill.methods.f_distill import FDistill
from diffdistill.methods.sid import SiD
from diffdistill.methods.sim import SIM
from diffdistill.training.trainer import Trainer

METHODS = {"sid": SiD(steps=MULTI_STEP), "sim": SIM(steps=MULTI_STEP), "f_distill": FDistill(steps=MULTI_STEP)}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@every_method
def test_a_sample_s_numbers_do_not_depend_on_its_batch(method: Method) -> None:
    problem = Problem(SHAPE, CLASSES, PATH)
    whole = method.draw(StepRandom(0, 4, torch.arange(BATCH)), problem)
    parts = [method.draw(StepRandom(0, 4, index), problem) for index in torch.arange(BATCH).split(2)]
    for name, value in whole.items():
        joined = parts[0][name] if value.ndim == 0 else torch.cat([part[name] for part in parts])
        assert torch.equal(value, joined), name


@every_method
def test_the_numbers_of_a_step_are_all_different(method: Method) -> None:
    draw = method.draw(StepRandom(0, 0, torch.arange(BATCH)), Problem(SHAPE, CLASSES, PATH))
    drawn = [value.double().numpy().tobytes() for value in draw.values() if value.is_floating_point()]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_ends_as_one_that_never_stopped(make_config: MakeConfig, tmp_path: Path, name: str) -> None:
    whole = make_config(name, "train.steps=4", f"run={tmp_path / 'whole'}")
    Trainer(whole, quiet=True).run()
    parts = make_config(name, "train.steps=2", f"run={tmp_path / 'parts'}")
    Trainer(parts, quiet=True).run()
    resumed = Trainer(replace(parts, train=whole.train), resume=True, quiet=True)
    resumed.run()
    once, twice = (folder / "checkpoints" / "step-00000004" for folder in (Path(whole.run), Path(parts.run)))
    for file in ("players.safetensors", "ema.safetensors", "optimizers.safetensors"):
        assert (once / file).read_bytes() == (twice / file).read_bytes()


@on_every_path
def test_a_fake_score_that_answers_the_image_itself_gives_score_distillation_sampling(path: NoisePath) -> None:
    """eps_teacher - eps, Poole et al. 2022: the generator's law is then taken for a point."""
    x, eps, teacher = (random(4, 3, seed=seed) for seed in range(3))
    t = torch.linspace(path.t_min, path.t_max, 6, dtype=torch.float64)[1:-1]
    x_t, constant = path.diffuse(x, eps, t), 1e3  # above every distance, so that it is the normaliser
    field = constant * matching_field(x, x, teacher, minimum=constant)
    by_noise = path.from_x0(teacher, "eps", x_t, t) - eps
    torch.testing.assert_close(expand(1 / path.ratio(t), x) * field, by_noise, rtol=1e-9, atol=1e-9)


def test_the_normaliser_is_the_distance_to_the_guided_teacher() -> None:
    method = SiD()
    players, draw, _ = scene(method)
    x, x_t, teacher, weight = judged_sample(players, draw, method.steps, guidance=4.0, weight="nu", minimum=1e-5)
    with_class, without = (players.teacher(x_t, draw["t"], Cond(label=draw["label"]), guidance=w) for w in (1.0, 0.0))
    guided = without + 4 * (with_class - without)
    torch.testing.assert_close(teacher, guided, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(1 / weight, (x - guided).abs().mean((1, 2, 3)).detach(), rtol=1e-10, atol=0)


def test_the_fake_score_s_own_sample_has_no_gradient() -> None:
    players, draw, _ = scene(SiD())
    x, cond = fake_sample(players, draw, SiD().steps)
    assert not x.requires_grad
    assert cond.label is not None
    assert cond.label.tolist() == draw["fake label"].tolist()


@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
def test_a_shielded_sample_with_one_broken_gradient_pushes_nothing(fault: float) -> None:
    x = torch.ones(2, 3, requires_grad=True)
    factor = torch.tensor([[1.0, fault, 1.0], [1.0, 2.0, 3.0]])
    (shielded(1 * x) * factor).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 0, 0], [1, 2, 3]]


def test_a_mean_counts_what_is_not_finite_as_zero_but_says_if_nothing_is() -> None:
    def mean(*values: float) -> float:
        return float(mean_of_finite(torch.tensor(values)))

    assert mean(1.0, torch.nan, 5.0) == 2
    assert not Tensor([mean(torch.nan, torch.inf)]).isfinite()
