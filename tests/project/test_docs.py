"""The documentation is true: its method learns, its tutorial runs, its commands, configs, links and tables hold."""

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml
from conftest import MakeConfig
from PIL import Image
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.data.registry import DATA
from diffdistill.distillation.method import METHODS, REGISTRY
from diffdistill.distillation.rewards import REWARDS
from diffdistill.eval.features.extractors import FEATURES
from diffdistill.eval.protocols.packaged import find_protocol
from diffdistill.models.teachers.registry import FAMILIES
from diffdistill.networks.registry import NETWORKS
from diffdistill.training.config import RunConfig, find_config, load_config
from diffdistill.training.reports.health import BANDS
from diffdistill.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WRITTEN_BY_INIT = "runs/pictures/"
"""Where `init pictures` writes its configs, which tests/commands/test_init.py trains."""
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def module_from(file: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


settings = module_from(DOCS / "settings.py", "docs_settings")
hooks = module_from(DOCS / "hooks.py", "docs_hooks")


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


def titled(page: Path) -> dict[str, str]:
    """The files that a page shows, by name."""
    return {title: block for _, title, block in FENCE.findall(page.read_text()) if title}


FILES = {name: text for page in PAGES for name, text in titled(page).items()}
METHOD = FILES["methods/diff_instruct.py"]
METHOD_NAME = "diffdistill.methods.diff_instruct"


@pytest.fixture
def method_file(tmp_path: Path) -> Path:
    file = tmp_path / "diff_instruct.py"
    file.write_text(METHOD)
    return file


def test_the_new_method_has_at_most_100_lines() -> None:
    assert len(METHOD.splitlines()) <= 100


def test_the_new_method_passes_the_tests_that_its_page_gives_it(
    method_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, METHOD_NAME, module_from(method_file, METHOD_NAME))
    tests: dict[str, Any] = {}
    exec(FILES["tests/test_diff_instruct.py"], tests)
    found = [value for name, value in tests.items() if name.startswith("test_")]
    assert len(found) == 2
    for test in found:
        test()


def test_the_new_method_trains_from_its_config(
    method_file: Path, quick_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(METHODS, "_registered", {})
    monkeypatch.setitem(sys.modules, METHOD_NAME, module_from(method_file, METHOD_NAME))
    METHODS.register(sys.modules[METHOD_NAME].DiffInstruct)
    config = tmp_path / "digits.yaml"
    config.write_text(FILES["configs/diff_instruct/digits.yaml"])
    places = [f"teacher={quick_teacher}", f"run={tmp_path / 'run'}"]
    short = ["train.steps=2", "train.global_batch_size=8", "train.device=cpu"]
    done = CliRunner().invoke(app, ["train", str(config), *places, *short])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()


def programs(page: str) -> list[str]:
    """The Python that a page shows, apart from whole files."""
    return [block for kind, title, block in FENCE.findall((DOCS / page).read_text()) if kind == "python" and not title]


def test_the_tutorial_runs_on_a_folder_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pictures").mkdir()
    for number in range(12):
        Image.new("RGB", (40, 30), (20 * number, 100, 200)).save(tmp_path / "pictures" / f"{number}.png")
    look_at_the_data, use_it = programs("tutorial.md")
    short = ["train.steps=1", "train.global_batch_size=8", "train.preview_every=0", "train.device=cpu"]
    for name in ("my-teacher.yaml", "my-student.yaml"):
        (tmp_path / name).write_text(FILES[name])
        Trainer(load_config(name, short), quiet=True).run()
    exec(look_at_the_data, {})
    assert (tmp_path / "pictures.png").exists()
    made: dict[str, Any] = {}
    exec(use_it, made)
    assert made["images"].shape == (16, 3, 16, 16)


def test_the_python_of_the_configs_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(FILES["small.yaml"])
    [program] = programs("configs.md")
    exec(program, {})
    assert (tmp_path / "runs" / "small" / "checkpoints" / "step-00000010").is_dir()


@pytest.mark.parametrize("page", ["guidance.md", "methods/agd.md"])
def test_the_python_of_a_page_about_guidance_runs(
    page: str, make_config: MakeConfig, quick_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapted = make_config("agd", "train.steps=1")
    Trainer(adapted, quiet=True).run()
    Path("runs").mkdir()
    Path("runs/teacher").symlink_to(quick_teacher)
    Path("runs/agd").symlink_to(adapted.run)
    made: dict[str, Any] = {}
    for program in programs(page):
        exec(program, made)
    if page == "guidance.md":
        ramp = made["Ramp"]()
        images = made["teacher"].spec.sampler(made["teacher"].denoiser, made["noise"], made["cond"], guidance=ramp)
        assert images.shape == made["images"].shape == (64, 1, 8, 8)


def test_the_protocol_of_the_evaluation_page_is_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(FILES["protocols/my-faces.yaml"])
    assert find_protocol(str(tmp_path / "mine.yaml")).name == "my-faces"


def links() -> Iterator[tuple[Path, str]]:
    for file in TEXTS:
        for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", file.read_text())):
            if not re.match(r"[a-z]+:", target):
                yield file, target


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as Python-Markdown makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize(("file", "target"), [*links()], ids=str)
def test_a_relative_link_leads_somewhere(file: Path, target: str) -> None:
    place, _, anchor = target.partition("#")
    page = (file.parent / place).resolve() if place else file
    assert page.exists(), f"{relative(file)}: {target}"
    if anchor:
        assert anchor in anchors(page), f"{relative(file)}: {target}"


def shell_lines() -> Iterator[tuple[str, list[str]]]:
    for file in TEXTS:
        for _, _, block in FENCE.findall(file.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("diffdistill "):
                    yield relative(file), shlex.split(line, comments=True)[1:]


@pytest.mark.parametrize(("origin", "words"), [*shell_lines()], ids=str)
def test_a_shell_line_is_a_command_that_exists(origin: str, words: list[str], tmp_path: Path) -> None:
    verb, *arguments = words
    assert verb in COMMANDS, f"{origin}: {words}"
    given = COMMANDS[verb].make_context(verb, arguments).params  # raises on an unknown option, or too few arguments
    if given.get("config") and not given["config"].startswith(("diff_instruct/", WRITTEN_BY_INIT)):
        shown = FILES.get(given["config"])
        file = tmp_path / Path(given["config"]).name
        file.write_text(shown or find_config(given["config"]).read_text())
        load_config(file, given["overrides"] or ())  # raises on an override that names no setting


def test_shell_lines_were_found() -> None:
    assert {words[0] for _, words in shell_lines()} >= {"pretrain", "train", "sample", "eval", "demo", "doctor"}


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".yaml") and "/" not in name])
def test_a_config_on_a_page_is_a_config(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(FILES[name])
    assert isinstance(load_config(tmp_path / name), RunConfig)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=relative)
def test_the_tables_of_a_page_are_those_of_the_code(page: Path) -> None:
    assert settings.renewed(page.read_text()) == page.read_text(), "run `make schema`"


@pytest.mark.parametrize("kind", settings.schema_classes().values(), ids=lambda kind: kind.__name__)
def test_every_setting_has_a_meaning(kind: type) -> None:
    cells = [row.rsplit(" | ", 1) for row in settings.table(kind).splitlines() if row.startswith("| `")]
    silent = [row for row, meaning in cells if not meaning.strip(" |")]
    assert not silent, "say it in docs/meanings.yaml, in the docstring, or in a comment behind the setting"


def test_only_settings_that_exist_have_a_meaning() -> None:
    said = yaml.safe_load((DOCS / "meanings.yaml").read_text())
    del said["everywhere"]
    known = settings.schema_classes()
    assert not {
        f"{kind}.{name}"
        for kind, names in said.items()
        for name in names
        if kind not in known or name not in known[kind].__dataclass_fields__  # type: ignore[attr-defined]
    }


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_a_method_has_a_page_with_its_settings(name: str) -> None:
    assert f"<!-- settings: {METHODS.find(name).__name__} -->" in (DOCS / "methods" / f"{name}.md").read_text()


def test_a_group_of_entry_points_is_called_what_it_is() -> None:
    registries = (METHODS, NETWORKS, DATA, FAMILIES, REWARDS, FEATURES)
    groups, text = {registry.group for registry in registries}, "".join(page.read_text() for page in PAGES)
    named = re.findall(
        r"entry point of the group\s`([^`]+)`|^\| \w[\w ]* \| `dd\.register\w*` \| `([^`]+)` \|", text, re.MULTILINE
    )
    assert len(named) == len(groups) + 1  # hyper_sd's page names one more
    assert {first or second for first, second in named} == groups


def test_every_health_signal_is_explained() -> None:
    assert set(BANDS) <= anchors(DOCS / "health.md")


def test_the_site_has_every_page_and_only_pages() -> None:
    def files(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for inner in entry.values() if isinstance(entry, dict) else entry:
                yield from files(inner)

    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text()) | {"docs_dir": str(DOCS)}
    nav = list(files(hooks.on_config(config)["nav"]))
    assert sorted(nav) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


@pytest.mark.parametrize(
    "loading",
    [
        '<script src="https://cdn.example/x.js"></script>',
        "<img alt=a src=//cdn.example/x.png>",
        '<link rel="stylesheet" href="https://fonts.example/css">',
        '<link href="https://fonts.example" rel="preconnect" crossorigin>',
        "@import url(https://fonts.example/css);",
    ],
)
def test_a_site_that_loads_from_another_host_is_refused(loading: str, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(loading)
    with pytest.raises(ValueError, match=r"index\.html loads"):
        hooks.on_post_build({"site_dir": str(tmp_path)})


def test_plain_links_are_not_loading() -> None:
    assert not hooks.foreign('<a href="https://arxiv.org/abs/2405.14867">DMD2</a> <img src="a.png">')


DOCUMENTED = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_what_the_reference_documents_is_there_and_says_what_it_is(name: str) -> None:
    place = resolve_name(name)
    assert place.__doc__
    assert (place.__name__ if isinstance(place, ModuleType) else f"{place.__module__}.{place.__qualname__}") == name
