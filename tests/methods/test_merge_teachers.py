"""DMM: at rest at each teacher's own denoiser, its losses by hand, who is asked and told what, runs, exports."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig, small_config
from support.closed_forms import numbers, random
from support.method_matrix import origin, train
from support.ring import NUM_CLASSES, NUM_MODES, PATH, ring_means
from support.ring import STD as STD_OF_MODES
from support.tiny_players import BATCH, CLASSES, SHAPE, small_teacher
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser, freeze
from diffdistill.diffusion.path import EDM
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.time_distributions import LogNormal
from diffdistill.distillation.method import Batch, Players, Problem
from diffdistill.export.run import ExportOptions, write
from diffdistill.exported.image_generators import open_image_generator
from diffdistill.inference.image_generator import SampleRequest
from diffdistill.methods.merge_teachers import MergeTeachers
from diffdistill.models.load import load_model
from diffdistill.models.styles import at_style, parse_style, styles_of
from diffdistill.networks.analytic import Mixture, gaussian_denoiser, mixture_denoiser
from diffdistill.networks.diffusers_model import DiffusersNetwork
from diffdistill.networks.mlp import MLPConfig
from diffdistill.networks.styled import StyledConfig
from diffdistill.settings.schema import UserError
from diffdistill.training.trainer import Trainer

METHOD = MergeTeachers(width=8, class_dropout=0.5)
BASE = MLPConfig(width=16, blocks=2)
NAMES = ("photo", "line")


def other(seed: int) -> Denoiser:
    teacher, generator = small_teacher(), torch.Generator().manual_seed(seed)
    for parameter in teacher.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return freeze(teacher)  # type: ignore[return-value]


def scene(method: MergeTeachers = METHOD, **teachers: Denoiser) -> tuple[Players, dict[str, Tensor], Batch]:
    """Players, one step's numbers and real images, all float64; by default of two teachers beside the base."""
    teachers = teachers or {name: other(seed) for seed, name in enumerate(NAMES, 1)}
    torch.manual_seed(0)
    config = StyledConfig(base=BASE, styles=tuple(teachers), width=8)
    student = Denoiser(config.build(SHAPE, CLASSES, 0.1).double(), EDM(), "edm")
    problem = Problem(SHAPE, CLASSES, EDM(), teacher=small_teacher(), teachers=teachers, network=student)
    players = Players(**problem.all_teachers, **method.players(problem))
    draw = {
        name: value.double() if value.is_floating_point() else value
        for name, value in method.draw(StepRandom(0, 0, torch.arange(BATCH)), problem).items()
    }
    return players, draw, Batch(random(BATCH, *SHAPE, seed=9), Cond(label=torch.arange(BATCH) % CLASSES))


def asked_by_hand(players: Players, draw: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor, Cond]:
    label = torch.where(draw["is_dropped"], CLASSES, batch.cond.label)
    return batch.images + draw["t"][:, None, None, None] * draw["eps"], draw["t"], Cond(label=label)


def test_a_student_of_one_teacher_that_it_starts_as_has_no_loss():
    loss = METHOD.student_loss(*scene(replace(METHOD, feature_weight=1.0), base=small_teacher()))
    assert float(loss.total.detach()) < 1e-24


def test_the_loss_is_the_squared_error_in_eps_to_each_samples_own_teacher():
    """The student starts as `teacher`; the condition is dropped for both sides of the same samples."""
    players, draw, batch = scene()
    x_t, t, cond = asked_by_hand(players, draw, batch)
    assert 0 < int(draw["is_dropped"].sum()) < BATCH
    assert set(draw["style"].tolist()) == {0, 1}
    own = torch.stack([players.teacher_photo(x_t, t, cond), players.teacher_line(x_t, t, cond)])
    target = own[draw["style"], torch.arange(BATCH)]
    expected = ((players.teacher(x_t, t, cond) - target) ** 2 / t[:, None, None, None] ** 2).mean()
    found = METHOD.student_loss(players, draw, batch).total
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_features_add_the_mean_over_taps_of_their_squared_error():
    method = replace(METHOD, feature_weight=0.5, feature_taps=(0, 1))
    players, draw, batch = scene(method)
    plain = METHOD.student_loss(players, draw, batch).total
    asked = asked_by_hand(players, draw, batch)
    heard = [players[f"teacher_{name}"].features(*asked, taps=(0, 1)) for name in NAMES]
    started = players.teacher.features(*asked, taps=(0, 1))
    which = draw["style"], torch.arange(BATCH)
    apart = [((started[i] - torch.stack([one[i] for one in heard])[which]) ** 2).mean() for i in range(2)]
    loss = method.student_loss(players, draw, batch)
    torch.testing.assert_close(loss.total, plain + 0.5 * sum(apart) / 2, rtol=1e-10, atol=0)
    torch.testing.assert_close(loss.logs["features"], sum(apart) / 2, rtol=1e-10, atol=0)


