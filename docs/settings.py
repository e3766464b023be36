"""Write the tables that are made from the code into the pages: every setting, every command.

Run as `python docs/settings.py` (or `make schema`) after a change of either. A table stands between two comments:
`<!-- settings: DMD2 -->`, `<!-- commands -->`, `<!-- signals -->`, `<!-- methods -->` or `<!-- distributions -->`, and
`<!-- end -->`. What a setting means stands in meanings.yaml by class and setting, or else in the code, as for every new
method.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch
import typer
import yaml

from diffdistill.commands.cli import app
from diffdistill.diffusion.path import EDM, Flow, VPCosine, VPDiscrete, VPLinear
from diffdistill.diffusion.path import Path as NoisePath
from diffdistill.diffusion.time_distributions import even_times
from diffdistill.distillation.method import METHODS as METHODS_TABLE
from diffdistill.settings.limits import MAX_COUNT, MAX_INTEGER, MAX_NUMBER
from diffdistill.settings.registry import NameOf, OneOf
from diffdistill.training.config import RunConfig
from diffdistill.training.reports.health import BANDS

DOCS = Path(__file__).parent
BLOCK = re.compile(r"<!-- (settings: [\w, ]+|commands|signals|methods|distributions) -->\n.*?<!-- end -->", re.DOTALL)
METHODS = "diffdistill.methods."
GROUPS = {
    "diffdistill.data.": "Data",
    "diffdistill.networks.": "Networks",
    "diffdistill.diffusion.path": "Paths",
    "diffdistill.diffusion.time_distributions": "Time distributions",
    "diffdistill.diffusion.sampling": "Samplers",
    "diffdistill.": "The run",
}
"""Headings of the page of all settings, by the beginning of a class's module."""
PATHS: dict[str, NoisePath] = {
    "`edm`": EDM(),
    "`vp_cosine`": VPCosine(),
    "`vp_linear`": VPLinear(),
    "`vp_discrete`": VPDiscrete(),
    "Stable Diffusion's": VPDiscrete(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "`flow`": Flow(),
    "`flow`, shift 3": Flow(shift=3.0),
}
MAXIMA = (MAX_COUNT, MAX_INTEGER, MAX_NUMBER)
"""Limits that no setting comes near: they are not said."""
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "multiple_of": "a multiple of"}


def main() -> None:
    """Write every page anew whose tables are not those of the code."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        fresh = renewed(text)
        if fresh != text:
            page.write_text(fresh, encoding="utf-8")
            print(page)


def pages() -> list[Path]:
    return [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))]


def renewed(text: str) -> str:
    """A page with its tables as the code says."""
    return BLOCK.sub(lambda found: f"<!-- {found[1]} -->\n\n{_content(found[1])}\n\n<!-- end -->", text)


def schema_classes() -> dict[str, type]:
    """Every class that a config can hold, by its name, in the order of a config."""
    found: dict[str, type] = {}

    def walk(kind: Any) -> None:
        if is_dataclass(kind) and isinstance(kind, type):
            if kind.__name__ not in found:
                found[kind.__name__] = kind
                for hint in get_type_hints(kind, include_extras=True).values():
                    walk(hint)
        else:
            for argument in get_args(kind):
                for inner in argument.own_classes() if isinstance(argument, OneOf) else [argument]:
                    walk(inner)

    walk(RunConfig)
    return found


def meaning(kind: type, name: str) -> str:
    """What a setting means: as meanings.yaml says, or the comment behind it, or the docstring's `name: meaning`.

    Empty if nobody says.
    """
    for owner in (kind.__name__, "everywhere"):
        if name in meanings().get(owner, {}):
            return meanings()[owner][name]
    comment = re.search(rf"^    {name}: .*#\s*(.+)$", inspect.getsource(kind), re.MULTILINE)
    if comment:
        return comment[1]
    names = r"\w+(?:, \w+)*"
    clause = re.compile(
        rf"(?:^|[;.] +|\n)(?:\w+, )*{name}(?:, \w+)*: (.+?)(?=[;.] +{names}: |\.?\n{names}: |\n\n|$)", re.DOTALL
    )
    found = clause.search(inspect.cleandoc(kind.__doc__ or ""))
    return " ".join(found[1].split()).rstrip(".") if found else ""


@cache
def meanings() -> dict[str, dict[str, str]]:
    """meanings.yaml, by class and setting."""
    return yaml.safe_load((DOCS / "meanings.yaml").read_text(encoding="utf-8"))


def table(kind: type) -> str:
    """One row a setting: its name, what it may be, its default, what it means."""
    hints = get_type_hints(kind, include_extras=True)
    rows = ["| setting | may be | default | meaning |", "|---|---|---|---|"]
    for setting in fields(kind):
        if setting.name == "name" and _name(kind):
            continue
        cells = (_described(hints[setting.name]), _default(setting), meaning(kind, setting.name))
        rows.append(f"| `{setting.name}` | {' | '.join(cell.replace('|', ',') for cell in cells)} |")
    return "\n".join(rows) if len(rows) > 2 else "No settings."


def _content(what: str) -> str:
    if what in MADE:
        return "\n\n".join(MADE[what]())
    named = [name.strip() for name in what.removeprefix("settings:").split(",")]
    classes = schema_classes()
    return "\n\n".join(_all_settings() if named == ["all"] else (table(classes[name]) for name in named))


def _all_settings() -> Iterator[str]:
    """Every class but the methods, grouped, each with a heading and its docstring's first sentence."""
    classes = [kind for kind in schema_classes().values() if not kind.__module__.startswith(METHODS)]
    group_of = {
        kind: next(title for start, title in GROUPS.items() if kind.__module__.startswith(start)) for kind in classes
    }
    for group in dict.fromkeys(["The run", *group_of.values()]):
        yield f"## {group}"
        for kind in (kind for kind in classes if group_of[kind] == group):
            yield "\n\n".join([f"### {_title(kind)}", *_first_sentence(kind), table(kind)])


