"""What others add is found by its name, its faults are said as ours are, and nobody takes a name of ours."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest
from pydantic import TypeAdapter
from support.plugins import install, on_the_path

from diffdistill.settings.registry import NameOf, OneOf, Registry, schema_class
from diffdistill.settings.schema import PositiveInt, UserError, field, schema
from diffdistill.settings.values import dump, validate

MODULE = __name__
GROUP = "diffdistill.tools"


@schema
class Saw:
    """One of ours."""

    name: Literal["saw"] = "saw"
    teeth: PositiveInt = 1


@schema
class Box:
    """One of ours that holds another."""

    name: Literal["box"] = "box"
    base: Any = None


@schema
class Drill:
    """Another's."""

    name: Literal["drill"] = "drill"
    speed: PositiveInt = 1


PLUGIN = """
from typing import Literal
from diffdistill.settings.schema import PositiveInt, schema

@schema
class Drill:
    name: Literal["drill"] = "drill"
    speed: PositiveInt = 1
"""

if TYPE_CHECKING:
    AnyTool = Any
else:
    TOOLS: Registry[Any] = Registry(
        "tool", {"saw": f"{MODULE}:Saw", "box": f"{MODULE}:Box"}, group=GROUP, check=schema_class()
    )
    AnyTool = Annotated[Any, OneOf(TOOLS)]