class Told(Denoiser):
    """The exact denoiser of N(mean of the styles by their weights, STD^2), and `off` too much of it."""

    def __init__(self, off: float) -> None:
        super().__init__(gaussian_denoiser(EDM(), MEANS[0], torch.diag(STD**2)).net, EDM(), "x0")
        self.off = off

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond, **_: object) -> Tensor:  # type: ignore[override]
        assert cond.style is not None
        mean = cond.style @ MEANS + self.off
        return mean + STD**2 / (STD**2 + t[:, None] ** 2) * (x_t - mean)


MEANS, STD = torch.stack([numbers(-0.5, 0.3, 0.0), numbers(1.0, -2.0, 0.5)]), numbers(0.5, 1.1, 0.2)


def test_gaussian_teachers_have_the_student_of_their_styles_as_fixed_point_and_a_shift_costs_what_it_should():
    """Off by d the estimate is off by d t^2 / (s^2 + t^2): in eps d t / (s^2 + t^2), squared."""
    teachers = {
        name: gaussian_denoiser(EDM(), mean, torch.diag(STD**2)) for name, mean in zip(NAMES, MEANS, strict=True)
    }
    problem = Problem((3,), 0, EDM(), teacher=teachers["photo"], teachers=teachers)
    rng = StepRandom(0, 0, torch.arange(64))
    draw = {n: v.double() if v.is_floating_point() else v for n, v in METHOD.draw(rng, problem).items()}
    batch = Batch(random(64, 3))
    exact, off = (
        METHOD.student_loss(Players(**problem.all_teachers, student=Told(by)), draw, batch).total for by in (0.0, 0.1)
    )
    t = draw["t"][:, None]
    assert float(exact) < 1e-24
    torch.testing.assert_close(off, ((0.1 * t / (STD**2 + t**2)) ** 2).mean(), rtol=1e-8, atol=0)


def test_only_the_styles_that_are_drawn_learn_and_no_teacher_does():
    players, draw, batch = scene()
    net = players.student.net
    for parameter in net.layers[-1].parameters():
        parameter.data += 0.1  # as new it hides the vectors behind it
    for name in NAMES:
        players[f"teacher_{name}"].requires_grad_(True)
    METHOD.student_loss(players, {**draw, "style": torch.ones(BATCH, dtype=torch.int64)}, batch).total.backward()
    assert net.styles.grad is not None
    assert not net.styles.grad[0].any()
    assert net.styles.grad[1].any()
    assert all(parameter.grad is not None for parameter in players.student.parameters())
    assert all(parameter.grad is None for name in NAMES for parameter in players[f"teacher_{name}"].parameters())


def test_every_teacher_is_asked_at_each_step_also_without_a_sample():
    """Where processes hold parts of one, all of them must call it."""
    players, draw, batch = scene()
    counts: dict[str, int] = {}
    for name in NAMES:
        players[f"teacher_{name}"].net.register_forward_hook(
            lambda _, given, __, name=name: counts.update({name: len(given[0])})
        )
    draw["style"] = torch.zeros(BATCH, dtype=torch.int64)
    METHOD.student_loss(players, draw, batch)
    assert counts == {"photo": BATCH, "line": 1}


def test_teachers_that_cannot_be_merged_are_refused():
    with pytest.raises(UserError, match="teachers: merge_teachers needs further teachers"):
        METHOD.student_model(BASE, "edm", Problem(SHAPE, CLASSES, EDM(), teacher=small_teacher()))
    with pytest.raises(UserError, match=r"teachers.all: has no unconditional estimate"):
        scene(all=Denoiser(BASE.build(SHAPE, CLASSES, 0.0).double(), EDM(), "edm"))
    wide = Denoiser(MLPConfig(width=24, blocks=2).build(SHAPE, CLASSES, 0.1).double(), EDM(), "edm")
    scene(wide=wide)
    with pytest.raises(UserError, match=r"teachers.wide: its network differs"):
        scene(replace(METHOD, feature_weight=1.0), wide=wide)


