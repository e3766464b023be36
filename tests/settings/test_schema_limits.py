"""Every number of a config, walked through its schema: at its limit, beyond it, and where people use it."""

import math
import random
import tracemalloc
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
from conftest import small_config

from diffdistill.diffusion.guidance.policies import AnyPolicy
from diffdistill.eval.protocols.protocol import Protocol
from diffdistill.eval.records.record import Record
from diffdistill.export.record import ExportRecord
from diffdistill.models.load import Students
from diffdistill.models.spec import ModelSpec
from diffdistill.settings import limits
from diffdistill.settings.limits import faults_of
from diffdistill.settings.registry import OneOf
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import apply_overrides, dump, validate
from diffdistill.training.config import RunConfig, parse_config

Leaf = tuple[tuple[str, ...], Any]


def leaves(kind: Any, place: tuple[str, ...] = (), seen: tuple[Any, ...] = ()) -> Iterator[Leaf]:
    """Every number and list of a schema, with its annotations; a choice is followed by its `name`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        inner, *marks = arguments
        if inner in (int, float) or get_origin(inner) is tuple:
            yield place, kind
        for choice in (choice for mark in marks if isinstance(mark, OneOf) for choice in mark.own_classes()):
            yield from leaves(choice, place, seen)
        yield from leaves(inner, place, seen) if inner not in (int, float) else ()
    elif kind in (int, float):
        yield place, kind
    elif is_dataclass(kind) and kind not in seen:
        for name, hint in get_type_hints(kind, include_extras=True).items():
            if name in {field.name for field in fields(kind)}:
                chosen = getattr(kind, "name", None)
                yield from leaves(hint, (*place, f"{chosen or ''}.{name}"), (*seen, kind))
    elif origin is dict:
        yield from leaves(arguments[1], (*place, "generator"), seen)
    elif origin is not None:
        for argument in dict.fromkeys(arguments):
            if argument is not Ellipsis:
                yield from leaves(argument, place, seen)


def distinct() -> list[Leaf]:
    """Each setting of each class once, at the least deep of its places."""
    found: dict[tuple[str, str], Leaf] = {}
    for place, kind in sorted(leaves(RunConfig), key=lambda leaf: len(leaf[0])):
        found.setdefault((place[-1], str(kind)), (place, kind))
    return list(found.values())


def schemas(kind: Any, found: dict[Any, None]) -> None:
    """Every schema class within a type, its own included."""
    if isinstance(kind, type) and hasattr(kind, "__pydantic_validator__") and kind not in found:
        found[kind] = None
        for hint in get_type_hints(kind, include_extras=True).values():
            schemas(hint, found)
    for argument in get_args(kind):
        for inner in argument.own_classes() if isinstance(argument, OneOf) else [argument]:
            schemas(inner, found)


def own_leaves() -> list[tuple[Any, str, Any]]:
    """Each number and list that stands in a class of a config, a protocol, a record, a checkpoint or an export."""
    found: dict[Any, None] = {}
    for root in (RunConfig, Protocol, Record, ModelSpec, ExportRecord, Students, AnyPolicy):
        schemas(root, found)
    return [
        (cls, place[0].rpartition(".")[2], kind)
        for cls in found
        for place, kind in leaves(cls)
        if len(place) == 1
        and (place[0].rpartition("_")[2], kind) != ("taps", int)  # its limits are the network's blocks
    ]


LEAVES = distinct()
NAMES = [".".join(step.strip(".") for step in place) for place, _ in LEAVES]
NO_INTEGERS = (2**63, 10**30, -(10**30), 1e101)
NO_NUMBERS = (1e101, -1e300, 1.7e308, float("inf"), float("-inf"), float("nan"), 10**400, -(10**101))


def put(data: dict[str, Any], place: tuple[str, ...], value: object) -> str:
    """Set a value deep in a config, choosing on the way what has it. Returns its dotted place."""
    names = []
    for number, step in enumerate(place):
        chosen, _, name = step.rpartition(".")
        if chosen:
            data.setdefault("name", chosen)
            if data["name"] != chosen:
                data.clear()
                data["name"] = chosen
        names.append(name)
        if number == len(place) - 1:
            data[name] = value
        else:
            inside = data.get(name)
            data[name] = inside = dict(inside) if isinstance(inside, dict) else {}
            data = inside
    return ".".join(names)


BASE = dump(small_config("dmd2", Path("run"), teacher=Path("teacher")))


def base_config() -> dict[str, Any]:
    found: dict[str, Any] = deepcopy(BASE)
    return found


@pytest.mark.parametrize(
    ("place", "kind"), LEAVES, ids=lambda value: ".".join(value) if isinstance(value, tuple) else ""
)
def test_every_setting_has_a_limit_and_says_so_by_its_name(place: tuple[str, ...], kind: Any) -> None:
    is_number = kind is float or (get_origin(kind) is Annotated and get_args(kind)[0] is float)
    rng = random.Random(".".join(place))
    for value in (*rng.sample(NO_NUMBERS if is_number else NO_INTEGERS, 2), far_number(rng, is_number=is_number)):
        data = base_config()
        named = put(data, place, value)
        with pytest.raises(UserError) as caught:
            parse_config(data, origin="here")
        assert named.rpartition(".")[2] in str(caught.value), value


def far_number(rng: random.Random, *, is_number: bool) -> float:
    """Beyond what any number of a config may be, on one side or the other."""
    sign = rng.choice((-1, 1))
    if not is_number:
        return sign * (2**63 + rng.getrandbits(rng.randrange(1, 200)))
    return sign * 10.0 ** rng.uniform(math.log10(limits.MAX_NUMBER) + 1e-9, 308.0)


def bounds(kind: Any) -> dict[str, float]:
    """The limits that a setting's own type says."""
    told = [one for info in getattr(kind, "__metadata__", ()) for one in getattr(info, "metadata", (info,))]
    keys = ("ge", "gt", "le", "lt", "max_length")
    return {name: getattr(one, name) for one in told for name in keys if getattr(one, name, None) is not None}


