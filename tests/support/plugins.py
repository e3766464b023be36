"""Packages of others, as `pip` leaves them: a module and a .dist-info folder with entry points, on the path."""

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest


def install(
    place: Path, package: str, modules: Mapping[str, str], points: Mapping[str, Mapping[str, str]], version: str = "1.0"
) -> None:
    """Put a package into a folder that is on the path.  points: by group, then name: "module:Name"."""
    for module, text in modules.items():
        (place / f"{module}.py").write_text(text)
    about = place / f"{package}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in points.items()]
    (about / "entry_points.txt").write_text("\n".join(lines))


def on_the_path(monkeypatch: pytest.MonkeyPatch, place: Path) -> Path:
    """A folder to install into, for one test."""
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return place
