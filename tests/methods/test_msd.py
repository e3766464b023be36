"""MSD: who gets which classes, what one student sees, and that several students are one model."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.closed_forms import random
from support.method_matrix import config_of, origin
from support.ring import INIT_RATIO, NUM_CLASSES, TIME_LAW, measure_ring, ring_teacher, trained_generator
from support.tiny_players import CLASSES, SHAPE, small_teacher
from torch import Tensor, nn
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.data.source import TensorImages
from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.prompt_table import PromptTable
from diffdistill.diffusion.router import ClassRouter, QuadrantRouter, RoutedDenoiser, by_student, fit_quadrants
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distillation.method import Problem
from diffdistill.distillation.partition import AnyPartition, KMeans, LabelRanges, Quadrants, class_means, equal_kmeans
from diffdistill.eval.evaluation.setup import EvalOptions, set_up
from diffdistill.inference.draw import sample_images
from diffdistill.inference.image_generator import ModelImageGenerator, SampleRequest
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.msd import MSD
from diffdistill.models.load import ROUTER, find_checkpoint, join_students, load_model
from diffdistill.settings.schema import UserError
from diffdistill.training.config import RunConfig
from diffdistill.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]

RULES: list[tuple[AnyPartition, int]] = [
    (LabelRanges(), 2),
    (LabelRanges(), 3),
    (KMeans(), 2),
    (KMeans(), 3),
    (Quadrants(), 4),
]


def looks(num_classes: int, seed: int = 0, each: int = 3) -> TensorImages:
    """Images [C, 2, 2] of classes that look different."""
    means = random(num_classes, 1, 2, 2, seed=seed).float()
    return TensorImages(means.repeat(each, 1, 1, 1), torch.arange(num_classes).repeat(each))


def problem(num_classes: int, classes: tuple[int, ...] = ()) -> Problem:
    return Problem((1, 2, 2), num_classes, EDM(), classes=classes)


# Partitions


@pytest.mark.parametrize("num_classes", [4, 7, 10, 11, 100])
@pytest.mark.parametrize(("rule", "cells"), RULES, ids=lambda value: getattr(value, "name", value))
def test_every_class_has_one_student_and_their_numbers_of_classes_differ_by_at_most_one(rule, cells, num_classes):
    source = looks(num_classes)
    given = [
        MSD(num_students=cells, student_index=k, partition=rule).classes(problem(num_classes), source)
        for k in range(cells)
    ]
    assert sorted(label for part in given for label in part) == list(range(num_classes))
    assert max(map(len, given)) - min(map(len, given)) <= 1


def test_label_ranges_are_consecutive_as_the_paper_s_on_imagenet():
    cells = LabelRanges()(1000, 4, looks(1))
    assert cells.tolist() == 250 * [0] + 250 * [1] + 250 * [2] + 250 * [3]


def test_kmeans_keeps_clusters_of_equal_size_together():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]], dtype=torch.float64)
    truth = torch.tensor([0, 1, 2, 2, 1, 0, 0, 2, 1])
    cells = equal_kmeans(centres[truth] + 0.1 * random(9, 2), 3)
    assert [{int(cell) for cell in cells[truth == k]} for k in range(3)] == [{int(cells[k])} for k in range(3)]
    assert len(cells.unique()) == 3


def test_kmeans_moves_a_point_where_clusters_are_of_unequal_size():
    points = torch.tensor([[0.0], [0.1], [0.2], [0.3], [9.0], [10.0]], dtype=torch.float64)
    assert equal_kmeans(points, 2)[[3, 4, 5]].unique().numel() == 1


def test_quadrants_split_the_first_axis_and_then_each_half():
    # Long in x, and no more of y on one side than on the other: the axes are x and y. The halves' lower medians in y
    # are -3 and -1, so that one threshold for both would leave a single point below on the right.
    left, right = [[-9, y] for y in (-3.5, -3, 1, 5.5)], [[9, y] for y in (-5.5, -1, 3, 3.5)]
    points = torch.tensor(left + right, dtype=torch.float64)
    assert fit_quadrants(points).cell(points).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_tie_on_a_quadrant_s_threshold_falls_below():
    router = QuadrantRouter(mean=(0.0, 0.0), axes=((1.0, 0.0), (0.0, 1.0)), thresholds=(0.0, 1.0, -1.0))
    points = torch.tensor([[0.0, 1.0], [0.0, 1.1], [0.1, -1.0], [0.1, -0.9]])
    assert router.cell(points).tolist() == [0, 1, 2, 3]


def test_a_quadrant_router_gives_every_embedding_a_student():
    router = fit_quadrants(random(40, 5))
    far = torch.cat([1e6 * random(500, 5, seed=1), torch.zeros(1, 5)])
    assert set(router(Cond(pooled_text=far)).tolist()) == {0, 1, 2, 3}


def test_class_means_are_of_the_first_images_of_each_class():
    images = torch.arange(8.0).reshape(8, 1, 1, 1)
    means = class_means(TensorImages(images, torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])), 2, 3)
    assert means.tolist() == [[2.0], [3.0]]


def test_data_without_labels_or_without_a_class_has_no_class_means():
    images = torch.zeros(2, 1, 1, 1)
    with pytest.raises(UserError, match="data: has no labels"):
        class_means(TensorImages(images, None), 2, 3)
    with pytest.raises(UserError, match="no image of class 1"):
        class_means(TensorImages(images, torch.zeros(2, dtype=torch.int64)), 2, 3)


def test_what_cannot_be_shared_out_is_refused():
    with pytest.raises(ValueError, match="student_index = 2: must be below num_students = 2"):
        MSD(num_students=2, student_index=2)
    with pytest.raises(UserError, match="num_students = 3: too many for 2 classes"):
        MSD(num_students=3).classes(problem(2), looks(2))
    with pytest.raises(UserError, match="there are four quadrants"):
        MSD(num_students=2, partition=Quadrants()).classes(problem(10), looks(10))


# One student


def test_a_student_draws_its_own_classes_evenly_and_together_they_draw_all():
    method = DMD2(gan_weight=0.0)
    drawn = []
    for k in range(3):
        student = MSD(base=method, num_students=3, student_index=k)
        here = problem(10, student.classes(problem(10), looks(10)))
        label = student.draw(StepRandom(0, 0, torch.arange(4000)), here)["label"]
        share = torch.bincount(label, minlength=10) / 4000
        assert set(label.unique().tolist()) == set(here.classes)
        drawn.append(share * len(here.classes) / 10)
    # The mixture of the students' laws, by their numbers of classes, is the uniform law of the teacher.
    torch.testing.assert_close(sum(drawn), torch.full((10,), 0.1), atol=0.012, rtol=0)  # five standard errors


def test_every_student_has_the_pairs_of_all_classes():
    base = DMD2(gan_weight=0.0, regression_weight=0.25, regression_pairs=40)
    teacher = small_teacher().float()
    own = Problem(SHAPE, CLASSES, teacher.path, teacher=teacher, classes=(1,))
    student = MSD(base=base, num_students=3, student_index=1)
    full, kept = base.prepare(replace(own, classes=()), seed=0), student.prepare(own, seed=0)
    assert all(torch.equal(full[name], kept[name]) for name in full)
    assert set(kept["label"].tolist()) == set(range(CLASSES))
    assert set(student.draw(StepRandom(0, 0, torch.arange(400)), own)["pair"].tolist()) == set(range(40))


def players(config: RunConfig) -> dict[str, Tensor]:
    trainer = Trainer(config, quiet=True)
    trainer.run()
    return {f"{name}.{k}": v for name, module in trainer.trained.items() for k, v in module.state_dict().items()}


def test_one_student_is_the_base_method_bit_for_bit(make_config: MakeConfig):
    plain, single = players(make_config("dmd2")), players(make_config("msd", "method.num_students=1"))
    assert plain.keys() == single.keys()
    assert all(torch.equal(plain[name], single[name]) for name in plain)


def test_a_student_s_real_images_are_of_its_classes(make_config: MakeConfig):
    trainer = Trainer(make_config("msd", "method.student_index=1"))
    seen = torch.cat([trainer.plan.real(first, 64)[1].label for first in range(0, 640, 64)])  # type: ignore[misc]
    assert set(seen.tolist()) == {5, 6, 7, 8, 9}


def test_a_resumed_student_equals_one_that_was_not_stopped(make_config: MakeConfig):
    whole = players(make_config("msd", "train.steps=4"))
    config = make_config("msd", "train.steps=2")
    players(config)
    resumed = Trainer(replace(config, train=replace(config.train, steps=4)), resume=True, quiet=True)
    resumed.run()
    parts = {f"{name}.{k}": v for name, module in resumed.trained.items() for k, v in module.state_dict().items()}
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


# Several students as one model


@pytest.fixture(scope="module")
def students(make_config: MakeConfig) -> list[Path]:
    """The runs of two students, of classes 0 to 4 and 5 to 9."""
    configs = [make_config("msd", f"method.student_index={k}", "optimizers={default: {lr: 1e-2}}") for k in range(2)]
    for config in configs:
        Trainer(config, quiet=True).run()
    return [Path(config.run) for config in configs]


def test_a_joined_model_makes_each_class_by_its_own_student(students: list[Path], tmp_path: Path):
    join_students(tmp_path / "all", students)
    whole = load_model(tmp_path / "all")
    mixed = sample_images(whole, count=40)  # classes in turn
    for k, place in enumerate(students):
        alone = load_model(place)
        every = replace(alone, spec=replace(alone.spec, classes=()))
        rows = torch.arange(40) % 10 // 5 == k
        # The same noise and class; only the batch's size differs, which changes how float32 sums are ordered.
        torch.testing.assert_close(mixed[rows], sample_images(every, count=40)[rows], rtol=0, atol=1e-5)
    assert not torch.allclose(mixed[:5], sample_images(every, count=40)[:5], atol=1e-3)


def test_a_joined_model_of_digits_is_judged_by_the_digits_protocol(students: list[Path], tmp_path: Path):
    join_students(tmp_path / "all", students)
    assert set_up([str(tmp_path / "all")], EvalOptions()).protocol.name == "digits-pixels"


def test_another_student_s_weights_change_no_bit_of_the_rest(students: list[Path], tmp_path: Path):
    join_students(tmp_path / "all", students)
    before = load_model(tmp_path / "all")
    after = load_model(tmp_path / "all")
    for parameter in after.denoiser.students[1].parameters():  # type: ignore[union-attr]
        parameter.mul_(1.1)
    first, second = (sample_images(model, count=40) for model in (before, after))
    is_first = torch.arange(40) % 10 < 5
    assert torch.equal(first[is_first], second[is_first])
    assert not torch.equal(first[~is_first], second[~is_first])


def test_students_that_are_all_the_teacher_are_the_teacher():
    teacher = ring_teacher()
    routed = RoutedDenoiser([teacher, teacher], ClassRouter(table=(0, 1, 1, 0)))
    x, t, label = random(64, 2), torch.linspace(0.1, 3, 64, dtype=torch.float64), torch.arange(64) % NUM_CLASSES
    for w in (0.0, 1.0, 2.5, torch.linspace(0, 3, 64)):
        expected = teacher(x, t, Cond(label=label), guidance=w)
        torch.testing.assert_close(routed(x, t, Cond(label=label), guidance=w), expected, rtol=1e-12, atol=1e-12)


def test_both_estimates_of_a_guided_sample_are_of_its_own_student():
    first, second = small_teacher(), small_teacher()
    for parameter in second.parameters():
        parameter.mul_(0.5)
    routed = RoutedDenoiser([first, second], ClassRouter(table=(0, 1, 1)))
    x, t, cond = random(3, *SHAPE), torch.full((3,), 2.0, dtype=torch.float64), Cond(label=torch.tensor([0, 1, 2]))
    null = routed.unconditional(cond)
    expected = torch.cat(
        [
            student(x[i : i + 1], t[:1], cond[i : i + 1], guidance=0.0)
            for i, student in enumerate([first, second, second])
        ]
    )
    torch.testing.assert_close(routed(x, t, cond, guidance=0.0), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(routed(x, t, null), expected, rtol=1e-10, atol=1e-10)  # what a policy asks


def test_the_class_router_is_a_total_function():
    router = ClassRouter(table=(1, 0, 1))
    assert router(Cond(label=torch.tensor([0, 1, 2, 3, 4]))).tolist() == [1, 0, 1, 0, 1]
    with pytest.raises(ValueError, match="has no label"):
        router(Cond())


def test_rows_keep_their_places():
    which, values = torch.tensor([2, 0, 2, 1]), torch.arange(4.0)
    assert by_student(which, lambda k, rows: 10 * k + values[rows]).tolist() == [20, 1, 22, 13]


def test_a_folder_of_students_can_be_moved(students: list[Path], tmp_path: Path):
    for k, place in enumerate(students):
        (tmp_path / "here").mkdir(exist_ok=True)
        (tmp_path / "here" / str(k)).symlink_to(find_checkpoint(place))
    join_students(tmp_path / "here", [tmp_path / "here" / str(k) for k in range(2)])
    (tmp_path / "here").rename(tmp_path / "there")
    assert load_model(tmp_path / "there").spec.num_classes == 10


def test_the_command_joins_and_the_folder_is_sampled(students: list[Path], tmp_path: Path):
    made = CliRunner().invoke(app, ["join", *map(str, students), "--out", str(tmp_path / "all")])
    assert made.exit_code == 0, made.output
    drawn = CliRunner().invoke(
        app, ["sample", str(tmp_path / "all"), "--count", "10", "--out", str(tmp_path / "x.png")]
    )
    assert drawn.exit_code == 0, drawn.output
    assert (tmp_path / "x.png").exists()


def test_a_student_alone_is_sampled_in_its_own_classes(students: list[Path]):
    model = load_model(students[1])
    images = [
        sample_images(model, count=10),
        *(sample_images(model, count=10, label=k)[k - 5 :: 5] for k in range(5, 10)),
    ]
    for k in range(5):
        torch.testing.assert_close(images[0][k::5], images[1 + k], rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="unknown class; the model knows 5, 6, 7, 8, 9"):
        sample_images(model, count=1, label=0)


def test_students_that_share_a_class_or_leave_one_out_are_refused(students: list[Path], tmp_path: Path):
    with pytest.raises(UserError, match="class 0 belongs to"):
        join_students(tmp_path, [students[0], students[0]])
    with pytest.raises(UserError, match="no student has the classes 0, 1, 2, 3, 4"):
        join_students(tmp_path, [students[1]])


def test_students_of_different_networks_are_refused(students: list[Path], teacher: Path, tmp_path: Path):
    with pytest.raises(UserError, match="network, image shape or sampler"):
        join_students(tmp_path, [students[0], teacher])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router": {"name": "classes", "table": [0, 2]}}, "the router names student 2, of 2 students"),
        ({"format": 2}, "format = 2: choose from 1"),
        ({"students": []}, "students"),
    ],
)
def test_a_faulty_router_is_one_message(students: list[Path], tmp_path: Path, change: dict[str, object], message: str):
    file = join_students(tmp_path, students)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load_model(tmp_path)


def test_a_router_that_is_no_json_is_one_message(tmp_path: Path):
    (tmp_path / ROUTER).write_text("{")
    with pytest.raises(UserError, match=r"router.json: not valid JSON"):
        load_model(tmp_path)


def test_several_students_are_no_teacher(students: list[Path], tmp_path: Path, make_config: MakeConfig):
    join_students(tmp_path, students)
    with pytest.raises(UserError, match="holds joined students"):
        Trainer(make_config("dmd2", f"teacher={tmp_path}"))


# The stages


def test_the_adversarial_stage_starts_from_the_student_of_the_stage_before(make_config: MakeConfig):
    first = make_config("msd", "method.base.gan_weight=0", "optimizers={default: {lr: 1e-2}}")
    Trainer(first, quiet=True).run()
    left = load_file(find_checkpoint(Path(first.run)) / "ema.safetensors")
    second = Trainer(make_config("msd", f"init={first.run}", f"teacher={first.teacher}"))
    start = second.trained["generator"].state_dict()
    assert all(torch.equal(value, left[f"generator.{name}"]) for name, value in start.items())
    assert "discriminator" in second.trained


# On the ring


def on_the_ring(student_index: int) -> MSD:
    base = DMD2(
        steps=FewSteps(init_ratio=INIT_RATIO),
        fake_updates=3,
        gan_weight=0.0,
        generator_time_law=TIME_LAW,
        fake_time_law=TIME_LAW,
    )
    return MSD(base=base, num_students=2, student_index=student_index)


class Together(nn.Module):
    """Two generators of the ring behind the router of their classes."""

    def __init__(self, generators: list[nn.Module], router: ClassRouter) -> None:
        super().__init__()
        self.generators, self.router = nn.ModuleList(generators), router

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return by_student(self.router(cond), lambda k, rows: self.generators[k](x[rows], t[rows], cond[rows]))


@pytest.mark.full
def test_two_students_of_half_the_classes_each_learn_the_ring():
    generators = [trained_generator(on_the_ring(k), num_steps=400) for k in range(2)]
    result = measure_ring(Together(generators, ClassRouter(table=(0, 0, 1, 1))))
    assert result.passes, result


def test_a_student_of_the_ring_knows_nothing_of_the_other_classes():
    generator = trained_generator(on_the_ring(0), num_steps=20)
    result = measure_ring(Together([generator, generator], ClassRouter(table=(0, 0, 1, 1))))
    assert not result.passes


# Prompts


def prompt_table(pooled: bool = True) -> PromptTable:
    """Twelve prompts in four heaps, in an order of their own, and the empty one."""
    corners = torch.tensor([[-4.0, -1], [-4, 1], [4, -1], [4, 1]])
    heaps = corners[torch.arange(12) % 4] + 0.1 * random(12, 2).float()
    if pooled:
        return PromptTable([Cond(pooled_text=heaps)], Cond(pooled_text=torch.zeros(1, 2)))
    filling = 100 * random(12, 2, seed=5).float()
    tokens = torch.stack([heaps + 1, heaps - 1, filling], 1)
    mask = torch.tensor([1, 1, 0]).repeat(12, 1)
    return PromptTable([Cond(text=tokens, text_mask=mask)], Cond(text=torch.zeros(1, 3, 2), text_mask=mask[:1]))


@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "tokens"])
def test_prompts_are_parted_by_their_embeddings_and_the_router_agrees(pooled: bool):
    teacher = small_teacher()
    teacher.run_with(conditions=prompt_table(pooled))
    asked = Problem(SHAPE, 12, EDM(), teacher=teacher)
    methods = [MSD(num_students=4, student_index=i, partition=Quadrants()) for i in range(4)]
    cells = [method.classes(asked, TensorImages(torch.zeros(1, *SHAPE), None)) for method in methods]
    assert sorted(label for cell in cells for label in cell) == list(range(12))
    assert {frozenset(label % 4 for label in cell) for cell in cells} == {frozenset({i}) for i in range(4)}
    routers = [method.router(asked) for method in methods]
    assert all(router == routers[0] for router in routers)
    assert routers[0] is not None
    which = routers[0](prompt_table(pooled).rows(torch.arange(12)))
    assert all(which[list(cell)].tolist() == [i] * 3 for i, cell in enumerate(cells))


def test_quadrants_of_prompts_need_four_students_and_as_many_prompts():
    teacher = small_teacher()
    teacher.run_with(conditions=prompt_table())
    asked = Problem(SHAPE, 12, EDM(), teacher=teacher)
    with pytest.raises(UserError, match="num_students = 2: there are four quadrants"):
        MSD(num_students=2, partition=Quadrants()).router(asked)
    assert MSD(num_students=2, partition=LabelRanges()).router(asked) is None
    assert MSD(num_students=1, partition=Quadrants()).router(asked) is None
    teacher.run_with(conditions=PromptTable([Cond(pooled_text=torch.eye(2))], Cond(pooled_text=torch.zeros(1, 2))))
    with pytest.raises(UserError, match="too many for 2 prompts"):
        MSD(num_students=4, partition=Quadrants()).router(asked)


def test_four_students_of_prompts_are_joined_and_each_prompt_is_its_own_students(tmp_path: Path):
    place = origin("sdxl", "msd", tmp_path / "teacher")
    partition = "method.partition={name: quadrants}"
    overrides = ("method.num_students=4", partition, "train.steps=1", "ema=null", "optimizers.default.lr=0.1")
    runs = [tmp_path / str(i) for i in range(4)]
    for number, run in enumerate(runs):
        config = config_of("msd", place, run, f"method.student_index={number}", *overrides)
        captions = Path(config.data.path)  # type: ignore[attr-defined]
        for i, file in enumerate(sorted(captions.glob("*.txt"))):
            file.write_text(f"{'a red fox' if i % 2 else 'two blue birds'}, number {i}")
        Trainer(config, quiet=True).run()
    joined = load_model(join_students(tmp_path / "joined", runs).parent)
    students = [load_model(run) for run in runs]
    assert students[0].spec.classes == ()
    with pytest.raises(UserError, match="give all four"):
        join_students(tmp_path / "half", runs[:2])
    denoiser = joined.denoiser
    assert isinstance(denoiser, RoutedDenoiser)
    asked = SampleRequest(prompts=("a red fox", "two blue birds", "a hat", "snow"))
    images = ModelImageGenerator(joined, asked)(torch.arange(4))
    which = denoiser.which(Cond(label=torch.arange(4))).tolist()
    for i, number in enumerate(which):
        alone = ModelImageGenerator(students[number], asked)(torch.arange(4))
        torch.testing.assert_close(images[i], alone[i], rtol=0, atol=1e-4)
    null = denoiser.unconditional(Cond(label=torch.arange(4)))
    assert denoiser.which(null).tolist() == which
