"""Files that are programs run only where the person who calls allowed it, and nowhere else."""

import ast
import hashlib
import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from torch import Tensor, nn
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.eval.evaluation.command import run_eval
from diffdistill.eval.evaluation.real import write_references
from diffdistill.eval.evaluation.setup import EvalOptions
from diffdistill.eval.features.extractors import Inception, OpenClip, Timm, TorchScript, load_extractor
from diffdistill.eval.protocols.packaged import DIGITS_PIXELS
from diffdistill.eval.protocols.protocol import Protocol
from diffdistill.export.record import ExportRecord
from diffdistill.models.spec import ModelSpec
from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import Console
from diffdistill.settings.values import dump, dump_yaml
from diffdistill.training.config import RunConfig
from diffdistill.training.memory.oom_retry import run_with_oom_retry
from diffdistill.training.trainer import Trainer

ROOT = Path(__file__).parents[2]


class Writes(nn.Module):
    """A stranger's features, which make a file wherever they run."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        written = torch.from_file(self.place, shared=True, size=1).fill_(7.0)
        return x.flatten(1)[:, :8] + 0 * written


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """The file that the stranger's program writes."""
    return tmp_path / "written-by-a-stranger"


@pytest.fixture
def script(tmp_path: Path, trap: Path) -> Path:
    file = tmp_path / "features.pt"
    torch.jit.script(Writes(str(trap))).save(str(file))
    return file


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def features_of(script: Path) -> TorchScript:
    return TorchScript(label="theirs", size=8, sha256=sha256(script))


@pytest.fixture
def protocol(tmp_path: Path, script: Path) -> Path:
    """A stranger's protocol, hash included."""
    given: dict[str, Any] = dump(DIGITS_PIXELS)
    given |= {
        "name": "theirs",
        "num_images": 20,
        "metrics": [{"name": "frechet", "features": dump(features_of(script))}],
    }
    file = tmp_path / "protocol.yaml"
    file.write_text(json.dumps(given))
    return file


def test_the_trap_works_where_it_is_allowed(script: Path, trap: Path) -> None:
    load_extractor(features_of(script), weights=script, trusts_code=True)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert trap.exists()


def test_torchscript_features_do_not_run_unless_they_are_allowed(script: Path, trap: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"theirs: TorchScript, a program that runs with your permissions; if you trust .* add --trust-code",
    ):
        load_extractor(features_of(script), weights=script)
    assert not trap.exists()


def test_inception_under_a_hash_of_the_protocols_own_is_a_strangers_program(script: Path) -> None:
    with pytest.raises(UserError, match="--trust-code"):
        load_extractor(Inception(mode="clean", sha256=sha256(script)), weights=script)
    with pytest.raises(UserError, match="damaged, or another file"):
        load_extractor(Inception(mode="clean"), weights=script)


def test_neither_eval_nor_reference_runs_a_protocols_program(
    protocol: Path, script: Path, trap: Path, teacher: Path
) -> None:
    options = EvalOptions(protocol=str(protocol), weights=[f"theirs={script}"])
    with pytest.raises(UserError, match="--trust-code"):
        run_eval([str(teacher)], options, Console())
    with pytest.raises(UserError, match="--trust-code"):
        write_references("{name: digits}", str(protocol), console=Console(), weights=[f"theirs={script}"])
    for command in (["eval", str(teacher)], ["reference", "{name: digits}"]):
        done = CliRunner().invoke(app, [*command, "--protocol", str(protocol), "--weights", f"theirs={script}"])
        assert done.exit_code == 2
    assert not trap.exists()


def test_the_command_line_allows_it(protocol: Path, script: Path, trap: Path, tmp_path: Path) -> None:
    told = ["--protocol", str(protocol), "--weights", f"theirs={script}", "--out", str(tmp_path), "--trust-code"]
    done = CliRunner().invoke(app, ["reference", "{name: digits, split: train}", *told])
    assert done.exit_code == 0, done.output
    assert trap.exists()


