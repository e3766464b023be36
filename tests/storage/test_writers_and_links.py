"""Whoever writes into a folder that may come from elsewhere writes and deletes nothing outside it."""

import ast
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeConfig
from support.made_records import MEASURED
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.eval.board.files import write_leaderboard
from diffdistill.eval.board.report import write_report
from diffdistill.eval.records.record import append_record
from diffdistill.export.run import _built_beside
from diffdistill.settings.schema import UserError
from diffdistill.training import students
from diffdistill.training.trainer import Trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that nobody may write to or empty."""
    folder = tmp_path / "outside"
    (folder / "deep").mkdir(parents=True)
    (folder / "precious").write_text("all of it")
    return folder


def untouched(outside: Path) -> bool:
    return (
        sorted(str(one.relative_to(outside)) for one in outside.rglob("*")) == ["deep", "precious"]
        and (outside / "precious").read_text() == "all of it"
    )


@pytest.mark.parametrize("linked", ["cards", "cards/toy", "cards/toy/.eval_results", "leaderboard.md"])
def test_a_leaderboard_is_not_written_through_links(tmp_path: Path, outside: Path, linked: str) -> None:
    append_record(tmp_path / "r.jsonl", replace(MEASURED, name="toy"))
    out = tmp_path / "board"
    link = out / linked
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    with pytest.raises(UserError, match=f"{linked}: is a link to {outside}"):
        write_leaderboard([tmp_path / "r.jsonl"], out)
    assert untouched(outside)


def test_a_leaderboard_s_own_folder_may_be_reached_through_a_link(tmp_path: Path) -> None:
    append_record(tmp_path / "r.jsonl", replace(MEASURED, name="toy"))
    (tmp_path / "plain").mkdir()
    (tmp_path / "reached").symlink_to(tmp_path / "plain")
    write_leaderboard([tmp_path / "r.jsonl"], tmp_path / "reached")
    assert (tmp_path / "plain/cards/toy/model-index.yaml").is_file()


@pytest.mark.parametrize("linked", ["a/b/c", "curves.png", "previews/step-00000001.png"])
def test_a_report_is_not_written_into_a_run_with_links(
    tmp_path: Path, outside: Path, quick_teacher: Path, linked: str
) -> None:
    run = tmp_path / "run"
    (run / linked).parent.mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl"):
        (run / name).write_bytes((quick_teacher / name).read_bytes())
    (run / linked).symlink_to(outside)
    with pytest.raises(UserError, match=f"{linked}: is a link"):
        write_report(run)
    assert not (run / "report.html").exists()
    assert untouched(outside)


@pytest.mark.parametrize("option", ["--records", "--out"])
def test_an_evaluation_finds_a_linked_file_before_it_works_and_makes_nothing_there(
    tmp_path: Path, outside: Path, quick_teacher: Path, option: str
) -> None:
    file = tmp_path / "file.json"
    file.symlink_to(outside / "new")
    told = CliRunner().invoke(app, ["eval", str(quick_teacher), "--protocol", "digits-pixels", option, str(file)])
    assert told.exit_code == 2, told.output
    assert "is a link" in told.output
    assert untouched(outside)


@pytest.mark.parametrize("linked", ["grids", "grids/x.png"])
def test_grids_are_not_written_through_links(tmp_path: Path, outside: Path, quick_teacher: Path, linked: str) -> None:
    from diffdistill.eval.evaluation import command

    records = tmp_path / "records" / "r.jsonl"
    link = records.parent / linked
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    options = command.EvalOptions(protocol="digits-pixels", records=str(records))
    bench = command.set_up([str(quick_teacher)], options)
    source = command.open_place(str(quick_teacher), bench, options)
    if linked == "grids":
        with pytest.raises(UserError, match="grids: is a link"):
            command._save_grid(source, bench.protocol, "x", records)
    else:
        file = command._save_grid(source, bench.protocol, "x", records)
        (records.parent / file).unlink()
        (records.parent / file).symlink_to(outside / "precious")
        with pytest.raises(UserError, match=r"\.png: is a link"):
            command._save_grid(source, bench.protocol, "x", records)
    assert untouched(outside)


@pytest.mark.parametrize("linked", ["student_index=0", "student_index=0.log", "student_index=1/checkpoints"])
def test_the_students_launcher_refuses_links_before_it_starts_any(
    tmp_path: Path, outside: Path, write_config: Callable[..., Path], linked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(students.subprocess, "Popen", lambda *_, **__: pytest.fail("started a student"))
    file = write_config("msd", "train.steps=1")
    link = tmp_path / "run" / linked
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    with pytest.raises(UserError, match=f"{linked}: is a link to {outside}"):
        students.train_students(file, [f"run={tmp_path / 'run'}"])
    assert untouched(outside)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_students_log_is_not_written_through_a_link(tmp_path: Path, outside: Path, is_there: bool) -> None:
    group = students.Group(0, tmp_path / "run")
    group.log.symlink_to(outside / ("precious" if is_there else "new"))
    with pytest.raises(UserError, match=f"{group.log.name}: is a link"):
        students._start(group, [sys.executable, "-c", "print('mine')"], [], 0)
    assert group.process is None
    assert untouched(outside)


def test_an_export_takes_the_place_of_a_folder_with_links_and_removes_none_of_what_they_lead_to(
    tmp_path: Path, outside: Path
) -> None:
    folder = tmp_path / "exported"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights").symlink_to(outside / "precious")
    (folder / "vae").symlink_to(outside)
    with _built_beside(folder) as building:
        (building / "new").write_text("new")
    assert [one.name for one in folder.iterdir()] == ["new"]
    assert untouched(outside)


@pytest.mark.parametrize("name", [".exporting-exported", ".replaced-exported"])
def test_an_export_is_not_built_through_a_link(tmp_path: Path, outside: Path, name: str) -> None:
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "old").write_text("old")
    (tmp_path / name).symlink_to(outside)
    with pytest.raises(UserError, match=f"{name}: is a link to {outside}"), _built_beside(folder):
        pytest.fail("built through a link")
    assert (folder / "old").read_text() == "old"
    assert untouched(outside)


@pytest.mark.parametrize("linked", ["teacher", "student/previews", "table.json"])
def test_the_demo_refuses_links_before_it_trains(tmp_path: Path, outside: Path, linked: str) -> None:
    link = tmp_path / "demo" / linked
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    told = CliRunner().invoke(app, ["demo", "--fast", "--run", str(tmp_path / "demo")])
    assert told.exit_code == 2, told.output
    assert "is a link" in told.output.replace("\n", " ")
    assert untouched(outside)


def test_a_runs_evaluation_does_not_follow_a_link_that_is_made_while_it_trains(
    tmp_path: Path, outside: Path, make_config: MakeConfig
) -> None:
    trainer = Trainer(make_config("pretrain", "train.steps=1", "eval={protocol: digits-pixels}"), quiet=True)
    trainer.folder.mkdir(parents=True)
    (trainer.folder / ".features").symlink_to(outside)
    with pytest.raises(UserError, match=r"\.features: is a link"):
        trainer.plan.evaluator.examine(trainer, is_last=True, log=None)  # type: ignore[arg-type]
    assert untouched(outside)


NEW = "into the folder that an export has just made"
RAW: dict[str, str] = {
    "diffdistill/attention/build.py": "the compiler's output in the user's own cache, named after this process",
    "diffdistill/data/prepare.py": "into memory",
    "diffdistill/export/lora_files.py": NEW,
    "diffdistill/export/parts.py": NEW,
    "diffdistill/export/quantised.py": NEW,
    "diffdistill/export/reload.py": "into a temporary folder",
    "diffdistill/export/self_contained.py": NEW,
    "diffdistill/export/stock.py": NEW,
    "diffdistill/export/verify.py": "into a temporary folder",
    "diffdistill/models/teachers/compose.py": "into a new folder of the cache, whose name is kept until it is whole",
    "diffdistill/models/teachers/single_file.py": "into the same",
    "eval/evaluation/reference.py": "into a file that open_plain has opened",
}
"""Files that open for writing by other means than the checked ones, and why that is right there."""


MARKS = (".open(", " open(", "save", "copy", "touch(", "move(", ".write_", "json.dump(")


def raw_writes(tree: ast.AST) -> list[str]:
    """Calls that write to a place without asking whether it is a link."""
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        last = name.rpartition(".")[2]
        told: list[Any] = [*call.args[:2], *(one.value for one in call.keywords if one.arg == "mode")]
        modes = [one.value for one in told if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        if last == "open" and any(set(mode) & set("wax+") and len(mode) < 4 for mode in modes):
            found.append(name)
        if name in ("np.save", "np.savez", "torch.save", "save_file", "json.dump", "shutil.move"):
            found.append(name)
        if last in ("copyfile", "copy2", "copytree", "touch", "save_pretrained"):
            found.append(name)
        if last in ("write_text", "write_bytes") and isinstance(call.func, ast.Attribute):
            found.append(name)
    return found


def test_every_writer_goes_through_the_checked_functions() -> None:
    """A new place that opens a file for writing by itself has to be looked at, and added with its reason."""
    found = defaultdict(list)
    for wing in ("diffdistill", "eval", "methods"):
        for place, _, names in os.walk(ROOT / wing):
            for name in (name for name in names if name.endswith(".py")):
                file = Path(place, name)
                text = file.read_text(encoding="utf-8")
                if any(mark in text for mark in MARKS) and (calls := raw_writes(ast.parse(text))):
                    found[str(file.relative_to(ROOT))] = calls
    assert dict(found).keys() == RAW.keys(), dict(found)
