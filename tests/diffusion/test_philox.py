"""Philox: known answers, and the same integers by numpy, by torch's calls and by one kernel of its compiler."""

import itertools
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffdistill.diffusion import philox as module
from diffdistill.diffusion.philox import _round_keys, block_words, fused_blocks, philox, philox_blocks
from diffdistill.diffusion.step_random import StepRandom

CPU = torch.device("cpu")
INDICES = torch.tensor([0, 7, 2**32 - 1, 2**40 + 3]), torch.tensor([5])
NAMES = (0, 0xFFFFFFFF, 12345), (99,)
CASES = [*itertools.product(INDICES, (1, 6), (0, 1, 2**32 - 5), NAMES, (0, 0xFFFFFFFF))]


@pytest.fixture
def _traces_anew():
    """The graphs of one function are limited in number, whatever their backend."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    fused_blocks.cache_clear()


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


def reference(index: Tensor, num_blocks: int, step: int, first: tuple[int, ...], second: int) -> Tensor:
    """By plain integers, one counter after another."""
    counters = itertools.product(first, index.tolist(), range(num_blocks))
    words = [philox((i & 0xFFFFFFFF, i >> 32, block, step), (name, second)) for name, i, block in counters]
    shape = len(first), len(index), num_blocks, 2
    return torch.stack([torch.tensor(words)[:, half::2].reshape(shape) for half in (0, 1)])


Way = Callable[[Tensor, int, int, tuple[int, ...], int], Tensor]


def by(blocks: Callable[[Tensor, int, int, Tensor], Tensor]) -> Way:
    return lambda index, n, step, first, second: blocks(index, n, step, _round_keys(first, second, index.device))


def check(way: Way) -> None:
    for index, num_blocks, step, first, second in CASES:
        found = way(index, num_blocks, step, first, second)
        assert found.dtype == torch.int64
        assert torch.equal(found.cpu(), reference(index.cpu(), num_blocks, step, first, second))


def test_the_words_of_numpy_and_of_torch_s_calls_are_the_reference_s():
    check(lambda index, n, step, first, second: block_words(index, n, step, (first, second)))
    check(by(philox_blocks))


@pytest.mark.full
@pytest.mark.usefixtures("_traces_anew")
def test_the_compiled_words_are_the_reference_s():
    if shutil.which("g++") is None:
        pytest.skip("inductor compiles by g++ here")
    blocks = fused_blocks(CPU)
    assert blocks is not philox_blocks
    check(by(blocks))


@pytest.mark.usefixtures("_traces_anew")
def test_steps_and_batches_share_one_compiled_kernel_which_has_the_reference_s_words():
    compiled: list[int] = []

    def backend(graph, example):
        compiled.append(1)
        return graph.forward

    blocks = by(fused_blocks(CPU, backend))
    for step, count in itertools.product(range(3), (2, 3, 9)):
        asked = torch.arange(count), 4, step, tuple(range(count)), step
        assert torch.equal(blocks(*asked), reference(*asked))
    assert len(compiled) == 1


@pytest.mark.usefixtures("_traces_anew")
def test_without_a_compiler_the_words_are_torch_s_and_it_is_said_once(capsys: pytest.CaptureFixture[str]):
    def backend(graph, example):
        raise RuntimeError("no C++ compiler is here")

    assert fused_blocks(CPU, backend) is philox_blocks
    assert fused_blocks(CPU, backend) is philox_blocks
    said = capsys.readouterr().err
    assert said.count("speed.compile: random numbers are drawn without it, the same ones, more slowly") == 1
    assert "no C++ compiler is here" in said


@pytest.mark.usefixtures("_traces_anew")
def test_a_kernel_of_other_integers_is_not_used(capsys: pytest.CaptureFixture[str]):
    def backend(graph, example):
        return lambda *given: tuple(made + 1 for made in graph.forward(*given))

    assert fused_blocks(CPU, backend) is philox_blocks
    assert "more slowly: the compiled kernel has others" in capsys.readouterr().err


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
