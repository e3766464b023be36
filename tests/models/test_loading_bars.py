"""Loading a model draws no bar of another library, and downloads keep theirs."""

import diffusers.utils.logging as of_diffusers
import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging as of_transformers

from diffdistill.models.loading_bars import turn_off_loading_bars


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
