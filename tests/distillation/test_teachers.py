"""Several named teachers, and players whose start is named rather than guessed."""

from collections.abc import Mapping

import pytest
import torch
from support.tiny_players import BATCH, CLASSES, PATH, SHAPE, small_teacher
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser, freeze
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.losses import zero_nonfinite
from diffdistill.distillation.method import Batch, Draw, Players, Problem
from diffdistill.distillation.score_distillation import condition, generate, matching_field
from diffdistill.methods.dmd2 import DMD2
from diffdistill.networks.lora import LoRASettings
from diffdistill.settings.schema import UserError, schema


def other_teacher(seed: int) -> Denoiser:
    """Another network of the same shape."""
    teacher, generator = small_teacher(), torch.Generator().manual_seed(seed)
    for parameter in teacher.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    teacher = freeze(teacher)  # type: ignore[assignment]
    return teacher


TEACHERS = {"photo": other_teacher(1), "line": other_teacher(2)}


def problem_of(
    initial: Mapping[str, Denoiser] | None = None, starts: Mapping[str, str] | None = None, **lora: LoRASettings
) -> Problem:
    teacher = small_teacher()
    return Problem(
        SHAPE, CLASSES, PATH, teacher=teacher, teachers=TEACHERS, initial=initial or {}, starts=starts or {}, lora=lora
    )


@schema
class ToTheirMean(DMD2):
    """DMD2 against the mean of all teachers' estimates; its fake score starts as the one called "photo"."""

    def players(self, problem: Problem) -> dict[str, nn.Module]:
        return problem.copies("generator", "fake", starts={"fake": "teacher_photo"})

    @torch.no_grad()
    def field(self, players: Players, draw: Draw, x: Tensor) -> Tensor:
        t, x_t = draw["t"], players.teacher.path.diffuse(x, draw["eps"], draw["t"])
        asked = condition(players, draw, role="teacher")
        teachers = [module for name, module in players.items() if name.partition("_")[0] == "teacher"]
        mean = torch.stack([teacher(x_t, t, asked) for teacher in teachers]).mean(0)
        fake = players.fake(x_t, t, condition(players, draw, role="fake"))
        return zero_nonfinite(matching_field(x, fake, mean, minimum=self.normaliser_minimum))


def same(first: nn.Module, second: nn.Module) -> bool:
    weights = second.state_dict()
    return all(torch.equal(value, weights[name]) for name, value in first.state_dict().items())


def test_a_method_can_match_the_mean_of_several_teachers() -> None:
    method, problem = ToTheirMean(gan_weight=0.0), problem_of()
    assert list(problem.all_teachers) == ["teacher", "teacher_photo", "teacher_line"]
    players = Players(**problem.all_teachers, **method.players(problem))
    draw = method.draw(StepRandom(0, 0, torch.arange(BATCH)), problem)
    draw = {name: value.double() if value.is_floating_point() else value for name, value in draw.items()}
    x = generate(players, draw, method.steps)
    x_t, cond = PATH.diffuse(x, draw["eps"], draw["t"]), Cond(label=draw["label"])
    first, second, third = (problem.all_teachers[name](x_t, draw["t"], cond) for name in problem.all_teachers)
    expected = matching_field(x, second, (first + second + third) / 3, minimum=1e-5)  # the fake score is the second
    torch.testing.assert_close(method.field(players, draw, x), expected.detach(), rtol=1e-10, atol=1e-12)
    method.generator_loss(players, draw, Batch(torch.empty(0))).total.backward()
    learned = {name for name, p in players.items() if any(w.grad is not None for w in p.parameters())}
    assert learned == {"generator"}


def test_a_player_starts_as_the_model_that_is_named_for_it() -> None:
    initial = {"generator": other_teacher(3), "fake": other_teacher(4)}
    named = {"generator": "init.fake", "fake": "teacher_line", "target": "teacher"}
    problem = problem_of(initial, named)
    made = problem.copies("generator", "fake", "target")
    assert same(made["generator"], initial["fake"])
    assert same(made["fake"], TEACHERS["line"])
    assert problem.teacher is not None
    assert same(made["target"], problem.teacher)
    assert all(parameter.requires_grad for module in made.values() for parameter in module.parameters())


def test_the_problem_s_word_goes_before_the_method_s() -> None:
    problem = problem_of(starts={"fake": "teacher"})
    assert problem.teacher is not None
    assert same(ToTheirMean(gan_weight=0.0).players(problem)["fake"], problem.teacher)


def test_a_lone_model_is_no_longer_everybody_s_start_where_roles_are_named() -> None:
    lone = {"teacher": other_teacher(5)}
    guessed = problem_of(lone).copies("generator", "fake")
    assert all(same(module, lone["teacher"]) for module in guessed.values())
    problem = problem_of(lone, {"fake": "teacher"})
    made = problem.copies("generator", "fake")
    assert same(made["generator"], lone["teacher"])
    assert problem.teacher is not None
    assert same(made["fake"], problem.teacher)


def test_a_name_of_no_model_is_refused_with_the_choices() -> None:
    choices = "teacher, teacher_photo, teacher_line, init.fake"
    problem = problem_of({"fake": other_teacher(3)}, {"fake": "photo"})
    with pytest.raises(UserError, match=f"starts.fake = 'photo': no such model; choose from {choices}"):
        problem.copies("fake")


def test_factors_stand_over_the_run_s_one_teacher_alone() -> None:
    with pytest.raises(UserError, match=r"starts.fake = 'teacher_photo': LoRA is applied to the teacher"):
        problem_of(starts={"fake": "teacher_photo"}, fake=LoRASettings(rank=1)).copies("fake")
    assert problem_of(starts={"fake": "teacher"}, fake=LoRASettings(rank=1)).copies("fake")
