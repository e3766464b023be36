"""Every family's student and every method's, out of a run of three steps, loaded without this package: the table."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from textwrap import wrap

import pytest
from support.habits import Case, cases
from support.method_matrix import METHODS, NO_STUDENTS, OF_SEVERAL, origin, train
from support.stand_ins import STAND_INS

from diffdistill.distillation import method as methods
from diffdistill.export.run import AnyKind, ExportOptions, write
from diffdistill.export.verify import TOLERANCE, Check, measure
from diffdistill.settings.schema import UserError

PAGE = Path(__file__).parents[2] / "docs" / "export-matrix.md"
LORA = ("lora.default={rank: 2, alpha: 4}", "optimizers.default.lr=0.1")
"""With a student that differs visibly from its teacher, so that a file that is not loaded is found."""
ON_EVERY_FAMILY = ("dmd2", "hyper_sd", "agd")
ALL_METHODS_ON = ("dit", "unet")
ROWS = (*METHODS, *OF_SEVERAL)
STYLE = "first"
"""Of a student of several teachers: what it is exported as."""
NO_GUIDANCE = {"ddpm": "has no class that stands for none", "flux": "has it in its network already, as an input"}
"""Families whose teachers AGD has nothing to learn from."""


@dataclass
class Cell:
    """found: the greatest difference of its images, or why there are none.  kind: of the folder.
    without_file: the same of a LoRA's program that does not load the file."""

    family: str
    method: str
    asked: AnyKind = "auto"
    kind: str = ""
    found: float | str = ""
    without_file: float | str | None = None


def cells() -> Iterator[Cell]:
    for family in STAND_INS:
        yield from (Cell(family, method) for method in ON_EVERY_FAMILY)
        yield from (Cell(family, "dmd2", kind) for kind in ("lora", "kohya"))
    for family in ALL_METHODS_ON:
        yield from (Cell(family, name) for name in ROWS if family == "unet" or name not in ON_EVERY_FAMILY)


def fill(every: Sequence[Cell], folder: Path) -> None:
    """Train, write, and compare all folders in one clean process."""
    checks: list[tuple[Cell, Check]] = []
    for cell in every:
        name = f"{cell.family}-{cell.method}-{'lora' if cell.asked in ('lora', 'kohya') else 'full'}".replace(" ", "-")
        try:
            if not (folder / name).exists():
                teacher = origin(cell.family, cell.method, folder / f"{name}-teacher")
                named = (f"teachers={{{STYLE}: {teacher}, second: {teacher}}}",) if cell.method in OF_SEVERAL else ()
                train(cell.method, teacher, folder / name, *named, *(LORA if name.endswith("lora") else ()))
            options = ExportOptions(kind=cell.asked, style=STYLE if cell.method in OF_SEVERAL else None)
            written = write(str(folder / name), folder / f"{name}-{cell.asked}", options)
        except UserError as error:
            cell.found = why_not(cell, str(error))
            continue
        cell.kind = written.kind
        checks.append((cell, written.check))
    planted = [(cell, without_lora_file(check)) for cell, check in checks if cell.asked in ("lora", "kohya")]
    made = measure([check for _, check in [*checks, *planted]])
    for (cell, _), found in zip(checks, made, strict=False):
        cell.found = found.difference
    for (cell, _), found in zip(planted, made[len(checks) :], strict=True):
        cell.without_file = found.habits["the teacher"]


def without_lora_file(check: Check) -> Check:
    """The program without the line that loads the factors."""
    kept = [line for line in check.code.splitlines() if "load_lora_weights" not in line]
    return replace(check, code="\n".join(kept), habits={"the teacher": check.call})


def why_not(cell: Cell, message: str) -> str:
    """A refusal as the page says it."""
    if cell.method == "agd" and cell.family in NO_GUIDANCE:
        return f"AGD distils guidance, and `{cell.family}` {NO_GUIDANCE[cell.family]}"
    return re.sub(r"^--kind \w+: ", "", message).partition("; use --kind")[0]


