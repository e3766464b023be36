"""Configurations of transformers' models may name attention kernels of the hub, which are programs: refused here."""

from pathlib import Path as FilePath
from typing import Any

from diffdistill.settings.schema import UserError
from diffdistill.settings.values import texts

NAMED_BY = ("attn_implementation", "attention_implementation", "experts_implementation")


def refuse_foreign_kernels(config: dict[str, Any], file: FilePath) -> None:
    """Raise UserError if a config.json names kernels by an owner and a repository, at any depth."""
    for place, text in texts(config):
        if any(name in place for name in NAMED_BY) and "/" in text:
            raise UserError(f"{file}: {place} = {text!r}: names a program of the hub, which is not run")
