"""Checkpoints are whole or absent, say what is wrong with them, and are never pickled."""

import errno
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.models.load import find_checkpoint, load_model
from diffdistill.networks.mlp import MLPConfig
from diffdistill.settings.schema import UserError
from diffdistill.storage import atomic
from diffdistill.storage import checkpoint as module
from diffdistill.storage.checkpoint import (
    Checkpoint,
    CheckpointError,
    find_damage,
    list_checkpoints,
    load_checkpoint,
    load_strictly,
    save_checkpoint,
)
from diffdistill.training.config import RunConfig
from diffdistill.training.reports.log import RunLog
from diffdistill.training.trainer import Trainer

MakeConfig = Callable[..., RunConfig]
WriteConfig = Callable[..., Path]

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def made(step: int, size: int = 100) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    tensors = {group: {"a.weight": torch.rand(size, generator=generator)} for group in ("players", "optimizers")}
    return Checkpoint(step, tensors, {"step": step, "note": "whole"})


def assert_whole(folder: Path, *steps: int, size: int = 100) -> None:
    """These checkpoints and nothing else are in the folder, and each is as it was saved."""
    assert sorted(p.name for p in folder.iterdir()) == [f"step-{step:08d}" for step in steps]
    for step, target in zip(steps, list_checkpoints(folder), strict=True):
        loaded, expected = load_checkpoint(target), made(step, size)
        assert (loaded.step, loaded.state) == (step, expected.state)
        assert loaded.tensors.keys() == expected.tensors.keys()
        for group, tensors in expected.tensors.items():
            assert torch.equal(loaded.tensors[group]["a.weight"], tensors["a.weight"])


def test_what_is_saved_is_loaded_and_the_newest_n_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 100):
        save_checkpoint(tmp_path, made(step), keep=3)
    assert_whole(tmp_path, 10, 15, 100)


def test_only_the_groups_asked_for_are_loaded(tmp_path: Path) -> None:
    assert load_checkpoint(save_checkpoint(tmp_path, made(1), keep=1), groups=("players",)).tensors.keys() == {
        "players"
    }


def test_a_resumed_run_hashes_its_checkpoint_once(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_config("dmd2", "train.steps=1")
    Trainer(first, quiet=True).run()
    started = make_config("dmd2", f"init={first.run}", f"run={first.run}-again", "train.steps=1")
    target, hashed, real = Trainer(started, quiet=True).run(), list[str](), module._hash
    monkeypatch.setattr(module, "_hash", lambda file: (hashed.append(str(file)), real(file))[1])
    assert Trainer(started, resume=True, quiet=True).step == 1
    assert sorted(file for file in hashed if str(target) in file) == sorted(map(str, set(target.glob("*[!t].*"))))


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    for _ in range(2):
        save_checkpoint(tmp_path, made(1), keep=1)
    assert_whole(tmp_path, 1)


def test_a_renamed_checkpoint_is_still_one(tmp_path: Path) -> None:
    best = save_checkpoint(tmp_path, made(7), keep=1).rename(tmp_path / "best")
    assert load_checkpoint(best).step == 7


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, name: str, call: int, error: BaseException) -> Iterator[list[int]]:
    """Let call number `call` of os.fsync or write_and_hash fail. Yields the calls so far."""
    owner: Any = os if name == "fsync" else atomic
    real, calls = getattr(owner, name), [0]

    def broken(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise error
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        yield calls


def test_a_fault_at_any_moment_leaves_whole_checkpoints_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, made(1), keep=5)
    with failing(monkeypatch, "fsync", 0, FULL) as calls:
        save_checkpoint(tmp_path, made(2), keep=5)
    last = calls[0]  # the folder's, after the rename: by then the new checkpoint stands
    errors = (FULL, KeyboardInterrupt())
    for call, error in [(call, error) for call in range(1, last) for error in errors]:
        with failing(monkeypatch, "fsync", call, error), pytest.raises(type(error)):
            save_checkpoint(tmp_path, made(3), keep=1)
        assert_whole(tmp_path, 1, 2)
    with failing(monkeypatch, "fsync", last, FULL), pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, made(3), keep=1)
    assert_whole(tmp_path, 1, 2, 3)