@schema
class Job:
    tool: AnyTool
    spare: AnyTool | None = None
    others: tuple[AnyTool, ...] = ()
    by_name: dict[str, AnyTool] = field(default_factory=dict)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A registry without what other tests have added."""
    monkeypatch.setattr(TOOLS, "_registered", {})
    monkeypatch.setattr(TOOLS, "_found", {})
    yield
    for module in ("drill_tool", "other_tool", "broken_tool"):
        sys.modules.pop(module, None)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    return on_the_path(monkeypatch, tmp_path)


def read(**tool: object) -> Job:
    return validate(Job, {"tool": tool}, origin="job")


def test_a_class_that_was_registered_after_the_type_was_made_is_read_and_written() -> None:
    TypeAdapter(Job)
    assert TOOLS.register(Drill) is Drill
    made = read(name="drill", speed=3)
    assert made.tool == Drill(speed=3)
    assert dump(made)["tool"] == {"name": "drill", "speed": 3}
    assert validate(Job, dump(made), origin="again") == made


def test_faults_of_another_s_class_have_their_place_and_their_choices() -> None:
    TOOLS.register(Drill)
    with pytest.raises(UserError, match=r"tool.speed = 0: input should be greater") as caught:
        validate(Job, {"tool": {"name": "drill", "speed": 0, "sped": 1}, "spare": {"name": "dril"}}, origin="job")
    said = str(caught.value)
    assert "3 faults" in said
    assert "tool.sped: unknown key; did you mean 'speed'? (choices: name, speed)" in said
    assert "spare.name = 'dril': unknown; did you mean 'drill'? (choices: saw, box, drill)" in said


def test_faults_are_placed_in_lists_and_mappings() -> None:
    TOOLS.register(Drill)
    data = {"tool": {"name": "saw"}, "others": [{"name": "drill", "x": 1}], "by_name": {"a": {"name": "drill", "y": 1}}}
    with pytest.raises(UserError) as caught:
        validate(Job, data, origin="job")
    assert "others[0].x: unknown key (choices: name, speed)" in str(caught.value)
    assert "by_name.a.y: unknown key (choices: name, speed)" in str(caught.value)


def test_an_unregistered_class_is_one_sentence_that_says_how() -> None:
    with pytest.raises(UserError) as caught:
        Job(tool=Drill())
    assert str(caught.value) == (
        f"Job: 1 fault\n  tool: {MODULE}.Drill is not registered; say diffdistill.register_tool(Drill) first, "
        f"or install it as an entry point of {GROUP}"
    )
    TOOLS.register(Drill)
    assert Job(tool=Drill()).tool == Drill()
    with pytest.raises(UserError, match="tool: must be an object of a tool's class"):
        Job(tool={"name": "saw"})


def test_a_class_with_a_name_of_ours_is_refused() -> None:
    @schema
    class Mine:
        name: Literal["saw"] = "saw"

    with pytest.raises(UserError, match="tool 'saw': diffdistill uses this name; choose another"):
        TOOLS.register(Mine)
    with pytest.raises(UserError, match="'saw' is the name of diffdistill's own tool"):
        Job(tool=Mine())


def test_what_is_none_of_the_kind_is_refused() -> None:
    class Plain:
        name = "plain"

    with pytest.raises(UserError, match=r"Plain: cannot be a tool: is no class with @schema"):
        TOOLS.register(Plain)


def test_a_second_class_of_a_name_is_refused_naming_both() -> None:
    @schema
    class Other:
        name: Literal["drill"] = "drill"

    TOOLS.register(Drill)
    TOOLS.register(Drill)
    with pytest.raises(UserError, match=rf"'drill': is registered already, as {MODULE}.Drill; .*Other needs another"):
        TOOLS.register(Other)


def test_a_cell_of_a_notebook_may_run_again() -> None:
    def cell() -> type:
        @schema
        class Cell:
            name: Literal["cell"] = "cell"

        Cell.__module__ = "__main__"
        return Cell

    TOOLS.register(cell())
    second = TOOLS.register(cell())
    assert TOOLS.find("cell") is second


def test_an_installed_class_is_loaded_when_it_is_named_and_not_before(place: Path) -> None:
    install(place, "drill-tool", {"drill_tool": PLUGIN}, {GROUP: {"drill": "drill_tool:Drill"}})
    assert "drill" in TOOLS.names()
    with pytest.raises(UserError, match="did you mean 'drill'"):
        read(name="drlil")
    read(name="saw")
    assert "drill_tool" not in sys.modules
    assert type(read(name="drill", speed=2).tool).__module__ == "drill_tool"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import nothing_of_this_name", "cannot be loaded: ModuleNotFoundError: No module named"),
        ("1 / 0", "cannot be loaded: ZeroDivisionError"),
        ("Drill = 3", "cannot be used: .*int is no class with @schema"),
        ("", "cannot be loaded: AttributeError"),
        (PLUGIN.replace('"drill"', '"dril"'), "cannot be used: .*its name is 'dril'"),
    ],
)
def test_a_broken_one_is_one_line_when_it_is_named_and_when_all_are_listed(place: Path, text: str, reason: str) -> None:
    install(place, "broken-tool", {"broken_tool": text}, {GROUP: {"drill": "broken_tool:Drill"}})
    with pytest.raises(UserError, match=f"tool: tool 'drill' of broken-tool 1.0: {reason}"):
        read(name="drill")
    found, faults = TOOLS.listed()
    assert list(found) == ["saw", "box"]
    assert [fault.count("\n") for fault in faults] == [0]
    read(name="saw")


def test_an_entry_point_with_a_name_of_ours_is_ignored_with_a_line(place: Path) -> None:
    install(place, "drill-tool", {"drill_tool": PLUGIN}, {GROUP: {"saw": "drill_tool:Drill"}})
    found, faults = TOOLS.listed()
    assert found["saw"] is Saw
    assert faults == ["tool 'saw' of drill-tool 1.0: ignored: the name is diffdistill's own"]
    assert read(name="saw").tool == Saw()
    assert "drill_tool" not in sys.modules


def test_two_packages_with_one_name_are_refused_naming_both(place: Path) -> None:
    install(place, "drill-tool", {"drill_tool": PLUGIN}, {GROUP: {"drill": "drill_tool:Drill"}})
    install(place, "other-tool", {"other_tool": PLUGIN}, {GROUP: {"drill": "other_tool:Drill"}}, version="2.0")
    with pytest.raises(UserError, match=r"two packages register it, .*-tool \d.0 and .*-tool \d.0; uninstall one"):
        read(name="drill")


def test_a_registered_class_and_an_installed_one_of_one_name_are_refused_naming_both(place: Path) -> None:
    install(place, "drill-tool", {"drill_tool": PLUGIN}, {GROUP: {"drill": "drill_tool:Drill"}})
    TOOLS.register(Drill)
    with pytest.raises(UserError, match=rf"is registered as {MODULE}.Drill, and drill-tool 1.0 has another"):
        read(name="drill")


def test_a_class_that_is_both_registered_and_installed_is_one(place: Path) -> None:
    install(place, "drill-tool", {"drill_tool": PLUGIN}, {GROUP: {"drill": "drill_tool:Drill"}})
    drill: Any = __import__("drill_tool").Drill
    TOOLS.register(drill)
    assert type(read(name="drill").tool) is drill


def test_the_json_schema_holds_ours_alone() -> None:
    before = TypeAdapter(Job).json_schema()
    TOOLS.register(Drill)
    after = TypeAdapter(Job).json_schema()
    assert before == after
    assert "Drill" not in json.dumps(after)
    assert after["properties"]["tool"]["discriminator"]["propertyName"] == "name"


def test_a_name_is_checked_against_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffdistill.settings.registry.from_above", lambda name: TOOLS)

    @schema
    class Named:
        tool: Annotated[str, NameOf("TOOLS")]

    TOOLS.register(Drill)
    assert Named(tool="drill").tool == "drill"
    with pytest.raises(UserError, match="tool = 'dril': choose from 'saw', 'box' or 'drill'"):
        Named(tool="dril")
    assert TypeAdapter(Named).json_schema()["properties"]["tool"]["enum"] == ["saw", "box"]


def test_a_nested_fault_of_python_is_said_once() -> None:
    @schema
    class Outer:
        inner: Saw = field(default_factory=lambda: Saw(teeth=0))

    with pytest.raises(UserError) as caught:
        Outer()
    assert "teeth = 0: input should be greater than or equal to 1" in str(caught.value)
    with pytest.raises(UserError, match="'saw': settings are given by name"):
        Saw("saw")  # type: ignore[misc]