# Mixtures by name


def test_a_mixture_is_read_by_names():
    assert parse_style("a", ("a", "b")) == {"a": 1, "b": 0}
    assert parse_style(" a=0.25, b=0.75", ("a", "b")) == {"a": 0.25, "b": 0.75}
    assert parse_style("a=1.5,b=-0.5", ("a", "b")) == {"a": 1.5, "b": -0.5}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("c", "no style 'c'; there are: a, b"),
        ("a=0.5", "sum to 0.5"),
        ("a=x", "'x' is no number"),
        ("a=nan,b=1", "'nan' is no number"),
        ("", "no style ''"),
    ],
)
def test_other_mixtures_are_refused(text: str, fault: str):
    with pytest.raises(UserError, match=fault):
        parse_style(text, ("a", "b"))


# The ring


def ring_of(scale: float) -> Denoiser:
    """The ring's teacher, of another radius."""
    classes = torch.arange(NUM_MODES) * NUM_CLASSES // NUM_MODES
    variances = torch.full((NUM_MODES,), STD_OF_MODES**2, dtype=torch.float64)
    return mixture_denoiser(PATH, torch.ones(NUM_MODES), scale * ring_means(), variances, classes)


def test_on_rings_of_two_radii_the_student_reaches_each_teacher():
    """Its error against a style's exact denoiser, over the distance between the two teachers."""
    teachers, method = (
        {"small": ring_of(0.6), "large": ring_of(1.2)},
        MergeTeachers(time_law=LogNormal(mean=-0.5, std=1.0), weight="x0", class_dropout=0.0),
    )
    torch.manual_seed(0)
    config = StyledConfig(base=MLPConfig(width=96, blocks=2), styles=tuple(teachers), width=16)
    student = Denoiser(config.build((2,), NUM_CLASSES, 0.0), PATH, "edm")
    problem = Problem((2,), NUM_CLASSES, PATH, teacher=ring_of(1.0), teachers=teachers)
    players = Players(**problem.all_teachers, student=student)
    optimizer = torch.optim.Adam(student.parameters(), lr=1.0)

    def real(step: int, count: int) -> tuple[StepRandom, Batch]:
        rng = StepRandom(3, step, torch.arange(step * count, (step + 1) * count))
        cond, mixture = Cond(label=rng.integers("real label", NUM_CLASSES)), ring_of(1.0).net
        assert isinstance(mixture, Mixture)
        return rng, Batch(mixture.sample(rng.uniform("real"), rng.normal("real normal", (2,)), cond).float(), cond)

    for step in range(200):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, 2 - step / 100)
        rng, batch = real(step, 128)
        optimizer.zero_grad()
        method.student_loss(players, method.draw(rng, problem), batch).total.backward()
        optimizer.step()
    rng, batch = real(10_000, 4000)
    t = method.time_law(rng.uniform("t"), PATH)
    x_t = PATH.diffuse(batch.images, rng.normal("eps", (2,)), t)
    with torch.no_grad():
        exact = [teacher(x_t, t, batch.cond).float() for teacher in teachers.values()]
        for number, target in enumerate(exact):
            told = replace(batch.cond, style=torch.eye(2)[number].expand(4000, 2))
            assert (student(x_t, t, told) - target).norm() < 0.25 * (exact[0] - exact[1]).norm()


# Runs


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another run's folder: of the same network, otherwise trained."""
    folder = tmp_path_factory.mktemp("shared") / "second"
    Trainer(small_config("pretrain", folder, "train.steps=2", "train.seed=7"), quiet=True).run()
    return folder


def of_two(make_config: MakeConfig, quick_teacher: Path, second: Path, *overrides: str):
    return make_config("merge_teachers", f"teachers={{photo: {quick_teacher}, line: {second}}}", *overrides)


