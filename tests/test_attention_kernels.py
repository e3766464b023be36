"""Our CUDA kernels: in an emulator of a GPU's blocks, through the compiler, and on a GPU."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import ORDERS, emulated
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from diffdistill.attention import build, kernels, launch, ops, reference
from diffdistill.attention.build import HERE, BuildError, cubin, find_nvrtc
from diffdistill.attention.kernels import HEAD_SIZES, Variant

BF16, FP16 = torch.bfloat16, torch.float16
QUICK = [(40, BF16), (64, FP16), (72, BF16), (160, BF16), (256, BF16)]
CASES = [
    pytest.param(size, dtype, marks=() if (size, dtype) in QUICK else pytest.mark.full)
    for size in HEAD_SIZES
    for dtype in (BF16, FP16)
]
RAGGED = [(100, 177), (64, 64), (1, 1), (65, 333)]


def inputs(count: int, *shape: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, *shape, generator=rng).to(dtype))


def error(made: Tensor, exact: Tensor) -> float:
    return float((made.double() - exact).norm() / exact.norm())


def rounded_math(q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor) -> tuple[Tensor, Tensor]:
    """Attention and tangent by torch's own operations in the inputs' type."""
    primal, moved = torch.func.jvp(_math, (q, k, v), (tq, tk, tv))
    return primal, moved


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


@pytest.mark.parametrize(("size", "dtype"), CASES)
def test_forward_and_tangent_err_at_most_twice_as_much_as_torch_in_16_bits(size: int, dtype: torch.dtype):
    scale = size**-0.5
    for order, (queries, keys) in zip(ORDERS, RAGGED, strict=True):
        run = emulated(order)
        q, tq = inputs(2, 1, 2, queries, size, dtype=dtype)
        k, v, tk, tv = inputs(4, 1, 2, keys, size, dtype=dtype, seed=1)
        wide = [x.double() for x in (q, k, v, tq, tk, tv)]
        exact, exact_lse = reference.forward(*wide[:3], None, scale)
        exact_tangent = reference.tangent(*wide[:3], exact, exact_lse, *wide[3:], None, scale)
        torch_out, torch_tangent = rounded_math(q, k, v, tq, tk, tv)
        out, lse = kernels.forward(run, q, k, v, None, scale)
        tangent = kernels.tangent(run, q, k, v, out, lse, tq, tk, tv, None, scale)
        assert error(out, exact) <= 2 * error(torch_out, exact) + 1e-4
        torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)
        if keys > 1:  # with one key the tangent is tv
            assert error(tangent, exact_tangent) <= 2 * error(torch_tangent, exact_tangent)


@pytest.mark.parametrize("size", [40, 128])
def test_where_text_stands_still_three_products_give_the_tangent(size: int):
    q, tq = inputs(2, 2, 1, 70, size, dtype=BF16)
    k, v = inputs(2, 2, 1, 77, size, dtype=BF16, seed=1)
    wide, scale = [x.double() for x in (q, k, v, tq)], size**-0.5
    exact, exact_lse = reference.forward(*wide[:3], None, scale)
    out, lse = kernels.forward(emulated(), q, k, v, None, scale)
    tangent = kernels.tangent(emulated(), q, k, v, out, lse, tq, None, None, None, scale)
    assert error(tangent, reference.tangent(*wide[:3], exact, exact_lse, wide[3], None, None, None, scale)) < 4e-3


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [40, 160])
def test_the_difference_of_two_contexts(size: int, order: int):
    (q,) = inputs(1, 2, 1, 70, size, dtype=BF16)
    k, v = inputs(2, 2, 1, 77, size, dtype=BF16, seed=1)
    other_k, other_v = inputs(2, 2, 1, 20, size, dtype=BF16, seed=2)
    lengths, other_lengths = torch.tensor([77, 3], dtype=torch.int32), torch.tensor([9, 20], dtype=torch.int32)
    made = kernels.difference(emulated(order), q, k, v, other_k, other_v, 0.7, lengths, other_lengths, size**-0.5)
    first, second = (
        reference.forward(q.double(), a.double(), b.double(), reference.length_mask(n, a.shape[2]), size**-0.5)[0]
        for a, b, n in ((k, v, lengths), (other_k, other_v, other_lengths))
    )
    assert error(made, first - 0.7 * second) < 4e-3


@pytest.mark.parametrize("stages", [1, 2])
def test_lengths_strides_and_one_stage_change_nothing(stages: int):
    """Tensors as a network makes them, [B, N, H, D] turned, and samples that see unlike numbers of keys."""
    q, k, v = (x.transpose(1, 2) for x in inputs(3, 3, 70, 2, 64, dtype=BF16))
    lengths = torch.tensor([70, 1, 0], dtype=torch.int32)
    run = emulated()

    def staged(kernel, arguments, variant, blocks, like):
        run(kernel, arguments, Variant(variant.head_size, variant.half, variant.moving_keys, stages), blocks, like)

    out, lse = kernels.forward(staged, q, k, v, lengths, 0.125)
    exact, exact_lse = reference.forward(*(x.double() for x in (q, k, v)), reference.length_mask(lengths, 70), 0.125)
    assert out.stride() == q.stride()
    assert error(out, exact) < 4e-3
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)
    assert not out[2].any()
    assert torch.isneginf(lse[2]).all()


SEALED = 777.0


def boxed(x: Tensor, filling: float) -> tuple[Tensor, Tensor]:
    """A larger tensor full of a number, and within it `x`, as a view with gaps between its rows."""
    batch, heads, rows, columns = x.shape
    whole = torch.full((batch, heads, rows + 2, columns + 8), filling, dtype=x.dtype)
    view = whole[:, :, 1:-1, :columns]
    view.copy_(x)
    return whole, view


@pytest.mark.parametrize("kernel", ["forward", "tangent", "difference"])
def test_nothing_beyond_the_tensors_is_read_or_written(kernel: str):
    """All around the inputs and beyond each sample's keys are NaNs; around the outputs a number that must stay."""
    size, scale = 40, 0.2
    q, tq = inputs(2, 2, 1, 70, size, dtype=BF16)
    k, v, tk, tv = inputs(4, 2, 1, 50, size, dtype=BF16, seed=1)
    lengths = torch.tensor([50, 5], dtype=torch.int32)
    mask = reference.length_mask(lengths, 50)
    wide = [x.double() for x in (q, k, v, tq, tk, tv)]
    exact, exact_lse = reference.forward(*wide[:3], mask, scale)
    q, k, v, tq, tk, tv = (boxed(x, torch.nan)[1] for x in (q, k, v, tq, tk, tv))
    for x in (k, v, tk, tv):
        x[1, :, 5:] = torch.nan
    written: list[tuple[Tensor, Tensor]] = []

    def into_a_box(kernel, arguments, variant, blocks, like):
        whole, view = boxed(torch.full(q.shape, SEALED).to(BF16), SEALED)
        place = kernels.TensorArgument(view.data_ptr(), *view.stride()[:3])
        setattr(arguments, "tangent" if kernel == "tangent" else "out", place)
        emulated()(kernel, arguments, variant, blocks, like)
        written.append((whole, view))

    if kernel == "forward":
        kernels.forward(into_a_box, q, k, v, lengths, scale)
        right = exact
    elif kernel == "tangent":
        out, lse = boxed(exact.to(BF16), torch.nan)[1], exact_lse.float()
        kernels.tangent(into_a_box, q, k, v, out, lse, tq, tk, tv, lengths, scale)
        right = reference.tangent(*wide[:3], exact, exact_lse, *wide[3:], mask, scale)
    else:
        kernels.difference(into_a_box, q, k, v, tk, tv, 0.5, lengths, lengths, scale)
        right = exact - 0.5 * reference.forward(wide[0], *wide[4:], mask, scale)[0]
    whole, view = written[0]
    assert error(view, right) < 5e-3
    view.fill_(SEALED)
    assert bool((whole == torch.tensor(SEALED).to(BF16)).all())