def _first_sentence(kind: type) -> list[str]:
    """Of the docstring, unless it begins with a setting."""
    first = " ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split())
    sentence = re.match(r".*?\.(?=\s|$)", first)
    return [] if re.match(r"\w+: ", first) else [sentence[0] if sentence else first]


def _title(kind: type) -> str:
    chosen_by = _name(kind)
    return f"`{chosen_by}`" if chosen_by else _places().get(kind, kind.__name__)


def _name(kind: type) -> str | None:
    """What a config's `name` must be to choose this class, None for one that is not chosen."""
    hint = get_type_hints(kind, include_extras=True).get("name")
    return get_args(hint)[0] if get_origin(hint) is Literal and len(get_args(hint)) == 1 else None


@cache
def _places() -> dict[type, str]:
    """Where a class without a name of its own stands in a config."""
    found: dict[type, str] = {RunConfig: "The file's top level"}
    for name, hint in get_type_hints(RunConfig).items():
        place = f"`{name}.<name>`" if get_origin(hint) is dict else f"`{name}`"
        for kind in (hint, *get_args(hint)):
            if is_dataclass(kind) and isinstance(kind, type) and not _name(kind) and kind not in found:
                found[kind] = place
    return found


def _described(hint: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated and isinstance(arguments[1], (OneOf, NameOf)):
        return ", ".join(f"`{name}`" for name in arguments[1].own)
    if origin is Annotated:
        return _described(arguments[0]) + _limits(arguments[1:])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        inner = _described(arguments[0])
        return f"list, each: {inner}" if arguments[-1] is Ellipsis else f"list of {len(arguments)}, each: {inner}"
    if origin is dict:
        return f"{_described(arguments[1])}, by name"
    if arguments:
        *first, last = (_described(argument) for argument in arguments)
        return " or ".join([", ".join(first), last]) if last == "`null`" else ", ".join([*first, last])
    if is_dataclass(hint):
        return f"`{_name(hint)}`" if _name(hint) else "settings"
    plain = {
        bool: "`true`, `false`",
        int: "integer",
        float: "number",
        str: "text",
        type(None): "`null`",
        Any: "anything",
    }
    return plain[hint]


def _limits(metadata: tuple[Any, ...]) -> str:
    """`, at least 1`, from a pydantic Field."""
    said = []
    for constraint in (constraint for info in metadata for constraint in getattr(info, "metadata", ())):
        found = ((words, getattr(constraint, key, None)) for key, words in LIMITS.items())
        said += [f"{words} {_plain(limit)}" for words, limit in found if limit is not None and abs(limit) not in MAXIMA]
    return "".join(f", {words}" for words in said)


def _default(setting: "Field[Any]") -> str:
    if setting.default is not MISSING:
        return f"`{_plain(setting.default)}`"
    return f"`{_plain(setting.default_factory())}`" if setting.default_factory is not MISSING else "required"


def _plain(value: Any) -> str:
    """A value as one writes it in YAML, on one line."""
    if is_dataclass(value):
        kind = type(value)
        own = {f.name: getattr(value, f.name) for f in fields(value)}
        required = [f.name for f in fields(value) if f.default is MISSING and f.default_factory is MISSING]
        usual = kind(**{name: own[name] for name in required})
        changed = [f"{name}: {_plain(v)}" for name, v in own.items() if name in required or v != getattr(usual, name)]
        named = [f"name: {own['name']}"] if "name" in own else []
        return "{" + ", ".join([*named, *changed]) + "}" if named or changed else "its defaults"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_plain(v) for v in value)}]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return re.sub(r"e([-+])0", r"e\1", f"{value:g}") if isinstance(value, float) else str(value)


