"""The editors' schema takes what is read, also what stands over a base, and underlines what is missing."""

import json
from typing import Any

import pytest

from diffdistill.settings.values import parse_yaml, read_yaml
from diffdistill.training.config import json_schema, packaged_configs

SCHEMA = json.loads(json_schema())
KINDS = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "number": (int, float)}


def fits(value: Any, schema: Any) -> bool:
    """By the words of JSON Schema that decide on keys and kinds; limits of numbers and patterns are left out."""
    if schema is True or ("$ref" in schema and fits(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")])):
        return True
    if "$ref" in schema:
        return False
    if "if" in schema and not fits(value, schema["then" if fits(value, schema["if"]) else "else"]):
        return False
    if "anyOf" in schema and not any(fits(value, one) for one in schema["anyOf"]):
        return False
    if "oneOf" in schema and sum(fits(value, one) for one in schema["oneOf"]) != 1:
        return False
    if ("const" in schema and value != schema["const"]) or ("enum" in schema and value not in schema["enum"]):
        return False
    if schema.get("type") in KINDS and not isinstance(value, KINDS[schema["type"]]):
        return False
    if isinstance(value, list):
        return all(fits(one, schema.get("items", True)) for one in value)
    return not isinstance(value, dict) or _keys_fit(value, schema)


def _keys_fit(value: dict[str, Any], schema: dict[str, Any]) -> bool:
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    return set(schema.get("required", ())) <= value.keys() and all(
        (others is not False if key not in known and isinstance(others, bool) else fits(one, known.get(key, others)))
        for key, one in value.items()
    )


def test_it_takes_every_packaged_config() -> None:
    assert [name for name, file in packaged_configs().items() if not fits(read_yaml(file), SCHEMA)] == []


WHOLE = "run: a\nmethod: {name: dmd2}\noptimizers: {default: {lr: 1}}\ntrain: {steps: 1, global_batch_size: 8}\n"
OVER = "base: dmd2/digits\n"


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        (WHOLE, True),
        (WHOLE.replace("lr: 1", "eps: 1"), False),
        (WHOLE.replace("steps: 1, ", ""), False),
        (WHOLE.replace("run: a\n", ""), False),
        (OVER, True),
        (OVER + "method: {fake_updates: 4}\noptimizers: {generator: {eps: 1}}\ntrain: {steps: 7}\n", True),
        (OVER + "method: {fake_updatez: 4}\n", False),
        (OVER + "train: {stepz: 7}\n", False),
        (OVER + "data: {name: image_folder, split: test}\n", False),
        (OVER + "stepz: 7\n", False),
    ],
)
def test_over_a_base_nothing_is_required_and_the_keys_are_known(text: str, is_right: bool) -> None:
    assert fits(parse_yaml(text, origin="x"), SCHEMA) == is_right
