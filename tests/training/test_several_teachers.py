"""Runs with several named teachers: who keeps, saves, counts and checks them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_config
from support.stand_ins import save_stand_in
from torch import Tensor, nn

from diffdistill.commands.doctor_config import examine_config
from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.guidance_rules import Renormalised, Rescaled
from diffdistill.distillation.method import Draw, Players, Problem
from diffdistill.distillation.score_distillation import condition, matching_field
from diffdistill.methods.dmd2 import DMD2
from diffdistill.models.load import load_model, load_players
from diffdistill.settings.schema import UserError, schema
from diffdistill.training.assembly import assemble
from diffdistill.training.config import RunConfig
from diffdistill.training.memory.advice import advise
from diffdistill.training.memory.prediction import module_bytes, plan_memory
from diffdistill.training.plan import plan
from diffdistill.training.speed.offload import is_offloaded
from diffdistill.training.trainer import Trainer

DATA_FREE = ("method.gan_weight=0", "train.preview_every=0")


@schema
class TowardsSketches(DMD2):
    """DMD2 towards the teacher by half and towards the one called "sketch" by half."""

    @property
    def takes_teachers(self) -> bool:
        return True

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        return problem.copies("generator", "fake", starts={"fake": "teacher_sketch"})

    @torch.no_grad()
    def field(self, players: Players, draw: Draw, x: Tensor) -> Tensor:
        cond, t = condition(players, draw, role="teacher"), draw["t"]
        x_t = players.teacher.path.diffuse(x, draw["eps"], t)
        mean = (players.teacher(x_t, t, cond) + players.teacher_sketch(x_t, t, cond)) / 2
        return matching_field(x, players.fake(x_t, t, cond), mean, minimum=self.normaliser_minimum)


@pytest.fixture(scope="module")
def sketch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another run's folder: of the same network, otherwise trained."""
    folder = tmp_path_factory.mktemp("shared") / "sketch"
    Trainer(small_config("pretrain", folder, "train.steps=2", "train.seed=7"), quiet=True).run()
    return folder


def towards_both(run: Path, teacher: Path, sketch: Path, *overrides: str) -> RunConfig:
    config = small_config(
        "dmd2", run, f"teachers.sketch={sketch}", "starts.fake=teacher_sketch", *DATA_FREE, *overrides, teacher=teacher
    )
    object.__setattr__(config, "method", TowardsSketches(gan_weight=0.0, steps=config.method.steps))  # type: ignore[attr-defined]
    return config


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_run_asks_saves_and_resumes_both(tmp_path: Path, quick_teacher: Path, sketch: Path) -> None:
    whole = Trainer(towards_both(tmp_path / "whole", quick_teacher, sketch, "train.steps=2"), quiet=True)
    assert equal(weights_of(whole.players.fake), weights_of(load_model(sketch).denoiser))
    assert set(whole.players) == {"teacher", "teacher_sketch", "generator", "fake"}
    state = json.loads((whole.run() / "state.json").read_text())
    assert Path(state["teachers"]["sketch"]).parents[1] == sketch
    for steps in (1, 2):
        config = towards_both(tmp_path / "parts", quick_teacher, sketch, f"train.steps={steps}")
        parts = Trainer(config, resume=steps == 2, quiet=True)
        parts.run()
    assert equal(weights_of(parts.trained["generator"]), weights_of(whole.trained["generator"]))
    alone = small_config("dmd2", tmp_path / "alone", *DATA_FREE, "train.steps=2", teacher=quick_teacher)
    trainer = Trainer(alone, quiet=True)
    state = json.loads((trainer.run() / "state.json").read_text())
    assert "teachers" not in state
    assert not equal(weights_of(trainer.trained["generator"]), weights_of(whole.trained["generator"]))


def test_a_resumed_run_refuses_a_teacher_that_has_changed(tmp_path: Path, quick_teacher: Path, sketch: Path) -> None:
    other, again = tmp_path / "sketch", tmp_path / "again"
    shutil.copytree(sketch, other)
    Trainer(towards_both(tmp_path / "run", quick_teacher, other, "train.steps=1"), quiet=True).run()
    shutil.rmtree(other)
    # Of the same length, so that the checkpoint has the same name.
    Trainer(small_config("pretrain", again, "train.steps=2", "train.seed=8"), quiet=True).run()
    shutil.copytree(again, other)
    with pytest.raises(UserError, match=r"teachers.sketch: .* holds other weights than when this run began"):
        plan(towards_both(tmp_path / "run", quick_teacher, other, "train.steps=2"), resume=True)