@pytest.mark.parametrize("call", [1, 2])
def test_a_disk_that_fills_while_tensors_are_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    save_checkpoint(tmp_path, made(1), keep=5)
    with failing(monkeypatch, "write_and_hash", call, FULL), pytest.raises(OSError, match="No space left") as caught:
        save_checkpoint(tmp_path, made(2), keep=5)
    assert caught.value.errno == errno.ENOSPC
    assert_whole(tmp_path, 1)


def test_a_disk_that_is_really_full_leaves_earlier_checkpoints_whole(tmp_path: Path) -> None:
    disk, size = tmp_path / "disk", 4000  # 32 kB a checkpoint, on a disk of 100 kB
    disk.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("mounting a small disk is not allowed here")
    try:
        save_checkpoint(disk / "c", made(1, size), keep=9)
        save_checkpoint(disk / "c", made(2, size), keep=9)
        with pytest.raises(OSError, match="No space left") as caught:
            save_checkpoint(disk / "c", made(3, size), keep=9)
        assert caught.value.errno == errno.ENOSPC
        assert_whole(disk / "c", 1, 2, size=size)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_leftovers_of_a_killed_writer_are_cleared_away(tmp_path: Path, make_config: MakeConfig) -> None:
    for name in (".writing-step-00000009", ".removing-step-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "players.safetensors").write_bytes(b"half")
    assert list_checkpoints(tmp_path) == []
    save_checkpoint(tmp_path, made(1), keep=1)
    assert_whole(tmp_path, 1)
    config = make_config("pretrain", "train.steps=1")
    leftover = Path(config.run) / "checkpoints" / ".writing-step-00000001"
    leftover.mkdir(parents=True)
    assert [p.name for p in Trainer(config, quiet=True).run().parent.iterdir()] == ["step-00000001"]


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": flip_a_bit,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "emptied": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["players.safetensors", "optimizers.safetensors", "state.json", "manifest.json"])
def test_damage_is_named_and_the_newest_whole_checkpoint_before_it_offered(
    tmp_path: Path, name: str, kind: str
) -> None:
    first, second, third = (save_checkpoint(tmp_path, made(step), keep=5) for step in (1, 2, 3))
    DAMAGE[kind](second / name)
    DAMAGE[kind](third / name)
    with pytest.raises(CheckpointError, match=name) as caught:
        load_checkpoint(third)
    assert str(caught.value).endswith(f"the newest whole one before it is {first}")
    assert "\n" not in str(caught.value)
    DAMAGE["truncated"](first / "state.json")
    with pytest.raises(CheckpointError, match="there is no whole one before it"):
        load_checkpoint(third)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"files": 3, "self": ""}', '{"files": {"state.json": "0"}, "self": "0"}', "\ud800{"]
)
def test_a_manifest_that_makes_no_sense_is_damage(tmp_path: Path, text: str) -> None:
    target = save_checkpoint(tmp_path, made(1), keep=1)
    (target / "manifest.json").write_bytes(text.encode(errors="surrogatepass"))
    assert "manifest.json" in (find_damage(target) or "")


def test_a_file_that_the_manifest_does_not_know_is_not_read(tmp_path: Path) -> None:
    target = save_checkpoint(tmp_path, made(1), keep=1)
    (target / "stray.safetensors").write_bytes(b"not one of ours")
    assert load_checkpoint(target).tensors.keys() == {"players", "optimizers"}


def test_a_checkpoint_without_its_state_is_called_damaged_not_absent(tmp_path: Path) -> None:
    target = save_checkpoint(tmp_path, made(1), keep=1)
    (target / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"damaged: state\.json is missing"):
        load_checkpoint(find_checkpoint(target))


