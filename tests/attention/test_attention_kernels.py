"""Our CUDA kernels: in an emulator of a GPU's blocks, through the compiler, and on a GPU."""

import ctypes
import faulthandler
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support import emulated as emulated_kernels
from support.emulated import ORDERS, emulated
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from diffdistill.attention import build, kernels, launch, ops, reference
from diffdistill.attention.build import HERE, BuildError, cubin, find_nvrtc
from diffdistill.attention.kernels import HEAD_SIZES, Kernel, Launch, Variant

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
    """In two opposite orders for each of the lengths, which change no bit."""
    scale = size**-0.5
    for order, (queries, keys) in zip(ORDERS, RAGGED, strict=True):
        q, tq = inputs(2, 1, 2, queries, size, dtype=dtype)
        k, v, tk, tv = inputs(4, 1, 2, keys, size, dtype=dtype, seed=1)
        wide = [x.double() for x in (q, k, v, tq, tk, tv)]
        exact, exact_lse = reference.forward(*wide[:3], None, scale)
        exact_tangent = reference.tangent(*wide[:3], exact, exact_lse, *wide[3:], None, scale)
        torch_out, torch_tangent = rounded_math(q, k, v, tq, tk, tv)
        (out, lse, tangent), again = (
            (out, lse, kernels.tangent(run, q, k, v, out, lse, tq, tk, tv, None, scale))
            for run in (emulated(order), emulated(max(ORDERS) - order))
            for out, lse in [kernels.forward(run, q, k, v, None, scale)]
        )
        assert all(map(torch.equal, (out, lse, tangent), again))
        assert error(out, exact) <= 2 * error(torch_out, exact) + 1e-4  # with one key torch makes no error
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


def sealed(run: Launch, call: Callable[[Launch], object], like: Tensor) -> tuple[Tensor, Tensor]:
    """A kernel's output, of `like`'s shape, and log-sum-exp, written into the midst of larger tensors.

    Raises AssertionError if anything else of those was written.
    """
    whole, out = boxed(torch.full(like.shape, SEALED).to(like.dtype), SEALED)
    sums = torch.full((like[..., 0].numel() + 16,), SEALED)

    def launch(kernel: Kernel, arguments: Any, variant: Variant, blocks: int, x: Tensor) -> None:
        place = kernels.TensorArgument(out.data_ptr(), *out.stride()[:3])
        setattr(arguments, "tangent" if kernel == "tangent" else "out", place)
        if kernel == "forward":
            arguments.lse = sums[8:].data_ptr()
        run(kernel, arguments, variant, blocks, x)

    call(launch)
    found = out.clone(), sums[8:-8].reshape(like.shape[:-1]).clone()
    out.fill_(SEALED)
    sums[8:-8] = SEALED
    assert bool((whole == whole[0, 0, 0, 0]).all()), "something beyond the output was written"
    assert bool((sums == SEALED).all()), "something beyond the log-sum-exp was written"
    return found


@pytest.mark.parametrize("kernel", ["forward", "tangent", "difference"])
def test_nothing_beyond_the_tensors_is_read_or_written(kernel: str):
    """All around the inputs and beyond each sample's keys are NaNs."""
    size, scale = 40, 0.2
    q, tq = inputs(2, 2, 1, 70, size, dtype=BF16)
    k, v, tk, tv = inputs(4, 2, 1, 50, size, dtype=BF16, seed=1)
    lengths = torch.tensor([50, 5], dtype=torch.int32)
    mask = reference.length_mask(lengths, 50)
    wide = [x.double() for x in (q, k, v, tq, tk, tv)]
    right, lse = reference.forward(*wide[:3], mask, scale)
    primal = boxed(right.to(BF16), torch.nan)[1]
    q, k, v, tq, tk, tv = (boxed(x, torch.nan)[1] for x in (q, k, v, tq, tk, tv))
    for x in (k, v, tk, tv):
        x[1, :, 5:] = torch.nan
    if kernel == "forward":
        found = sealed(emulated(), lambda run: kernels.forward(run, q, k, v, lengths, scale), q)[0]
    elif kernel == "tangent":
        right = reference.tangent(*wide[:3], right, lse, *wide[3:], mask, scale)
        given = (q, k, v, primal, lse.float(), tq, tk, tv, lengths, scale)
        found = sealed(emulated(), lambda run: kernels.tangent(run, *given), q)[0]
    else:
        right = right - 0.5 * reference.forward(wide[0], *wide[4:], mask, scale)[0]
        found = sealed(
            emulated(), lambda run: kernels.difference(run, q, k, v, tk, tv, 0.5, lengths, lengths, scale), q
        )[0]
    assert error(found, right) < 5e-3


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


