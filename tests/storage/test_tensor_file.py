"""Tensor files have the bytes of safetensors' own, and the hash of those."""

import hashlib
import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from diffdistill.storage.atomic import write_tensors
from diffdistill.storage.tensor_file import BATCH_BYTES, ORDER, write_and_hash


def every_type() -> dict[str, Tensor]:
    """Two tensors of each type of numbers, one of them empty."""
    numbers = torch.arange(64, dtype=torch.uint8)
    found = {}
    for dtype in ORDER:
        made = numbers > 3 if dtype == torch.bool else numbers.clone().view(dtype)  # of memory of its own
        found |= {f"z {dtype}": made.reshape(2, -1), f"a {dtype}": made[:0]}
    return found


CASES = {
    "every type": (every_type(), {"format": "pt"}),
    "nothing": ({}, None),
    "a number, and names that JSON escapes": ({"b": torch.tensor(1.5), 'q"\né\x7f\x01': torch.zeros(3)}, {"é": "\n"}),
    "not contiguous": ({"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.zeros(1).expand(4)}, None),
    "several batches": ({str(n): torch.full((BATCH_BYTES // 8,), float(n)) for n in range(5)}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_bytes_are_safetensors_own_and_the_hash_is_of_them(case: str) -> None:
    tensors, metadata = CASES[case]
    file = io.BytesIO()
    sha256 = write_and_hash(file, tensors, metadata)
    assert file.getvalue() == save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    assert sha256 == hashlib.sha256(file.getvalue()).hexdigest()


def test_a_type_that_files_have_not_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weight: safetensors files have no torch\.complex128"):
        write_tensors(tmp_path / "a", {"weight": torch.zeros(1, dtype=torch.complex128)})


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    tensors = {"weight": torch.arange(6.0).requires_grad_(), "half": torch.ones(2, 3, dtype=torch.bfloat16)}
    sha256 = write_tensors(tmp_path / "a", tensors)
    assert sha256 == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "a").items())
