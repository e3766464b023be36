"""Two small students and their exported folders, for the commands that take both."""

from pathlib import Path
from typing import Any

from diffdistill.export.run import ExportOptions, export
from support.method_matrix import origin, train


def text_student(home: Path) -> Path:
    """A one-step student with LoRA on a stand-in of Stable Diffusion."""
    return train("sid", origin("sd", "sid", home / "sd"), home / "sd-run", "lora.default={rank: 2}")


def class_student(home: Path) -> Path:
    """A one-step student of an MLP on digits."""
    return train("sid", origin("mlp", "sid", home / "mlp"), home / "mlp-run")


def exported(run: Path, kind: Any) -> Path:
    """An export of it, made once."""
    folder = run.with_name(f"{run.name}-{kind}")
    if not folder.exists():
        export(str(run), folder, ExportOptions(kind=kind, is_verified=False))
    return folder
