"""What the limits allow is written and read again: no limit is beyond another, and logs have none."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from support.made_records import MEASURED

from diffdistill.data.collection import NAME_ROOM, Classes, checked_classes, numbered_classes
from diffdistill.diffusion.path import VPDiscrete
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.eval.records.record import Values, parse_record
from diffdistill.models.spec import ModelConfig, ModelSpec
from diffdistill.networks.mlp import MLPConfig
from diffdistill.settings import limits, reading
from diffdistill.settings.reading import lines_of_log, read_json, read_log
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import dump, read_yaml, validate
from diffdistill.training.reports.curves import read_metrics
from diffdistill.training.reports.log import RunLog
from diffdistill.training.students import Group

LONG = [1.2345678901234567e-100 * (1 - n / 10**6) for n in range(limits.MAX_LISTED)]
"""As many numbers as a list of a config may hold, falling, of more than twenty characters each."""


def test_two_of_the_longest_lists_stand_in_one_config_and_are_read(tmp_path: Path) -> None:
    path, sampler = VPDiscrete(betas=tuple(LONG)), FewSteps(later_ratios=tuple(LONG))
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"model": {"path": dump(path)}, "method": {"a": {"sampler": dump(sampler)}}}))
    assert file.stat().st_size > limits.MAX_CONFIG_BYTES * 3 // 4  # nothing much larger would be read
    read = read_yaml(file)
    assert validate(VPDiscrete, read["model"]["path"], origin="here") == path
    assert validate(FewSteps, read["method"]["a"]["sampler"], origin="here") == sampler


def test_two_of_the_longest_metrics_stand_in_one_record_and_are_read() -> None:
    values = [-1.2345678901234567e-100 - n * 1e-106 for n in range(limits.MAX_REPEATS)]
    metric = dump(Values.of(values))
    line = json.dumps(dump(MEASURED) | {"metrics": {"fid": metric, "kid": metric}})
    assert len(line) > limits.MAX_LINE_BYTES * 3 // 4
    assert parse_record(line, origin="here").metrics["kid"].values == tuple(values)


def test_all_classes_with_their_names_and_a_config_fit_into_a_state() -> None:
    numbers, names = [limits.MAX_CLASSES] * 100, ["\n"] * 100
    size = len(json.dumps({"model": {"classes": numbers, "class_names": names}}, indent=1))
    assert size < 14 * 100 + (NAME_ROOM + len('"\\n"')) * 100
    assert limits.MAX_NAMES_BYTES + 14 * limits.MAX_CLASSES + 8 * limits.MAX_CONFIG_BYTES < limits.MAX_JSON_BYTES
    assert 2 * limits.MAX_CLASSES + 2 * limits.MAX_LISTED < limits.MAX_TOTAL


@pytest.mark.full
def test_a_million_classes_with_the_longest_names_are_a_state_that_is_read(tmp_path: Path) -> None:
    """Of the numbers of classes there is the largest, and of their names nothing but what is escaped."""
    room = limits.MAX_NAMES_BYTES // limits.MAX_CLASSES - NAME_ROOM - 2
    names = tuple(f"{n:0{room}d}" for n in range(limits.MAX_CLASSES))
    assert checked_classes([0], origin="here", names=names).count == limits.MAX_CLASSES
    about = {"image_shape": (1, 8, 8), "num_classes": limits.MAX_CLASSES, "class_dropout": 0.1}
    spec = dump(ModelSpec(model=ModelConfig(network=MLPConfig()), sampler=FewSteps(), **about))
    spec |= {"classes": [limits.MAX_CLASSES - 1] * limits.MAX_CLASSES, "class_names": names}
    config = {"a": "x" * 2 * limits.MAX_CONFIG_BYTES}
    file = tmp_path / "state.json"
    file.write_text(json.dumps({"step": 1, "model": spec, "config": config}, indent=1))
    assert file.stat().st_size > limits.MAX_JSON_BYTES * 2 // 3
    assert validate(ModelSpec, read_json(file)["model"], origin="here").class_names == names


@pytest.mark.parametrize("text", ["\U0001f600", "\x01", "a"])
def test_names_that_no_checkpoint_would_hold_are_refused_before_the_run(text: str) -> None:
    """By what they take as JSON: an emoji twelve bytes, a control character six."""
    size = len(json.dumps(text)) - 2
    longest = text * ((limits.MAX_NAMES_BYTES - NAME_ROOM - 2) // size)
    assert numbered_classes([longest], origin="here").names == (longest,)
    readers = (
        lambda names: numbered_classes(names, origin="here"),
        lambda names: checked_classes([0], origin="here", names=tuple(names)),
    )
    for read in readers:
        with pytest.raises(UserError, match=r"here: the names of its classes take [\d,]+ bytes; at most 16,777,216"):
            read([longest + text])


def test_more_classes_than_a_network_has_are_refused_by_name_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffdistill.data.collection.MAX_CLASSES", 3)
    with pytest.raises(UserError, match="here: 4 classes; at most 3"):
        numbered_classes(["a", "b", "c", "d"], origin="here")
    assert isinstance(numbered_classes(["a", "b", "c", "a"], origin="here"), Classes)


def write_log(file: Path, lines: Sequence[str]) -> None:
    file.write_text("".join(f"{line}\n" for line in lines))


def test_of_a_long_log_the_last_whole_lines_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.log"
    write_log(file, [f"line {n:04d}" for n in range(1000)])
    assert read_log(file, limit=25).splitlines() == ["line 0998", "line 0999"]
    assert read_log(file) == file.read_text()
    assert read_log(tmp_path / "none") == ""
    with file.open("ab") as handle:
        handle.truncate(2 * limits.MAX_LOG_BYTES)  # zeros without end and no line break
    assert read_log(file) == ""


def test_the_students_launcher_and_the_curves_outlive_logs_beyond_all(tmp_path: Path) -> None:
    """Of more than half a gigabyte, of which nothing but the end is there."""
    (tmp_path / "student_index=0").mkdir()
    for name in ("student_index=0.log", "metrics.jsonl"):
        with (tmp_path / name).open("wb") as handle:
            handle.seek(2**29)
            handle.write(b'\nerror: no room\n{"step": 1, "a/loss": 2}\n')
    assert Group(0, tmp_path / "student_index=0").last_words == "error: no room"
    assert list(read_metrics(tmp_path / "metrics.jsonl")["a/loss"].values) == [2.0]


def test_a_resumed_run_keeps_all_lines_of_a_long_log_up_to_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_LOG_BYTES", 100)
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 50)
    lines = [json.dumps({"step": n, "a/loss": 1.0}) for n in range(100)]
    file = tmp_path / "metrics.jsonl"
    write_log(file, [*lines[:5], "x" * 175, *lines[5:], '{"step'])
    RunLog(tmp_path, title="a", start_step=89, num_steps=100, quiet=True)
    assert file.read_text().splitlines() == lines[:90]


def test_lines_of_a_log_are_read_one_by_one_and_those_without_end_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 8)
    (tmp_path / "a").write_bytes(b"one\r\n" + b"x" * 8 + b"\n\xff\n" + b"y" * 7 + b"\n" + b"z" * 20 + b"\nlast")
    assert list(lines_of_log(tmp_path / "a")) == ["one", "\ufffd", "y" * 7, "last"]
