"""Loading a model draws no bar of another library, and downloads keep theirs."""

from pathlib import Path

import diffusers.utils.logging as of_diffusers
import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from safetensors.torch import load_file, save_file
from support.stand_ins import save_sentence_encoder
from transformers.utils import logging as of_transformers

from diffdistill.models.loading_bars import turn_off_loading_bars
from diffdistill.models.sentence_encoder import SentenceEncoder
from diffdistill.settings.schema import UserError


def test_bars_of_loading_are_off_and_those_of_downloads_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    had = (
        of_diffusers.is_progress_bar_enabled(),
        of_transformers.is_progress_bar_enabled(),
        are_progress_bars_disabled(),
    )
    of_diffusers.enable_progress_bar()
    of_transformers.enable_progress_bar()
    try:
        turn_off_loading_bars()
        assert not of_diffusers.is_progress_bar_enabled()
        assert not of_transformers.is_progress_bar_enabled()
        assert are_progress_bars_disabled() == had[2]
    finally:
        if had[0]:
            of_diffusers.enable_progress_bar()


def test_a_sentence_encoder_whose_file_has_a_pooling_layer_loads_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """That layer is none of the embedding's. A weight that is missing would be drawn at random, and is refused."""
    SentenceEncoder(str(save_sentence_encoder(tmp_path / "encoder"))).load()
    assert "pooler" not in caplog.text
    file = tmp_path / "encoder" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "attention.self.query" not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks the weights encoder\.layer\.0\.attention\.self\.query\.bias, "):
        SentenceEncoder(str(tmp_path / "encoder")).load()
