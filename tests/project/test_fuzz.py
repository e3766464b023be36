"""Whatever is in a file, it is read or refused. The first cases are what fuzzing has found, kept."""

from pathlib import Path

import fuzz
import pytest
from fuzz import READERS, Fuzzer

EXAMPLES = 40  # a reader

FOUND = {
    "no JSON": ("state.json", b"{\n}9"),
    "no text": ("state.json", b"\xff\xfe"),
    "nothing": ("state.json", b""),
    "a huge integer": ("state.json", b'{"step": ' + b"9" * 4400 + b"}"),
    "a step of the wrong kind": ("state.json", b'{"step": true}'),
    "a negative step": ("state.json", b'{"step": -1}'),
    "a list for a state": ("state.json", b"[]"),
    "a student of the wrong kind": ("state.json", b'{"step": 1, "student": 7, "model": {}}'),
    "no student": ("state.json", b'{"step": 1}'),
    "depth": ("state.json", b"[" * 100_000),
    "depth in the manifest": ("manifest.json", b"[" * 100_000),
    "another folder's file": ("manifest.json", b'{"files": {"../x": ""}, "self": ""}'),
    "a header that is too large": ("players.safetensors", b"\xff" * 16),
    "a header that is cut": ("players.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    return Fuzzer("checkpoint", tmp_path_factory.mktemp("fuzz") / "checkpoint")


@pytest.mark.parametrize("case", FOUND)
def test_a_hostile_checkpoint_is_refused(checkpoint: Fuzzer, case: str) -> None:
    name, content = FOUND[case]
    before = checkpoint.refused
    checkpoint.feed(name.encode() + b"\n" + content)
    assert checkpoint.refused == before + 1


@pytest.mark.parametrize("name", READERS)
def test_changed_files_are_read_or_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Fuzzer
) -> None:
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path))
    fuzzer = checkpoint if name == "checkpoint" else Fuzzer(name, tmp_path / "fuzz")
    before = fuzzer.refused
    for good in fuzzer.seeds:
        fuzzer.feed(good)
    assert fuzzer.refused == before
    fuzzer.run(EXAMPLES)
    assert (fuzzer.refused > before) == fuzzer.reader.refuses


@pytest.mark.full
@pytest.mark.parametrize("name", READERS)
def test_two_minutes_of_changed_files_are_read_or_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path))
    assert fuzz.feed_for(120, Fuzzer(name, tmp_path / "fuzz"), least=1000) >= 1000
