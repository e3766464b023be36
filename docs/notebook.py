"""docs/tutorial.ipynb out of tutorial.md: python docs/notebook.py

Its sections below become cells: YAML files are written, commands and Python are run. STEPS stands in the first cell.
"""

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
SECTIONS = ("Look at the data first", "Train the teacher", "Distil it", "Watch it", "Use it")
LEFT_OUT = ("--resume", "--seed")  # commands that a notebook, which runs from top to bottom, has no use for
FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$\n*", re.MULTILINE | re.DOTALL)

INTRO = """# From your pictures to a one-step student

This is the [tutorial](tutorial.md) as a notebook, made of that page by `python docs/notebook.py`. It needs an
environment in which diffdistill is installed. With your own pictures in the folder `pictures` it takes yours; otherwise
the next cell writes 1,797 digits that come with scikit-learn.
"""
PREPARE = """STEPS = 2000  # of each of the two trainings; 20 show that everything works

from pathlib import Path

import numpy as np
from IPython.display import Image, display
from PIL import Image as Picture
from sklearn.datasets import load_digits

if not Path("pictures").is_dir():
    Path("pictures").mkdir()
    for number, digit in enumerate(load_digits().images):
        grey = Picture.fromarray((digit * 15.9).astype(np.uint8)).resize((16, 16))
        grey.convert("RGB").save(f"pictures/{number}.png")"""


def notebook(page: str) -> str:
    """The notebook's JSON."""
    parts = re.split(r"^## (.*)$", page, flags=re.MULTILINE)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    cells = [("markdown", INTRO.strip()), ("code", PREPARE)]
    for title in SECTIONS:
        cells += _cells(f"## {title}\n{found[title]}")
    made = {
        "cells": [_cell(number, kind, text) for number, (kind, text) in enumerate(cells)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def _cells(text: str) -> list[tuple[str, str]]:
    cells, end = [], 0
    for fence in FENCE.finditer(text):
        cells += _prose(text[end : fence.start()])
        kind, title, block = fence.groups()
        if title:
            cells.append(("code", f"%%writefile {title}\n{block.rstrip()}"))
        elif kind == "python":
            cells.append(("code", block.rstrip()))
        elif kind == "bash" and (commands := _commands(block)):
            cells.append(("code", commands))
        end = fence.end()
    return cells + _prose(text[end:])


def _prose(text: str) -> list[tuple[str, str]]:
    return [("markdown", text.strip())] if text.strip() else []


def _commands(block: str) -> str:
    """Commands of a shell, each followed by the picture that it writes."""
    lines = []
    for line in block.splitlines():
        if any(word in line.split() for word in LEFT_OUT):
            continue
        trains = line.startswith(("diffdistill pretrain", "diffdistill train"))
        lines.append(f"!{line}{' train.steps={STEPS}' if trains else ''}")
        if written := re.search(r"--out (\S+\.png)", line):
            lines.append(f'display(Image("{written[1]}"))')
    return "\n".join(lines)


def _cell(number: int, kind: str, text: str) -> dict[str, Any]:
    code = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, **code, "source": text.splitlines(keepends=True)}


if __name__ == "__main__":
    file = DOCS / "tutorial.ipynb"
    file.write_text(notebook((DOCS / "tutorial.md").read_text(encoding="utf-8")), encoding="utf-8")
    print(file)
