"""The entry to attention: equal to torch's in value and in every derivative, by any backend, inside any network."""

import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from support.emulated import emulated
from torch import Tensor, nn
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from diffdistill.attention import (
    attention,
    attention_difference,
    backends,
    choose,
    entry,
    ops,
    reference,
    use_attention,
)
from diffdistill.attention.backends import Options, measured_ratio
from diffdistill.attention.state import current_backend
from diffdistill.networks.diffusers_unet import DiffusersUNetConfig
from diffdistill.networks.dit import DiTConfig
from diffdistill.networks.unet import UNetConfig
from diffdistill.settings.schema import UserError


def inputs(*, keys: int = 50, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(0)
    shapes = [(2, 3, n, 16) for n in (40, keys, keys)]
    return tuple(torch.randn(*s, generator=rng, dtype=torch.float64).to(dtype) for s in (*shapes, *shapes))


def by_math(function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*arguments: Any) -> Any:
        with sdpa_kernel([SDPBackend.MATH]):
            return function(*arguments)

    return called


MASKS = {
    "none": None,
    "bool": torch.rand(2, 1, 40, 50, generator=torch.Generator().manual_seed(1)) > 0.2,
    "additive": torch.randn(2, 3, 40, 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64),
    "of keys": torch.rand(2, 1, 1, 50, generator=torch.Generator().manual_seed(3)) > 0.5,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("backend", ["auto", "math", "reference", "flash"])
def test_every_backend_computes_the_same(backend: str, mask: Tensor | None):
    if backend == "flash" and mask is not None:
        mask = None
    q, k, v, *_ = inputs()
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(attention(q, k, v, mask=mask, scale=0.3, backend=backend), expected)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_the_forward_derivative_is_that_of_plain_math(mask: Tensor | None):
    q, k, v, *tangents = inputs()
    expected = jvp(by_math(lambda *x: scaled_dot_product_attention(*x, attn_mask=mask)), (q, k, v), tuple(tangents))
    found = jvp(lambda *x: attention(*x, mask=mask), (q, k, v), tuple(tangents))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("moving", [(True, False, False), (False, True, True), (True, True, False)])
def test_what_stands_still_may_be_left_out(moving: tuple[bool, ...]):
    x, t = inputs()[:3], inputs()[3:]

    def of_moving(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def called(*some: Tensor) -> Tensor:
            given = iter(some)
            return function(*(next(given) if m else fixed for m, fixed in zip(moving, x, strict=True)))

        return called

    primals, tangents = (tuple(a for a, m in zip(s, moving, strict=True) if m) for s in (x, t))
    expected = jvp(of_moving(by_math(scaled_dot_product_attention)), primals, tangents)
    torch.testing.assert_close(jvp(of_moving(attention), primals, tangents), expected)


def test_causal_and_key_lengths_are_masks():
    q, k, v, tq, tk, tv = inputs(keys=40)
    lengths = torch.tensor([40, 7], dtype=torch.int32)
    mask = (torch.arange(40) < lengths[:, None])[:, None, None]
    torch.testing.assert_close(
        attention(q, k, v, key_lengths=lengths), scaled_dot_product_attention(q, k, v, attn_mask=mask)
    )
    for given, torchs in (({"key_lengths": lengths}, {"attn_mask": mask}), ({"causal": True}, {"is_causal": True})):
        expected = jvp(by_math(lambda *x, t=torchs: scaled_dot_product_attention(*x, **t)), (q, k, v), (tq, tk, tv))
        torch.testing.assert_close(jvp(lambda *x, g=given: attention(*x, **g), (q, k, v), (tq, tk, tv)), expected)


@pytest.mark.parametrize("mask", [None, MASKS["bool"][:1, :, :6, :5]], ids=["none", "bool"])
def test_the_reference_has_the_right_gradients(mask: Tensor | None):
    q, k, v, *_ = (x[:1, :1, :6, :4].clone().requires_grad_() for x in inputs())
    k, v = (x[:, :, :5].detach().requires_grad_() for x in (k, v))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, mask=mask, backend="reference"), (q, k, v))


@pytest.mark.parametrize("of", ["primal", "tangent", "both"])
def test_a_loss_on_the_tangent_has_the_right_gradient(of: str):
    q, k, v, *tangents = inputs()

    def gradients(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        primal, tangent = jvp(function, tuple(leaves), tuple(tangents))
        loss = {"primal": primal, "tangent": tangent, "both": primal * tangent}[of].square().sum()
        return torch.autograd.grad(loss, leaves)

    torch.testing.assert_close(gradients(attention), gradients(by_math(scaled_dot_product_attention)))


def test_a_query_that_sees_no_key_gets_zeros_and_no_nan():
    q, k, v, tq, tk, tv = inputs()
    nothing = torch.zeros(2, 1, 1, 50, dtype=torch.bool)
    out, moved = jvp(lambda *x: attention(*x, mask=nothing, backend="reference"), (q, k, v), (tq, tk, tv))
    assert not out.any()
    assert not moved.any()


# The routes that give a tangent of zero without a word in torch, and the ones that raise.


def test_torchs_own_fused_attention_has_no_forward_derivative():
    q, k, v, *tangents = inputs(dtype=torch.float32)
    with pytest.raises((RuntimeError, NotImplementedError)):
        jvp(scaled_dot_product_attention, (q, k, v), tuple(tangents))


def test_an_operator_alone_loses_the_tangent_and_the_entry_keeps_it():
    q, k, v, tq, *_ = inputs()

    def bare(x: Tensor) -> Tensor:
        return ops.reference_attention(x, k, v, None, 0.25)[0]

    _, lost = jvp(bare, (q,), (tq,))
    _, kept = jvp(lambda x: attention(x, k, v, scale=0.25, backend="reference"), (q,), (tq,))
    assert not lost.any()  # if torch ever changes this, the entry may become simpler
    assert kept.abs().max() > 0.1


class Taught(torch.autograd.Function):
    """Attention to fixed keys and values whose derivative is written down, as torch's manual says."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.reference_attention(q, k, v, None, 0.25)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, tq: Tensor, tk: Any, tv: Any) -> Tensor:
        q, k, v = ctx.saved_tensors
        return reference.whole_tangent(q, k, v, tq, None, None, None, 0.25)


def test_a_function_with_a_jvp_loses_the_tangent_when_it_is_compiled_and_the_entry_keeps_it():
    q, k, v, tq, *_ = inputs()

    def taught(x: Tensor, direction: Tensor) -> Tensor:
        return jvp(lambda x: Taught.apply(x, k, v), (x,), (direction,))[1]

    def ours(x: Tensor, direction: Tensor) -> Tensor:
        return jvp(lambda x: attention(x, k, v, scale=0.25, backend="reference"), (x,), (direction,))[1]

    right = taught(q, tq)
    lost, kept = (torch.compile(f, backend="aot_eager", fullgraph=True)(q, tq) for f in (taught, ours))
    torch.testing.assert_close(ours(q, tq), right)
    torch.testing.assert_close(kept, right)
    assert not lost.any()  # if torch ever changes this, the entry may become simpler


def test_the_tangent_survives_torch_compile():
    q, k, v, *tangents = inputs()

    def both(*x: Tensor) -> tuple[Tensor, Tensor]:
        return jvp(attention, x[:3], x[3:])

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, *tangents), both(q, k, v, *tangents))


def test_the_primal_compiles_with_its_backward_pass():
    q, k, v, *_ = (x.requires_grad_() for x in inputs())

    def loss(*x: Tensor) -> Tensor:
        return attention(*x, backend="reference").square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(f(q, k, v), (q, k, v)) for f in (compiled, loss))
    torch.testing.assert_close(found, expected)


def test_vmap_over_the_derivative():
    q, k, v, *tangents = (x[None].expand(3, *x.shape) for x in inputs())
    found = vmap(lambda *x: jvp(attention, x[:3], x[3:])[1])(q, k, v, *tangents)
    expected = jvp(attention, (q[0], k[0], v[0]), tuple(t[0] for t in tangents))[1]
    torch.testing.assert_close(found, expected.expand_as(found))


def test_dropout_has_no_forward_derivative_here():
    q, k, v, *tangents = inputs()
    with pytest.raises(UserError, match="no forward-mode derivative with dropout"):
        jvp(lambda *x: attention(*x, dropout=0.1), (q, k, v), tuple(tangents))


# The context.


def test_inside_the_context_torchs_attention_is_ours(monkeypatch: pytest.MonkeyPatch):
    q, k, v, *_ = inputs()
    seen: list[str] = []
    run = entry.run
    monkeypatch.setattr(entry, "run", lambda name, *rest: seen.append(name) or run(name, *rest))
    with use_attention("reference"):
        inner = scaled_dot_product_attention(q, k, v)
        with use_attention("math"):
            scaled_dot_product_attention(q, k, v)
        scaled_dot_product_attention(q[0], k[0], v[0])
    scaled_dot_product_attention(q, k, v)
    assert seen == ["reference", "math", "reference"]
    assert current_backend() == "auto"
    torch.testing.assert_close(inner, scaled_dot_product_attention(q, k, v))


def test_grouped_queries_masks_and_scales_pass_through():
    q, k, v, *_ = inputs()
    k, v = k[:, :1], v[:, :1]
    options = {"attn_mask": MASKS["bool"], "scale": 0.1, "enable_gqa": True}
    with use_attention("reference"):
        found = scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(found, scaled_dot_product_attention(q, k, v, **options))


def test_an_exception_leaves_the_context_as_it_was():
    before = torch.utils.checkpoint._checkpoint_without_reentrant_generator
    with pytest.raises(ZeroDivisionError), use_attention("math"):
        raise ZeroDivisionError
    assert current_backend() == "auto"
    assert torch.utils.checkpoint._checkpoint_without_reentrant_generator is before


@pytest.mark.parametrize("ours", [False, True], ids=["torch's attention", "the entry"])
def test_what_is_recomputed_outside_takes_the_backend_of_the_forward_pass(ours: bool, monkeypatch: pytest.MonkeyPatch):
    q, k, v, *_ = inputs()
    q = q.requires_grad_()
    seen: list[str] = []
    run = entry.run
    monkeypatch.setattr(entry, "run", lambda name, *rest: seen.append(name) or run(name, *rest))
    with use_attention("reference"):
        out = checkpoint(attention if ours else scaled_dot_product_attention, q, k, v, use_reentrant=False)
    out.sum().backward()
    assert seen == ["reference", "reference"]


@pytest.mark.parametrize("name", ["", "Flash", "triton"])
def test_an_unknown_backend_is_refused_with_the_choices(name: str):
    with pytest.raises(UserError, match=r"choose from auto, cuda, cudnn, flash, efficient, math, xformers, reference"):
        use_attention(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["cudnn", "efficient", "xformers"])
def test_a_backend_of_gpus_says_so_on_a_cpu(name: str):
    q, k, v, *_ = inputs()
    with pytest.raises(UserError, match=f"'{name}': needs a CUDA GPU, not a CPU"):
        attention(q, k, v, backend=name)  # type: ignore[arg-type]


def test_without_a_gpu_the_reference_serves_for_our_kernels_with_one_line():
    backends.say_once.cache_clear()
    q, k, v, *_ = inputs(dtype=torch.float32)
    with pytest.warns(UserWarning, match="needs a CUDA GPU, not a CPU; the reference computes it"):
        first = attention(q, k, v, backend="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(q, k, v, backend="cuda")
    torch.testing.assert_close(first, scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize(
    "lengths", [torch.tensor([1]), torch.tensor([1.0, 2.0]), torch.tensor([True, False]), torch.ones(2, 1)]
)
def test_key_lengths_are_one_whole_number_a_sample(lengths: Tensor):
    q, k, v, *_ = inputs()
    with pytest.raises(UserError, match="key_lengths must be 2 integers, one per sample"):
        attention(q, k, v, key_lengths=lengths)


def test_key_lengths_of_any_whole_type_mean_the_same():
    q, k, v, *_ = inputs()
    expected = attention(q, k, v, key_lengths=torch.tensor([9, 50], dtype=torch.int32))
    assert torch.equal(attention(q, k, v, key_lengths=torch.tensor([9, 50])), expected)


def test_lengths_and_a_mask_together_are_refused():
    q, k, v, *_ = inputs()
    with pytest.raises(UserError, match="key_lengths or a mask, not both"):
        attention(q, k, v, mask=MASKS["bool"], key_lengths=torch.tensor([1, 2], dtype=torch.int32))


def test_auto_says_why_it_chooses_torchs_own_on_a_cpu():
    q, k, v, *_ = inputs(dtype=torch.bfloat16)
    assert choose(q, k, v, Options(0.25)) == ("auto", "torch's own choice; our kernel needs a CUDA GPU, not a CPU")


def test_auto_follows_the_nearest_measured_row(monkeypatch: pytest.MonkeyPatch):
    rows = [
        {"device": "X", "dtype": "bfloat16", "head_size": 16, "queries": 64, "keys": 64, "ratio": 1.2},
        {"device": "X", "dtype": "bfloat16", "head_size": 16, "queries": 1024, "keys": 1024, "ratio": 0.6},
    ]
    monkeypatch.setattr(backends, "_table", lambda: rows)
    q, k, *_ = inputs(dtype=torch.bfloat16)
    assert measured_ratio("X", q, k) == 1.2  # 40 x 50
    assert measured_ratio("Y", q, k) is None
    assert measured_ratio("X", q[:, :, :2], k[:, :, :2]) is None  # too far from any


# Networks.


def text(batch: int, length: int, width: int) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def stable_diffusion(**more: Any) -> tuple[nn.Module, dict[str, Any], tuple[int, ...]]:
    net = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=12,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **more,
    )
    return net, {"timestep": torch.tensor([3.0, 500.0]), "encoder_hidden_states": text(2, 5, 12)}, (2, 4, 8, 8)


def sdxl() -> tuple[nn.Module, dict[str, Any], tuple[int, ...]]:
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    net, given, shape = stable_diffusion(**more, projection_class_embeddings_input_dim=6 * 4 + 10)
    added = {"text_embeds": text(2, 1, 10)[:, 0], "time_ids": torch.ones(2, 6, dtype=torch.float64)}
    return net, given | {"added_cond_kwargs": added}, shape


def sd3() -> tuple[nn.Module, dict[str, Any], tuple[int, ...]]:
    net = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        in_channels=4,
        out_channels=4,
    )
    given = {"encoder_hidden_states": text(2, 5, 12), "pooled_projections": text(2, 1, 10)[:, 0]}
    return net, given | {"timestep": torch.tensor([3.0, 500.0])}, (2, 4, 8, 8)


def pixart() -> tuple[nn.Module, dict[str, Any], tuple[int, ...]]:
    net = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
        use_additional_conditions=False,
    )
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.float64)
    given = {"encoder_hidden_states": text(2, 5, 12), "encoder_attention_mask": mask}
    return net, given | {"timestep": torch.tensor([3, 500])}, (2, 4, 8, 8)


def flux() -> tuple[nn.Module, dict[str, Any], tuple[int, ...]]:
    net = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 4, 8),
    )
    given = {"encoder_hidden_states": text(2, 5, 12), "pooled_projections": text(2, 1, 10)[:, 0]}
    ids = {"img_ids": torch.zeros(9, 3), "txt_ids": torch.zeros(5, 3)}
    return net, given | ids | {"timestep": torch.tensor([0.1, 0.5])}, (2, 9, 4)


def dit() -> tuple[nn.Module, dict[str, Any], tuple[int, ...]]:
    net = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8)
    return net, {"timestep": torch.tensor([3, 500]), "class_labels": torch.tensor([1, 2])}, (2, 4, 8, 8)


FAMILIES = {"SD": stable_diffusion, "SDXL": sdxl, "SD3": sd3, "PixArt": pixart, "Flux": flux, "DiT": dit}


def in_float64(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: in_float64(inner) for key, inner in value.items()}
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_of_diffusers_gets_a_forward_derivative_through_the_context(family: str):
    torch.manual_seed(0)
    net, given, shape = FAMILIES[family]()
    net.double().eval().requires_grad_(False)
    for parameter in net.parameters():  # some families begin with gates at zero
        if not parameter.any():
            parameter.data.normal_(0, 0.2)
    given = in_float64(given)
    x, direction = torch.randn(2, *shape, dtype=torch.float64)

    def call(h: Tensor) -> Tensor:
        out: Tensor = net(h, **given, return_dict=False)[0]
        return out

    expected = jvp(by_math(call), (x,), (direction,))
    with use_attention():
        found = jvp(call, (x,), (direction,))
    for made, right in zip(found, expected, strict=True):
        assert float((made - right).norm() / right.norm()) < 1e-5
    assert float(expected[1].norm()) > 1e-3


def test_the_network_of_a_teacher_has_a_forward_derivative_without_a_context():
    """Of UNet2DModel, whose attention hands group_norm tensors that torch's own rule raises on."""
    from diffdistill.diffusion.cond import Cond

    torch.manual_seed(0)
    options = {
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    net = DiffusersUNetConfig(options=options).build((3, 8, 8), 0, 0.0).double().eval().requires_grad_(False)
    x, direction = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)

    def call(h: Tensor) -> Tensor:
        out: Tensor = net(h, torch.tensor([3.0, 500.0]), Cond())
        return out

    found = jvp(call, (x,), (direction,))[1]
    nearby = (call(x + 1e-6 * direction) - call(x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(found, nearby, rtol=1e-6, atol=1e-8)


def test_without_the_context_stock_torch_raises():
    net, given, shape = stable_diffusion()
    net.eval().requires_grad_(False)
    given = {name: x.float() for name, x in given.items()}
    with pytest.raises((RuntimeError, NotImplementedError)):
        jvp(lambda h: net(h, **given, return_dict=False)[0], (torch.randn(shape),), (torch.randn(shape),))


def test_gradient_checkpointing_of_diffusers_keeps_the_backend_outside_of_the_context():
    net, given, shape = stable_diffusion()
    net.double().train()
    x = torch.randn(shape, dtype=torch.float64)

    def gradients() -> list[Tensor]:
        with use_attention("reference"):
            out = net(x, **given, return_dict=False)[0]
        return list(torch.autograd.grad(out.square().sum(), list(net.parameters()), allow_unused=True))

    plain = gradients()
    net.enable_gradient_checkpointing()
    for found, expected in zip(gradients(), plain, strict=True):
        if expected is not None:
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(channels=(8, 16), attention=(False, True), head_channels=8),
        DiTConfig(width=16, depth=2, heads=2),
    ],
    ids=["unet", "dit"],
)
def test_our_own_networks_call_the_entry(config: Any, monkeypatch: pytest.MonkeyPatch):
    from diffdistill.diffusion.cond import Cond

    torch.manual_seed(0)
    net = config.build((1, 8, 8), 3, 0.1).double().eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, direction = torch.randn(2, 2, 1, 8, 8, dtype=torch.float64)

    def call(h: Tensor) -> Tensor:
        out: Tensor = net(h, torch.tensor([0.1, 0.9], dtype=torch.float64), Cond(label=torch.tensor([0, 3])))
        return out

    with use_attention("math"):
        expected = jvp(call, (x,), (direction,))
    torch.testing.assert_close(jvp(call, (x,), (direction,)), expected)


# Our kernels, in the emulator, as the backend of a whole network.


@pytest.fixture
def kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's flash attention, which gives the primal of a tangent on a GPU, is ours as well."""
    monkeypatch.setattr(ops, "launcher", emulated)
    monkeypatch.setattr(entry, "_primal", lambda q, k, v, o: ops.cuda_attention(q, k, v, o.key_lengths, o.scale))
    for module in (backends, entry):
        monkeypatch.setattr(module, "no_kernels", lambda device: None)


@pytest.mark.usefixtures("kernels_on_cpu")
def test_the_entry_takes_our_kernels_for_the_difference_and_tells_misfits():
    q, k, v, other_k, other_v = (
        torch.randn(1, 2, 33, 40, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(5)
    )
    expected = scaled_dot_product_attention(q, k, v) - 0.5 * scaled_dot_product_attention(q, other_k, other_v)
    found = attention_difference(q, k, v, other_k, other_v, weight=0.5)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
    with pytest.raises(UserError, match="head sizes 32 to 160"):
        attention(q[..., :12], k[..., :12], v[..., :12], backend="cuda")


def test_the_difference_without_a_kernel_is_two_attentions_with_derivatives():
    q, k, v, tq, other_k, other_v = inputs(keys=40)
    found = jvp(lambda x: attention_difference(x, k, v, other_k, other_v, weight=0.5), (q,), (tq,))
    expected = jvp(
        by_math(
            lambda x: scaled_dot_product_attention(x, k, v) - 0.5 * scaled_dot_product_attention(x, other_k, other_v)
        ),
        (q,),
        (tq,),
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("kernels_on_cpu")
@pytest.mark.parametrize("what", ["plain", "tangent", "difference"])
def test_our_kernels_compile_into_one_graph_with_their_gradients(what: str):
    q, k, v, other_k, other_v = (
        torch.randn(1, 2, 20, 40, generator=torch.Generator().manual_seed(i)).bfloat16().requires_grad_()
        for i in range(5)
    )

    def of(q: Tensor, k: Tensor, v: Tensor, other_k: Tensor, other_v: Tensor) -> Tensor:
        if what == "plain":
            return attention(q, k, v, backend="cuda")
        if what == "difference":
            return attention_difference(q, k, v, other_k, other_v, weight=0.5)
        return jvp(attention, (q, k, v), (q.detach() + 1, other_k.detach(), other_v.detach()))[1]

    compiled = torch.compile(of, backend="aot_eager", fullgraph=True)
    made, expected = compiled(q, k, v, other_k, other_v), of(q, k, v, other_k, other_v)
    assert torch.equal(made, expected)
    found, right = (
        torch.autograd.grad(out.float().square().sum(), (q, k, v, other_k, other_v), allow_unused=True)
        for out in (made, expected)
    )
    torch.testing.assert_close(found, right)


def test_auto_on_a_gpu_compiles_though_it_looks_for_a_compiler_and_a_table(monkeypatch: pytest.MonkeyPatch):
    """As on a GPU that was measured, but for the GPU."""
    from diffdistill.attention.build import BuildError

    def searched(device: torch.device) -> str | None:
        if not shutil.which("sh"):  # dynamo cannot trace a look at files
            raise BuildError
        return None

    rows = [{"device": "X", "dtype": "bfloat16", "head_size": 40, "queries": 20, "keys": 20, "ratio": 1.2}]
    monkeypatch.setattr(ops, "launcher", emulated)
    monkeypatch.setattr(backends, "_no_kernels", searched)
    monkeypatch.setattr(backends, "_read_table", lambda: rows)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "X")
    q, k, v = torch.randn(3, 1, 1, 20, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert choose(q, k, v, Options(0.2)) == ("cuda", "our kernel measured 1.20 times as fast as the best of torch's")
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), attention(q, k, v, backend="cuda"))


@pytest.mark.usefixtures("kernels_on_cpu")
@pytest.mark.parametrize("method", ["dmd2", "sid"])
def test_a_whole_step_of_a_method_runs_on_our_kernels(method: str, make_config: Callable[..., Any], teacher: Any):
    from diffdistill.training.trainer import Trainer

    calls: list[int] = []
    launch = emulated()

    def counted(*arguments: Any) -> None:
        calls.append(1)
        launch(*arguments)

    network = "model.network={name: unet, channels: [8, 32], attention: [false, true], head_channels: 32}"
    source = Trainer(make_config("pretrain", network, "train.steps=1"), quiet=True).run()
    config = make_config(method, f"teacher={source}", "train.steps=2", "train.precision=bf16", "health=null")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), use_attention("cuda"):
        warnings.simplefilter("ignore")
        patch.setattr(ops, "launcher", lambda: counted)
        trainer = Trainer(config, quiet=True)
        trainer.run()
    assert calls
    assert all(bool(p.isfinite().all()) for p in trainer.players.generator.parameters())


def test_the_references_memory_grows_linearly_in_the_length():
    peaks = []
    for length in (512, 1024, 2048):
        q, k, v, tq, tk, tv = (torch.zeros(1, 1, length, 8) for _ in range(6))

        def everything() -> None:
            out, lse = reference.forward(q, k, v, None, 1.0)  # noqa: B023
            reference.backward(out, q, k, v, out, lse, None, 1.0)  # noqa: B023
            reference.tangent(q, k, v, out, lse, tq, tk, tv, None, 1.0)  # noqa: B023

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "SCORES", 2**17)
            peaks.append(_largest_tensor(everything))
    assert peaks == [2**17, 2**17, 2**17]


def _largest_tensor(function: Callable[[], Any]) -> int:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, Tensor):
                    self.largest = max(self.largest, x.numel())
            return out

    with Sizes() as mode:
        function()
    return mode.largest


def test_what_is_constant_in_graphs_is_marked_as_torch_marks_it() -> None:
    def marked(mark: Any) -> dict[str, Any]:
        return vars(mark(lambda: 1))

    assert marked(backends.constant_in_graphs) == marked(torch.compiler.assume_constant_result)
