"""An evaluation: one record from the features alone, whatever the batches, the processes and the interruptions."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from support.judged import (
    EXTRACTOR,
    METRICS,
    SHAPE,
    TOY,
    NoiseImages,
    TensorFeatures,
    files_under,
    toy_bench,
    toy_protocol,
)
from torch import Tensor

from diffdistill.eval.evaluation.run import Evaluation, evaluate, progress_bar
from diffdistill.eval.evaluation.workers import find_workers
from diffdistill.eval.features.extractors import Extractor
from diffdistill.eval.features.store import BLOCK
from diffdistill.eval.metrics.kernels import kid
from diffdistill.eval.metrics.scores import inception_score
from diffdistill.eval.metrics.scoring import score
from diffdistill.eval.metrics.settings import Frechet, InceptionScore
from diffdistill.eval.metrics.sides import OnDevice
from diffdistill.eval.records.record import Record
from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import Console
from diffdistill.settings.values import dump


def run(root: Path, *, batch_size: int = 100, keep: bool = False, **changes: Any) -> Evaluation:
    protocol = toy_protocol(**changes)
    bench = toy_bench(protocol, batch_size=batch_size)
    done = evaluate(NoiseImages(protocol), bench, name="noise", root=root, keep_features=keep)
    assert done is not None
    return done


def lasting(record: Record) -> dict[str, Any]:
    """All of a record that the machine and the clock do not decide."""
    return {name: value for name, value in dump(record).items() if name != "environment"}


def test_every_metric_has_a_value_a_repeat_and_its_features_are_hashed(tmp_path: Path) -> None:
    record = run(tmp_path).record
    names = ["fd-toy", "kid-toy", "precision", "recall", "is-toy", "diversity"]
    assert list(record.metrics) == names
    assert {len(values.values) for values in record.metrics.values()} == {2}
    assert record.images is not None
    assert record.images.seeds == ((0, 300), (300, 600))
    assert list(record.images.features_sha256) == ["toy"]
    assert record.protocol == dump(toy_protocol())


def test_kid_and_inception_score_keep_their_spread_within_a_repeat(tmp_path: Path) -> None:
    record, protocol = run(tmp_path).record, toy_protocol()
    for repeat in range(2):
        seen = EXTRACTOR(NoiseImages(protocol).take(repeat, torch.arange(300)))
        _, spread = kid(seen.features, toy_bench(protocol).real["toy"].rows(), num_subsets=5, subset_size=50)
        assert record.metrics["kid-toy"].within is not None
        assert record.metrics["kid-toy"].within[repeat] == pytest.approx(spread, rel=1e-12)
        assert seen.logits is not None
        assert record.metrics["is-toy"].within is not None
        assert record.metrics["is-toy"].within[repeat] == pytest.approx(inception_score(seen.logits, splits=2)[1])
    assert record.metrics["fd-toy"].within is None


def test_the_real_side_goes_to_the_device_of_the_judged_one() -> None:
    device = torch.device("meta")  # stands for a GPU
    there = OnDevice(TensorFeatures(torch.rand(20, 4)), device)
    assert there.rows(7).shape == (7, 4)
    assert {there.rows().device, there.summary.mean.device, there.summary.scatter.device} == {device}


def test_the_values_are_those_of_all_features_in_memory(tmp_path: Path) -> None:
    record = run(tmp_path).record
    protocol = toy_protocol()
    source = NoiseImages(protocol)
    for repeat in range(2):
        features = EXTRACTOR(source.take(repeat, torch.arange(300))).features
        found = score(METRICS[:3], {"toy": TensorFeatures(features)}, toy_bench(protocol).real)  # type: ignore[dict-item]
        for name, value in found.values.items():
            assert record.metrics[name].values[repeat] == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_the_batch_size_changes_no_bit_given_the_same_features(tmp_path: Path, batch_size: int) -> None:
    assert lasting(run(tmp_path, batch_size=batch_size).record) == lasting(run(tmp_path).record)


def _one_of_several(rank: int, count: int, port: int, root: Path, send: Callable[[Any], None]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    PartialState._reset_state()
    protocol = toy_protocol(num_images=600)
    workers = find_workers()
    source = NoiseImages(protocol)
    done = evaluate(source, toy_bench(protocol, workers=workers), name="noise", root=root)
    send((rank, workers.count, len(source.calls), dump(done.record) if done else None))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_share_the_blocks_and_change_no_bit(tmp_path: Path, count: int) -> None:
    context = multiprocessing.get_context("fork")
    queue: Any = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (count, port, tmp_path / "several", queue.put)
    processes = [context.Process(target=_one_of_several, args=(rank, *arguments)) for rank in range(count)]
    for process in processes:
        process.start()
    told = sorted((queue.get(timeout=120) for _ in processes), key=lambda message: message[0])
    for process in processes:
        process.join(timeout=60)
    alone = run(tmp_path / "alone", num_images=600).record
    record = told[0][3]
    assert record["environment"]["num_processes"] == count
    assert {name: value for name, value in record.items() if name != "environment"} == lasting(alone)
    assert [message[3] for message in told[1:]] == [None] * (count - 1)
    assert [message[1] for message in told] == [count] * count
    assert all(message[2] for message in told)
    assert sum(message[2] for message in told) == 2 * (3 + 3 + 1)  # batches of 100 in blocks of 256, 256, 88


def test_an_evaluation_goes_on_where_it_was_broken_off(tmp_path: Path) -> None:
    protocol = toy_protocol(num_images=600)
    source = NoiseImages(protocol, fails_after=5)
    with pytest.raises(KeyboardInterrupt):
        evaluate(source, toy_bench(protocol), name="noise", root=tmp_path)
    again = NoiseImages(protocol)
    done = evaluate(again, toy_bench(protocol), name="noise", root=tmp_path)
    assert done is not None
    assert again.calls[0] == (0, list(range(BLOCK, BLOCK + 100)))
    assert lasting(done.record) == lasting(run(tmp_path / "whole", num_images=600).record)


def test_a_damaged_block_is_made_again(tmp_path: Path) -> None:
    whole = run(tmp_path, keep=True)
    file = next(whole.stores[1].folder.glob("000000-*"))
    file.write_bytes(file.read_bytes()[:-8])
    protocol = toy_protocol()
    source = NoiseImages(protocol)
    done = evaluate(source, toy_bench(protocol), name="noise", root=tmp_path)
    assert done is not None
    assert {repeat for repeat, _ in source.calls} == {1}
    assert lasting(done.record) == lasting(whole.record)


def test_features_go_when_the_record_is_there_unless_they_are_kept(tmp_path: Path) -> None:
    run(tmp_path / "gone")
    assert files_under(tmp_path / "gone") == []
    kept = run(tmp_path / "kept", keep=True)
    assert [len(list(store.rows("toy"))) for store in kept.stores] == [2, 2]


def test_other_images_and_other_protocols_do_not_take_anothers_features(tmp_path: Path) -> None:
    first = run(tmp_path, keep=True).record
    other = toy_protocol()
    done = evaluate(NoiseImages(other, scale=2.0), toy_bench(other), name="noise", root=tmp_path)
    assert done is not None
    assert done.record.metrics != first.metrics
    assert run(tmp_path, first_seed=1, keep=True).record.metrics != first.metrics


def test_more_metrics_of_the_same_features_need_no_new_images(tmp_path: Path) -> None:
    run(tmp_path, keep=True, metrics=(Frechet(features=TOY),))
    protocol = toy_protocol(metrics=METRICS[:3])
    source = NoiseImages(protocol)
    evaluate(source, toy_bench(protocol), name="noise", root=tmp_path)
    assert source.calls == []


def test_nothing_of_the_images_is_written_unless_asked(tmp_path: Path) -> None:
    protocol = toy_protocol()
    seen: list[tuple[int, int]] = []

    def keep(repeat: int, index: Tensor, images: Tensor) -> None:
        assert images.shape == (len(index), *SHAPE)
        seen.extend((repeat, number) for number in index.tolist())

    evaluate(NoiseImages(protocol), toy_bench(protocol), name="noise", root=tmp_path, on_images=keep)
    assert seen == [(repeat, number) for repeat in range(2) for number in range(300)]
    assert files_under(tmp_path) == []


def test_fewer_samples_than_features_are_noted(tmp_path: Path) -> None:
    record = run(tmp_path, num_images=10, metrics=(Frechet(features=TOY),)).record
    assert "10 samples of 16 features" in record.notes
    assert record.metrics["fd-toy"].min > 0


def test_a_distance_without_a_reference_is_refused(tmp_path: Path) -> None:
    protocol = toy_protocol()
    bench = replace(toy_bench(protocol), real={})
    with pytest.raises(UserError, match="fd-toy: needs a reference"):
        evaluate(NoiseImages(protocol), bench, name="noise", root=tmp_path)


def test_a_score_that_needs_logits_says_so(tmp_path: Path) -> None:
    protocol = toy_protocol(metrics=(InceptionScore(features=TOY),))
    plain = Extractor(label="toy", network=lambda x: x.flatten(1), prepare=Tensor.float, num_features=16)
    bench = replace(toy_bench(protocol), extractors={"toy": plain})
    with pytest.raises(UserError, match="a metric needs logits, and toy has none"):
        evaluate(NoiseImages(protocol), bench, name="noise", root=tmp_path)


def test_all_images_are_told_to_the_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    protocol = toy_protocol()
    with progress_bar("toy", 600, Console(width=80)) as advance:
        evaluate(NoiseImages(protocol), toy_bench(protocol), name="noise", root=tmp_path, advance=advance)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "toy: 600/600 images"
    assert len(lines) <= 10
