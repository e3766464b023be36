"""Negative prompts: cross-attention that steers away from a second text, in networks, in training and in sampling."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from PIL import Image
from support.emulated import emulated
from support.stand_ins import save_stand_in
from torch import Tensor, nn
from torch.func import jvp
from typer.testing import CliRunner

from diffdistill.attention import backends, entry, ops
from diffdistill.commands.cli import app
from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.path import VPDiscrete
from diffdistill.diffusion.prompt_table import PromptTable
from diffdistill.models.load import load_model
from diffdistill.models.negative_prompts import drawn_scale, guide_away, with_negative_prompt
from diffdistill.models.teachers.families.sd import StableDiffusionUNet
from diffdistill.networks import negative_prompts
from diffdistill.networks.negative_prompts import NegativePrompt, at_scale, steer_away, text_attention
from diffdistill.settings.schema import UserError
from diffdistill.training.config import find_config, load_config
from diffdistill.training.ema import EMA, EMAConfig
from diffdistill.training.trainer import Trainer

LENGTH, WIDTH = 5, 12
TEXT, NEGATIVE = torch.randn(2, 2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
T = torch.tensor([3.0, 500.0], dtype=torch.float64)
SCALE = 0.4


def unet(head_size: int = 8) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(2 * head_size, 4 * head_size),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,  # of heads: diffusers names it so
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).double()


def denoiser(head_size: int = 8) -> Denoiser:
    net = StableDiffusionUNet(unet(head_size), frozenset({"text"}))
    return Denoiser(net, VPDiscrete.from_scheduler({"beta_schedule": "linear"}), "eps")


def negative(scale: float = SCALE) -> NegativePrompt:
    return NegativePrompt(Cond(text=NEGATIVE[:1]), scale)


class ByThePaper:
    """Z+ - alpha Z-, every softmax written out.  other: the negative text [1, L', C], as the layer is given texts."""

    def __init__(self, other: Tensor, alpha: float, other_mask: Tensor | None = None) -> None:
        self.other, self.alpha, self.other_mask = other, alpha, other_mask

    def __call__(self, attn: Any, hidden_states: Tensor, text: Tensor | None = None, mask: Any = None, **_: Any) -> Any:
        q = attn.head_to_batch_dim(attn.to_q(hidden_states))

        def attended(context: Tensor, bias: Tensor | None) -> Tensor:
            k, v = (attn.head_to_batch_dim(layer(context)) for layer in (attn.to_k, attn.to_v))
            scores = q @ k.mT * attn.scale
            if bias is not None:
                scores = scores + bias.repeat_interleave(attn.heads, 0)
            return scores.softmax(-1) @ v

        towards = attended(text, mask)
        away = attended(self.other.expand(len(text), -1, -1), self.other_mask)
        return attn.to_out[0](attn.batch_to_head_dim(towards - self.alpha * away))


def by_the_paper(module: nn.Module, other: Tensor, alpha: float, other_mask: Tensor | None = None) -> nn.Module:
    changed = copy.deepcopy(module)
    for layer in text_attention(changed):
        processor = ByThePaper(other, alpha, other_mask)
        layer.set_processor(_Named(processor))
    return changed


class _Named:
    """diffusers calls a processor with the names of its arguments."""

    def __init__(self, inner: ByThePaper) -> None:
        self.inner = inner

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        **more: Any,
    ) -> Any:
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, **more)


def test_a_network_and_its_gradients_are_those_of_the_papers_formula() -> None:
    plain = denoiser()
    expected = by_the_paper(plain, NEGATIVE[:1], SCALE)
    steered = copy.deepcopy(plain)
    steer_away(steered, negative())
    outputs = [net(X, T, Cond(text=TEXT)) for net in (plain, expected, steered)]
    torch.testing.assert_close(outputs[2], outputs[1])
    assert not torch.allclose(outputs[2], outputs[0], rtol=1e-3)
    gradients = [
        torch.autograd.grad(out.square().sum(), list(net.parameters()), allow_unused=True)
        for net, out in ((expected, outputs[1]), (steered, outputs[2]))
    ]
    for right, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, right)