def test_tensors_that_kernels_cannot_read_are_copied():
    x = torch.arange(2 * 64 + 4).to(BF16)[4:].view(1, 1, 2, 64)
    assert x.data_ptr() % 16 == 8
    assert x.is_contiguous()
    for unfit in (x, x.mT.contiguous().mT, torch.zeros(1, 1, 2, 68, dtype=BF16)[..., :64]):
        copied = kernels.dense_rows(unfit)
        assert copied.data_ptr() % 16 == 0
        assert all(stride % 8 == 0 for stride in copied.stride()[:-1])
        assert torch.equal(copied, unfit)
    fit = torch.zeros(1, 2, 3, 64, dtype=BF16).transpose(1, 2)
    assert kernels.dense_rows(fit) is fit


def test_a_nan_among_the_keys_is_not_hidden():
    q, k, v = inputs(3, 1, 1, 64, 64, dtype=BF16)
    k[0, 0, 3] = torch.nan
    assert kernels.forward(emulated(), q, k, v, None, 0.125)[0].isnan().all()


FAULTS = {
    "no barrier before the tile is used": ("        __syncthreads();\n        compute", "        compute"),
    "no barrier before the tile is overwritten": (
        "        compute(i, i % STAGES);\n        __syncthreads();",
        "        compute(i, i % STAGES);",
    ),
    "no wait for the copies": ("        wait_for_copies<STAGES - 1>();\n", ""),
    "a wait for all but one too many": ("wait_for_copies<STAGES - 1>", "wait_for_copies<STAGES>"),
    "a fragment of the keys from the wrong place": (
        "lane % 8 + lane / 16 * 8) * PITCH",
        "lane % 8 + lane / 8 % 2 * 8) * PITCH",
    ),
    "a row's sum without its second half": ("return x + from_lane_xor(x, 2);", "return x;"),
    "keys beyond the end are seen": ("bool valid = i * KEYS + n * 8", "bool valid = 0 * KEYS + n * 8"),
    "the sum is not rescaled": ("            total[half] *= rescale[half];\n", ""),
    "the output is not rescaled": ("out[d][e] *= rescale[e / 2]", "out[d][e] *= 1"),
    "the tangent's drift has the wrong sign": ("out[d][e] - drift[e / 2]", "out[d][e] + drift[e / 2]"),
    "the moving keys are left out": ("if (MOVING_KEYS) add_scores", "if (false) add_scores"),
    "the moving values are left out": ("if (MOVING_KEYS) add_weighted", "if (false) add_weighted"),
}