OWN = own_leaves()


SAMPLES: dict[str, Any] = {
    "trackers": "tensorboard",
    "styles": "a style",
    "stages": {"segments": 1},
    "targets": "to_q",
    "metrics": {"name": "diversity", "features": {"name": "pixels"}},
    "seeds": [0, 1],
    "students": "runs/a",
}
"""What stands in lists of something else than numbers."""


def beyond(name: str, kind: Any) -> dict[str, Any]:
    """For each limit of a setting the first value that it refuses. Every number must have two, and every list one."""
    inner = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    limit = bounds(kind)
    if get_origin(inner) is tuple:
        assert Ellipsis not in get_args(inner) or "max_length" in limit, "how many?"
        item = SAMPLES.get(name, 0.5 if bounds(get_args(inner)[0]).get("lt") == 1 else 1)
        return {key: [item] * (int(length) + 1) for key, length in limit.items() if key == "max_length"}
    assert {"ge", "gt"} & set(limit), "how small?"
    assert {"le", "lt"} & set(limit), "how large?"
    step = max((getattr(info, "multiple_of", 0) for info in kind.__metadata__[0].metadata), default=0) or 1
    first = {
        "ge": lambda least: least - step if inner is int else math.nextafter(least, -math.inf),
        "le": lambda most: most + step if inner is int else math.nextafter(most, math.inf),
    }
    return {key: first.get(key, lambda value: value)(value) for key, value in limit.items()}


@pytest.mark.parametrize(("cls", "name", "kind"), OWN, ids=lambda value: getattr(value, "__name__", str(value))[:40])
def test_every_number_and_list_says_its_own_limits_and_what_is_beyond_is_refused_by_them(
    cls: Any, name: str, kind: Any
) -> None:
    chosen = {"name": cls.name} if hasattr(cls, "name") else {}
    for key, value in beyond(name, kind).items():
        limit = bounds(kind)[key]
        for tried in (value, [value], [value, value], [[value, value]]):  # where the number is one of several
            with pytest.raises(UserError) as caught:
                validate(cls, chosen | {name: tried}, origin="here")
            if any(says(line, name, value, limit) for line in str(caught.value).split("\n")):
                break
        else:
            pytest.fail(f"{key} = {limit} is not said of {value}")


def says(line: str, name: str, value: object, limit: float) -> bool:
    """Whether a fault's line names the setting, its value where it is one number, and the limit."""
    limits_said = (f"{limit:g}", f"{limit}", f"{limit:,}", "at most 63")
    number_said = isinstance(value, list) or f" = {value!r}" in line
    is_scale = "must be a finite number, or a range" in line  # beyond MAX_NUMBER, where another sentence comes first
    return name in line and (is_scale or (number_said and any(said in line for said in limits_said)))


@pytest.mark.parametrize(
    ("place", "kind"), LEAVES, ids=lambda value: ".".join(value) if isinstance(value, tuple) else ""
)
def test_a_value_at_its_limit_is_a_config_or_a_fault_and_takes_no_memory(place: tuple[str, ...], kind: Any) -> None:
    for value in (limit for name, limit in bounds(kind).items() if name in ("ge", "le")):
        data = base_config()
        put(data, place, value)
        tracemalloc.start()
        try:
            parse_config(data, origin="here")
        except UserError:
            pass  # it does not fit the rest of the config, and is named
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 2**25, f"{value}: {peak:,} bytes"


def test_the_walk_has_found_the_schema_s_numbers() -> None:
    names = {place[-1].rpartition(".")[2] for place, _ in LEAVES}
    assert len(LEAVES) > 150
    assert names >= {
        "steps",
        "lr",
        "resolution",
        "num_steps",
        "guidance",
        "channels",
        "width",
        "depth",
        "betas",
        "rank",
    }


@pytest.mark.parametrize(
    "override",
    [
        *(
            "train.steps=1000000",
            "train.steps=500000000",
            "train.global_batch_size=32768",
            "train.seed=9223372036854775807",
        ),
        *("optimizers.generator.lr=1e38", "method.regression_pairs=1000000", "ema.halflife_images=2e9"),
        *("data={name: image_folder, path: x, resolution: 4096}", "model.network={name: dit, width: 8192, depth: 64}"),
    ],
)
def test_what_people_use_stays_allowed(override: str) -> None:
    data = apply_overrides(base_config() | {"model": {"network": {"name": "mlp"}}}, [override])
    said = ""
    try:
        parse_config(data, origin="here")
    except UserError as error:  # dmd2's rules for models and data
        said = str(error)
    assert "less than" not in said
    assert "at most" not in said


def test_lists_and_texts_beyond_all_are_named() -> None:
    assert faults_of({"a": {"b": [0] * (limits.MAX_ITEMS + 1)}}) == [
        "a.b: holds 1,000,001 values; at most 1,000,000 are read"
    ]
    assert faults_of({"a": ["x" * (limits.MAX_TEXT + 1)]})[0].startswith("a[0]: a text of 1,048,577 characters")
    with pytest.raises(
        UserError, match=r"here: 1 fault\n  a = 1267650600228229401496703205376: an integer of 101 bits"
    ):
        validate(dict[str, int], {"a": 2**100}, origin="here")
