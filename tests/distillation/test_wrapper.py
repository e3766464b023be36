"""Methods that hold another: which, how a config says so, and that the rest of the run stays the other's."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch

from diffdistill.distillation.method import METHODS, Method
from diffdistill.distillation.wrapper import Wrapper, default_base, methods_above
from diffdistill.methods.disback import DisBack
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.msd import MSD
from diffdistill.settings.schema import UserError, field, schema
from diffdistill.training.config import RunConfig, parse_config
from diffdistill.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]
HOOKS = {name for name, value in vars(Method).items() if not name.startswith("_") and name != "name"}


def parse(base: dict[str, object]) -> RunConfig:
    method = {"name": "disback", "base": base}
    return parse_config(
        {
            "run": "x",
            "teacher": "y",
            "method": method,
            "optimizers": {"default": {"lr": 1}},
            "train": {"steps": 1, "global_batch_size": 1},
        }
    )


def test_the_method_inside_is_a_config_like_any_other():
    method = parse({"name": "dmd2", "fake_updates": 3}).method
    assert isinstance(method, DisBack)
    assert method.base == DMD2(fake_updates=3)
    assert parse({"name": "sid"}).method.base.name == "sid"  # type: ignore[attr-defined]


def test_faults_of_the_method_inside_are_named_by_their_place():
    with pytest.raises(UserError, match=r"method.base.fake_update: unknown key; did you mean 'fake_updates'"):
        parse({"name": "dmd2", "fake_update": 3})


@pytest.mark.parametrize("name", ["disback", "msd"])
def test_no_method_holds_itself_or_one_that_could_hold_it(name: str):
    with pytest.raises(UserError, match=f"method.base.name = '{name}': unknown"):
        parse({"name": name})


def test_several_students_can_each_walk_a_path():
    assert isinstance(MSD(base=DisBack()).base, DisBack)


def test_only_methods_above_are_offered():
    names = list(METHODS.own)
    with pytest.raises(UserError, match=rf"choices: {', '.join(names[: names.index('disback')])}\)"):
        parse({"name": "msd"})


def test_a_method_of_others_can_be_held_but_never_hold_its_holder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(METHODS, "_registered", {})
    monkeypatch.setattr(METHODS, "_found", {})

    @METHODS.register
    @schema
    class Foreign(Wrapper):
        name: Literal["foreign"] = "foreign"
        base: methods_above("foreign") = field(default_factory=default_base)  # type: ignore[valid-type]

    held = parse({"name": "foreign", "base": {"name": "msd", "base": {"name": "dmd2"}}}).method
    assert isinstance(held, DisBack)
    assert isinstance(held.base, Foreign)
    assert DisBack(base=Foreign()).base == Foreign()
    with pytest.raises(UserError, match=r"method\.base: disback stands within itself"):
        parse({"name": "foreign", "base": {"name": "disback"}})
    with pytest.raises(UserError, match=r"base: disback stands within itself"):
        DisBack(base=Foreign(base=DisBack()))
    with pytest.raises(UserError, match=r"base\.name = 'foreign': unknown"):
        parse({"name": "foreign", "base": {"name": "foreign"}})


@pytest.mark.parametrize("hook", [*sorted(HOOKS), "added_later", "is_added_later"])
def test_every_hook_is_the_held_method_s_own(hook: str, monkeypatch: pytest.MonkeyPatch):
    default = property(lambda _: "a default") if hook == "is_added_later" else lambda *_: "a default"
    if hook not in HOOKS:
        monkeypatch.setattr(Method, hook, default, raising=False)
        monkeypatch.setattr(Wrapper, hook, None, raising=False)  # so that it is gone again after the test
        delattr(Wrapper, hook)

    class Answering(DMD2):
        """A method whose answers to this hook can be told from any other's."""

    is_value = isinstance(vars(Method)[hook], property)
    setattr(Answering, hook, property(lambda _: "own") if is_value else lambda self, *given: ("own", given))

    @schema
    class Quiet(Wrapper):
        name: Literal["quiet"] = "quiet"
        base: Method

    @schema
    class Further(Quiet):
        pass

    for holder in (Quiet(base=Answering()), Further(base=Quiet(base=Answering()))):
        answer = getattr(holder, hook)
        assert answer == "own" if is_value else answer(1, 2) == ("own", (1, 2))


def test_two_wrappers_that_change_nothing_change_no_bit(make_config: MakeConfig):
    plain = make_config("dmd2", "method.regression_weight=0.5", "method.regression_pairs=8", "train.steps=3")
    method = MSD(base=DisBack(base=plain.method, path_length=0), num_students=1)
    wrapped = replace(make_config("msd", "train.steps=3"), method=method)
    found = []
    for config in (plain, wrapped):
        trainer = Trainer(config, quiet=True)
        trainer.run()
        found.append({f"{p}.{k}": v for p, module in trainer.trained.items() for k, v in module.state_dict().items()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
