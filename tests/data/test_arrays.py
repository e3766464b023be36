"""A .npz file whose header says more than it holds is refused by us, before NumPy asks for the memory."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.lib import format as npy

from diffdistill.data import Npz
from diffdistill.data.arrays import read_arrays
from diffdistill.eval.evaluation.reference import open_reference
from diffdistill.eval.images.files import open_images
from diffdistill.eval.protocols.protocol import Preparation
from diffdistill.settings.schema import UserError

SHAPES = [(2**40, 8, 8, 3), (2**32, 2**32, 1, 3), (10, 8, 8, 3), (-1, 8, 8, 3), (2**62, 2**62, 2**62, 4)]


def write(
    file: Path, name: str, shape: tuple[int, ...], kind: int, descr: str = "|u1", data: bytes = b"\0" * 64
) -> None:
    member = io.BytesIO()
    npy.write_array_header_1_0(member, {"descr": descr, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(file, "w", kind) as archive:
        archive.writestr(f"{name}.npy", member.getvalue() + b"\0" * 64)


READERS: dict[str, Callable[[Path], object]] = {
    "images": lambda file: Npz(path=str(file), cache=str(file.parent / "cache")).load(),
    "arr_0": lambda file: open_images(str(file), Preparation(), channels=3),
    "mu": lambda file: open_reference(file, label="pixels", num_images=10),
}


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", READERS)
def test_a_header_that_says_more_than_there_is_is_refused_before_numpy_makes_the_array(
    name: str, shape: tuple[int, ...], kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*_: object, **__: object) -> None:
        raise AssertionError("NumPy was asked")

    monkeypatch.setattr(npy, "read_array", made)
    monkeypatch.setattr(np, "memmap", made)
    write(tmp_path / "a.npz", name, shape, kind)
    with pytest.raises(
        UserError, match=rf"a\.npz: cannot be read as \.npz: `{name}(\.npy)?` says that it is uint8 .*; it holds "
    ):
        READERS[name](tmp_path / "a.npz")


def test_objects_are_refused_and_good_arrays_read(tmp_path: Path) -> None:
    write(tmp_path / "a.npz", "a", (8,), zipfile.ZIP_STORED, "|O")
    with pytest.raises(ValueError, match="`a` holds Python objects"):
        read_arrays(tmp_path / "a.npz", ("a",))
    wanted = {"a": np.arange(6.0).reshape(2, 3).T, "b": np.array("text"), "c": np.empty((0, 4), np.float32)}
    np.savez_compressed(tmp_path / "b.npz", d=np.zeros(1), **wanted)
    found, others = read_arrays(tmp_path / "b.npz", wanted)
    assert others == ["d"]
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
