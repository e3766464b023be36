"""The table of where each recipe's settings come from, and the recipes: each holds the other."""

import shlex
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path as FilePath
from typing import Any

import pytest

from diffdistill.methods.disback import DisBack
from diffdistill.settings.values import read_yaml
from diffdistill.training.config import RunConfig, find_config, load_config

TABLE = FilePath(__file__).parents[2] / "docs" / "provenance.yaml"
HOME = find_config("dmd2/digits").parent.parent
OURS = ("digits", "mnist")  # recipes on these images are this project's own in every field
RECIPES = sorted(
    str(file.relative_to(HOME).with_suffix("")) for file in HOME.glob("*/*.yaml") if not file.name.startswith(OURS)
)
KINDS = {"published", "implementation", "ours"}
ELSEWHERE = {"base", "run", "teacher", "init", "data", "health", "speed"}
CHANGES_NOTHING = {f"train.{name}" for name in ("micro_batch_size", "log_every", "preview_every", "checkpoint_every")}
DEEP = ("optimizers", "method.base")
"""Groups whose members are looked at field by field as well."""


def fields_of(recipe: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """What a recipe's file says, by dotted place: a law, a sampler or a list of stages is one value."""
    for key, value in recipe.items():
        here = f"{place}.{key}" if place else key
        is_group = not place or place == "optimizers" or here in DEEP
        if here in ELSEWHERE | CHANGES_NOTHING or here.endswith(("method.name", "base.name")):
            continue
        if is_group and isinstance(value, Mapping):
            yield from fields_of(value, here)
        else:
            yield here, value


def differences(recipe: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where a recipe's file and its entry in the table do not say the same."""
    written, listed = dict(fields_of(recipe)), [pair for group in groups.values() for pair in group.items()]
    named = [place for place, _ in listed]
    twice = [f"{place}: twice in the table" for place in sorted({place for place in named if named.count(place) > 1})]
    table = dict(listed)
    return twice + [
        f"{place}: {written.get(place, 'nothing')!r} in the recipe, {table.get(place, 'nothing')!r} in the table"
        for place in sorted(written.keys() | table.keys())
        if place not in written or place not in table or written[place] != table[place]
    ]


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    return read_yaml(TABLE)


def recipe_of(name: str) -> dict[str, Any]:
    return read_yaml(find_config(name))


def test_every_recipe_but_those_on_digits_and_mnist_is_in_the_table(table: dict[str, Any]) -> None:
    assert sorted(table["recipes"]) == RECIPES
    assert len(RECIPES) > 45


@pytest.mark.parametrize("name", RECIPES)
def test_the_table_says_what_the_recipe_says(table: dict[str, Any], name: str) -> None:
    assert differences(recipe_of(name), table["recipes"][name]) == []


def test_every_source_has_a_kind_and_a_place_and_is_used(table: dict[str, Any]) -> None:
    for name, source in table["sources"].items():
        assert source["kind"] in KINDS, name
        assert source["place"], name
    used = {source for groups in table["recipes"].values() for source in groups}
    assert used == set(table["sources"])


def test_what_a_header_calls_its_own_is_not_claimed_by_another(table: dict[str, Any]) -> None:
    """ "bf16 is ours" and the like."""
    for name, groups in table["recipes"].items():
        text = find_config(name).read_text().replace("\n# ", " ")
        if "bf16 is ours" in text:
            assert groups["ours"]["train.precision"] == "bf16", name
        if "bf16 is theirs" in text:
            assert "train.precision" not in groups.get("ours", {}), name


@pytest.mark.parametrize("name", RECIPES)
def test_a_change_of_any_field_on_either_side_is_found(table: dict[str, Any], name: str) -> None:
    recipe, groups = recipe_of(name), table["recipes"][name]
    for source, group in groups.items():
        for place in group:
            changed = deepcopy(groups)
            changed[source][place] = "another"
            assert [place] == [said.partition(":")[0] for said in differences(recipe, changed)]
            del changed[source][place]
            assert [place] == [said.partition(":")[0] for said in differences(recipe, changed)]
    for place in dict(fields_of(recipe)):
        changed_recipe = deepcopy(recipe)
        *path, last = place.split(".")
        inner: Any = changed_recipe
        for key in path:
            inner = inner[key]
        inner[last] = "another"
        assert [place] == [said.partition(":")[0] for said in differences(changed_recipe, groups)]


def test_a_field_that_only_the_recipe_has_is_found(table: dict[str, Any]) -> None:
    recipe = recipe_of("dmd2/sd15")
    recipe["method"]["alpha_power"] = 1
    assert differences(recipe, table["recipes"]["dmd2/sd15"]) == [
        "method.alpha_power: 1 in the recipe, 'nothing' in the table"
    ]


# Numbers that follow from others


def method_and_config(name: str, *overrides: str) -> tuple[Any, RunConfig]:
    config = load_config(find_config(name), list(overrides))
    return config.method, config


@pytest.mark.parametrize(
    ("name", "iterations"), [("dmd2/cifar10", 5), ("f_distill/cifar10", 5), ("f_distill/imagenet64", 5)]
)
def test_fastgen_s_averages_forget_by_iterations_of_which_one_in_five_is_the_generator_s(
    name: str, iterations: int
) -> None:
    """Its callback multiplies by 0.9999 in every iteration: by the fifth power between updates of the generator."""
    method, config = method_and_config(name)
    assert method.fake_updates == iterations - 1
    assert config.ema is not None
    between = config.train.global_batch_size * method.fake_updates  # images, here, from one update to the next
    assert 0.5 ** (between / config.ema.halflife_images) == pytest.approx(0.9999**iterations, rel=1e-8)
    assert (
        config.train.steps * iterations
        == method.fake_updates * {2048: 100_000, 512: 600_000}[config.train.global_batch_size]
    )


@pytest.mark.parametrize("name", ["mean_flow/cifar10", "scm/imagenet64"])
def test_averages_of_methods_with_one_update_are_0_9999(name: str) -> None:
    _, config = method_and_config(name)
    assert config.ema is not None
    assert 0.5 ** (config.train.global_batch_size / config.ema.halflife_images) == pytest.approx(0.9999, rel=1e-8)


def test_mean_flow_warms_up_for_200_epochs_of_cifar10() -> None:
    _, config = method_and_config("mean_flow/cifar10")
    assert config.optimizer("generator").warmup_steps == 200 * 50_000 // config.train.global_batch_size


@pytest.mark.parametrize(
    "name", ["dmd2/cifar10", *(f"f_distill/{n}" for n in ("cifar10", "imagenet64", "sd15", "sdxl"))]
)
def test_fastgen_clips_the_generator_alone(name: str) -> None:
    _, config = method_and_config(name)
    assert config.optimizer("generator").clip_norm == 10
    assert config.optimizer("fake").clip_norm is config.optimizer("discriminator").clip_norm is None


DROP_NOTHING = ("dmd2", "f_distill", "disback", "msd", "scm")


@pytest.mark.parametrize("name", [name for name in RECIPES if name.partition("/")[0] in DROP_NOTHING])
def test_students_and_fake_scores_drop_nothing_where_their_authors_build_them_so(name: str) -> None:
    """Whatever their teacher dropped: the setting is written out for every player that is a network like it."""
    method, config = method_and_config(name)
    trained = {player for update in method.updates for player in update.players} - {"discriminator", "weight"}
    assert config.dropout == dict.fromkeys(trained, 0.0)
    assert "generator" in trained


def test_mean_flow_drops_a_fifth_and_sid_what_its_teacher_drops() -> None:
    assert method_and_config("mean_flow/cifar10")[1].dropout == {"generator": 0.2}
    for name in ("sid/cifar10", "sid/sida_cifar10", "sid/imagenet64"):
        assert method_and_config(name)[1].dropout == {}
        assert "Players keep its dropout" in find_config(name).read_text().replace("\n# ", " ")


def test_disback_s_targets_last_a_thousand_of_the_base_s_iterations() -> None:
    for method in (DisBack(), *(method_and_config(f"disback/{name}")[0] for name in ("cifar10", "imagenet64"))):
        assert method.backtracking_interval * method.base.fake_updates == 1000
        assert method.recording_lr == 5e-7


def test_dmd2_by_lora_is_of_the_generator_at_an_eighth_and_its_header_s_words_are_overrides() -> None:
    text = find_config("dmd2/sdxl").read_text().replace("\n# ", " ")
    said = shlex.split(text.partition("at a rate of 5e-5: ")[2].partition(". Images")[0])
    assert len(said) == 3
    _, config = method_and_config("dmd2/sdxl", *said)
    lora = config.lora["generator"]
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.alpha / lora.rank) == (64, 8, 1 / 8)
    assert set(config.lora) == {"generator"}
    assert (config.optimizer("generator").lr, config.train.steps) == (5e-5, 16_000)