def table(every: Sequence[Cell]) -> str:
    """The page: each family by each of some methods, then all methods, and the reasons."""
    reasons: list[str] = []

    def shown(cell: Cell) -> str:
        if not isinstance(cell.found, str):
            return f"{cell.kind}, {cell.found:.1g}"
        if cell.found not in reasons:
            reasons.append(cell.found)
        return f"({reasons.index(cell.found) + 1})"

    by_key = {(cell.family, cell.method, cell.asked): cell for cell in every}
    lines = ["| family | DMD2 | Hyper-SD | AGD | LoRA of DMD2 | the same, kohya's keys |", "|---|---|---|---|---|---|"]
    for family in STAND_INS:
        row = [by_key[family, method, "auto"] for method in ON_EVERY_FAMILY]
        row += [by_key[family, "dmd2", kind] for kind in ("lora", "kohya")]
        lines.append(f"| `{family}` | " + " | ".join(map(shown, row)) + " |")
    lines += ["", "| method | `dit`, a pipeline | `unet`, our own network |", "|---|---|---|"]
    for method in ROWS:
        row = [by_key[family, method, "auto"] for family in ALL_METHODS_ON]
        lines.append(f"| `{method}` | " + " | ".join(map(shown, row)) + " |")
    listed = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    no_row = "; ".join(f"`{name}` {reason}" for name, reason in NO_STUDENTS.items())
    several = f"`merge_teachers` is exported as one of its styles. Methods without a row: {no_row}."
    return "\n".join([*lines, "", *wrap(several, 120), "", "Why not:", "", *listed])


CALLS = """
## The three calls

The same folders without training, by several kinds of steps: the card's own program; `pipe(prompt,
num_inference_steps=N, guidance_scale=0)`, then with 1; and `pipe(prompt)`. As people call them, but that families whose
pipelines have a size of their own are told the stand-in's. A number is the greatest difference from the student's
images; **bold** ones are other images, of which diffusers warns by nothing. Each card says the same of its student.
`--own-pipeline` makes all of them right.

| family | steps | the card's | N, guidance 0 | N, guidance 1 | a prompt alone |
|---|---|---|---|---|---|
"""


def call_rows(every: Sequence[Case]) -> str:
    """A line for each family and kind of steps, measured; those that cannot be had are left out."""
    return "\n".join(
        f"| `{case.family}` | {case.steps} | " + " | ".join(map(shown_call, case.measured.values())) + " |"
        for case in every
        if case.check
    )


def shown_call(found: float | str) -> str:
    if isinstance(found, str):
        return "an error" if found.startswith(("ValueError", "IndexError")) else f"**{found}**"
    return f"{found:.1g}" if found <= TOLERANCE else f"**{found:.1g}**"


def measure_calls(folder: Path) -> list[Case]:
    every = list(cases(folder))
    written = [case for case in every if case.check]
    for case, found in zip(written, measure([case.check for case in written if case.check]), strict=True):
        case.measured = {"card": found.difference, **found.habits}
    return every


def verdict_of(found: float | str) -> str:
    if isinstance(found, str):
        return "refused" if found.startswith(("ValueError", "IndexError")) else "wrong"
    return "right" if found <= TOLERANCE else "wrong"


HEAD = """# What can be exported

Written by `make test-full` (tests/export/test_export_matrix.py) on {date}. The teacher is each family's smallest
architecture with random weights, or one of our own networks after three steps of training. Then come three steps of
the method, the export, and the cards' programs run in one process where diffdistill cannot be imported. A number is the
greatest difference of any value of two images from the run's own, in float32; {tolerance:g} is allowed. BOOT and
FreeFlow start from a teacher that predicts v.

"""


def test_every_method_has_a_row_or_a_reason_for_none() -> None:
    listed = re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(ROWS)
    assert sorted([*ROWS, *NO_STUDENTS]) == sorted(methods.METHODS.own)
    assert not set(ROWS) & NO_STUDENTS.keys()


@pytest.mark.full
def test_every_student_is_exported_or_it_is_said_why_not(tmp_path: Path) -> None:
    every = list(cells())
    fill(every, tmp_path)
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    called = measure_calls(tmp_path / "calls")
    text = HEAD.format(date=date, tolerance=TOLERANCE) + table(every) + "\n" + CALLS + call_rows(called) + "\n"
    PAGE.write_text(text, encoding="utf-8")
    for case in called:
        if case.check and case.said:
            assert verdict_of(case.measured["card"]) == "right", case
            assert verdict_of(case.measured["zero"]) == case.said.counted, case
            assert verdict_of(case.measured["one"]) == case.said.one, case
            assert verdict_of(case.measured["plain"]) == case.said.plain, case
    for cell in every:
        where = f"{cell.family} {cell.method} {cell.asked}: {cell.found}"
        if cell.asked == "auto" and cell.method in ON_EVERY_FAMILY:
            assert isinstance(cell.found, str) == (cell.method == "agd" and cell.family in NO_GUIDANCE), where
        if isinstance(cell.found, float) and cell.asked in ("lora", "kohya"):
            assert isinstance(cell.without_file, float), where
            assert cell.without_file > 100 * TOLERANCE, where
        if cell.family == "unet" or isinstance(cell.found, float):
            assert isinstance(cell.found, float), where
            assert cell.found <= TOLERANCE, where
