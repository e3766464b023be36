"""`make install`, with a stand-in for Python: interrupted wherever, it recovers, and it says what is missing."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
# Makes an environment by copying itself, and installs by writing a line; waits where it is told to.
case "$1 $2" in
    "-c "*) exit ${FAKE_OLD:-0} ;;
    "-m venv")
        test -z "$FAKE_NO_VENV" || { mkdir -p "$3/bin"; exit 1; }
        mkdir -p "$3/bin"; cp "$0" "$3/bin/python"
        test "$FAKE_WAIT" != venv || { touch waiting; exec sleep 60; }
        touch "$3/bin/has-pip" ;;
    "-m pip")
        test -e "$(dirname "$0")/has-pip" || exit 1
        test "$3" != --version || exit 0
        test -z "$FAKE_FAILS" || exit 1
        touch "$(dirname "$0")/../half-a-package"
        test "$FAKE_WAIT" != pip || { touch waiting; exec sleep 60; }
        mv "$(dirname "$0")/../half-a-package" "$(dirname "$0")/../package"
        echo "pip says what it does"; echo "$@" >> installed ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with this Makefile and a python3 that is none."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "python3").write_text(PYTHON)
    (tmp_path / "python3").chmod(0o755)
    return tmp_path


OF_MAKE = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "PYTHON", "VENV")
"""What `make test` hands to the tests, and a user's `make install` does not have."""


def start(project: Path, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        # What is started in the background ignores SIGINT, and so does all that it starts.
        ["env", "--default-signal=INT", "make", "install", f"PYTHON={project}/python3"],
        cwd=project,
        env={name: value for name, value in os.environ.items() if name not in OF_MAKE} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def install(project: Path, **environment: str) -> tuple[int, str]:
    process = start(project, **environment)
    said, _ = process.communicate(timeout=30)
    return process.returncode, said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("where", ["venv", "pip"])
def test_an_interrupted_install_recovers(project: Path, where: str, number: signal.Signals) -> None:
    process = start(project, FAKE_WAIT=where)
    until = time.monotonic() + 30
    while not (project / "waiting").exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.killpg(process.pid, number)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert not (project / ".venv" / ".installed").exists()
    code, said = install(project)
    assert code == 0, said
    assert "The last install did not end: .venv is made anew" in said
    assert (project / ".venv" / "package").exists()
    assert not (project / ".venv" / "half-a-package").exists()
    assert install(project) == (0, "make: Nothing to be done for 'install'.\n")


def test_the_stamp_is_written_last(project: Path) -> None:
    code, _ = install(project, FAKE_FAILS="1")
    assert code != 0
    assert not (project / ".venv" / ".installed").exists()
    code, said = install(project)
    assert code == 0
    assert "pip says what it does" in said
    assert said.splitlines()[-1].endswith("source .venv/bin/activate")
    assert (project / ".venv" / ".installed").exists()
    assert not (project / ".venv" / ".installing").exists()


def test_an_environment_that_the_user_made_is_kept(project: Path) -> None:
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "of-the-user").touch()
    code, _ = install(project)
    assert code == 0
    assert (project / ".venv" / "of-the-user").exists()


def test_a_python_without_venv_and_one_that_is_too_old_are_named(project: Path) -> None:
    code, said = install(project, FAKE_NO_VENV="1")
    assert code != 0
    assert "apt-get install python3-venv, or make install PYTHON=python3.12" in said
    code, said = install(project, FAKE_OLD="1")
    assert code != 0
    assert f"{project}/python3: no Python of at least 3.11; name one: make install PYTHON=" in said
    assert install(project)[0] == 0


def test_the_pins_of_the_page_and_those_of_the_rest_go_together() -> None:
    rest, page = (
        dict(line.split("==") for line in (ROOT / name).read_text().splitlines() if not line.startswith("#"))
        for name in ("constraints.txt", "constraints-play.txt")
    )
    assert rest.keys() & page.keys() == {"pillow"}
    assert "gradio" in page
    assert int(page["pillow"].split(".")[0]) < 13  # gradio 6.31.0: pillow<13.0,>=8.0
