"""Our attention kernels on a CUDA GPU: `pytest -m gpu`."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from diffdistill.attention import attention, attention_difference, backends, kernels, ops, reference, use_attention
from diffdistill.attention.kernels import HEAD_SIZES, Variant
from diffdistill.attention.launch import build_all

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]
LENGTHS = [(256, 256), (100, 77), (1, 333)]
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """All variants, side by side: one after the other they take minutes. Fails without a compiler."""
    assert backends.no_kernels(torch.device("cuda")) is None
    build_all(
        [
            (kernel, Variant(size, half, moving))
            for size, half in product(HEAD_SIZES, (False, True))
            for kernel, moving in (("forward", True), ("tangent", True), ("tangent", False))
        ]
    )


def inputs(size: int, queries: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    rng = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, 3, n, size) for n in (queries, keys, keys)]
    return [torch.randn(s, generator=rng, device="cuda").to(dtype) for s in (*shapes, *shapes)]


def by_math(*x: Tensor) -> Tensor:
    with sdpa_kernel([SDPBackend.MATH]):
        return scaled_dot_product_attention(*x)


def error(made: Tensor, right: Tensor) -> float:
    return float((made.double() - right).norm() / right.norm())


@pytest.mark.parametrize("size", [40, 72, 256])
def test_every_kernel_on_a_ragged_shape_once(size: int) -> None:
    """Small enough for compute-sanitizer."""
    q, k, v, tq, tk, tv = inputs(size, 70, 50, torch.bfloat16)
    launch, scale = ops.launcher(), size**-0.5
    lengths = torch.tensor([50, 5], dtype=torch.int32, device="cuda")
    out, lse = kernels.forward(launch, q, k, v, lengths, scale)
    made = [out, kernels.tangent(launch, q, k, v, out, lse, tq, tk, tv, lengths, scale)]
    made.append(kernels.tangent(launch, q, k, v, out, lse, tq, None, None, lengths, scale))
    if size <= 160:
        made.append(kernels.difference(launch, q, k, v, tk, tv, 0.5, lengths, None, scale))
    assert all(bool(x.isfinite().all()) for x in made)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", HEAD_SIZES)
def test_forward_and_tangent_err_at_most_twice_as_much_as_torchs_math(size: int, dtype: torch.dtype) -> None:
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


@pytest.mark.parametrize("size", [40, 64, 160])
def test_where_text_stands_still_three_products_err_no_more(size: int) -> None:
    q, k, v, tq, _, _ = inputs(size, 256, 77, torch.bfloat16)
    wide = [a.double() for a in (q, k, v, tq)]
    right = jvp(lambda a: by_math(a, *wide[1:3]), (wide[0],), (wide[3],))[1]
    torchs = jvp(lambda a: by_math(a, k, v), (q,), (tq,))[1]
    found = jvp(lambda a: attention(a, k, v), (q,), (tq,))[1]
    assert error(found, right) <= 2 * error(torchs, right)


@pytest.mark.parametrize("size", [40, 64, 72, 160])
def test_key_lengths_and_the_difference_of_contexts(size: int) -> None:
    q, k, v, _, other_k, other_v = inputs(size, 100, 77, torch.bfloat16)
    lengths = torch.tensor([77, 5], dtype=torch.int32, device="cuda")
    mask, scale = reference.length_mask(lengths, 77), size**-0.5
    wide = [a.double() for a in (q, k, v, other_k, other_v)]
    first = reference.forward(*wide[:3], mask, scale)[0]
    assert error(attention(q, k, v, key_lengths=lengths, backend="cuda"), first) < 5e-3
    second = reference.forward(wide[0], *wide[3:], None, scale)[0]
    found = attention_difference(q, k, v, other_k, other_v, weight=0.7, key_lengths=lengths)
    assert error(found, first - 0.7 * second) < 5e-3


def test_every_kernel_repeats_itself_bit_for_bit() -> None:
    x = inputs(72, 1024, 1024, torch.bfloat16)
    runs: tuple[Callable[[], Tensor], ...] = (
        lambda: attention(*x[:3], backend="cuda"),
        lambda: jvp(attention, tuple(x[:3]), tuple(x[3:]))[1],
        lambda: attention_difference(*x[:3], x[4], x[5], weight=0.5),
    )
    for run in runs:
        assert torch.equal(run(), run())


def test_gradients_through_our_kernels_are_torchs() -> None:
    x = [a.requires_grad_() for a in inputs(72, 128, 128, torch.bfloat16)[:3]]
    ours, math = (lambda *a: attention(*a, backend="cuda")), by_math
    twice = lambda *a: attention_difference(*a, a[2], a[1], weight=0.5)  # noqa: E731
    for found, expected in ((ours, math), (twice, lambda q, k, v: math(q, k, v) - 0.5 * math(q, v, k))):
        pair = [torch.autograd.grad(f(*x).float().square().sum(), x) for f in (found, expected)]
        for made, right in zip(*pair, strict=True):
            assert error(made, right.double()) < 2e-2


def test_a_side_stream_and_a_graph_are_respected() -> None:
    x = inputs(64, 4096, 4096, torch.bfloat16)
    expected = attention(*x[:3], backend="cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = attention(*x[:3], backend="cuda")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, expected)
    with torch.cuda.graph(graph):
        replayed = attention(*x[:3], backend="cuda")
    replayed.zero_()
    graph.replay()
    assert torch.equal(replayed, expected)


def test_compiled_attention_with_a_tangent_is_the_same() -> None:
    x = inputs(72, 128, 100, torch.bfloat16)

    def both(*a: Tensor) -> tuple[Tensor, Tensor]:
        return jvp(attention, a[:3], a[3:])

    compiled = torch.compile(both, fullgraph=True)
    for made, right in zip(compiled(*x), both(*x), strict=True):
        assert error(made, right.double()) < 1e-2


def test_a_diffusers_network_has_a_tangent_by_our_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import UNet2DConditionModel

    called: list[str] = []
    launch = ops.launcher()

    def counted(kernel: Any, *rest: Any) -> None:
        called.append(kernel)
        launch(kernel, *rest)

    torch.manual_seed(0)
    net = UNet2DConditionModel(
        sample_size=16, block_out_channels=(80, 160), layers_per_block=1, norm_num_groups=8, cross_attention_dim=16,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).cuda().bfloat16().requires_grad_(False)  # fmt: skip
    text = torch.randn(2, 9, 16, device="cuda", dtype=torch.bfloat16)
    x, direction = torch.randn(2, 2, 4, 16, 16, device="cuda").bfloat16()

    def call(h: Tensor) -> Tensor:
        out: Tensor = net(h, torch.tensor([3.0, 500.0], device="cuda"), text, return_dict=False)[0]
        return out

    with sdpa_kernel([SDPBackend.MATH]):
        expected = jvp(call, (x,), (direction,))
    monkeypatch.setattr(ops, "launcher", lambda: counted)
    with use_attention():
        found = jvp(call, (x,), (direction,))
    assert "tangent" in called
    for made, right in zip(found, expected, strict=True):
        assert error(made, right.double()) < 5e-2


@pytest.mark.parametrize("method", ["dmd2", "sid"])
def test_a_whole_step_of_a_method_runs_on_our_kernels(method: str, make_config: Any, tmp_path: Any) -> None:
    from diffdistill.training.trainer import Trainer

    network = "model.network={name: unet, channels: [8, 32], attention: [false, true], head_channels: 32}"
    source = Trainer(make_config("pretrain", network, "train.steps=1", "train.device=auto"), quiet=True).run()
    settings = ("train.steps=2", "train.precision=bf16", "train.device=auto", "health=null")
    with use_attention("cuda"):
        trainer = Trainer(make_config(method, f"teacher={source}", *settings), quiet=True)
        trainer.run()
    assert all(bool(p.isfinite().all()) for p in trainer.players.generator.parameters())
