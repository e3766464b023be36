"""Philox by one kernel of torch's compiler. Run by test_philox.py in a process of its own: behind torch's tracer a
process cannot be forked and trained in, as other tests do."""

import itertools

import pytest
import torch
from support.philox_words import by, check, reference

from diffdistill.diffusion.philox import fused_blocks, philox_blocks

CPU = torch.device("cpu")


@pytest.fixture
def _traces_anew():
    """The graphs of one function are limited in number, whatever their backend."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    fused_blocks.cache_clear()


@pytest.mark.full
@pytest.mark.usefixtures("_traces_anew")
def test_the_compiled_words_are_the_reference_s():
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
