"""`diffdistill play` and the Space's app.py in a real browser, with the gradio of `make play`.

Without gradio these are skipped; with DIFFDISTILL_PLAY=required, as in CI, they fail.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.browser import chromium, set_width
from support.method_matrix import origin, train
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.export.run import ExportOptions
from diffdistill.export.space import export_space

ROOT = Path(__file__).parents[2]


def python_with_gradio() -> str:
    over = ROOT / ".venv/play/bin/python"
    if importlib.util.find_spec("gradio"):
        return sys.executable
    if named := os.environ.get("DIFFDISTILL_PLAY_PYTHON"):
        return named
    if not over.is_file():
        told = "gradio is not installed, so the page of `diffdistill play` is not tested: make play"
        (pytest.fail if os.environ.get("DIFFDISTILL_PLAY") == "required" else pytest.skip)(told)
    return str(over)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("played")
    return train("sid", origin("mlp", "sid", home / "teacher"), home / "student")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@contextmanager
def served(folder: Path, *words: str, **environment: str) -> Iterator[int]:
    """The port of a page that such a program serves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = tuple(word.format(port=port) for word in words)
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GRADIO_SERVER_PORT": str(port)}
    settings |= {"GRADIO_TEMP_DIR": str(folder / "gradio")} | environment
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [python_with_gradio(), "-W", "ignore", *words],
            cwd=folder,
            env=os.environ | settings,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        for _ in range(1200):
            if process.poll() is not None or "Running on" in (folder / "log").read_text():
                break
            time.sleep(0.1)
        assert process.poll() is None, (folder / "log").read_text()
        yield port
    finally:
        process.terminate()  # what was started in the background ignores Ctrl-C's signal
        process.wait(30)


def pictures(browser: Any, count: int, *, other_than: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The addresses of the models' pictures, once so many are there, of others than those."""
    script = "return [...document.querySelectorAll('.model img')].filter(i => i.naturalWidth > 0).map(i => i.src)"
    for _ in range(600):
        found = tuple(browser.execute_script(script))
        if len(found) == count and not set(found) & set(other_than):
            return found
        time.sleep(0.1)
    pytest.fail(f"{count} pictures did not come: {found}")


def captions(browser: Any) -> list[str]:
    shown = [one.text for one in browser.find_elements("css selector", ".caption")]  # gradio nests two of the class
    return list(dict.fromkeys(text for text in shown if text))


def asked_elsewhere(browser: Any, port: int) -> list[str]:
    """The addresses outside the page's own host that it asked for."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked
    own = (f"http://127.0.0.1:{port}/", "data:", "blob:")
    return [url for url in asked if not url.startswith(own)]


def test_a_page_draws_teacher_and_student_and_draws_anew(run: Path, browser: Any, tmp_path: Path) -> None:
    with served(tmp_path, "-m", "diffdistill", "play", str(run), "--port", "{port}") as port:
        with pytest.raises(OSError, match="refused"):  # it listens at 127.0.0.1 alone, and not at every address
            socket.create_connection(("127.0.0.2", port), timeout=2)
        browser.get(f"http://127.0.0.1:{port}/")
        first = pictures(browser, 2)
        assert [one.text for one in browser.find_elements("css selector", "h3")] == ["teacher", "student"]
        assert captions(browser)[0].endswith("; 35 NFE")
        assert captions(browser)[1].endswith("; 1 NFE")
        seed = browser.find_element("css selector", "input[aria-label='Seed'], label input[type=number]")
        seed.clear()
        seed.send_keys("3")
        browser.find_element("css selector", "#draw").click()
        assert pictures(browser, 2, other_than=first) != first
        for width in (1280, 390):
            set_width(browser, width)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert asked_elsewhere(browser, port) == []


def test_a_space_runs_where_this_package_is_not(run: Path, browser: Any, tmp_path: Path) -> None:
    export_space(str(run), tmp_path / "space", ExportOptions(is_verified=False))
    (tmp_path / "diffdistill.py").write_text("raise ImportError('not here')\n")
    with served(tmp_path, "space/app.py", PYTHONPATH=str(tmp_path)) as port:
        browser.get(f"http://127.0.0.1:{port}/")
        pictures(browser, 2)
        assert captions(browser)[1].endswith("; 1 NFE")
        assert asked_elsewhere(browser, port) == []


def test_without_gradio_the_command_says_what_to_install(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = CliRunner().invoke(app, ["play", str(run)])
    assert said.exit_code == 2
    assert "pip install 'diffdistill[play]'" in said.output
