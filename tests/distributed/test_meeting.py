"""Processes meet soon or say who is missing, and train only what all of them were told."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch.distributed as dist
from conftest import MakeConfig, small_config
from support.fleet import run_together

from diffdistill.distributed import meeting
from diffdistill.distributed.processes import find_processes
from diffdistill.distributed.stopping import TrainingError
from diffdistill.eval.evaluation.workers import find_workers
from diffdistill.eval.protocols.packaged import find_protocol
from diffdistill.settings.registry import OneOf
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import dump_yaml
from diffdistill.training.agreement import OWN, _is_own
from diffdistill.training.config import RunConfig
from diffdistill.training.plan import plan
from diffdistill.training.reports.evaluator import EvalConfig
from diffdistill.training.trainer import Trainer

Find = Callable[[], object]


def come_without(missing: int, find: Find) -> tuple[str, float]:
    """What the others say, and after how long."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DIFFDISTILL_MEETING_SECONDS", "2")
        if int(os.environ["RANK"]) == missing:
            return "", 0.0
        began = time.monotonic()
        with pytest.raises(TrainingError) as raised:
            find()
        return str(raised.value), time.monotonic() - began


@pytest.mark.parametrize("find", [find_processes, find_workers])
@pytest.mark.parametrize("missing", [0, 2])
def test_a_process_that_does_not_come_is_named(find: Find, missing: int) -> None:
    told = run_together(3, lambda: come_without(missing, find))
    for said, seconds in told[:missing] + told[missing + 1 :]:
        assert said.startswith(f"the processes cannot connect: process {missing} of 3 did not come"), said
        assert seconds < 20
    assert any("did not come within 2 s (DIFFDISTILL_MEETING_SECONDS sets " in said for said, _ in told)


