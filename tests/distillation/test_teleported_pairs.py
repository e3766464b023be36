"""`teleport` of stored pairs: they begin at the data's Gaussian, with fewer evaluations; what has none is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_players import CLASSES, PATH, SHAPE, small_teacher

from diffdistill.data.gaussian import gaussian_of
from diffdistill.data.source import NoImages, TensorImages
from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.guidance_rules import Rescaled
from diffdistill.diffusion.path import VPDiscrete
from diffdistill.diffusion.prompt_table import PromptTable
from diffdistill.diffusion.sampling import DDIM, Heun
from diffdistill.diffusion.teleport import LowRankGaussian, Teleport
from diffdistill.distillation.method import Problem
from diffdistill.methods.rectified_flow import RectifiedFlow
from diffdistill.methods.regression import Regression
from diffdistill.settings.schema import UserError
from diffdistill.training.config import RunConfig
from diffdistill.training.trainer import Trainer

SAMPLER = Heun(num_steps=6)
RATIO = 20.0
both_methods = pytest.mark.parametrize("kind", [Regression, RectifiedFlow])


def images(seed: int = 0, count: int = 30) -> TensorImages:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    return TensorImages(torch.randn(count, *SHAPE, generator=generator) + labels[:, None, None, None], labels)


def problem(**changes: object) -> Problem:
    made = Problem(SHAPE, CLASSES, PATH, teacher=small_teacher().float(), data=images())
    return replace(made, **changes)  # type: ignore[arg-type]


def method(kind: type, **changes: object) -> Regression | RectifiedFlow:
    settings = {"pairs": 6, "held_out": 2, "pair_sampler": SAMPLER, "teleport": RATIO, "guidance": 2.0}
    return kind(**(settings | changes))  # type: ignore[no-any-return]


@both_methods
def test_pairs_are_those_of_the_data_s_gaussian_and_the_rest_of_the_grid(kind: type) -> None:
    stored = method(kind).prepare(problem(), seed=3)
    levels = PATH.karras_times(6)
    left_out = int((levels > RATIO).sum())
    assert left_out > 0
    data, teacher = images(), small_teacher().float()
    gaussian = LowRankGaussian.fit(data.images, data.labels)
    sampler = Teleport(Heun(num_steps=6 - left_out), float(levels[left_out]), gaussian)
    wanted = sampler(teacher, stored["noise"], teacher.class_cond(stored["label"]), guidance=2.0)
    torch.testing.assert_close(stored["image"], wanted, rtol=1e-5, atol=1e-5)
    plain = method(kind, teleport=None).prepare(problem(), seed=3)
    assert torch.equal(plain["noise"], stored["noise"])
    assert not torch.allclose(plain["image"], stored["image"], atol=1e-3)


def test_fewer_evaluations_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    heun = Heun.__call__
    monkeypatch.setattr(
        Heun, "__call__", lambda self, *a, **k: asked.append(self.num_evaluations) or heun(self, *a, **k)
    )
    for ratio in (None, RATIO):
        method(Regression, held_out=0, teleport=ratio).prepare(problem(), seed=0)
    assert asked[0] == 11
    assert asked[1] < 11


def test_a_folder_tells_the_ratio_and_the_data(tmp_path: Path) -> None:
    def made(data: TensorImages, **changes: object) -> dict[str, torch.Tensor]:
        return method(Regression, pairs_folder=str(tmp_path), **changes).prepare(problem(data=data), seed=0)

    first = made(images())
    assert all(torch.equal(first[name], value) for name, value in made(images()).items())
    for data, changes, named in (
        (images(), {"teleport": None}, "teleport, data"),
        (images(), {"teleport": 10.0}, "teleport"),
        (images(seed=1), {}, "data"),
    ):
        with pytest.raises(UserError, match=f"holds pairs with another {named}; name another folder"):
            made(data, **changes)


def prompts() -> PromptTable:
    return PromptTable([Cond(text=torch.ones(1, 1, 1))], Cond(text=torch.zeros(1, 1, 1)))


@both_methods
@pytest.mark.parametrize(
    ("changed", "told", "message"),
    [
        ({"pair_sampler": DDIM()}, {}, "skips steps of Heun, and the sampler is ddim"),
        ({"teleport": 100.0}, {}, "100: skips 0 steps; choose from"),
        ({"teleport": 0.001}, {}, "0.001: skips 6 steps"),
        ({}, {"data": None}, "needs the run's images"),
        ({}, {"data": NoImages(SHAPE)}, "needs the run's images"),
        ({}, {"conditions": prompts()}, "the teacher takes prompts"),
        ({}, {"guidance_rule": Rescaled()}, "leave guidance_rule out, or set guidance: 1"),
    ],
)
def test_what_has_no_such_start_is_refused(
    kind: type, changed: dict[str, object], told: dict[str, object], message: str
) -> None:
    known = problem(**{name: value for name, value in told.items() if name == "data"})
    assert known.teacher is not None
    known.teacher.run_with(**{name: value for name, value in told.items() if name != "data"})
    with pytest.raises(UserError, match=f"method.teleport = .*{message}"):
        method(kind, **changed).players(known)


@both_methods
def test_a_discrete_path_is_refused_and_others_without_the_setting_are_not(kind: type) -> None:
    teacher = small_teacher().float()
    teacher.path = VPDiscrete()
    told = problem(teacher=teacher, path=teacher.path)
    with pytest.raises(UserError, match="vp_discrete cannot start at the ratio"):
        method(kind, guidance=1.0).players(told)
    method(Regression, guidance=1.0, teleport=None, pair_sampler=DDIM()).players(told)


@both_methods
def test_images_are_read_for_the_gaussian_alone(kind: type) -> None:
    plain, teleported = method(kind, teleport=None), method(kind)
    assert not plain.needs_images
    assert plain.one_shape is None
    assert teleported.needs_images
    assert teleported.one_shape == "its stored pairs are of one size"


def test_of_many_images_evenly_spaced_ones_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets lie in the order of their classes."""
    monkeypatch.setattr("diffdistill.data.gaussian.MOST", 10)
    data = TensorImages(torch.arange(40.0)[:, None, None, None].expand(40, 1, 2, 2), torch.arange(40) // 10)
    made = gaussian_of(data, by_class=True)
    assert len(made.means) == 5
    assert made.means[-1].tolist() == [18.0] * 4
    assert len(gaussian_of(data, by_class=False).means) == 1


def test_a_run_is_trained_on_them(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """From a config: its data is the one that the pairs begin at."""
    config = make_config(
        "regression", "train.steps=1", "method.pairs=8", "method.held_out=0", "method.teleport=5",
        "method.pair_sampler={name: heun, num_steps: 6}", f"method.pairs_folder={tmp_path / 'pairs'}",
    )  # fmt: skip
    Trainer(config, quiet=True).run()
    facts = (tmp_path / "pairs" / "pairs.json").read_text()
    assert f'"data": "{config.data.load().key}"' in facts
    assert '"teleport": 5.0' in facts
