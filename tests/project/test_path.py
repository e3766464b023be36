"""What stands between a command and the network: the files and hops that CONTRIBUTING.md names, and no more."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.networks.unet import UNet
from diffdistill.training.config import RunConfig

ROOT = Path(__file__).parents[2]
TOP = ("diffdistill", "methods", "eval")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## How a command becomes")[2]
WINGS = [line.strip(' ",') for line in (ROOT / "pyproject.toml").read_text().partition("\nlayers = [")[2].splitlines()]
"""From the top down."""
SMALL = ("train.steps=1", "train.global_batch_size=4", "train.device=cpu", "train.preview_every=0", "health=null")

Call = tuple[str, str]
"""A file, from the package's folder or `methods/`, and a function."""
Followed = tuple[list[list[Call]], set[tuple[str, str]]]
_ours: dict[str, str | None] = {}


def file_of(frame: FrameType) -> str | None:
    """The file of a frame of the package; None for others'."""
    name = frame.f_code.co_filename
    if name not in _ours:
        path = Path(name).resolve()
        inside = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path()
        is_ours = inside.parts[:1] and inside.parts[0] in TOP
        _ours[name] = inside.as_posix().removeprefix("diffdistill/") if is_ours else None
    return _ours[name]


def calls_above(frame: FrameType | None) -> list[Call]:
    """The package's calls that led to a frame, the outermost first, the frame's own included."""
    found: list[Call] = []
    while frame is not None:
        if file := file_of(frame):
            found.append((file, frame.f_code.co_qualname))
        frame = frame.f_back
    return found[::-1]


@contextmanager
def profiled(note: Callable[[FrameType], None]) -> Iterator[None]:
    """While open, `note` is told of every call of the package.

    Python takes away a profiler that raises, and what it raised is lost where a finalizer runs: here the end raises it.
    """
    raised: list[Exception] = []

    def tell(frame: FrameType, event: str, _: object) -> None:
        try:
            if event == "call" and file_of(frame):
                note(frame)
        except Exception as error:
            raised.append(error)

    before = sys.getprofile()
    sys.setprofile(tell)
    try:
        yield
        assert sys.getprofile() is tell, f"another profiler was set: {sys.getprofile()}"
    finally:
        sys.setprofile(before)
    for error in raised:
        raise error


def follow(teacher: str, run: str) -> None:
    """Print what `followed` returns, as JSON on the last line."""
    stacks: list[list[Call]] = []
    handed: set[tuple[str, str]] = set()

    def note(frame: FrameType) -> None:
        if frame.f_code is UNet.forward.__code__:
            calls = calls_above(frame)
            if any(name == "Trainer.train_step" for _, name in calls):
                stacks.append(calls[[name for _, name in calls].index("train") :])
        has_config = any(type(value) is RunConfig for value in frame.f_locals.values())
        if has_config and frame.f_code.co_name != "__post_init__":  # where it is made
            handed.add((calls_above(frame.f_back)[-1][0], str(file_of(frame))))

    with profiled(note):
        result = CliRunner().invoke(app, ["train", "dmd2/digits", f"teacher={teacher}", f"run={run}", *SMALL])
    assert result.exit_code == 0, result.output
    print(json.dumps([stacks, sorted(handed)]))


@pytest.fixture(scope="module")
def followed(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Followed:
    """One step of DMD2 by the command line: the calls above each call of the network inside a loss; and from which file
    to which a config was handed.  In a process of its own, whose interpreter no other test has touched."""
    run = tmp_path_factory.mktemp("followed") / "run"
    code = f"import test_path; test_path.follow({str(teacher)!r}, {str(run)!r})"
    paths = os.pathsep.join([str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    stacks, handed = json.loads(done.stdout.splitlines()[-1])
    assert stacks, "no call of the network was seen"
    assert handed, "no config was seen"
    return [[(file, name) for file, name in calls] for calls in stacks], {(above, below) for above, below in handed}


def test_the_files_between_a_command_and_the_network_are_those_that_are_named(followed: Followed) -> None:
    met = {file for calls in followed[0] for file, _ in calls} | {"commands/exit_codes.py"}  # which wraps `train`
    named = re.findall(r"`([a-z_0-9/]+\.py)`", CONTRIBUTING.partition("A test follows")[0])
    assert met == set(named)
    assert len(met) <= 12


def test_six_hops_lead_from_a_step_to_the_paper(followed: Followed) -> None:
    for calls in followed[0]:
        names = [name for _, name in calls]
        first = names.index("Trainer.train_step")
        hops = names[first : next(i for i, (file, _) in enumerate(calls) if file == "methods/dmd2.py")]
        assert f"Six hops: {' -> '.join(f'`{name}`' for name in hops)} -> the method's loss" in CONTRIBUTING


def test_a_config_is_never_handed_upwards(followed: Followed) -> None:
    depths = [(WINGS.index(a.partition("/")[0]), WINGS.index(b.partition("/")[0])) for a, b in followed[1]]
    assert all(above <= below for above, below in depths)
    assert {b.partition("/")[0] for _, b in followed[1]} == {"training", "settings"}
