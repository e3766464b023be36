"""Tables on disk: computed once, by one process, and after a kill only what was missing."""

import errno
import multiprocessing
import os
import resource
import signal
from pathlib import Path
from time import sleep

import pytest
import torch
from torch import Tensor

from diffdistill.data.shards import MakeRows, Shard, _mapped, build_table, files_key
from diffdistill.settings.schema import UserError
from diffdistill.storage.atomic import is_disk_full

COUNT, SHARD = 10, 3


def rows(first: int, last: int) -> Shard:
    numbers = torch.arange(first, last)
    return {"x": numbers[:, None] * torch.ones(1, 4), "n": numbers, "is_odd": numbers % 2 == 1}


def build(root: Path, log: Path, *, delay: float = 0.0, dies_at: int | None = None) -> list[dict[str, Tensor]]:
    """The table of `rows`; each shard that is made is a line of `log`."""

    def start() -> MakeRows:
        def make(first: int, last: int) -> Shard:
            if first == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            sleep(delay)
            with log.open("a") as file:
                file.write(f"{first}\n")
            return rows(first, last)

        return make

    return build_table(root, "key", COUNT, rows_per_shard=SHARD, start=start, title="the table", about={})


def read(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()]


def run(*processes: multiprocessing.Process) -> list[int | None]:
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def assert_whole(shards: list[dict[str, Tensor]]) -> None:
    for name, part in rows(0, COUNT).items():
        assert torch.equal(torch.cat([shard[name] for shard in shards]), part)


def test_a_table_is_computed_once_and_read_from_the_disk(tmp_path: Path) -> None:
    assert_whole(build(tmp_path, tmp_path / "log"))
    assert_whole(build(tmp_path, tmp_path / "log"))
    assert read(tmp_path / "log") == [0, 3, 6, 9]


def test_a_build_that_was_killed_goes_on_where_it_stopped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fork = multiprocessing.get_context("fork")
    died = run(fork.Process(target=build, args=(tmp_path, tmp_path / "log"), kwargs={"dies_at": 6}))
    assert died == [-signal.SIGKILL]
    assert read(tmp_path / "log") == [0, 3]
    assert_whole(build(tmp_path, tmp_path / "log"))
    assert read(tmp_path / "log") == [0, 3, 6, 9]
    assert "the table: 2 of 4 shards exist; resuming" in " ".join(capfd.readouterr().err.split())


def test_two_processes_build_it_once(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=build, args=(tmp_path, tmp_path / "log"), kwargs={"delay": 0.05}) for _ in range(2)]
    assert run(*both) == [0, 0]
    assert read(tmp_path / "log") == [0, 3, 6, 9]


@pytest.mark.parametrize("damage", ["one bit", "half", "none left"])
def test_a_damaged_shard_is_made_anew(damage: str, tmp_path: Path) -> None:
    build(tmp_path, tmp_path / "log")
    file = sorted((tmp_path / "key").glob("00001-*"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes({"one bit": bytes(content), "half": bytes(content[: len(content) // 2]), "none left": b""}[damage])
    assert_whole(build(tmp_path, tmp_path / "log"))
    assert read(tmp_path / "log") == [0, 3, 6, 9, 3]


@pytest.mark.parametrize("call", range(1, 11))
def test_a_full_disk_leaves_nothing_half_written_and_the_next_build_goes_on(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, fsync = [0], os.fsync

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/key") as caught:
            build(tmp_path, tmp_path / "log")
    assert is_disk_full(caught.value)
    assert not [file for file in (tmp_path / "key").iterdir() if file.name.startswith(".")]
    done = read(tmp_path / "log")
    assert_whole(build(tmp_path, tmp_path / "log"))
    whole = [0, 3, 6, 9]
    assert read(tmp_path / "log") == [*done, *whole[call - 1 :]]  # one call a shard, the others when all are there


def test_a_file_that_cannot_grow_is_named_and_goes(tmp_path: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match=r"File too large: '.*/key/\.writing-00000'") as caught:
            build(tmp_path, tmp_path / "log")
        os._exit(0 if is_disk_full(caught.value) else 1)

    assert run(multiprocessing.get_context("fork").Process(target=limited)) == [0]
    assert list((tmp_path / "key").iterdir()) == []
    assert_whole(build(tmp_path, tmp_path / "log"))


@pytest.mark.parametrize(
    "header",
    [
        *(b"", b"{", b"[]", b"[" * 9000, b"\xff", b"null", b'{"x": 1}', b'{"x": {"dtype": "F32", "shape": [1]}}'),
        b'{"x": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [99999996, 100000000]}}',
        b'{"x": {"dtype": "F32", "shape": [9223372036854775807, 4], "data_offsets": [0, 16]}}',
        b'{"x": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}',
        b'{"x": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}',
    ],
    ids=lambda header: header.decode("latin-1")[:40],
)
def test_a_shard_s_header_that_makes_no_sense_is_refused(header: bytes, tmp_path: Path) -> None:
    file = tmp_path / "00000-x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(UserError, match=r"00000-x\.safetensors: "):
        _mapped(file)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**20 + 1, 100])
def test_a_shard_s_header_that_is_longer_than_the_file_is_refused(length: int, tmp_path: Path) -> None:
    file = tmp_path / "00000-x.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="does not fit the file"):
        _mapped(file)


def test_files_are_known_by_their_content_wherever_they_are(tmp_path: Path) -> None:
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "w").write_text("other" if folder == "c" else "same")
    keys = [files_key([tmp_path / folder / "w"], root=tmp_path / "cache") for folder in ("a", "b", "c", "a")]
    assert keys[0] == keys[1] == keys[3] != keys[2]
