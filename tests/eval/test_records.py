"""Records: written whole or not at all, read strictly, ranked together only under one protocol."""

import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.made_records import MEASURED

from diffdistill.eval.records.record import (
    append_record,
    parse_record,
    protocol_id,
    read_records,
)
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import dump


def changed(**changes: Any) -> str:
    """The record's line with other top-level fields."""
    return json.dumps(dump(MEASURED) | changes)


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    for name in ("first", "zweiter ü"):
        append_record(tmp_path / "new" / "records.jsonl", replace(MEASURED, name=name))
    found = read_records(tmp_path / "new" / "records.jsonl")
    assert found == [replace(MEASURED, name="first"), replace(MEASURED, name="zweiter ü")]


def test_repeats_keep_their_min_mean_and_sample_deviation() -> None:
    values = MEASURED.metrics["fd-pixels"]
    assert (values.min, values.mean, values.std) == (0.15, pytest.approx(0.2), pytest.approx(0.05))
    assert MEASURED.metrics["recall"].std is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (changed(schema=2), "schema = 2: this version reads schema 1"),
        (changed(metrics={"fd-pixels": {"values": [float("nan")]}}), "NaN is not JSON"),
        (changed(name="x" * 201), "name"),
        (changed(colour="red"), "colour: unknown key"),
        (changed(seed="0"), "seed = '0'"),
        (changed(seed=True), "seed = True"),
        (changed(kind="rumoured"), "kind = 'rumoured': choose from 'measured' or 'reported'"),
        (changed(metrics={}), "metrics"),
        (changed(metrics={"A metric": {"values": [1.0], "min": 1.0, "mean": 1.0, "std": None}}), "metrics"),
        (changed(metrics={"is": {"values": [1.0, 2.0], "min": 0.5, "mean": 1.5, "std": 0.7}}), "min = 0.5: of"),
        (changed(metrics={"is": {"values": [1.0], "min": 1.0, "mean": 1.0, "std": 0.0}}), "std = 0.0: of"),
        (
            changed(metrics={"is": {"values": [1.0], "min": 1.0, "mean": 1.0, "std": None, "within": [0.1, 0.2]}}),
            "within = [0.1, 0.2]: one for each of [1.0]",
        ),
        (changed(protocol={"num_images": 1800}), "protocol.name: is required"),
        (changed(environment=None), "environment: a measured record needs it"),
        (changed(kind="reported"), "source: a reported record needs it"),
        ('{"schema": 1, "schema": 1}', "repeated key 'schema'"),
        ("[1]", "must be an object, not list"),
        (changed()[:40], "not a record"),
        ("[" * 100_000, "not a record"),
    ],
)
def test_what_is_no_record_is_refused_by_file_and_line(line: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text(f"{changed()}\n\n{line}\n")
    with pytest.raises(UserError) as caught:
        read_records(file)
    assert str(caught.value).startswith(f"{file}, line 3: ")
    assert said in str(caught.value)


def test_a_file_that_is_not_text_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"records\.jsonl: byte 0xff is not UTF-8"):
        read_records(tmp_path / "records.jsonl")


def test_nothing_is_appended_to_half_a_line(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text(changed()[:50])
    with pytest.raises(UserError, match="its last line is cut short"):
        append_record(file, MEASURED)
    assert file.read_text() == changed()[:50]


def test_a_write_that_fails_half_way_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "records.jsonl"
    append_record(file, MEASURED)
    before, write = file.read_bytes(), os.write
    calls = []

    def full_disk(descriptor: int, data: bytes) -> int:
        if calls:
            raise OSError(28, "No space left on device")
        calls.append(1)
        return write(descriptor, data[:20])

    monkeypatch.setattr(os, "write", full_disk)
    with pytest.raises(OSError, match="No space left"):
        append_record(file, MEASURED)
    assert file.read_bytes() == before


def _append_many(file: Path, name: str) -> None:
    for _ in range(20):
        append_record(file, replace(MEASURED, name=name))


def test_several_writers_leave_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(file, f"writer {n}")) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    names = [record.name for record in read_records(file)]
    assert sorted(names) == sorted(f"writer {n}" for n in range(3) for _ in range(20))


def test_a_protocols_id_ignores_the_order_of_keys_and_nothing_else() -> None:
    one = protocol_id({"name": "p", "scale": 1.0, "parts": [1, {"a": None}]})
    assert one == protocol_id({"parts": [1, {"a": None}], "scale": 1, "name": "p"})
    for other in ({"name": "p", "scale": 2, "parts": [1, {"a": None}]}, {"name": "p", "scale": 1.0}):
        assert one != protocol_id(other)
    with pytest.raises(ValueError, match="not JSON compliant"):
        protocol_id({"name": "p", "scale": float("nan")})


def test_parsing_names_every_fault_at_once() -> None:
    with pytest.raises(UserError) as caught:
        parse_record(changed(seed="0", name=""), origin="here")
    assert "2 faults" in str(caught.value)
