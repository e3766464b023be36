"""Packages of others, as `pip` leaves them: a module and a .dist-info folder with entry points, on the path."""

import base64
import hashlib
import sys
import zipfile
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
    (about / "METADATA").write_text(_metadata(package, version))
    (about / "entry_points.txt").write_text(_entry_points(points))


def write_wheel(
    folder: Path, package: str, files: Mapping[str, str], points: Mapping[str, Mapping[str, str]], version: str = "1.0"
) -> Path:
    """A wheel of pure Python, by its specification: what `python -m build` would write.  files: by their paths."""
    name = package.replace("-", "_")
    about = f"{name}-{version}.dist-info"
    contents = {
        **files,
        f"{about}/METADATA": _metadata(package, version),
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/entry_points.txt": _entry_points(points),
    }
    lines = [f"{path},sha256={_digest(text)},{len(text.encode())}" for path, text in contents.items()]
    contents[f"{about}/RECORD"] = "\n".join([*lines, f"{about}/RECORD,,"]) + "\n"
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in contents.items():
            archive.writestr(path, text)
    return wheel


def _metadata(package: str, version: str) -> str:
    return f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"


def _entry_points(points: Mapping[str, Mapping[str, str]]) -> str:
    groups = (f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in points.items())
    return "\n".join(groups)


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")


def on_the_path(monkeypatch: pytest.MonkeyPatch, place: Path) -> Path:
    """A folder to install into, for one test."""
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return place
