"""What the first call is given must be the noise that the method's equations begin with."""

from typing import Any

import pytest
from support.tiny_players import CLASSES, SHAPE, small_teacher

from diffdistill.diffusion.path import EDM, Flow, Path, VPDiscrete, VPLinear
from diffdistill.diffusion.sampling import DDIM, TCD, FewSteps
from diffdistill.distillation.method import Problem
from diffdistill.methods.consistency import Consistency
from diffdistill.methods.hyper_sd import HyperSD
from diffdistill.methods.mean_flow import MeanFlow
from diffdistill.methods.rcm import RCM
from diffdistill.methods.rectified_flow import RectifiedFlow
from diffdistill.methods.scm import SCM
from diffdistill.methods.tdm import TDM
from diffdistill.settings.schema import UserError

KINDS: dict[str, Any] = {
    "consistency": Consistency,
    "mean_flow": MeanFlow,
    "rectified_flow": RectifiedFlow,
    "scm": SCM,
    "rcm": RCM,
    "tdm": TDM,
}


STABLE_DIFFUSION = VPDiscrete(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def problem(path: Path) -> Problem:
    teacher = small_teacher().float()
    teacher.path = path
    return Problem(SHAPE, CLASSES, path, teacher=teacher, network=small_teacher().float())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("path", "sigma"), [(EDM(), "5"), (Flow(), "0.833"), (VPLinear(), "0.981"), (STABLE_DIFFUSION, "0.981")]
)
def test_unit_noise_where_the_level_s_deviation_is_another_is_refused(name: str, path: Path, sigma: str) -> None:
    said = f"^method.steps.init_noise = unit: {name} begins with sigma n, and sigma is {sigma} there; use sigma"
    with pytest.raises(UserError, match=said):
        KINDS[name](steps=FewSteps(init_ratio=5.0, init_noise="unit")).players(problem(path))


@pytest.mark.parametrize(
    ("path", "ratio"),
    [(Flow(), 500.0), (Flow(shift=3), 1e6), (VPLinear(), 80.0), (STABLE_DIFFUSION, 1e6), (EDM(), 1.0)],
    ids=["flow", "a flow's end", "vp", "a schedule's last index", "edm"],
)
def test_unit_noise_where_it_is_the_level_s_own_is_taken(path: Path, ratio: float) -> None:
    for kind in (Consistency, TDM, RectifiedFlow, SCM):
        assert kind(steps=FewSteps(init_ratio=ratio, init_noise="unit")).players(problem(path))


def test_hyper_sd_s_student_begins_with_the_path_s_own_noise_too() -> None:
    steps = TCD(num_steps=1, grid=DDIM(num_steps=64), init_noise="unit")
    with pytest.raises(UserError, match=r"hyper_sd begins with sigma n, and sigma is 80 there"):
        HyperSD(steps=steps).players(problem(EDM()))
    assert HyperSD(steps=steps).players(problem(VPLinear()))
