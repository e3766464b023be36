"""What a folder says of how its sentences are embedded is what is done with it, or it is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffdistill.models.sentence_encoder import SentenceEncoder
from diffdistill.settings.schema import UserError

MODULES = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling", "Normalize")]


def encoder(folder: Path, *, pooling: Any = None, modules: Any = None) -> SentenceEncoder:
    (folder / "1_Pooling").mkdir()
    if pooling is not None:
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if modules is not None:
        (folder / "modules.json").write_text(json.dumps(modules))
    return SentenceEncoder(str(folder))


@pytest.mark.parametrize(
    "pooling",
    [None, {}, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, {"pooling_mode": "mean"}],
)
def test_the_mean_of_the_tokens_is_taken(tmp_path: Path, pooling: Any) -> None:
    encoder(tmp_path, pooling=pooling, modules=MODULES).refuse_other_embeddings()


@pytest.mark.parametrize(
    ("pooling", "said"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "pools by cls_token; only the mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "pools by cls_token, mean_tokens;"),
        ({"pooling_mode": "lasttoken"}, "pools by lasttoken;"),
    ],
)
def test_another_pooling_is_refused(tmp_path: Path, pooling: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        encoder(tmp_path, pooling=pooling).refuse_other_embeddings()


def test_a_further_layer_is_refused(tmp_path: Path) -> None:
    dense = [*MODULES, {"type": "sentence_transformers.models.Dense"}]
    with pytest.raises(UserError, match=r"has 'sentence_transformers\.models\.Dense', .* Transformer, Pooling, Norm"):
        encoder(tmp_path, modules=dense).refuse_other_embeddings()


@pytest.mark.parametrize("modules", [3, {"a": 1}, [1], "x"])
def test_a_list_of_modules_that_is_none_is_one_error(tmp_path: Path, modules: Any) -> None:
    with pytest.raises(UserError, match="text_encoder = "):
        encoder(tmp_path, modules=modules).refuse_other_embeddings()