def test_a_resumed_run_takes_a_further_teacher_from_where_it_is_now(
    tmp_path: Path, quick_teacher: Path, sketch: Path
) -> None:
    shutil.copytree(sketch, tmp_path / "sketch")
    Trainer(towards_both(tmp_path / "run", quick_teacher, tmp_path / "sketch", "train.steps=1"), quiet=True).run()
    moved = (tmp_path / "sketch").rename(tmp_path / "moved")
    found = plan(towards_both(tmp_path / "run", quick_teacher, moved, "train.steps=2"), resume=True)
    assert found.teachers_source["sketch"].startswith(str(moved))


def test_memory_is_planned_and_counted_with_both(tmp_path: Path, quick_teacher: Path, sketch: Path) -> None:
    config = towards_both(tmp_path / "run", quick_teacher, sketch)
    assembly = assemble(plan(config, resume=None))
    needs = plan_memory(assembly.plan, assembly.iteration)
    each = module_bytes(load_model(sketch).denoiser)
    assert needs.players["teacher_sketch"].weights == needs.players["teacher"].weights == each
    first = advise(assembly.plan, assembly.iteration, needs, needs.total - each // 2)[0]
    assert first.startswith(("speed.teacher_dtype=bf16", "train.micro_batch_size"))
    findings = {finding.topic: finding.text for finding in examine_config(config)}
    assert "as predicted" in findings["teacher_sketch"]


def test_what_is_set_for_the_teacher_is_done_to_all(tmp_path: Path, quick_teacher: Path, sketch: Path) -> None:
    speed = ("speed.teacher_dtype=bf16", "speed.teacher_device=cpu")
    made = plan(towards_both(tmp_path / "run", quick_teacher, sketch, *speed), resume=None)
    assert [is_offloaded(teacher) for teacher in made.problem.all_teachers.values()] == [True, True]
    assert {teacher.runtime.autocast for teacher in made.problem.all_teachers.values()} == {torch.bfloat16}
    assert made.sha256 == plan(towards_both(tmp_path / "run", quick_teacher, sketch), resume=None).sha256


def test_a_start_alone_leaves_memory(tmp_path: Path, quick_teacher: Path, sketch: Path) -> None:
    starts = (f"teachers.sketch={sketch}", "starts.fake=teacher_sketch")
    config = small_config("dmd2", tmp_path / "run", *DATA_FREE, *starts, teacher=quick_teacher)
    trainer = Trainer(config, quiet=True)
    assert set(trainer.players) == {"teacher", "generator", "fake"}
    assert not trainer.problem.teachers
    assert equal(weights_of(trainer.players.fake), weights_of(load_model(sketch).denoiser))
    assert equal(weights_of(trainer.players.generator), weights_of(load_model(quick_teacher).denoiser))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["teachers.sketch={sketch}"], "dmd2 asks one teacher, and no player starts as teacher_sketch; leave it out"),
        (["starts.critic=teacher"], r"starts.critic: not a player that starts as a copy; choose from generator, fake"),
        (["starts.fake=sketch"], r"starts.fake = 'sketch': no such model; choose from teacher"),
        (["teachers.Bad={sketch}"], r"teachers.Bad"),
        (["teachers.sketch={sketch}/nowhere", "starts.fake=teacher_sketch"], "nowhere"),
    ],
    ids=["idle", "no player", "no model", "a name", "no place"],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, quick_teacher: Path, sketch: Path, overrides: list[str], said: str
) -> None:
    given = [text.format(sketch=sketch) for text in overrides]
    with pytest.raises(UserError, match=said):
        plan(small_config("dmd2", tmp_path / "run", *DATA_FREE, *given, teacher=quick_teacher), resume=None)


def test_a_teacher_does_not_take_a_player_s_name(tmp_path: Path, quick_teacher: Path, sketch: Path) -> None:
    class Own(TowardsSketches):
        def players(self, problem: Problem) -> dict[str, nn.Module]:
            made = super().players(problem)
            return {**made, "teacher_sketch": made["fake"]}

    config = towards_both(tmp_path / "run", quick_teacher, sketch)
    object.__setattr__(config, "method", Own(gan_weight=0.0))
    with pytest.raises(UserError, match=r"teachers.sketch: the method has its own player teacher_sketch; choose"):
        plan(config, resume=None)