def test_no_training_config_runs_a_protocols_program(
    make_config: MakeConfig, protocol: Path, script: Path, trap: Path
) -> None:
    config = make_config("dmd2", "train.steps=2", f"eval={{protocol: {protocol}, weights: {{theirs: {script}}}}}")
    for start in (Trainer, run_with_oom_retry):
        with pytest.raises(UserError, match="--trust-code"):
            start(config, quiet=True)
    assert not trap.exists()
    Trainer(config, quiet=True, trusts_code=True).run()
    assert trap.exists()


@pytest.mark.parametrize("kind", [RunConfig, Protocol, ModelSpec, ExportRecord, TorchScript, Inception])
def test_no_file_can_give_the_leave(kind: type) -> None:
    def names(of: type, seen: set[type]) -> set[str]:
        seen.add(of)
        return {field.name for field in fields(of)}  # type: ignore[arg-type]

    assert not {name for name in names(kind, set()) if "trust" in name}


def test_a_config_that_asks_for_it_is_refused(make_config: MakeConfig) -> None:
    for override in ("trusts_code=true", "train.trust_code=true", "eval={protocol: digits-pixels, trusts_code: true}"):
        with pytest.raises(UserError, match="unknown key"):
            make_config("dmd2", override)


@pytest.mark.parametrize("model", ["hf-hub:stranger/model", "local-dir:/tmp/stranger"])
def test_names_that_lead_to_a_strangers_folder_are_no_models(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = pytest.importorskip("open_clip")
    monkeypatch.setattr(clip, "get_model_config", lambda name: pytest.fail(f"asked for {name}"))
    with pytest.raises(UserError, match="has none of this name"):
        load_extractor(OpenClip(model=model, pretrained="x"))
    with pytest.raises(UserError, match="has none of this name"):
        load_extractor(Timm(model=model))


def test_what_can_run_files_is_called_in_the_known_places_alone() -> None:
    """Every reader that is able to run what it reads, by file: a new place has to be looked at, and added."""
    allowed = {
        "jit.load": {"eval/features/networks/torchscript.py"},
        "open_script": {"eval/features/networks/torchscript.py", "eval/features/networks/inception.py"},
        "exec": {"diffdistill/export/reload.py"},  # the card's program, of names and values' reprs (export/usage.py)
        "compile": {"diffdistill/export/reload.py"},
        "trust_remote_code=True": {"diffdistill/exported/image_generators.py"},
    }
    forbidden = {"eval", "pickle.load", "pickle.loads", "joblib.load", "hub.load", "runpy.run_path"}
    forbidden |= {"load_source", "spec_from_file_location", "__import__", "dill.load", "cloudpickle.load"}
    found: dict[str, set[str]] = {name: set() for name in allowed}
    for file in (file for wing in ("diffdistill", "methods", "eval") for file in (ROOT / wing).rglob("*.py")):
        place = str(file.relative_to(ROOT))
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            name, told = ast.unparse(call.func), {one.arg: ast.unparse(one.value) for one in call.keywords}
            assert name not in forbidden, f"{place}: {name}"
            assert name != "torch.load" or told.get("weights_only") == "True", place
            assert name != "np.load" or told.get("allow_pickle") == "False", place
            assert name != "yaml.load" or told.get("Loader") == "_Loader", place
            if name.endswith("jit.load"):
                found["jit.load"].add(place)
            if name in ("open_script", "exec", "compile"):
                found[name].add(place)
            if told.get("trust_remote_code") == "True":
                found["trust_remote_code=True"].add(place)
    assert found == allowed


def test_python_has_to_say_it_as_a_keyword() -> None:
    for called in (load_extractor, Trainer, run_with_oom_retry, write_references):
        parameter = inspect.signature(called).parameters["trusts_code"]
        assert parameter.default is False
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
    assert EvalOptions().trusts_code is False
    assert "trust" not in dump_yaml(DIGITS_PIXELS)