def test_masked_texts_are_steered_too() -> None:
    torch.manual_seed(0)
    net = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
        use_additional_conditions=False,
    ).double()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    other_mask = torch.tensor([[1, 1, 0, 0, 0]])

    def call(model: nn.Module, cond: Cond) -> Tensor:
        given = {"encoder_hidden_states": cond.text, "encoder_attention_mask": cond.text_mask}
        out: Tensor = model(X, timestep=torch.tensor([3, 500]), **given, return_dict=False)[0]
        return out

    cond, other = Cond(text=TEXT, text_mask=mask), Cond(text=NEGATIVE[:1], text_mask=other_mask)
    bias = (1 - other_mask[:, None].double()) * -10000.0
    expected = by_the_paper(net, net.caption_projection(NEGATIVE[:1]), SCALE, bias.expand(2, -1, -1))
    steered = Denoiser(net, VPDiscrete.from_scheduler({"beta_schedule": "linear"}), "eps")
    right = call(expected, cond)
    plain = call(net, cond)
    steer_away(steered, NegativePrompt(other, SCALE))
    found = call(net, NegativePrompt(other, SCALE).behind(cond))
    torch.testing.assert_close(found, right)
    assert not torch.allclose(found, plain, rtol=1e-3)


def test_a_scale_of_nothing_changes_nothing_and_steering_can_be_taken_back() -> None:
    net = denoiser()
    plain = net(X, T, Cond(text=TEXT))
    steer_away(net, negative(0.0))
    torch.testing.assert_close(net(X, T, Cond(text=TEXT)), plain)
    steer_away(net, negative())
    steer_away(net, None)
    assert torch.equal(net(X, T, Cond(text=TEXT)), plain)


