"""Cards are written as PyYAML and libyaml would write them, byte for byte."""

import random
from typing import Any

import pytest
import yaml

from diffdistill.eval.board import card_yaml
from diffdistill.eval.board.card_yaml import write_yaml

TEXTS = (
    *(
        "yes",
        "No",
        "a",
        "b c",
        "x: y",
        "# c",
        "- d",
        "1",
        "1.0",
        "1e5",
        "2020-01-01",
        "",
        "é",
        "a  b",
        "a ",
        "~",
        "null",
    ),
    *("@x", "a,b", "a (b)", "it's", 'q"', "a:b", "long " * 30, "w" * 130, "k" * 110, "n", "a #b", "tab\tx", "line\nx"),
    *("[x]", "{a}", "=", "<<", "0x1f", "1_000", "12:30:00", "±", "%x", "!t", "&a", "*b", "|", ">", "? x", "a?b", "a:"),
    *(".inf", "model 1", "protocol digits (abc123), 1 NFE, seeds 0, 1", "a\u2028b", "\x7f"),
)
NUMBERS = (0, -5, 10**18, True, False, None, 0.25, 3.0, -0.0, 1e22, 1e16, 1.5e-8, 123456789012345680.0)


def any_value(rng: random.Random, depth: int) -> Any:
    kind = rng.random() if depth else 1.0
    if kind < 0.3:
        return {rng.choice(TEXTS): any_value(rng, depth - 1) for _ in range(rng.randrange(4))}
    if kind < 0.55:
        return [any_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return rng.choice([rng.choice(TEXTS), rng.choice(NUMBERS), rng.random()])


def test_any_value_is_written_as_pyyaml_writes_it() -> None:
    rng = random.Random(0)
    for _ in range(400):
        value = [any_value(rng, 4)]
        made = write_yaml(value)
        assert made == card_yaml._slowly(value), value
        assert repr(yaml.safe_load(made)) == repr(value)


def test_a_model_s_card_does_not_go_the_slow_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(value: Any) -> str:
        raise AssertionError(value)

    monkeypatch.setattr(card_yaml, "_slowly", refuse)
    metrics = [{"type": "fd", "name": "FD (digits)", "value": 0.125, "args": {"values": [0.1, 0.15], "std": None}}]
    made = write_yaml({"model-index": [{"name": "model 7", "results": [{"metrics": metrics}]}]})
    assert made.startswith("model-index:\n- name: model 7\n  results:\n  - metrics:\n    - type: fd\n")
