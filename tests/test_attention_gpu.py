"""Our attention kernels on a CUDA GPU: `pytest -m gpu`."""

import pytest
import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from diffdistill.attention import attention, attention_difference, reference
from diffdistill.attention.kernels import HEAD_SIZES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
LENGTHS = [(256, 256), (100, 77), (1, 333)]


def inputs(size: int, queries: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    rng = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, 3, n, size) for n in (queries, keys, keys)]
    return [torch.randn(s, generator=rng, device="cuda").to(dtype) for s in (*shapes, *shapes)]


def by_math(*x: Tensor) -> Tensor:
    with sdpa_kernel([SDPBackend.MATH]):
        return scaled_dot_product_attention(*x)


def error(made: Tensor, right: Tensor) -> float:
    return float((made.double() - right).norm() / right.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_forward_and_tangent_err_at_most_twice_as_much_as_torchs_math(size: int, dtype: torch.dtype):
    for lengths in LENGTHS:
        x = inputs(size, *lengths, dtype)
        wide = [a.double() for a in x]
        right = jvp(by_math, tuple(wide[:3]), tuple(wide[3:]))
        torchs = jvp(by_math, tuple(x[:3]), tuple(x[3:]))
        found = jvp(attention, tuple(x[:3]), tuple(x[3:]))
        plain = attention(*x[:3], backend="cuda")
        assert error(plain, right[0]) <= 2 * error(torchs[0], right[0])
        for made, math, exact in zip(found, torchs, right, strict=True):
            assert error(made, exact) <= 2 * error(math, exact)


@pytest.mark.parametrize("size", [40, 64, 72, 160])
def test_key_lengths_and_the_difference_of_contexts(size: int):
    q, k, v, _, other_k, other_v = inputs(size, 100, 77, torch.bfloat16)
    lengths = torch.tensor([77, 5], dtype=torch.int32, device="cuda")
    mask, scale = reference.length_mask(lengths, 77), size**-0.5
    wide = [a.double() for a in (q, k, v, other_k, other_v)]
    first = reference.forward(*wide[:3], mask, scale)[0]
    assert error(attention(q, k, v, key_lengths=lengths, backend="cuda"), first) < 5e-3
    second = reference.forward(wide[0], *wide[3:], None, scale)[0]
    found = attention_difference(q, k, v, other_k, other_v, weight=0.7, key_lengths=lengths)
    assert error(found, first - 0.7 * second) < 5e-3


def test_every_kernel_repeats_itself_bit_for_bit():
    x = inputs(72, 1024, 1024, torch.bfloat16)
    for run in (
        lambda: attention(*x[:3], backend="cuda"),
        lambda: jvp(attention, tuple(x[:3]), tuple(x[3:]))[1],
        lambda: attention_difference(*x[:3], x[4], x[5], weight=0.5),
    ):
        assert torch.equal(run(), run())


def test_gradients_through_our_forward_are_torchs():
    x = [a.requires_grad_() for a in inputs(72, 128, 128, torch.bfloat16)[:3]]
    found, expected = (
        torch.autograd.grad(f(*x).float().square().sum(), x)
        for f in (lambda *a: attention(*a, backend="cuda"), by_math)
    )
    for made, right in zip(found, expected, strict=True):
        assert error(made, right.double()) < 2e-2


def test_a_side_stream_is_respected():
    x = inputs(64, 4096, 4096, torch.bfloat16)
    expected = attention(*x[:3], backend="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = attention(*x[:3], backend="cuda")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, expected)