def _commands() -> Iterator[str]:
    """Every verb with its help, its arguments and its options."""
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        what, *rest = inspect.cleandoc(command.help or "").split("\n\n")
        examples = [f"```bash\n{text.removeprefix('Example: ')}\n```" for text in rest if text.startswith("Example: ")]
        rows = ["| given as | default | meaning |", "|---|---|---|"]
        for parameter in command.params:
            is_argument = parameter.param_type_name == "argument"
            given = (
                parameter.name.upper() + (" ..." if parameter.nargs == -1 else "")
                if is_argument
                else ", ".join(parameter.opts)
            )
            default = (
                "required"
                if parameter.required
                else ""
                if parameter.default is None or parameter.default is False
                else f"`{parameter.default}`"
            )
            rows.append(f"| `{given}` | {default} | {parameter.help or ''} |")
        yield "\n\n".join([f"### {name}", what.replace("\n", " "), *examples, *(["\n".join(rows)] if rows[2:] else [])])


def _signals() -> Iterator[str]:
    """The band of every health signal."""
    rows = ["| signal | healthy from | to |", "|---|---|---|"]
    yield "\n".join(
        [*rows, *(f"| [`{name}`](#{name}) | {band.low:g} | {band.high:g} |" for name, band in BANDS.items())]
    )


def _methods() -> Iterator[str]:
    """Every method with its paper, by the first line of its file, and its config."""
    rows = ["| method | paper | config |", "|---|---|---|"]
    for name in METHODS_TABLE.own:
        text = " ".join((sys.modules[METHODS_TABLE.find(name).__module__].__doc__ or "").split())
        paper = re.match(r"(.*?)arXiv:(\d+\.\d+)", text)
        said = f"{paper[1]}[arXiv:{paper[2]}](https://arxiv.org/abs/{paper[2]})" if paper else text.partition(". ")[0]
        rows.append(f"| [`{name}`](docs/methods/{name}.md) | {said} | `{name}/digits` |")
    yield "\n".join(rows)


def _distributions() -> Iterator[str]:
    """Each method's own time distributions on each path: the greater share at an end, and that below ratio 1."""
    rows = [("setting", *PATHS), ("---",) * (len(PATHS) + 1)]
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for name in METHODS_TABLE.own:
        made = METHODS_TABLE.find(name)()
        for place in (f.name for f in fields(made) if f.name.endswith("time_law")):
            cells = []
            for path in PATHS.values():
                times = (getattr(made, place) or even_times(path))(uniform, path)
                nearby = 0.5 if isinstance(path, VPDiscrete) else 1e-6 * path.t_max
                at_ends = [_share((times - end).abs() <= nearby) for end in (path.t_min, path.t_max)]
                cells.append(f"{max(at_ends):.1%}, {_share(path.ratio(times) < 1):.0%}")
            rows.append((f"`{name}.{place}`", *cells))
    yield "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _share(is_so: torch.Tensor) -> float:
    return float(is_so.double().mean())


MADE = {"commands": _commands, "signals": _signals, "methods": _methods, "distributions": _distributions}


if __name__ == "__main__":
    main()
