"""scripts/bench_features.py judges small images in a process of their own, and tells its peak."""

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_an_evaluation_s_peak_of_memory_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from bench_features import memory

    [(name, mib)] = memory((8,)).items()
    assert name == "8 images"
    assert 50 < mib < 4096  # torch alone takes some hundred
