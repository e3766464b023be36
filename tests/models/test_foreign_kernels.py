"""A config.json that names a kernel of the hub would have transformers fetch and run it."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffdistill.models.sentence_encoder import SentenceEncoder
from diffdistill.models.teachers import pipeline
from diffdistill.settings.schema import UserError

KEYS: list[dict[str, Any]] = [
    {"attn_implementation": "stranger/kernel"},
    {"_attn_implementation": "stranger/kernel@main:attention"},
    {"text_config": {"attn_implementation": {"": "stranger/kernel"}}},
    {"experts_implementation": "stranger/kernel"},
]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertModel(transformers.BertConfig(vocab_size=10, **sizes)).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("named", KEYS)
def test_kernels_of_the_hub_are_refused_before_transformers_sees_them(bert: Path, named: dict[str, Any]) -> None:
    file = bert / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    with pytest.raises(UserError, match="names a program of the hub, which is not run"):
        pipeline.load_model_of("BertModel", bert, library="transformers")
    with pytest.raises(UserError, match="names a program of the hub, which is not run"):
        SentenceEncoder(str(bert)).load()


def test_attention_of_torch_itself_may_be_named(bert: Path) -> None:
    file = bert / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attn_implementation": "eager"}))
    assert pipeline.load_model_of("BertModel", bert, library="transformers") is not None
