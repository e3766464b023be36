"""docs/tutorial.ipynb: made of the tutorial, and executed."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def test_the_notebook_is_that_of_the_tutorial() -> None:
    notebook = runpy.run_path(str(ROOT / "docs" / "notebook.py"))["notebook"]
    expected = notebook((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"))
    assert NOTEBOOK.read_text(encoding="utf-8") == expected, "run `python docs/notebook.py`"
    code = ["".join(cell["source"]) for cell in json.loads(expected)["cells"] if cell["cell_type"] == "code"]
    assert "!diffdistill pretrain my-teacher.yaml train.steps={STEPS}" in code
    assert "!diffdistill train my-student.yaml train.steps={STEPS}" in code


@pytest.mark.full
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="pip install '.[dev]'")
    nbclient = pytest.importorskip("nbclient", reason="pip install '.[dev]'")
    scripts = tmp_path / "bin"
    scripts.mkdir()
    command = scripts / "diffdistill"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m diffdistill "$@"\n')
    command.chmod(0o755)
    for name, value in {
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DIFFDISTILL_CACHE": str(tmp_path / "cache"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }.items():
        monkeypatch.setenv(name, value)
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    book.cells[1].source = book.cells[1].source.replace("STEPS = 2000", "STEPS = 2")
    work = tmp_path / "work"
    work.mkdir()
    nbclient.NotebookClient(book, timeout=900, resources={"metadata": {"path": str(work)}}).execute()
    for name in ("teacher", "student"):
        assert (work / "runs" / f"my-{name}" / "checkpoints" / "step-00000002").is_dir()
    shown = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 2
    assert not [output for output in shown if "error:" in output.get("text", "")]