CHECK = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import ctypes, torch, emulated
from diffdistill.attention import kernels, reference
file = Path({file!r})
emulated._library = lambda variant: ctypes.CDLL(str(emulated.compile_emulated(variant, file.parent, kernels=file)))
q, k, v, tq, tk, tv = torch.randn(6, 1, 1, 200, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
wide = [x.double() for x in (q, k, v, tq, tk, tv)]
exact, exact_lse = reference.forward(*wide[:3], None, 0.16)
exact_tangent = reference.tangent(*wide[:3], exact, exact_lse, *wide[3:], None, 0.16)
worst = 0.0
for order in emulated.ORDERS:
    run = emulated.emulated(order)
    out, lse = kernels.forward(run, q, k, v, None, 0.16)
    moved = kernels.tangent(run, q, k, v, exact.bfloat16(), exact_lse.float(), tq, tk, tv, None, 0.16)
    for made, right in ((out, exact), (lse, exact_lse), (moved, exact_tangent)):
        found = float((made.double() - right).norm() / right.norm())
        worst = max(worst, found if found == found else 9.0)
print(worst)
"""


def worst_error_of(source: str, folder: Path) -> float:
    """The largest relative error of forward and tangent with these kernels; 9 where they do not end."""
    file = folder / "attention.cu"
    file.write_text(source)
    code = CHECK.format(tests=str(Path(__file__).parent), file=str(file))
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return 9.0
    return float(done.stdout) if done.returncode == 0 else 9.0


QUICK_FAULTS = list(FAULTS)[1:3]


@pytest.mark.parametrize(
    "fault", [None, *(pytest.param(f, marks=() if f in QUICK_FAULTS else pytest.mark.full) for f in FAULTS)]
)
def test_the_emulator_shows_planted_faults(fault: str | None, tmp_path: Path):
    source = (HERE / "attention.cu").read_text()
    if fault is None:
        assert worst_error_of(source, tmp_path) < 4e-3
        return
    right, wrong = FAULTS[fault]
    assert source.count(right) >= 1
    assert worst_error_of(source.replace(right, wrong), tmp_path) > 1e-2


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize(
    ("size", "architecture"),
    [
        pytest.param(size, architecture, marks=() if size in (72, 256) else pytest.mark.full)
        for size in HEAD_SIZES
        for architecture in (80, 90)
    ],
)
def test_nvcc_builds_without_spilling_registers(size: int, architecture: int, tmp_path: Path):
    for moving_keys in (True, False):
        flags = ["-std=c++17", "-O3", f"-arch=sm_{architecture}", *Variant(size, False, moving_keys).defines]
        command = ["nvcc", "-cubin", "-Xptxas", "-v", *flags, str(HERE / "attention.cu"), "-o", str(tmp_path / "a")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        assert said.count("0 bytes spill stores, 0 bytes spill loads") == (3 if size <= 160 else 2)


@pytest.mark.skipif(find_nvrtc() is None, reason="no NVRTC beside torch")
@pytest.mark.parametrize("half", [False, True])
def test_nvrtc_builds_the_same_source(half: bool, tmp_path: Path):
    file = tmp_path / "a.cubin"
    build.Nvrtc(find_nvrtc()).compile(("-std=c++17", "-arch=sm_90", *Variant(72, half).defines), file)
    image = file.read_bytes()
    assert image[:4] == b"\x7fELF"
    assert b"attention_tangent" in image


class CountingCompiler:
    """Writes a file; counts how often."""

    version = "counting 1"

    def __init__(self) -> None:
        self.calls = 0

    def compile(self, flags: tuple[str, ...], file: Path) -> None:
        self.calls += 1
        file.write_bytes(" ".join(flags).encode())


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CountingCompiler:
    compiler = CountingCompiler()
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "find_compiler", lambda: compiler)
    return compiler


def test_a_variant_is_built_once_even_by_many_at_the_same_time(counting: CountingCompiler):
    with ThreadPoolExecutor(8) as pool:
        images = set(pool.map(lambda _: cubin(Variant(64, False), 90), range(16)))
    assert len(images) == counting.calls == 1


def test_another_architecture_flag_or_compiler_is_another_build(counting: CountingCompiler):
    for variant, architecture in ((Variant(64, False), 90), (Variant(64, True), 90), (Variant(64, False), 80)):
        cubin(variant, architecture)
    counting.version = "counting 2"
    cubin(Variant(64, False), 90)
    assert counting.calls == 4


def test_a_failed_build_leaves_nothing_and_says_what_the_compiler_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "find_compiler", lambda: build.Nvrtc(find_nvrtc()))
    with pytest.raises(BuildError, match="HEAD_SIZE"):
        cubin(Variant("wrong", False), 90)  # type: ignore[arg-type]
    assert not list((tmp_path / "kernels").glob("*.cubin*"))
    assert not list((tmp_path / "kernels").glob("*.partial"))


def test_without_any_compiler_the_error_names_both(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(build, "find_nvrtc", lambda: None)
    build.find_compiler.cache_clear()
    with pytest.raises(BuildError, match=r"nvcc.*NVRTC"):
        build.find_compiler()
    build.find_compiler.cache_clear()


def test_the_pipeline_has_as_many_stages_as_shared_memory_holds():
    assert launch.fitting("tangent", Variant(72, False), 99 * 1024).stages == 2
    assert launch.fitting("tangent", Variant(256, False), 163 * 1024).stages == 2
    assert launch.fitting("tangent", Variant(256, False), 110 * 1024).stages == 1
    with pytest.raises(BuildError, match="head size 256"):
        launch.fitting("tangent", Variant(256, False), 48 * 1024)


def test_importing_the_package_compiles_nothing():
    code = "from diffdistill.attention import build; print(build.find_compiler.cache_info().currsize)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


def test_gradients_through_our_forward_are_torchs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ops, "launcher", emulated)
    leaves = [x.requires_grad_() for x in inputs(3, 1, 2, 33, 40, dtype=BF16)]
    found = torch.autograd.grad(ops.cuda_attention(*leaves, None, 0.2)[0].float().square().sum(), leaves)
    exact = torch.autograd.grad(
        scaled_dot_product_attention(*(x.double() for x in leaves), scale=0.2).square().sum(), leaves
    )
    for made, right in zip(found, exact, strict=True):
        assert error(made, right.double()) < 1e-2


def test_gradients_through_the_difference_are_those_of_its_two_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ops, "launcher", emulated)
    leaves = [x.requires_grad_() for x in inputs(5, 1, 1, 33, 40, dtype=BF16)]
    q, k, v, other_k, other_v = (x.double() for x in leaves)
    out = ops.cuda_difference(*leaves, None, None, 0.7, 0.2)
    right = scaled_dot_product_attention(q, k, v, scale=0.2) - 0.7 * scaled_dot_product_attention(
        q, other_k, other_v, scale=0.2
    )
    found = torch.autograd.grad(out.float().square().sum(), leaves)
    for made, exact in zip(found, torch.autograd.grad(right.square().sum(), leaves), strict=True):
        assert error(made, exact.double()) < 1.5e-2


def arguments_of(op: str, layout: Callable[..., Tensor]) -> tuple[Any, ...]:
    q, k, v, tq, tk, tv = (layout(x) for x in inputs(6, 1, 2, 16, 32, dtype=BF16))
    out, lse = reference.forward(q, k, v, None, 0.2)
    return {
        "attention": (q, k, v, None, 0.2),
        "attention_tangent": (q, k, v, out, lse, tq, tk, tv, None, None, 0.2, True),
        "attention_difference": (q, k, v, tk, tv, None, None, 0.7, 0.2),
        "reference_attention": (q, k, v, None, 0.2),
        "reference_attention_backward": (out, q, k, v, out, lse, None, 0.2),
    }[op]


OPERATORS = ("attention", "attention_tangent", "attention_difference", "reference_attention")


@pytest.mark.parametrize("op", OPERATORS)
def test_torchs_own_checks_of_an_operator_pass(op: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ops, "launcher", emulated)
    torch.library.opcheck(getattr(torch.ops.diffdistill, op), arguments_of(op, lambda x: x))


LAYOUTS = {
    "dense": lambda x: x,
    "heads last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "columns first": lambda x: x.mT.contiguous().mT,
    "with gaps": lambda x: boxed(x, 0.0)[1],
    "expanded": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("op", [*OPERATORS, "reference_attention_backward"])
def test_a_compiler_is_told_the_layout_that_comes(
    op: str, layout: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
):
    """`opcheck` does not look at it, and compiled code reads what it was told."""
    monkeypatch.setattr(ops, "launcher", lambda: lambda *_: None)
    arguments, call = arguments_of(op, layout), getattr(torch.ops.diffdistill, op)
    with FakeTensorMode() as mode:
        told = call(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments))
    came = call(*arguments)
    pairs = zip(told, came, strict=True) if isinstance(came, tuple) else [(told, came)]
    for first, second in pairs:
        assert (first.shape, first.stride(), first.dtype) == (second.shape, second.stride(), second.dtype)


def test_the_emulator_stops_at_an_access_outside_of_shared_memory(tmp_path: Path):
    source = (HERE / "attention.cu").read_text()
    beyond = source.replace("moving + QUERIES * PITCH;", "moving + 100 * QUERIES * PITCH;")
    assert beyond != source
    assert worst_error_of(beyond, tmp_path) == 9.0
