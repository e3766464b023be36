"""`make gpu`: its parts in order, cut off and resumed, and all of it in small on a CPU."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("gpu", SCRIPTS / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "GRACE", 0.2)
    monkeypatch.setattr(module, "LEAST_ON_CPU", 0.0)
    return module


def parts_of(gpu: ModuleType, *programs: str | None) -> tuple[object, ...]:
    """Parts that run a Python program each, which may name its file RESULT."""

    def command(number: int, program: str | None) -> Callable[..., list[str] | None]:
        def made(setup: object, seconds: float) -> list[str] | None:
            file = setup.results / f"{number}.json"  # type: ignore[attr-defined]
            return None if program is None else [sys.executable, "-c", program.replace("RESULT", repr(str(file)))]

        return made

    return tuple(
        gpu.Part(f"part {i}", 1.0, command(i, program), f"{i}.json", lambda file: file.read_text())
        for i, program in enumerate(programs)
    )


WRITES = "open(RESULT, 'a').write('written')"


def said(gpu: ModuleType, place: Path, minutes: float, capsys: pytest.CaptureFixture[str]) -> list[str]:
    gpu.main(
        minutes=minutes, device="cpu", data=None, weights=None, results=place, page=place / "page.md", only_page=False
    )
    return [line.rpartition(",")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("part ")]


def test_what_is_done_is_not_done_again_and_what_was_cut_off_is(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hangs = f"import time; {WRITES}; time.sleep(60)"
    monkeypatch.setattr(gpu, "PARTS", parts_of(gpu, WRITES, hangs, WRITES, None))
    first = said(gpu, tmp_path, 0.1, capsys)
    assert first == ["part 0: done", "part 1: cut off", "part 2: done", "part 3: left out"]
    assert (tmp_path / "1.json").read_text() == "written"  # what it wrote before it was cut off stays
    monkeypatch.setattr(gpu, "PARTS", parts_of(gpu, WRITES, WRITES, WRITES, None))
    again = said(gpu, tmp_path, 0.1, capsys)
    assert again == ["part 0: done before", "part 1: done", "part 2: done before", "part 3: left out"]
    assert (tmp_path / "0.json").read_text() == "written"
    page = (tmp_path / "page.md").read_text()
    assert "figures mean nothing" in page
    assert page.count("written\n") >= 3


def test_a_part_that_fails_ends_the_command_with_an_error_after_all_others(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "PARTS", parts_of(gpu, "raise SystemExit(3)", WRITES))
    with pytest.raises(SystemExit, match="part 0: failed"):
        said(gpu, tmp_path, 0.1, capsys)
    assert (tmp_path / "1.json").read_text() == "written"


def test_the_page_says_what_was_not_run(gpu: ModuleType, tmp_path: Path) -> None:
    """As committed, as long as no GPU has run it."""
    given = {"data": None, "weights": None, "results": tmp_path, "page": tmp_path / "gpu.md", "only_page": True}
    gpu.main(minutes=1, device="cuda", **given)
    page = (tmp_path / "gpu.md").read_text()
    assert page.count("**Not run yet.**") == len(gpu.PARTS)
    if not list((ROOT / "results").glob("gpu/*.status.json")):
        assert page == (ROOT / "docs" / "gpu.md").read_text()


def test_another_commit_does_all_again(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "PARTS", parts_of(gpu, WRITES))
    said(gpu, tmp_path, 0.1, capsys)
    monkeypatch.setattr(gpu, "_commit", lambda: "another")
    assert said(gpu, tmp_path, 0.1, capsys) == ["part 0: done"]


@pytest.mark.full
def test_all_of_it_in_small_on_a_cpu(tmp_path: Path) -> None:
    given = ["--minutes", "1", "--device", "cpu", "--results", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPTS / "gpu.py"), *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    logs = "\n".join(file.read_text()[-500:] for file in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    ended = {file.name: json.loads(file.read_text())["ended"] for file in tmp_path.glob("*.status.json")}
    assert ended == {f"{name}.status.json": "done" for name in ("tests", "attention", "steps", "records")}
    page = (tmp_path / "gpu.md").read_text()
    assert "| bf16, compiled |" in page
    assert "sid, cifar10-" in page
