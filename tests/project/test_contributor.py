"""What a contributor touches: in a copy of the repository a method is four files, a family two, a metric one."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.pages import ROOT, files_of

TOP = (
    "diffdistill",
    "methods",
    "eval",
    "configs",
    "scripts",
    "docs",
    "tests",
    "results",
    "README.md",
    "CONTRIBUTING.md",
)
MORE = ("pyproject.toml", "mkdocs.yml", "Makefile", "CHANGELOG.md", "LICENSE", "CITATION.cff", "constraints.txt")
GENERATED = {"configs/schema.json", "README.md", "docs/settings.md", "docs/time-distributions.md"}
WRAPPERS = ("ddk", "disback", "diversity", "forget", "msd")  # whose pages tell the settings of each base
SCHEMA = 'from diffdistill.training.config import json_schema; print(json_schema(), end="")'
CHECKS = ("tests/project/test_structure.py", "tests/project/test_docs.py")
SLOW = "not tutorial and not python_of and not new_method"  # of the pages' programs, which no new file changes
EXAMPLES = files_of("new-method.md") | files_of("library.md")
Write = Callable[[str, str], None]

METHOD_PAGE = """# diff_instruct

The method of [A new method in 100 lines](../new-method.md).

<!-- settings: DiffInstruct -->

<!-- end -->
"""
FAMILY_TEST = """from pathlib import Path

import json
from diffdistill.models.load import load_model
from support.stand_ins import save_stand_in


def test_a_pipeline_is_read(tmp_path: Path) -> None:
    save_stand_in("ddpm", tmp_path / "pipeline", channels=1)
    file = tmp_path / "pipeline" / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "StripesPipeline"}))
    assert load_model(tmp_path / "pipeline").spec.model.network.family == "stripes_pipeline"
"""
METRIC = '''@schema
class MeanGap(Metric):
    """Distance of the means of the features."""

    facts = (Fact("mean-gap", "lower", "mean gap"),)

    name: Literal["mean_gap"] = "mean_gap"
    features: AnyFeatures

    @property
    def keys(self) -> tuple[str, ...]:
        return (f"mean-gap-{self.features.label}",)

    def compute(self, sides: Sides) -> Found:
        return Found((float((sides.fake.rows().mean(0) - sides.real.rows().mean(0)).norm()),))


AnyMetric = Annotated[
    MeanGap | '''


def a_method(write: Write, _: Path) -> tuple[str, ...]:
    write("methods/diff_instruct.py", EXAMPLES["methods/diff_instruct.py"])
    write("configs/diff_instruct/digits.yaml", EXAMPLES["configs/diff_instruct/digits.yaml"])
    write("tests/methods/test_diff_instruct.py", EXAMPLES["tests/test_diff_instruct.py"])
    write("docs/methods/diff_instruct.md", METHOD_PAGE)
    return "tests/methods/test_diff_instruct.py", "tests/distillation/test_wrapper.py"


def a_family(write: Write, _: Path) -> tuple[str, ...]:
    name = "stripes_pipeline"
    write(f"diffdistill/models/teachers/families/{name}.py", EXAMPLES[f"example/diffdistill_example/{name}.py"])
    write(f"tests/models/test_{name}.py", FAMILY_TEST)
    return (f"tests/models/test_{name}.py",)


def a_metric(write: Write, copy: Path) -> tuple[str, ...]:
    text = (copy / "eval/metrics/settings.py").read_text()
    assert text.count("AnyMetric = Annotated[\n    ") == 1
    write("eval/metrics/settings.py", text.replace("AnyMetric = Annotated[\n    ", METRIC))
    return "tests/eval/test_metric_facts.py", "tests/eval/test_table.py"


@pytest.mark.full
@pytest.mark.parametrize(("add", "count"), [(a_method, 4), (a_family, 2), (a_metric, 1)])
def test_so_many_files_are_touched_and_no_more(
    add: Callable[[Write, Path], tuple[str, ...]], count: int, tmp_path: Path
) -> None:
    """Whoever needs another by hand sees a test of the copy fail. The tables that `make schema` writes do not count."""
    copy, touched = tmp_path / "copy", set[str]()
    copy.mkdir()
    for name in (*TOP, *MORE):
        source, target = ROOT / name, copy / name
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, target, symlinks=True, ignore=skipped) if source.is_dir() else shutil.copy(
            source, target
        )

    def write(name: str, text: str) -> None:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(text)
        touched.add(name)

    def run(*command: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        return done.stdout

    tests = add(write, copy)
    before = {name: (copy / name).read_text() for name in GENERATED}
    (copy / "configs/schema.json").write_text(run(sys.executable, "-c", SCHEMA))
    renewed = {str(Path(line).relative_to(copy)) for line in run(sys.executable, "docs/settings.py").splitlines()}
    assert renewed <= {*GENERATED, *touched, *(f"docs/methods/{name}.md" for name in WRAPPERS)}
    assert (before["README.md"] != (copy / "README.md").read_text()) == (add is a_method)
    run(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0", "-k", SLOW, *CHECKS, *tests)
    assert len(touched) == count