def test_weights_of_another_architecture_are_refused_in_one_line() -> None:
    networks = [MLPConfig(width=width, blocks=2).build((1, 8, 8), 10, 0.1) for width in (32, 16)]
    with pytest.raises(UserError, match="of another architecture") as caught:
        load_strictly(networks[0], networks[1].state_dict(), origin="here")
    assert "blocks.0.first.bias is (16,), not (32,)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_is_pickled_or_unpickled(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("pickled")

    for owner, names in (
        (pickle, ("load", "loads", "Unpickler", "dump", "dumps", "Pickler")),
        (torch, ("load", "save")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, refuse)
    config = make_config("dmd2", "train.steps=2")
    Trainer(config, quiet=True).run()
    longer = make_config("dmd2", f"run={config.run}", "train.steps=3")
    load_model(Trainer(longer, resume=True, quiet=True).run())


def test_the_command_line_says_that_the_disk_is_full_and_keeps_the_last_good_checkpoint(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = write_config("pretrain", "train.checkpoint_every=1")
    with failing(monkeypatch, "write_and_hash", 5, FULL):  # three files a checkpoint: the second file of the second
        done = CliRunner().invoke(app, ["pretrain", str(file)])
    assert done.exit_code == 1
    assert "error: the disk is full" in done.stderr
    assert "Traceback" not in done.output
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    assert CliRunner().invoke(app, ["pretrain", str(file), "--resume"]).exit_code == 0


def test_metrics_are_cut_back_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, lines = tmp_path / "metrics.jsonl", '{"step": 1}\n{"step": 2}\n'
    file.write_text(lines)
    with failing(monkeypatch, "fsync", 1, FULL), pytest.raises(OSError, match="No space left"):
        RunLog(tmp_path, title="", start_step=1, num_steps=2, quiet=True)
    assert file.read_text() == lines
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_where_no_link_can_be_made_a_file_names_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    save_checkpoint(tmp_path, made(1), keep=1, best="step-00000001")
    assert (tmp_path / "best").is_symlink()
    monkeypatch.setattr(os, "symlink", refused)
    for step, best in ((2, 1), (3, 3), (4, 3)):
        save_checkpoint(tmp_path, made(step), keep=1, best=f"step-{best:08d}")
        assert (tmp_path / "best").is_file()
        assert module.find_best(tmp_path) == tmp_path / f"step-{best:08d}"
        assert find_checkpoint(tmp_path / "best").name == f"step-{best:08d}"
    save_checkpoint(tmp_path, made(5), keep=1)
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize("text", ["", "../../secrets", "step-00000009", "step-good", "\x00\xff" * 100])
def test_a_file_that_names_no_checkpoint_as_the_best_is_not_followed(tmp_path: Path, text: str) -> None:
    save_checkpoint(tmp_path, made(1), keep=1)
    (tmp_path / "best").write_text(text, encoding="latin-1")
    assert module.find_best(tmp_path) is None
    with pytest.raises(CheckpointError, match="best: no such folder"):
        find_checkpoint(tmp_path / "best")


@pytest.mark.parametrize(
    "name", ["step-good", "step-00000040-backup", "step-00000099.old", "step-99", "xstep-00000099"]
)
def test_a_copy_under_another_name_is_no_checkpoint_and_stays(tmp_path: Path, name: str) -> None:
    first = save_checkpoint(tmp_path, made(1), keep=2)
    shutil.copytree(first, tmp_path / name)
    for step in (2, 3):
        save_checkpoint(tmp_path, made(step), keep=2)
    assert [found.name for found in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert load_checkpoint(tmp_path / name).step == 1


def test_steps_of_more_than_eight_digits_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 100_000_001):
        save_checkpoint(tmp_path, made(step), keep=2)
    assert_whole(tmp_path, 100_000_000, 100_000_001)