def test_teachers_that_differ_are_refused(tmp_path: Path, quick_teacher: Path, teacher: Path) -> None:
    flow = ("model.path={name: flow}", "model.predicts=flow")
    Trainer(small_config("pretrain", tmp_path / "flow", "train.steps=1", *flow), quiet=True).run()
    given = (*DATA_FREE, f"teachers.other={tmp_path / 'flow'}", "starts.fake=teacher_other")
    with pytest.raises(UserError, match=r"teachers.other = .*: its path differs from that of `teacher`"):
        plan(small_config("dmd2", tmp_path / "run", *given, teacher=quick_teacher), resume=None)
    given = (*DATA_FREE, f"teachers.other={teacher}", "starts.generator=teacher_other")
    with pytest.raises(UserError, match=r"starts.generator = 'teacher_other': is another network than the student's"):
        plan(small_config("dmd2", tmp_path / "run", *given, teacher=quick_teacher), resume=None)


def test_a_start_that_predicts_otherwise_than_the_student_is_described_is_refused(
    tmp_path: Path, quick_teacher: Path
) -> None:
    """It would be saved, and loaded, as what it is not."""
    Trainer(small_config("pretrain", tmp_path / "x0", "train.steps=1", "model.predicts=x0"), quiet=True).run()
    given = (*DATA_FREE, f"teachers.other={tmp_path / 'x0'}")
    with pytest.raises(UserError, match=r"starts.generator = 'teacher_other': predicts x0 .* that predicts edm"):
        plan(
            small_config("dmd2", tmp_path / "run", *given, "starts.generator=teacher_other", teacher=quick_teacher),
            resume=None,
        )
    made = plan(
        small_config("dmd2", tmp_path / "run", *given, "starts.fake=teacher_other", teacher=quick_teacher), resume=None
    )
    assert made.players.fake.predicts == "x0"


def test_a_resumed_run_has_the_further_teachers_that_its_config_names_now(tmp_path: Path, quick_teacher: Path) -> None:
    def asked(*more: str) -> RunConfig:
        return small_config("dmd2", tmp_path / "run", *DATA_FREE, *more, teacher=quick_teacher)

    first = (f"teachers.sketch={quick_teacher}", "starts.fake=teacher_sketch")
    Trainer(asked(*first, "train.steps=1"), quiet=True).run()
    with pytest.raises(UserError, match=r"the config has changed since:(.|\n)*sketch"):
        plan(asked("train.steps=2"), resume=True)
    assert not plan(asked("train.steps=2"), resume=True, allow_changes=True).teachers_source
    other = (f"teachers.other={quick_teacher}", "starts.fake=teacher_other", "train.steps=2")
    assert set(plan(asked(*other), resume=True, allow_changes=True).teachers_source) == {"other"}


def test_a_player_of_another_kind_than_the_student_is_loaded_as_what_it_is(tmp_path: Path, quick_teacher: Path) -> None:
    Trainer(small_config("pretrain", tmp_path / "x0", "train.steps=1", "model.predicts=x0"), quiet=True).run()
    given = (*DATA_FREE, f"teachers.other={tmp_path / 'x0'}", "starts.fake=teacher_other", "train.steps=1")
    trainer = Trainer(small_config("dmd2", tmp_path / "run", *given, teacher=quick_teacher), quiet=True)
    state = json.loads((trainer.run() / "state.json").read_text())
    assert state["players"] == {"fake": {"predicts": "x0", "sigma_data": 0.75}}
    fake = load_players(tmp_path / "run").denoisers["fake"]
    x, t, cond = torch.randn(2, 1, 8, 8), torch.full((2,), 1.0), Cond(label=torch.tensor([3, 7]))
    assert torch.equal(fake(x, t, cond), trainer.players.fake(x, t, cond))
    again = small_config("dmd2", tmp_path / "again", *DATA_FREE, f"init={tmp_path / 'run'}", teacher=quick_teacher)
    assert plan(again, resume=None).players.fake.predicts == "x0"
    plain = Trainer(small_config("dmd2", tmp_path / "plain", *DATA_FREE, "train.steps=1", teacher=quick_teacher))
    assert "players" not in json.loads((plain.run() / "state.json").read_text())