def test_a_text_steered_away_from_itself_by_one_leaves_nothing() -> None:
    net = denoiser()
    seen: list[Tensor] = []
    for layer in text_attention(net):
        layer.to_out[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    steer_away(net, NegativePrompt(Cond(text=TEXT[:1]), 1.0))
    net(X[:1], T[:1], Cond(text=TEXT[:1]))
    assert len(seen) == len(text_attention(net)) > 0
    assert max(float(x.abs().max()) for x in seen) < 1e-12


def test_what_is_recomputed_has_the_same_gradients() -> None:
    net = denoiser().train()
    steer_away(net, negative())

    def gradients() -> list[Tensor]:
        out = net(X, T, Cond(text=TEXT))
        return list(torch.autograd.grad(out.square().sum(), list(net.parameters()), allow_unused=True))

    plain = gradients()
    net.net.model.enable_gradient_checkpointing()
    for found, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_call_with_one_text_is_as_ever() -> None:
    net = denoiser()
    plain = net(X, T, Cond(text=TEXT))
    steer_away(net, negative())
    net.run_with(negative=None)  # as another player whose network has these layers
    assert torch.equal(net(X, T, Cond(text=TEXT)), plain)


def test_copies_and_averages_steer_too() -> None:
    net = denoiser()
    steer_away(net, negative())
    expected = net(X, T, Cond(text=TEXT))
    for copied in (copy.deepcopy(net), EMA(net, EMAConfig()).module):
        assert torch.equal(copied(X, T, Cond(text=TEXT)), expected)


def test_guidance_the_tangent_and_compiled_blocks_go_with_it() -> None:
    net = denoiser().requires_grad_(False)
    steer_away(net, negative())
    cond, null = Cond(text=TEXT), Cond(text=torch.zeros_like(TEXT))
    both = [net(X, T, c) for c in (null, cond)]
    guided = net(X, T, cond, guidance=2.0, uncond=null)
    torch.testing.assert_close(guided, both[0] + 2 * (both[1] - both[0]))

    direction = torch.randn_like(X)
    moved = jvp(lambda x: net(x, T, cond), (X,), (direction,))[1]
    nearby = (net(X + 1e-5 * direction, T, cond) - net(X - 1e-5 * direction, T, cond)) / 2e-5
    torch.testing.assert_close(moved, nearby, rtol=1e-5, atol=1e-7)

    traced = []

    def note(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        traced.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    block = next(block for block in net.net.blocks if text_attention(block))
    block.compile(backend=note)
    torch.testing.assert_close(net(X, T, cond), both[1])
    assert len([name for name in traced if "scaled_dot_product" in name]) == len(text_attention(block))  # to itself


def test_the_compiler_is_imported_only_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compiler.disable` imports it."""
    asked: list[Any] = []
    monkeypatch.setattr(torch.compiler, "disable", lambda function: asked.append(function) or partial(function))
    monkeypatch.setattr(negative_prompts._Steered, "steer", staticmethod(negative_prompts._steered))
    net = denoiser()
    steer_away(net, negative())
    net(X, T, Cond(text=TEXT))
    assert not asked
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    net(X, T, Cond(text=TEXT))
    assert asked == [negative_prompts._steered]


def test_networks_without_cross_attention_and_texts_of_other_lengths_are_refused() -> None:
    joint = SD3Transformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=WIDTH,
        caption_projection_dim=16, pooled_projection_dim=10, in_channels=4, out_channels=4,
    )  # fmt: skip
    assert text_attention(joint) == []
    with pytest.raises(UserError, match="no cross-attention to text"):
        steer_away(Denoiser(joint, VPDiscrete.from_scheduler({"beta_schedule": "linear"}), "eps"), negative())
    net = denoiser()
    steer_away(net, negative())
    with pytest.raises(ValueError, match="has 5 tokens, the prompts have 4"):
        net(X, T, Cond(text=TEXT[:, :4]))


def test_a_processor_that_does_not_call_torchs_attention_is_named() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    net = denoiser()
    net.net.model.set_attn_processor(AttnProcessor())
    steer_away(net, negative())
    with pytest.raises(UserError, match="AttnProcessor does not call torch's attention"):
        net(X, T, Cond(text=TEXT))


def test_on_a_gpu_it_is_one_kernel_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "launcher", lambda: counted)
    for module in (backends, entry):
        monkeypatch.setattr(module, "no_kernels", lambda device: None)
    called: list[str] = []

    def counted(kernel: str, *rest: Any) -> None:
        called.append(kernel)
        emulated()(kernel, *rest)  # type: ignore[arg-type]

    net = denoiser(head_size=32)
    steer_away(net, negative())
    expected = net(X, T, Cond(text=TEXT))
    net.float().run_with(autocast=torch.bfloat16)
    found = net(X.float(), T, Cond(text=TEXT.float()))
    assert called == ["difference"] * len(text_attention(net))
    assert float((found - expected).norm() / expected.norm()) < 2e-2


# In training.


def test_within_a_step_the_scale_is_another_and_afterwards_the_usual_one() -> None:
    steered, other, cond = denoiser(), denoiser(), Cond(text=TEXT)
    steer_away(steered, negative())
    steer_away(other, negative(0.9))
    usual, expected = steered(X, T, cond), other(X, T, cond)
    with at_scale(steered, 0.9):
        assert torch.equal(steered(X, T, cond), expected)
    assert torch.equal(steered(X, T, cond), usual)
    assert not torch.equal(usual, expected)


def test_a_drawn_scale_is_one_for_a_step_and_even_over_its_range() -> None:
    steered = denoiser()
    steer_away(steered, negative())

    def found(step: int, amount: Any = (0.2, 0.6), seed: int = 0) -> float:
        with drawn_scale(steered, amount, seed=seed, step=step):
            scales = {layer.processor.scale for layer in text_attention(steered)}
        assert len(scales) == 1
        return float(scales.pop())

    drawn = torch.tensor([found(step) for step in range(200)])
    assert 0.2 <= float(drawn.min()) < 0.22
    assert 0.58 < float(drawn.max()) <= 0.6
    assert float(drawn.mean()) == pytest.approx(0.4, abs=0.03)  # its standard error is .008
    assert found(3) == found(3) != found(3, seed=1)
    assert found(0, 0.7) == SCALE  # a number is in the layers already


def test_a_teacher_is_guided_away_from_the_negative_prompt_and_who_shares_its_prompts_is_not() -> None:
    plain, student = denoiser(), denoiser()
    plain.net.has_null_condition = True
    plain.run_with(conditions=PromptTable([Cond(text=TEXT)], Cond(text=torch.zeros(1, LENGTH, WIDTH).double())))
    without = plain(X, T, Cond(label=torch.tensor([0, 1])), guidance=0.0)  # looked up before there is another
    teacher = copy.deepcopy(plain)
    steer_away(student, negative())
    guide_away(teacher, student)
    torch.testing.assert_close(plain(X, T, Cond(label=torch.tensor([0, 1])), guidance=0.0), without)
    cond, scales = Cond(label=torch.tensor([0, 1])), torch.tensor([3.0, 1.5], dtype=torch.float64)
    for_text, away = plain(X, T, cond), plain(X, T, Cond(text=NEGATIVE[:1].expand(2, -1, -1)))
    torch.testing.assert_close(
        teacher(X, T, cond, guidance=scales), away + scales.reshape(2, 1, 1, 1) * (for_text - away)
    )
    torch.testing.assert_close(teacher(X, T, cond), for_text)
    torch.testing.assert_close(plain(X, T, cond, guidance=0.0), plain(X, T, Cond(text=0 * TEXT)))
    assert len(teacher.conditions) == len(plain.conditions) == 2
    assert teacher.conditions.key != plain.conditions.key
    plain.net.has_null_condition = False
    with pytest.raises(UserError, match='negative_teacher: the teacher is not guided away from "no prompt"'):
        guide_away(plain, student)


# A whole pipeline: training and the command line.


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stand_in("sd", tmp_path_factory.mktemp("teacher") / "sd")


def test_a_negative_prompt_changes_samples_by_its_scale(teacher: Path) -> None:
    opened, cond = _prompts(teacher)
    model = load_model(teacher)
    noise = torch.randn(2, *model.spec.image_shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((2,), 500.0, dtype=torch.float64)
    plain = model.denoiser(noise, t, cond)
    changes = []
    for scale in (0.01, 0.02):
        steered = with_negative_prompt(model, "a blue bird", scale)
        assert (steered.spec.negative_prompt, steered.spec.negative_scale) == ("a blue bird", scale)
        changes.append(float((steered.denoiser(noise, t, cond) - plain).norm()))
    assert changes[1] / changes[0] == pytest.approx(2, rel=0.05)  # to first order
    assert opened.place == str(teacher)


def test_a_scale_alone_and_a_model_without_text_are_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a negative prompt"):
        with_negative_prompt(load_model(teacher), None, 0.3)
    with pytest.raises(UserError, match="a DiTPipeline has no cross-attention to text"):
        with_negative_prompt(load_model(save_stand_in("dit", tmp_path / "dit")), "blurry")


def test_a_student_trains_and_samples_away_from_its_negative_prompt(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("a red fox\ntwo birds\na hat\n")
    settings = (
        *(f"teacher={teacher}", f"data={{name: prompts, path: {tmp_path}/prompts.txt}}", "train.steps=2"),
        *("train.global_batch_size=4", "train.micro_batch_size=4", "train.device=cpu", "train.preview_every=0"),
    )
    runs = {}
    for name, more in (("plain", ()), ("away", ("negative_prompt=a blue bird", "negative_scale=0.6"))):
        config = load_config(find_config("sid/sd15"), [f"run={tmp_path / name}", *settings, *more])
        trainer = Trainer(config, quiet=True)
        players = trainer.players
        assert (players.generator.runtime.negative is not None) == (name == "away")
        assert players.teacher.runtime.negative is None
        assert players.fake.runtime.negative is None
        trainer.run()
        runs[name] = load_model(tmp_path / name, use_ema=False)
        noise, label = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1])
        t = torch.tensor([500.0], dtype=torch.float64)
        with torch.no_grad():
            expected = players.generator.eval()(noise, t, players.generator.resolve(Cond(label=label)))
            found = runs[name].denoiser(noise, t, players.generator.resolve(Cond(label=label)))
        torch.testing.assert_close(found, expected)  # what was trained is what is loaded, the prompt included
    assert runs["away"].spec.negative_prompt == "a blue bird"
    weights = [run.denoiser.state_dict() for run in runs.values()]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])  # another gradient


def test_a_drawn_scale_and_a_teacher_that_is_guided_away_train(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SNOOPI's NASA in training: the student by a scale of each step, the teacher by guidance, the fake score plain."""
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("a red fox\ntwo birds\na hat\n")
    settings = (
        *(f"teacher={teacher}", f"data={{name: prompts, path: {tmp_path}/prompts.txt}}", "train.steps=2"),
        *("train.global_batch_size=4", "train.micro_batch_size=2", "train.device=cpu", "train.preview_every=0"),
        *("negative_prompt=a blue bird", "negative_scale=[0.5, 1]", "negative_teacher=true", "method.gan_weight=0"),
        *("method.guidance=[0.5, 4]", "method.fake_guidance=same", "method.fake_updates=1", "health=null"),
    )
    config = load_config(find_config("dmd2/sd15"), [f"run={tmp_path / 'run'}", *settings])
    trainer, weights = Trainer(config, quiet=True), list[float]()

    def recorded(*given: Any, weight: float, **more: Any) -> Tensor:
        weights.append(weight)
        return entry.attention_difference(*given, weight=weight, **more)

    monkeypatch.setattr(negative_prompts, "attention_difference", recorded)
    players = trainer.players
    noise, label = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1])
    t, cond = torch.tensor([500.0], dtype=torch.float64), Cond(label=label)
    with torch.no_grad():
        away, plain = (player(noise, t, cond, guidance=0.0) for player in (players.teacher, players.fake))
    assert not torch.equal(away, plain)
    assert not weights  # neither is steered
    trainer.train_step()
    first = set(weights)
    weights.clear()
    trainer.train_step()
    assert len(first) == len(set(weights)) == 1  # in each of the step's micro-batches
    assert first != set(weights)
    assert all(0.5 <= weight <= 1 for weight in first.union(weights))
    trainer.save()
    assert load_model(tmp_path / "run").spec.negative_scale == 0.75


@pytest.mark.parametrize("scale", ["0", "0.5"])
def test_the_command_line_samples_away_from_a_negative_prompt(teacher: Path, tmp_path: Path, scale: str) -> None:
    def sampled(name: str, *more: str) -> bytes:
        file = tmp_path / name
        given = ["sample", str(teacher), "--count", "1", "--steps", "1", "--prompt", "a red fox", "--out", str(file)]
        result = CliRunner().invoke(app, [*given, *more])
        assert result.exit_code == 0, result.output
        return Image.open(file).tobytes()

    plain = sampled("plain.png")
    away = sampled("away.png", "--negative-prompt", "a blue bird", "--negative-scale", scale)
    assert (plain == away) == (scale == "0")


def _prompts(teacher: Path) -> tuple[Any, Cond]:
    from diffdistill.models.teachers import open_pipeline

    opened = open_pipeline(teacher)
    return opened, opened.encode(opened.load_encoder(), ["a red fox", "two birds"])