PLANTED = tuple(
    x[..., :n, :] for x, n in zip(inputs(6, 1, 1, 200, 40, dtype=BF16), (70, 200, 200, 70, 200, 200), strict=True)
)
FAULTS = {
    "no barrier before the tile is used": ("        __syncthreads();\n        compute", "        compute"),
    "no barrier before the tile is overwritten": (
        "        compute(i, i % STAGES);\n        __syncthreads();",
        "        compute(i, i % STAGES);",
    ),
    "no wait for the copies": ("        wait_for_copies<STAGES - 1>();\n", ""),
    "a wait for all but one too many": ("wait_for_copies<STAGES - 1>", "wait_for_copies<STAGES>"),
    "the next tile goes over this one": ("load(i + 1, (i + 1) % 2)", "load(i + 1, i % 2)"),
    "rows without a gap between their banks": ("PITCH = WIDTH + 8;", "PITCH = WIDTH;"),
    "memory that is not shared memory": ("moving + QUERIES * PITCH;", "moving + 100 * QUERIES * PITCH;"),
    "a fragment of the keys from the wrong place": (
        "lane % 8 + lane / 16 * 8) * PITCH",
        "lane % 8 + lane / 8 % 2 * 8) * PITCH",
    ),
    "queries of the wrong rows": ("warp_of() * 16 + lane % 16) * PITCH", "warp_of() * 16 + lane % 8) * PITCH"),
    "values that are not transposed": ("load_matrices_transposed(b, values", "load_matrices(b, values"),
    "a row's sum without its second half": ("return x + from_lane_xor(x, 2);", "return x;"),
    "keys beyond the end are seen": ("bool valid = i * KEYS + n * 8", "bool valid = 0 * KEYS + n * 8"),
    "rows beyond the end are read": ("first + row < limit && column < HEAD_SIZE;", "column < HEAD_SIZE;"),
    "columns beyond the head are read": ("first + row < limit && column < HEAD_SIZE;", "first + row < limit;"),
    "rows beyond the end are written": ("if (row < queries && column < HEAD_SIZE)", "if (column < HEAD_SIZE)"),
    "columns beyond the head are written": ("if (row < queries && column < HEAD_SIZE)", "if (row < queries)"),
    "the sum is not rescaled": ("            total[half] *= rescale[half];\n", ""),
    "the output is not rescaled": ("out[d][e] *= rescale[e / 2]", "out[d][e] *= 1"),
    "the logarithm has the wrong base": ("* LN_2;", "* 1.0f;"),
    "the tangent's drift has the wrong sign": ("out[d][e] - drift[e / 2]", "out[d][e] + drift[e / 2]"),
    "the tangent's scores have no scale": ("p[n][e] * a.shape.scale;", "p[n][e];"),
    "the moving keys are left out": ("if (MOVING_KEYS) add_scores", "if (false) add_scores"),
    "the moving values are left out": ("if (MOVING_KEYS) add_weighted", "if (false) add_weighted"),
}


def outcome_of(source: str, folder: Path) -> float | str:
    """With these kernels the largest relative error of forward and tangent over the orders; or, where the program
    ended, the emulator's reason. In a process of its own, for a fault may end it.
    """
    file, said = folder / "attention.cu", folder / "said"
    file.write_text(source)
    library = emulated_kernels.compile_emulated(Variant(40, False), folder, kernels=file)
    scale, wide = 0.16, [x.double() for x in PLANTED]
    exact, exact_lse = reference.forward(*wide[:3], None, scale)
    moved = reference.tangent(*wide[:3], exact, exact_lse, *wide[3:], None, scale)
    q, k, v, tq, tk, tv = (boxed(x, torch.nan)[1] for x in PLANTED)
    primal, lse = boxed(exact.to(BF16), torch.nan)[1], exact_lse.float()
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()  # pytest's
            signal.alarm(600)  # for one that never ends
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
            emulated_kernels._library = lambda _: ctypes.CDLL(str(library))  # type: ignore[assignment]
            worst = 0.0
            for run in map(emulated, ORDERS):
                out, sums = sealed(run, lambda run: kernels.forward(run, q, k, v, None, scale), q)
                step, _ = sealed(
                    run, lambda run: kernels.tangent(run, q, k, v, primal, lse, tq, tk, tv, None, scale), q
                )
                pairs = ((out, exact), (sums, exact_lse), (step, moved))
                worst = max(worst, *(min(9.0, error(a, b)) for a, b in pairs))  # a NaN counts as 9
            said.write_text(str(worst))
            os._exit(0)
        except AssertionError as fault:
            said.write_text(str(fault).splitlines()[0])
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return float(said.read_text()) if status == 0 else said.read_text().strip() or f"signal {-status}"


QUICK_FAULTS = ("no barrier before the tile is overwritten", "rows beyond the end are read")


def test_the_emulator_finds_no_fault_where_there_is_none(tmp_path: Path):
    found = outcome_of((HERE / "attention.cu").read_text(), tmp_path)
    assert isinstance(found, float), found
    assert found < 4e-3


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=() if f in QUICK_FAULTS else pytest.mark.full) for f in FAULTS]
)
def test_the_emulator_shows_planted_faults(fault: str, tmp_path: Path):
    source, (right, wrong) = (HERE / "attention.cu").read_text(), FAULTS[fault]
    assert source.count(right) >= 1
    found = outcome_of(source.replace(right, wrong), tmp_path)
    assert isinstance(found, str) or found > 1e-2


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize(
    ("size", "architecture"),
    [
        pytest.param(
            size, architecture, marks=() if (size, architecture) in ((72, 90), (256, 80)) else pytest.mark.full
        )
        for size in HEAD_SIZES
        for architecture in (80, 90)
    ],
)
def test_nvcc_builds_with_16_bytes_of_spilled_registers_at_most(size: int, architecture: int, tmp_path: Path):
    for moving_keys in (True, False):
        flags = ["-std=c++17", "-O3", f"-arch=sm_{architecture}", *Variant(size, False, moving_keys).defines]
        command = ["nvcc", "-cubin", "-Xptxas", "-v", *flags, str(HERE / "attention.cu"), "-o", str(tmp_path / "a")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        spilled = [
            max(map(int, found)) for found in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
        ]
        assert len(spilled) == (3 if size <= 160 else 2)
        assert max(spilled) <= (16 if architecture == 80 and size in (32, 104) else 0)


@pytest.mark.skipif(find_nvrtc() is None, reason="no NVRTC in the environment of torch")
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