def test_a_resumed_run_equals_one_that_was_not_stopped(make_config: MakeConfig, quick_teacher: Path, second: Path):
    whole = of_two(make_config, quick_teacher, second, "train.steps=4")
    parts = replace(whole, run=f"{whole.run}-parts", train=replace(whole.train, steps=2))
    first = Trainer(whole, quiet=True)
    first.run()
    Trainer(parts, quiet=True).run()
    resumed = Trainer(replace(parts, train=whole.train), resume=True, quiet=True)
    resumed.run()
    expected = first.trained["student"].state_dict()
    for name, value in resumed.trained["student"].state_dict().items():
        assert torch.equal(value, expected[name])


def test_a_resumed_run_keeps_the_numbers_of_its_styles(make_config: MakeConfig, quick_teacher: Path, second: Path):
    """The order of `teachers` is no setting: named in another order they are the same, and so are the weights."""
    whole = of_two(make_config, quick_teacher, second, "train.steps=4")
    parts = replace(whole, run=f"{whole.run}-parts", train=replace(whole.train, steps=2))
    first = Trainer(whole, quiet=True)
    first.run()
    Trainer(parts, quiet=True).run()
    for steps in (3, 4):  # the second time the checkpoint's own config has the other order
        teachers = {"line": str(second), "photo": str(quick_teacher)}
        again = replace(parts, teachers=teachers, train=replace(whole.train, steps=steps))
        resumed = Trainer(again, resume=True, quiet=True)
        resumed.run()
        assert styles_of(load_model(again.run).spec) == ("photo", "line")
    expected = first.trained["student"].state_dict()
    for name, value in resumed.trained["student"].state_dict().items():
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize("names", [("line", "photo"), ("photo", "drawing")])
def test_a_start_of_other_styles_is_refused(
    make_config: MakeConfig, quick_teacher: Path, second: Path, names: tuple[str, str]
):
    start = of_two(make_config, quick_teacher, second, "train.steps=1")
    Trainer(start, quiet=True).run()
    teachers = f"teachers={{{names[0]}: {quick_teacher}, {names[1]}: {second}}}"
    config = make_config("merge_teachers", teachers, f"init={start.run}")
    with pytest.raises(UserError, match=rf"init: its styles are photo, line; `teachers` names {names[0]}, {names[1]}"):
        Trainer(config, quiet=True)


@pytest.mark.parametrize("lora", [(), ("lora.default={rank: 2}",)], ids=["in full", "lora"])
def test_a_run_is_sampled_and_exported_by_style(
    make_config: MakeConfig, quick_teacher: Path, second: Path, tmp_path: Path, lora: tuple[str, ...]
):
    overrides = ("optimizers.default.lr=0.02", "ema=null", "train.preview_every=0", *lora)
    config = of_two(make_config, quick_teacher, second, *overrides)
    Trainer(config, quiet=True).run()
    student = load_model(config.run)
    assert styles_of(student.spec) == ("photo", "line")
    mixture = at_style(student, "photo=0.5,line=0.5")
    assert mixture.spec.model.network == load_model(quick_teacher).spec.model.network
    with pytest.raises(UserError, match="has no styles"):
        at_style(mixture, "photo")

    def images(place: str | Path, style: str | None) -> Tensor:
        return open_image_generator(str(place), SampleRequest(style=style, trusts_code=True))(torch.arange(3))

    made = {style: images(config.run, style) for style in ("photo", "line", "photo=0.5,line=0.5", None)}
    assert not torch.allclose(made["photo"], made["line"], atol=1e-4)
    torch.testing.assert_close(made[None], made["photo=0.5,line=0.5"], rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=r"has several styles \(photo, line\).*--style"):
        write(config.run, tmp_path / "none", ExportOptions())
    folder = tmp_path / "line"
    write(config.run, folder, ExportOptions(style="line"))
    torch.testing.assert_close(images(folder, None), made["line"].clamp(-1, 1), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="an exported folder has one style"):
        images(folder, "photo")


def test_a_student_of_a_pipelines_is_exported_as_one_of_diffusers(tmp_path: Path):
    place = origin("sd", "merge_teachers", tmp_path / "teacher")
    run = train("merge_teachers", place, tmp_path / "run", f"teachers={{one: {place}, two: {place}}}", "train.steps=1")
    written = write(str(run), tmp_path / "out", ExportOptions(kind="stock", style="two"))
    assert written.kind == "stock"
    net = load_model(tmp_path / "out").denoiser.net
    assert isinstance(net, DiffusersNetwork)
