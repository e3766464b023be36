"""A rule of guidance in a run: a config sets it, the teacher is guided by it, and what comes out keeps it."""

from pathlib import Path

import pytest
import torch
from conftest import MakeConfig

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.guidance_rules import LINEAR, Renormalised
from diffdistill.models.load import load_model
from diffdistill.networks.guided import GuidedConfig
from diffdistill.settings.schema import UserError
from diffdistill.training.plan import plan
from diffdistill.training.trainer import Trainer

RULE = ("guidance_rule={name: renormalised}", "method.guidance=3", "train.steps=2", "train.preview_every=0")
X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
T, COND = torch.full((2,), 1.0), Cond(label=torch.tensor([3, 7]))


@pytest.mark.parametrize("method", ["dmd2", "regression"])
def test_a_student_of_a_renormalised_teacher(method: str, make_config: MakeConfig, quick_teacher: Path) -> None:
    config = make_config(method, *RULE)
    teacher, plain = plan(config, resume=None).problem.teacher, load_model(quick_teacher)
    assert teacher is not None
    assert plain.denoiser.runtime.guidance_rule == plain.spec.model.guidance_rule == LINEAR
    without, with_cond = (plain.denoiser(X, T, COND, guidance=w) for w in (0.0, 1.0))
    expected = Renormalised()(without, with_cond, 3.0)  # of x0, for the teacher predicts "edm"
    torch.testing.assert_close(teacher(X, T, COND, guidance=3.0), expected)
    Trainer(config, quiet=True).run()
    student = load_model(config.run)
    assert student.denoiser.runtime.guidance_rule == student.spec.model.guidance_rule == Renormalised()
    linear = make_config(method, *RULE, "guidance_rule=null")
    Trainer(linear, quiet=True).run()
    other = load_model(linear.run)
    assert other.spec.model.guidance_rule == LINEAR
    assert any(
        not torch.equal(a, b) for a, b in zip(student.denoiser.parameters(), other.denoiser.parameters(), strict=True)
    )


def test_a_teacher_s_own_rule_is_kept_unless_a_config_names_another(make_config: MakeConfig) -> None:
    first = make_config("regression", *RULE)
    Trainer(first, quiet=True).run()
    again = make_config("regression", "method.guidance=3", f"teacher={first.run}")
    made = plan(again, resume=None)
    assert made.problem.teacher is not None
    assert made.problem.teacher.runtime.guidance_rule == Renormalised()
    started = make_config("dmd2", *RULE, f"init={first.run}", "guidance_rule={name: rescaled, share: 0.5}")
    spec = plan(started, resume=None).spec
    assert spec.model.guidance_rule.name == "rescaled"


def test_a_rule_is_refused_for_a_teacher_that_is_told_w(make_config: MakeConfig, quick_teacher: Path) -> None:
    guided = make_config("guidance_distill", "method.width=8", "train.steps=1")
    Trainer(guided, quiet=True).run()
    assert isinstance(load_model(guided.run).spec.model.network, GuidedConfig)
    config = make_config("regression", *RULE, f"teacher={guided.run}")
    with pytest.raises(UserError, match="guidance_rule: the teacher takes the scale as input"):
        plan(config, resume=None)


def test_a_rule_is_refused_where_there_is_no_teacher_to_guide(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"guidance_rule: is for teachers, .* model.guidance_rule"):
        plan(make_config("pretrain", "guidance_rule={name: renormalised}"), resume=None)
