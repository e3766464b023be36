"""One question for all methods: can this teacher be guided? By "no class", or by a scale that it takes as its input."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.method_matrix import METHODS, train
from support.stand_ins import save_stand_in

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.guidance.check import check_guidance, check_null_condition
from diffdistill.diffusion.guidance.policies import CFG, Guidance
from diffdistill.diffusion.line import on_path
from diffdistill.diffusion.path import EDM, expand
from diffdistill.distillation.method import Batch, Players, Problem
from diffdistill.methods.agd import AGD
from diffdistill.methods.guidance_distill import GuidanceDistill
from diffdistill.methods.mean_flow import MeanFlow
from diffdistill.models.load import load_model
from diffdistill.networks.guided import GuidedConfig
from diffdistill.networks.unet import UNetConfig
from diffdistill.settings.schema import UserError

GUIDED = {
    "dmd2": ("method.guidance=2", "method.fake_guidance=1.5"),
    "sid": ("method.guidance=2", "method.fake_guidance=1.5", "method.fake_training_guidance=1.5"),
    "sim": ("method.guidance=2",),
    "f_distill": ("method.guidance=2",),
    "uni_instruct": ("method.guidance=2",),
    "cdm": ("method.guidance=2",),
    "rcm": ("method.guidance=2",),
    "free_flow": ("method.guidance=2",),
    "hyper_sd": ("method.guidance=[1, 2]",),
    "boot": ("method.guidance=[2, 2]",),
    "regression": ("method.guidance=2",),
    "scm": ("method.guidance=2",),
    "consistency": ("method.guidance=2",),
    "tdm": ("method.guidance=[1, 2]",),
    "preference_field": ("method.guidance=2",),
    "score_field": ("method.guidance=2", "method.fake_guidance=1.5"),
    "forget": ("method.base.guidance=2",),
    "ddk": ("method.base.guidance=2",),
    "diversity": ("method.base.guidance=2",),
    "rectified_flow": ("method.guidance=2",),
    "mean_flow": ("method.guidance=2",),
    "pi_flow": ("method.guidance=2",),
    "disback": ("method.base.guidance=2",),
    "msd": ("method.base.guidance=2",),
    "agd": ("method.guidance=[1, 2]",),
    "guidance_distill": ("method.guidance=[1, 2]",),
}
"""How each method that distils a teacher is told to guide it."""

NEEDS_NO_CLASS = {
    "agd": AGD(guidance=(1.0, 2.0)),
    "guidance_distill": GuidanceDistill(guidance=(1.0, 2.0)),
    "mean_flow": MeanFlow(guidance=2.0, velocity="data"),
}
"""The methods that ask for the estimate of "no class" itself, and when."""


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that takes w as an input, and knows no "no class"."""
    return save_stand_in("flux", tmp_path_factory.mktemp("flux") / "teacher")


def test_every_method_that_distils_is_tried() -> None:
    assert GUIDED.keys() == METHODS.keys() - {"pso"}  # which distils no more, and asks no teacher


@pytest.mark.parametrize("method", sorted(GUIDED.keys() - NEEDS_NO_CLASS.keys()))
def test_a_teacher_that_takes_w_can_be_guided(method: str, flux: Path) -> None:
    """The runs share their images and encoded prompts."""
    student = load_model(train(method, flux, flux.with_name(method), "train.steps=1", *GUIDED[method]))
    assert all(bool(p.isfinite().all()) for p in student.denoiser.parameters())


@pytest.mark.parametrize("method", NEEDS_NO_CLASS)
def test_what_needs_no_class_itself_says_so(method: str) -> None:
    teacher = make(class_dropout=0.0, takes_scale=True)
    problem = Problem((1, 8, 8), 3, EDM(), teacher=teacher, network=teacher)
    with pytest.raises(UserError, match=r"needs an unconditional estimate.*\(it takes a scale as its input instead\)"):
        NEEDS_NO_CLASS[method].players(problem)


def test_mean_flow_follows_the_velocity_of_a_teacher_that_is_told_w() -> None:
    teacher = make(class_dropout=0.0, takes_scale=True)
    method = MeanFlow(guidance=2.0, guidance_interval=(0.0, 0.4))
    z, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.6])
    batch = Batch(torch.zeros_like(z), Cond(label=torch.tensor([0, 2])))
    found = method.velocity_at(Players(teacher=teacher), {"t": t}, batch, z)
    x, time = on_path(teacher, z, t)
    told = replace(batch.cond, guidance_input=torch.tensor([2.0, 1.0]))
    assert torch.equal(found, (z - teacher(x, time, told)) / expand(t, z))


def make(*, class_dropout: float, takes_scale: bool) -> Denoiser:
    unet = UNetConfig(channels=(8, 8))
    config = GuidedConfig(base=unet, width=8) if takes_scale else unet
    return Denoiser(config.build((1, 8, 8), 3, class_dropout), EDM(), "edm")


ONE: list[Guidance | tuple[float, float]] = [1, 1.0, (1.0, 1.0), torch.ones(3)]
OTHERS: list[Guidance | tuple[float, float]] = [2.0, (1.0, 2.0), torch.tensor([1.0, 2.0]), CFG(scale=2.0)]


@pytest.mark.parametrize("scale", [*ONE, *OTHERS], ids=str)
def test_guidance_is_refused_where_it_would_mean_nothing(scale: Guidance) -> None:
    for class_dropout, takes_scale in [(0.1, False), (0.0, True), (0.1, True)]:
        check_guidance(make(class_dropout=class_dropout, takes_scale=takes_scale), "method.guidance", scale)
    deaf = make(class_dropout=0.0, takes_scale=False)
    if any(scale is one for one in ONE):
        check_guidance(deaf, "method.guidance", scale)
        return
    shown = str(scale) if isinstance(scale, CFG) else "2.0"
    with pytest.raises(UserError, match=re.escape(f"method.guidance: {shown} needs a model trained with")):
        check_guidance(deaf, "method.guidance", scale)


@pytest.mark.parametrize("takes_scale", [False, True])
def test_no_class_is_asked_for_where_it_is_needed(takes_scale: bool) -> None:
    check_null_condition(make(class_dropout=0.1, takes_scale=takes_scale), "this")
    with pytest.raises(UserError, match=r"this needs an unconditional estimate") as caught:
        check_null_condition(make(class_dropout=0.0, takes_scale=takes_scale), "this")
    assert ("takes a scale" in str(caught.value)) == takes_scale
