"""Philox: known answers, and the same integers by numpy, by torch's calls and by one kernel of its compiler."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.philox_words import by, check

from diffdistill.diffusion import philox as module
from diffdistill.diffusion.philox import block_words, fused_blocks, philox, philox_blocks
from diffdistill.diffusion.step_random import StepRandom


def as_ints(words: str) -> list[int]:
    return [int(word, 16) for word in words.split()]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "digits of pi"],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    first, second = as_ints(key)
    words = philox(tuple(torch.tensor([word]) for word in as_ints(counter)), (first, second))
    assert [word.item() for word in words] == as_ints(expected)


def test_philox_of_plain_integers_is_philox_of_tensors():
    counter, key = as_ints("243f6a88 85a308d3 13198a2e 03707344"), (0xA4093822, 0x299F31D0)
    words = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert list(philox(tuple(counter), key)) == [word.item() for word in words]


def test_the_words_of_numpy_and_of_torch_s_calls_are_the_reference_s():
    check(lambda index, n, step, first, second: block_words(index, n, step, (first, second)))
    check(by(philox_blocks))


@pytest.mark.parametrize(
    ("marked", "count"), [("not full", 3), pytest.param("full", 1, marks=pytest.mark.full)], ids=["traced", "compiled"]
)
def test_one_kernel_of_the_compiler_has_the_same_words(marked: str, count: int):
    if marked == "full" and shutil.which("g++") is None:
        pytest.skip("inductor compiles by g++ here")
    asked = [sys.executable, "-m", "pytest", "-m", marked, str(Path(__file__).with_name("traced_philox.py"))]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"{count} passed" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("compiles", [False, True])
def test_a_gpu_has_the_host_s_words(compiles: bool):
    def way(index, n, step, first, second):
        return block_words(index.cuda(), n, step, (first, second), compiles=compiles)

    check(way)
    if compiles:
        assert fused_blocks(torch.device("cuda", 0)) is not philox_blocks


def test_a_cpu_compiles_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "fused_blocks", lambda *_: pytest.fail("asked"))
    index = torch.arange(3)
    plain, asked = StepRandom(1, 2, index), StepRandom(1, 2, index, compiles=True)
    assert torch.equal(plain.normal("z", (5,)), asked.normal("z", (5,)))