def test_a_student_that_starts_as_a_further_teacher_is_guided_by_its_rule(tmp_path: Path, quick_teacher: Path) -> None:
    rule = "model.guidance_rule={name: renormalised}"
    Trainer(small_config("pretrain", tmp_path / "other", "train.steps=1", rule), quiet=True).run()
    given = (*DATA_FREE, f"teachers.other={tmp_path / 'other'}", "starts.generator=teacher_other", "train.steps=1")
    trainer = Trainer(small_config("dmd2", tmp_path / "run", *given, teacher=quick_teacher), quiet=True)
    trainer.run()
    student = load_model(tmp_path / "run")
    assert student.spec.model.guidance_rule == student.denoiser.runtime.guidance_rule == Renormalised()
    assert trainer.players.generator.runtime.guidance_rule == Renormalised()


def test_a_new_student_s_rule_is_its_teacher_s_unless_model_says_another(tmp_path: Path, quick_teacher: Path) -> None:
    def rule_of(*more: str) -> object:
        config = small_config(
            "tsm", tmp_path / "run", "guidance_rule={name: renormalised}", *more, teacher=quick_teacher
        )
        return plan(config, resume=None).spec.model.guidance_rule

    assert rule_of() == Renormalised()
    assert rule_of("model.guidance_rule={name: rescaled, share: 0.5}") == Rescaled(share=0.5)


def test_a_start_of_equal_shapes_and_another_meaning_is_refused(tmp_path: Path, quick_teacher: Path) -> None:
    for name, heads in (("two", 2), ("four", 4)):
        network = f"model.network={{name: dit, width: 16, depth: 1, heads: {heads}, patch: 4}}"
        Trainer(small_config("pretrain", tmp_path / name, "train.steps=1", network), quiet=True).run()
    given = (*DATA_FREE, f"teachers.other={tmp_path / 'four'}", "starts.generator=teacher_other")
    with pytest.raises(UserError, match=r"another network than the student's \(network.heads = 4 and not 2\)"):
        plan(small_config("dmd2", tmp_path / "run", *given, teacher=tmp_path / "two"), resume=None)


def test_a_teacher_whose_heads_are_not_those_of_init_is_no_start_of_its_student(
    tmp_path: Path, quick_teacher: Path
) -> None:
    """The student would be saved as what `init` is."""
    for name, heads in (("two", 2), ("four", 4)):
        network = f"model.network={{name: dit, width: 16, depth: 1, heads: {heads}, patch: 4}}"
        Trainer(small_config("pretrain", tmp_path / name, "train.steps=1", network), quiet=True).run()
    once = small_config("dmd2", tmp_path / "once", *DATA_FREE, "train.steps=1", teacher=tmp_path / "four")
    Trainer(once, quiet=True).run()
    given = (*DATA_FREE, f"init={tmp_path / 'once'}", "starts.generator=teacher")
    with pytest.raises(UserError, match=r"another network than the student's \(network.heads = 2 and not 4\)"):
        plan(small_config("dmd2", tmp_path / "run", *given, teacher=tmp_path / "two"), resume=None)


def test_configs_of_two_versions_of_diffusers_are_of_one_network(tmp_path: Path) -> None:
    """One of them leaves out what is as by default."""
    first, other = (save_stand_in("ddpm", tmp_path / name) for name in ("first", "other"))
    file = other / "unet" / "config.json"
    options = json.loads(file.read_text())
    for name in ("downsample_type", "upsample_type", "add_attention", "time_embedding_type", "dropout"):
        del options[name]
    file.write_text(json.dumps(options))
    np.savez(tmp_path / "data.npz", images=np.zeros((8, 8, 8, 3), np.uint8))
    given = (*DATA_FREE, f"data={{name: npz, path: {tmp_path / 'data.npz'}}}", "method.guidance=1")
    start = (f"teachers.other={other}", "starts.generator=teacher_other")
    config = small_config("dmd2", tmp_path / "run", *given, *start, teacher=first)
    assert plan(config, resume=None).spec.model.network.name == "diffusers"
    file.write_text(json.dumps(options | {"flip_sin_to_cos": False}))
    with pytest.raises(UserError, match=r"\(network.options.flip_sin_to_cos = False and not True\)"):
        plan(config, resume=None)