@pytest.mark.parametrize("text", ["soon", "0", "-3", "86401", "nan", "inf", "1e400"])
def test_how_long_they_wait_is_a_number_with_limits(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFDISTILL_MEETING_SECONDS", text)
    with pytest.raises(UserError, match=f"^DIFFDISTILL_MEETING_SECONDS = '{text}': must be .* from 1 to 86400$"):
        find_processes("cpu")


def test_without_a_word_they_wait_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, expected in (("", 600), ("90", 90), (" 1.5 ", 1.5), ("86400", 86400)):
        monkeypatch.setenv("DIFFDISTILL_MEETING_SECONDS", text)
        assert meeting.meeting_time() == timedelta(seconds=expected)


def leave_at_once() -> str:
    """The second process is gone once it has said that it is there."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("DIFFDISTILL_MEETING_SECONDS", "2")
        if os.environ["RANK"] == "1":
            meeting._wait_for_all(meeting.meeting_time())
            return ""
        with pytest.raises(TrainingError) as raised:
            find_processes("cpu")
        return str(raised.value)


def test_a_process_that_goes_before_they_are_connected_is_not_waited_for() -> None:
    assert "the processes cannot connect: " in run_together(2, leave_at_once)[0]


def test_once_met_they_wait_for_each_other() -> None:
    def slow() -> int:
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("DIFFDISTILL_MEETING_SECONDS", "1")
            processes = find_processes("cpu")
            time.sleep(2.0 * processes.rank)
            return processes.largest(processes.rank)

    assert run_together(2, slow) == [1, 1]


@pytest.mark.parametrize(
    ("machines", "restarts", "before"),
    [("1", "1", lambda: meeting._wait_for_all(meeting.meeting_time())), ("2", "0", lambda: find_processes("cpu"))],
)
def test_processes_that_torchrun_starts_again_do_not_meet_those_before(
    machines: str, restarts: str, before: Find
) -> None:
    """On one machine however those ended; on several, where restarts are not counted alike, once they had met."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]

    def start(work: Find, count: str) -> object:
        os.environ |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        os.environ |= {"TORCHELASTIC_RESTART_COUNT": count, "GROUP_WORLD_SIZE": machines}
        return work() and None

    run_together(2, lambda: start(before, "0"))
    _, (said, _) = run_together(2, lambda: come_without(0, lambda: start(find_processes, restarts)))
    assert "process 0 of 2 did not come within 2 s" in said


def fault(config: RunConfig) -> str:
    """What is said against these configs of the two processes."""
    try:
        plan(config, resume=None)
    except UserError as error:
        return str(error)
    return ""


def test_processes_that_were_not_started_alike_are_refused_and_told_why(
    make_config: MakeConfig, tmp_path: Path, quick_teacher: Path
) -> None:
    first, moved, other = make_config("dmd2"), tmp_path / "moved", tmp_path / "other"
    shutil.copytree(quick_teacher, moved)
    small = small_config("pretrain", other, "train.steps=1")
    Trainer(small, quiet=True).run()
    for number in range(2):
        pixels = np.full((12, 8, 8, 1), 100 + number, np.uint8)
        np.savez(tmp_path / f"{number}.npz", images=pixels, labels=np.arange(12) % 10)

    def set_up(*overrides: str, teacher: Path = quick_teacher) -> RunConfig:
        return small_config("dmd2", Path(first.run), *overrides, teacher=teacher)

    def compare() -> list[str]:
        is_second = os.environ["RANK"] == "1"
        data = f"data={{name: npz, path: {tmp_path / f'{int(is_second)}.npz'}, cache: {tmp_path / 'cache'}}}"
        changed = ("optimizers.default.lr=5e-4", "method.gan_weight=0") if is_second else ()
        said = [
            fault(set_up(*changed)),
            fault(set_up(teacher=other if is_second else quick_teacher)),
            fault(set_up(data)),
            fault(set_up(teacher=moved if is_second else quick_teacher)),
        ]
        with pytest.MonkeyPatch.context() as patched:
            if is_second:
                patched.setattr("diffdistill.training.agreement.code_version", lambda _: "another")
            said.append(fault(set_up()))
        return said

    told = run_together(2, compare)
    assert told[0] == told[1]
    settings, teachers, data, same, code = told[0]
    assert settings == (
        "the processes were started differently:\n"
        "  method.gan_weight: 0.03 in process 0, 0.0 in process 1\n"
        "  optimizers.default.lr: 0.001 in process 0, 0.0005 in process 1"
    )
    assert "the weights of teacher: '" in teachers
    assert "the images, labels and prompts of data: '" in data
    assert same == ""
    assert "the code: 'diffdistill " in code
    assert code.endswith("'another' in process 1")


def places_of(kind: Any, place: str = "") -> Iterator[str]:
    """Every setting of a schema that is text of any kind, as the dotted place where a config has it."""
    if kind is str:
        yield place
    elif hasattr(kind, "__pydantic_validator__"):
        for name, hint in get_type_hints(kind, include_extras=True).items():
            yield from places_of(hint, f"{place}.{name}".lstrip("."))
    elif get_origin(kind) is dict:
        yield from places_of(get_args(kind)[1], place)
    elif get_origin(kind) is not Literal:
        for inner in get_args(kind):
            for choice in inner.own_classes() if isinstance(inner, OneOf) else [inner]:
                yield from places_of(choice, place) if choice != kind else ()


NO_PLACES = {
    *("data.caption_column", "data.captions_ending", "data.column", "data.image_column", "data.label_column"),
    *("data.split", "data.subset", "eval.best_by", "method.reward", "method.gan_taps", "negative_prompt"),
    *("method.feature_taps", "method.features", "model.styles"),
    *("lora.targets", "method.sha256", "model.family", "model.targets", "starts"),
}
"""Settings that are text and no file or folder: compared as they are, with all others."""
ALIKE = {"run", "method.pairs_folder", "method.weights"}
"""Places that all processes have alike: in which all write, or whose content has its hash beside it."""


def test_every_setting_that_may_be_a_place_is_one_s_own_or_the_folder_of_all() -> None:
    found = {place.partition(".")[0] + "." + place.rpartition(".")[2] for place in places_of(RunConfig)}
    found = {place.removesuffix(f".{place.partition('.')[0]}") for place in found}  # a setting of no group
    assert "eval.references" in found
    assert {place for place in found if not _is_own(place)} == NO_PLACES | ALIKE
    assert set(OWN) - found == {"data.download", "data.key", "data.kind", "train.num_threads"}


def test_evaluations_are_compared_by_what_they_measure_and_not_by_where_it_lies(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    protocol = replace(find_protocol("digits-pixels"), name="mine")
    for rank, other in enumerate((protocol, replace(protocol, metrics=protocol.metrics[:1]))):
        (tmp_path / f"same-{rank}.yaml").write_text(dump_yaml(protocol))
        (tmp_path / f"other-{rank}.yaml").write_text(dump_yaml(other))
    config = make_config("pretrain")

    def compare() -> list[str]:
        rank = os.environ["RANK"]
        watched = [
            EvalConfig(protocol=str(tmp_path / f"{name}-{rank}.yaml"), num_images=number)
            for name, number in (("same", 100), ("other", None))
        ]
        trackers = ("tensorboard",) if rank == "0" else ()
        return [fault(replace(config, eval=one, trackers=trackers)) for one in watched]

    for same, other in run_together(2, compare):
        assert same == ""
        assert other.startswith("the processes were started differently:\n  the protocol of eval.metrics: ")
        assert len(other.splitlines()) == 2
