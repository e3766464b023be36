"""Diffusers pipelines as teachers: the same numbers as the pipeline's own network and scheduler."""

import inspect
import io
import json
import math
import struct
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from support.other_libraries import assert_steps_agree, layout_of, watched_steps
from support.stand_ins import STAND_INS, save_stand_in
from support.tiny_parts import LENGTH
from torch import Tensor

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.denoiser import Denoiser, freeze
from diffdistill.diffusion.guidance_rules import Rescaled
from diffdistill.diffusion.prompt_table import PromptTable
from diffdistill.models.load import load_model
from diffdistill.models.spec import ModelSpec
from diffdistill.models.teachers import Pipeline, find_family, open_pipeline
from diffdistill.networks.discriminator import make_head
from diffdistill.networks.lora import LoRASettings, merge_lora, with_lora
from diffdistill.networks.recompute import set_recompute
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import dump, validate
from diffdistill.training.speed.options import SpeedConfig, apply_speed

PROMPTS = ["a red fox", "two blue birds"]
RELATIVE = 2e-5  # of a step's greatest x0


@pytest.fixture(scope="module", params=STAND_INS)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stand_in(request.param, tmp_path_factory.mktemp(request.param))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def numbered(place: Path) -> PromptTable | None:
    """Two prompts by number, for a family that takes text."""
    opened = open_pipeline(place)
    return opened.conditions(PROMPTS) if opened.family.takes_text else None


def middle(denoiser: Denoiser, count: int = 2) -> Tensor:
    """A time in the middle of the path's, for each of `count` samples."""
    return torch.full((count,), (denoiser.path.t_min + denoiser.path.t_max) / 3, dtype=torch.float64)


def asked(opened: Pipeline) -> dict[str, Any]:
    """What makes a family's pipeline run three steps on two samples."""
    call = {"num_inference_steps": 3, "generator": seeded(1), **opened.family.call(opened.image_size)}
    if opened.family.takes_text:
        return call | {"prompt": list(PROMPTS), "output_type": "latent"}  # which Z-Image's changes
    return call | ({"class_labels": [3, 998]} if opened.spec.num_classes else {"batch_size": 2})


def guided(w: float) -> dict[str, Any]:
    """How most pipelines are told the guidance scale w."""
    return {"guidance_scale": w}


GUIDED = {
    "z_image": lambda w: {"guidance_scale": w - 1},
    "qwen_image": lambda w: {"true_cfg_scale": w, "negative_prompt": [" "] * 2},
    "longcat_image": lambda w: {"guidance_scale": w, "negative_prompt": [""] * 2},
}
"""And how others are."""


def assert_pipeline_agrees(place: Path, w: float, call: dict[str, Any] | None = None, **options: Any) -> float:
    """Every step of diffusers' own run at this scale is ours.  call: more arguments of it.  options: of loading it.

    Returns the greatest relative difference.
    """
    teacher, opened = load_model(place), open_pipeline(place)
    cond = Cond(label=torch.tensor([3, 998])) if teacher.spec.num_classes else NO_COND
    if opened.family.takes_text:
        teacher.denoiser.run_with(conditions=numbered(place))
        cond = teacher.denoiser.class_cond(torch.arange(2))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(place, **options)
    guidance = GUIDED.get(opened.family.name, guided)(w) if cond.parts() else {}
    steps = watched_steps(pipeline, **asked(opened) | guidance | (call or {}))
    layout = layout_of(opened.family.name, opened.spec.image_shape)
    return assert_steps_agree(teacher.denoiser, steps, cond, guidance=w, layout=layout)


@pytest.mark.parametrize("w", [1.0, 3.5])
def test_every_step_of_the_pipeline_is_ours(place: Path, w: float) -> None:
    if w != 1 and open_pipeline(place).family.name == "ddpm":  # which knows no condition
        denoiser = load_model(place).denoiser
        with pytest.raises(ValueError, match="guidance: this network was trained without dropping its condition"):
            denoiser(torch.zeros(1, 3, 8, 8), middle(denoiser, 1), guidance=w)
        return
    difference = assert_pipeline_agrees(place, w)
    print(f"{place.name}, guidance {w:g}: {difference:.1e}")
    assert difference < RELATIVE


@pytest.mark.parametrize("w", [1.0, 3.5])
def test_sdxl_is_guided_by_the_rule_that_its_folder_names(w: float, tmp_path: Path) -> None:
    place = save_stand_in("sdxl", tmp_path)
    index = json.loads((place / "model_index.json").read_text())
    (place / "model_index.json").write_text(json.dumps(index | {"guidance_rescale": 0.7}))
    assert load_model(place).spec.model.guidance_rule == Rescaled(share=0.7)
    assert_pipeline_agrees(place, w, {"guidance_rescale": 0.7})


@pytest.mark.parametrize("w", [1.0, 3.5])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_network_that_was_distilled_for_its_guidance_is_told_it(family: str, w: float, tmp_path: Path) -> None:
    """LCM's take w by `time_cond_proj_dim`; without it they are other networks."""
    place = save_stand_in(family, tmp_path, time_cond_proj_dim=33)
    assert_pipeline_agrees(place, w)
    told = load_model(place).denoiser
    assert told.takes_guidance
    assert not told.net.has_null_condition


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_student_of_such_a_network_is_exported_as_one_that_is_told_one(family: str, tmp_path: Path) -> None:
    place = save_stand_in(family, tmp_path, time_cond_proj_dim=33)
    opened, told = open_pipeline(place), load_model(place).denoiser
    told.run_with(conditions=numbered(place))
    cond = told.class_cond(torch.arange(2))
    plain = Denoiser(opened.family.wrap(opened.family.stock_network(told.net.model), 0, 0.0), told.path, told.predicts)
    plain.run_with(conditions=numbered(place))
    assert plain.net.model.config.time_cond_proj_dim is None
    x = torch.randn(2, 4, 8, 8, generator=seeded(0))
    torch.testing.assert_close(plain(x, middle(told), cond), told(x, middle(told), cond), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(told(x, middle(told), cond, guidance=3.5), told(x, middle(told), cond), atol=1e-3)


def test_a_share_beyond_one_is_refused(tmp_path: Path) -> None:
    place = save_stand_in("sdxl", tmp_path)
    index = json.loads((place / "model_index.json").read_text())
    (place / "model_index.json").write_text(json.dumps(index | {"guidance_rescale": 1.5}))
    with pytest.raises(UserError, match=r"guidance_rescale: 1 fault\s+share = 1\.5"):
        open_pipeline(place).spec  # noqa: B018


@pytest.mark.parametrize("w", [1.0, 3.5])
def test_pixart_for_1024_pixels_is_told_the_images_size(w: float, tmp_path: Path) -> None:
    assert_pipeline_agrees(save_stand_in("pixart", tmp_path, has_sizes=True), w)
    height, width = numbered(tmp_path).rows(torch.tensor([0])).size[0]
    assert (int(height), int(width)) == open_pipeline(tmp_path).image_size


def test_sd3_without_its_t5_has_zeros_in_its_place(tmp_path: Path) -> None:
    save_stand_in("sd3", tmp_path, has_t5=False)
    assert_pipeline_agrees(tmp_path, 3.5, text_encoder_3=None, tokenizer_3=None)
    assert not numbered(tmp_path).rows(torch.tensor([0])).text[:, LENGTH:].any()


def test_flux_without_a_guidance_input_knows_no_guidance(tmp_path: Path) -> None:
    assert_pipeline_agrees(save_stand_in("flux", tmp_path, guidance_embeds=False), 1.0)
    denoiser = load_model(tmp_path).denoiser
    denoiser.run_with(conditions=numbered(tmp_path))
    with pytest.raises(ValueError, match="guidance: this network was trained without dropping its condition"):
        denoiser(torch.zeros(1, 4, 8, 8), middle(denoiser, 1), denoiser.class_cond(torch.tensor([0])), guidance=2.0)


def test_flux_is_told_its_guidance_in_one_call(tmp_path: Path) -> None:
    denoiser = load_model(save_stand_in("flux", tmp_path)).denoiser
    denoiser.run_with(conditions=numbered(tmp_path))
    x, cond, calls = torch.randn(1, 4, 8, 8, generator=seeded(1)), denoiser.class_cond(torch.tensor([0])), []
    handle = denoiser.net.model.register_forward_hook(lambda *call: calls.append(call))
    plain, guided = (denoiser(x, middle(denoiser, 1), cond, guidance=w) for w in (1.0, 3.5))
    handle.remove()
    assert len(calls) == 2
    assert (plain - guided).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({"shift": 3.0}, 3.0),
        ({"shift": 1.0, "use_dynamic_shifting": True}, math.exp(0.5 + 0.65 * (16 - 256) / 3840)),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear", "max_shift": 0.5}, 0.5),
    ],
)
def test_a_flows_shift_is_its_schedulers(scheduler: dict[str, Any], expected: float, tmp_path: Path) -> None:
    """What is even in the path's time is what the scheduler makes of even times."""
    path = load_model(save_stand_in("sd3", tmp_path, **scheduler)).denoiser.path
    assert path.shift == pytest.approx(expected, rel=1e-12)
    pipeline = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    even = [0.9, 0.5, 0.1]
    pipeline.set_timesteps(sigmas=even, mu=expected if "time_shift_type" in scheduler else math.log(expected))
    torch.testing.assert_close(path.sigma(torch.tensor(even)).float(), pipeline.sigmas[:-1], atol=1e-6, rtol=0)


def test_sanas_prompts_stand_behind_the_pipelines_instruction_and_the_empty_one_alone(tmp_path: Path) -> None:
    opened = open_pipeline(save_stand_in("sana", tmp_path))
    pipeline = diffusers.SanaPipeline.from_pretrained(tmp_path)
    found, empty = opened.conditions(["a red fox"]).rows(torch.arange(2)), pipeline.encode_prompt("", False)[0]
    plain = pipeline.encode_prompt("a red fox", False)[0]
    assert (found.text[:1] - plain).abs().max() > 0.1
    torch.testing.assert_close(found.text[1:], empty, atol=1e-5, rtol=0)


def test_pixart_of_before_its_class_had_a_name_is_read(tmp_path: Path) -> None:
    expected = load_model(save_stand_in("pixart", tmp_path)).denoiser.state_dict()
    for file in (tmp_path / "model_index.json", tmp_path / "transformer" / "config.json"):
        file.write_text(file.read_text().replace("PixArtTransformer2DModel", "Transformer2DModel"))
    found = load_model(tmp_path).denoiser.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_text_behind_the_mask_does_not_count(tmp_path: Path) -> None:
    denoiser = load_model(save_stand_in("pixart", tmp_path)).denoiser
    cond, x = numbered(tmp_path).rows(torch.arange(2)), torch.randn(2, 4, 8, 8, generator=seeded(1))
    changed = replace(cond, text=torch.where(cond.text_mask[..., None] == 1, cond.text, 5.0))
    expected = denoiser(x, middle(denoiser), cond)
    torch.testing.assert_close(denoiser(x, middle(denoiser), changed), expected, atol=1e-6, rtol=0)
    assert (denoiser(x, middle(denoiser), replace(cond, text=-cond.text)) - expected).abs().max() > 1e-3


def test_a_network_says_whether_its_shapes_change_with_the_prompts(place: Path) -> None:
    """CUDA graphs are of one shape: what its blocks see of one token and of all of them."""
    denoiser, table = load_model(place).denoiser, numbered(place)
    if table is None or (cond := table.rows(torch.arange(2))).text_mask is None:
        assert not denoiser.net.cuts_text
        return
    seen: list[set[tuple[int, ...]]] = []
    for block in denoiser.net.blocks:
        block.register_forward_pre_hook(
            lambda _, given, named: seen[-1].update(t.shape for t in (*given, *named.values()) if torch.is_tensor(t)),
            with_kwargs=True,
        )
    x = torch.randn(2, *open_pipeline(place).spec.image_shape, generator=seeded(1))
    for count in (1, cond.text_mask.shape[1]):
        mask = (torch.arange(cond.text_mask.shape[1]) < count).to(cond.text_mask).expand_as(cond.text_mask)
        seen.append(set())
        denoiser(x, middle(denoiser), replace(cond, text_mask=mask))
    assert denoiser.net.cuts_text == (seen[0] != seen[1])


def test_v_predictions_are_read(tmp_path: Path) -> None:
    save_stand_in("sd", tmp_path, prediction_type="v_prediction")
    assert load_model(tmp_path).denoiser.predicts == "v"
    assert_pipeline_agrees(tmp_path, 2.0)


@pytest.mark.parametrize("w", [1.0, 3.5])
def test_networks_on_a_schedule_that_ends_without_signal_are_read(w: float, tmp_path: Path) -> None:
    """Its first step is at the last index, with what diffusers' Euler keeps of the signal."""
    place = save_stand_in("sd", tmp_path, prediction_type="v_prediction")
    pipe = diffusers.DiffusionPipeline.from_pretrained(place)
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "steps_offset": 0}
    scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, **settings)
    scheduler.save_pretrained(place / "scheduler")
    index = json.loads((place / "model_index.json").read_text())
    (place / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}))
    teacher, opened = load_model(place).denoiser, open_pipeline(place)
    assert teacher.path.t_max == 999
    teacher.run_with(conditions=numbered(place))
    loaded = diffusers.DiffusionPipeline.from_pretrained(place)
    steps = watched_steps(loaded, **asked(opened) | {"guidance_scale": w})
    assert steps[0].time == 999
    cond = teacher.class_cond(torch.arange(2))
    for step, ratio in zip(steps, loaded.scheduler.sigmas.double(), strict=False):
        t = torch.full((2,), step.time, dtype=torch.float64)
        x = (step.x.double() / (1 + ratio**2).sqrt()).float()  # Euler's x is in units of the signal
        x0 = teacher(x, t, cond, guidance=w)
        expected = teacher.path.to_x0(step.output, "v", x, t)
        torch.testing.assert_close(x0, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_networks_in_edms_preconditioning_are_read(kind: str, tmp_path: Path) -> None:
    """As playground-v2.5's: each x0 is what the scheduler makes of the network's output."""
    place = save_stand_in("sdxl", tmp_path)
    made = getattr(diffusers, kind)(sigma_data=0.6, sigma_max=50.0)
    made.save_pretrained(place / "scheduler")
    index = json.loads((place / "model_index.json").read_text())
    (place / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", kind]}))
    teacher, opened = load_model(place), open_pipeline(place)
    assert (teacher.spec.model.predicts, teacher.spec.model.sigma_data) == ("edm", 0.6)
    assert (teacher.denoiser.path.t_min, teacher.denoiser.path.t_max) == (0.002, 50.0)
    teacher.denoiser.run_with(conditions=numbered(place))
    loaded = diffusers.DiffusionPipeline.from_pretrained(place)
    for step in watched_steps(loaded, **asked(opened) | {"guidance_scale": 1.0}):
        sigma = torch.full((2,), math.exp(4 * step.time), dtype=torch.float64)
        x0 = teacher.denoiser(step.x, sigma, teacher.denoiser.class_cond(torch.arange(2)))
        expected = made.precondition_outputs(step.x, step.output, float(sigma[0]))
        torch.testing.assert_close(x0, expected.float(), atol=1e-3, rtol=1e-4)


def test_a_model_is_built_again_from_its_description_alone(place: Path) -> None:
    teacher = load_model(place)
    spec = validate(ModelSpec, json.loads(json.dumps(dump(teacher.spec))), origin="state.json")
    assert spec == teacher.spec
    again = spec.build()
    again.load_state_dict(teacher.denoiser.state_dict())
    freeze(again)
    for denoiser in (teacher.denoiser, again):
        denoiser.run_with(conditions=numbered(place))
    x, t = torch.randn(2, *spec.image_shape, generator=seeded(1)), middle(again)
    cond = again.class_cond(torch.tensor([1, 0]))
    assert torch.equal(again(x, t, cond), teacher.denoiser(x, t, cond))


UNET = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2}
REAL: dict[str, tuple[dict[str, Any], list[int], float]] = {
    "dit": (
        {"sample_size": 32, "in_channels": 4, "out_channels": 8, "num_layers": 28, "attention_head_dim": 72},
        [4, 32, 32],
        0.750,  # the paper's 0.675, and an embedder for every block
    ),
    "sd": (
        UNET | {"sample_size": 64, "cross_attention_dim": 768, "block_out_channels": [320, 640, 1280, 1280]},
        [4, 64, 64],
        0.860,
    ),
    "sdxl": (
        UNET
        | {"sample_size": 128, "cross_attention_dim": 2048, "block_out_channels": [320, 640, 1280]}
        | {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]}
        | {"up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]}
        | {
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
        }
        | {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816},
        [4, 128, 128],
        2.567,
    ),
    "pixart": ({"sample_size": 128, "in_channels": 4, "caption_channels": 4096}, [4, 128, 128], 0.611),
    "sd3": (
        {"sample_size": 128, "in_channels": 16, "num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 192}
        | {"caption_projection_dim": 1536},
        [16, 128, 128],
        2.028,
    ),
    "flux": ({"in_channels": 64, "guidance_embeds": True}, [16, 128, 128], 11.90),
    "sana": ({"sample_size": 32, "in_channels": 32}, [32, 32, 32], 1.604),
    "z_image": ({}, [16, 128, 128], 6.155),
    "qwen_image": ({}, [16, 128, 128], 20.43),
    "chroma": ({}, [16, 128, 128], 8.900),
    "flux2": (
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
        | {"guidance_embeds": False},
        [128, 64, 64],
        3.876,
    ),
    "lumina2": ({"cap_feat_dim": 2304}, [16, 128, 128], 2.610),
    "auraflow": ({"pos_embed_max_size": 9216}, [4, 128, 128], 6.859),
    "cogview4": (
        {"num_layers": 28, "attention_head_dim": 128, "num_attention_heads": 32},
        [16, 128, 128],
        6.369,
    ),
    "longcat_image": ({"num_layers": 10, "num_single_layers": 20}, [16, 128, 128], 6.271),
}
"""What matters of a real network's config.json, what it denoises, and its parameters in thousands of millions."""


@pytest.mark.full
@pytest.mark.parametrize("name", REAL)
def test_real_networks_have_their_size(name: str) -> None:
    options, shape, size = REAL[name]
    family = find_family(name)
    assert list(family.image_shape(options)) == shape
    with init_empty_weights():
        net = family.build(options, family.image_shape(options), family.num_classes(options), family.class_dropout)
    assert sum(p.numel() for p in net.parameters()) / 1e9 == pytest.approx(size, rel=2e-3)


def test_the_tap_is_a_map_and_stops_there(place: Path) -> None:
    denoiser = load_model(place).denoiser
    denoiser.run_with(conditions=numbered(place))
    shape = open_pipeline(place).spec.image_shape
    x, t = torch.randn(2, *shape, generator=seeded(2)), middle(denoiser)
    cond = denoiser.class_cond(torch.tensor([0, 1]))
    x0, features = denoiser.with_features(x, t, cond)
    assert torch.equal(features, denoiser.features(x, t, cond))
    assert torch.equal(x0, denoiser(x, t, cond))
    assert make_head(denoiser, shape)(features).shape == (2,)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_every_block_can_be_tapped(place: Path, is_compiled: bool) -> None:
    denoiser = load_model(place).denoiser
    denoiser.run_with(conditions=numbered(place))
    net, shape = denoiser.net, open_pipeline(place).spec.image_shape
    x, t = torch.randn(2, *shape, generator=seeded(2)), middle(denoiser)
    cond = denoiser.class_cond(torch.tensor([0, 1]))
    seen: dict[int, Any] = {}
    handles = [
        block.register_forward_hook(lambda _, __, output, i=i: seen.update({i: output}))
        for i, block in enumerate(net.blocks)
    ]
    x0 = denoiser(x, t, cond)
    for handle in handles:
        handle.remove()
    if is_compiled:
        apply_speed(SpeedConfig(compile="eager"), {"generator": denoiser}, {})
        assert torch.allclose(denoiser(x, t, cond), x0, atol=1e-5)
    taps = tuple(range(len(net.blocks)))
    again, tapped = denoiser.with_features(x, t, cond, taps=taps)
    assert torch.equal(again, x0)
    for number, feature in enumerate(tapped):
        assert torch.equal(feature, net.read_tap(seen[number], x, denoiser.resolve(cond)))
    assert make_head(denoiser, shape, taps)(tapped).shape == (2,)
    name = next(name for name, module in net.model.named_modules() if module is net.blocks[0])
    first, second = denoiser.features(x, t, cond, taps=("middle", name))
    assert torch.equal(first, denoiser.features(x, t, cond))
    assert torch.equal(second, tapped[0])
    last = len(taps)
    published = 57 if open_pipeline(place).family.name == "flux" else 60
    numbers = (last * 30 // published, last * 45 // published)
    wanted = (taps[net.blocks.index(net.model.mid_block)],) if hasattr(net.model, "mid_block") else numbers
    listed = denoiser.features(x, t, cond, taps="fastgen")
    assert len(listed) == len(set(wanted))
    assert all(torch.equal(found, tapped[number]) for found, number in zip(listed, dict.fromkeys(wanted), strict=True))
    assert not any(block._forward_hooks for block in net.blocks)


def test_flux_s_blocks_of_fastgen_are_the_published_ones() -> None:
    """Of FLUX.1's 57 blocks 30 and 45."""
    with init_empty_weights():
        model = diffusers.FluxTransformer2DModel(
            num_layers=19, num_single_layers=38, num_attention_heads=1, attention_head_dim=16
        )
    assert find_family("flux").wrap(model, 0, 0.0).fastgen_taps == (30, 45)


@pytest.mark.parametrize("want", ["x0", "features", "both"])
def test_recomputed_activations_have_the_same_gradients(place: Path, want: Any) -> None:
    found = {}
    for is_on in (False, True):
        denoiser = load_model(place).denoiser.requires_grad_(True)
        denoiser.run_with(conditions=numbered(place))
        assert set_recompute(denoiser.train(), is_on)
        x = torch.randn(2, *open_pipeline(place).spec.image_shape, generator=seeded(2)).requires_grad_()
        ask = {"x0": denoiser, "features": denoiser.features, "both": denoiser.with_features}[want]
        given = ask(x, middle(denoiser), denoiser.class_cond(torch.tensor([0, 1])))
        sum(part.square().sum() for part in (given if isinstance(given, tuple) else (given,))).backward()
        grads = {name: p.grad for name, p in denoiser.named_parameters() if p.grad is not None}
        found[is_on] = {"x": x.grad, **grads}
    assert found[True].keys() == found[False].keys()
    for name, gradient in found[False].items():
        assert torch.equal(found[True][name], gradient), name


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_factors_start_as_the_network_and_merge_into_it(place: Path, targets: Any) -> None:
    denoiser, shape = load_model(place).denoiser, open_pipeline(place).spec.image_shape
    denoiser.run_with(conditions=numbered(place))
    x, cond = torch.randn(2, *shape, generator=seeded(2)), denoiser.class_cond(torch.tensor([0, 1]))
    player = with_lora(denoiser, LoRASettings(rank=2, targets=targets))
    t, before = middle(denoiser), denoiser(x, middle(denoiser), cond)
    assert torch.equal(player(x, t, cond), before)
    for parameter in player.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=seeded(3))
    changed = player(x, t, cond)
    assert (changed - before).abs().max() > 1e-4
    torch.testing.assert_close(merge_lora(player)(x, t, cond), changed, atol=1e-4, rtol=1e-4)
    assert torch.equal(denoiser(x, t, cond), before)


def test_dit_drops_no_labels_of_its_own_in_training(tmp_path: Path) -> None:
    denoiser = load_model(save_stand_in("dit", tmp_path)).denoiser
    x, t = torch.randn(64, 4, 8, 8, generator=seeded(3)), torch.full((64,), 321.0, dtype=torch.float64)
    cond = Cond(label=torch.arange(64))
    torch.testing.assert_close(denoiser.train()(x, t, cond), denoiser.eval()(x, t, cond), atol=1e-6, rtol=0)


def test_latents_are_the_pipelines_own(place: Path) -> None:
    opened = open_pipeline(place)
    if opened.family.name == "ddpm":
        with pytest.raises(UserError, match="has no VAE"):
            opened.load_vae()
        return
    if opened.class_of("vae") not in ("AutoencoderKL", "AutoencoderDC"):  # see test_flow_families
        return
    vae, latents = opened.load_vae(), torch.randn(2, *opened.spec.image_shape, generator=seeded(4))
    images = opened.family.to_images(vae, latents)
    assert images.shape == (2, 3, *opened.image_size)
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    theirs = vae.decode(latents / vae.config.scaling_factor + shift).sample
    torch.testing.assert_close(images, theirs, atol=5e-6, rtol=0)
    found, raw = opened.family.to_latents(vae, images, torch.zeros_like(latents)), vae.encode(images)
    mean = raw.latent if opened.family.name == "sana" else raw.latent_dist.mean
    torch.testing.assert_close(found, (mean - shift) * vae.config.scaling_factor, atol=1e-6, rtol=0)


def test_latents_of_a_vae_that_names_its_statistics(tmp_path: Path) -> None:
    opened = open_pipeline(save_stand_in("sdxl", tmp_path))
    vae, latents = opened.load_vae(), torch.randn(2, 4, 8, 8, generator=seeded(4))
    mean, std = torch.tensor([0.1, -2, 3, 0.5]), torch.tensor([1.5, 0.5, 2, 1])
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    raw = latents * std[:, None, None] / vae.config.scaling_factor + mean[:, None, None]  # as in the pipeline
    torch.testing.assert_close(opened.family.to_images(vae, latents), vae.decode(raw).sample, atol=1e-6, rtol=0)
    images = opened.family.to_images(vae, latents)
    expected = vae.encode(images).latent_dist.mean - mean[:, None, None]
    expected = expected * vae.config.scaling_factor / std[:, None, None]
    found = opened.family.to_latents(vae, images, torch.zeros_like(latents))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_without_prompts_a_text_network_says_what_it_needs(tmp_path: Path) -> None:
    denoiser = load_model(save_stand_in("sdxl", tmp_path)).denoiser
    with pytest.raises(ValueError, match="needs pooled_text, size, text"):
        denoiser(torch.zeros(1, 4, 8, 8), torch.ones(1, dtype=torch.float64))


def make_sentencepiece(folder: Path) -> Any:
    """Put a T5's vocabulary there as sentencepiece writes it, and nothing else."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    for file in folder.iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()
    written, settings = io.BytesIO(), {"vocab_size": 30, "hard_vocab_limit": False, "minloglevel": 2}
    numbers = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    SentencePieceTrainer.train(sentence_iterator=iter(PROMPTS * 20), model_writer=written, **settings, **numbers)
    (folder / "spiece.model").write_bytes(written.getvalue())
    return SentencePieceProcessor(model_proto=written.getvalue())


def test_a_vocabulary_of_sentencepiece_alone_is_read(tmp_path: Path) -> None:
    theirs = make_sentencepiece(save_stand_in("pixart", tmp_path) / "tokenizer")
    found = open_pipeline(tmp_path).load_encoder().tokenizer("a red fox").input_ids
    assert found == [*theirs.encode("a red fox"), 1]
    assert 2 not in found


def test_a_tokenizer_without_its_vocabulary_is_refused(tmp_path: Path) -> None:
    """transformers would make one that knows no word."""
    (save_stand_in("pixart", tmp_path) / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer: holds no vocabulary"):
        open_pipeline(tmp_path).conditions(PROMPTS)


def test_without_sentencepiece_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_sentencepiece(save_stand_in("pixart", tmp_path) / "tokenizer")
    monkeypatch.setattr("diffdistill.models.teachers.text_encoders.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tokenizer: reading a sentencepiece model needs .*\[hf\]"):
        open_pipeline(tmp_path).conditions(PROMPTS)


def test_text_encoders_in_half_precision_are_read_where_there_are_no_others(tmp_path: Path) -> None:
    folder = save_stand_in("sd", tmp_path) / "text_encoder"
    before = open_pipeline(tmp_path).conditions(PROMPTS).shards[0].text
    weights = {name: weight.half() for name, weight in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.fp16.safetensors", {"format": "pt"})
    after = open_pipeline(tmp_path).conditions(PROMPTS).shards[0].text
    assert after.dtype == torch.float32
    torch.testing.assert_close(after, before, atol=1e-2, rtol=0)


def test_a_pipelines_call_takes_what_an_exported_student_is_called_with(place: Path) -> None:
    opened = open_pipeline(place)
    kind = getattr(diffusers, opened.family.stock_pipeline or str(opened.index["_class_name"]))
    taken = inspect.signature(kind.__call__).parameters
    assert {opened.family.steps_argument, *opened.family.call(opened.image_size)} <= taken.keys()


def test_half_precision_weights_are_read_where_there_are_no_others(tmp_path: Path) -> None:
    folder = save_stand_in("sd", tmp_path) / "unet"
    before = load_model(tmp_path).denoiser.state_dict()
    weights = {name: weight.half() for name, weight in load_file(folder / WEIGHTS).items()}
    (folder / WEIGHTS).unlink()
    save_file(weights, folder / "diffusion_pytorch_model.fp16.safetensors")
    after = load_model(tmp_path).denoiser.state_dict()
    for name, weight in after.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, before[name].half().float())


HOSTILE = [
    ({"_class_name": "os.system"}, "_class_name = 'os.system': no family of teachers"),
    ({"_class_name": ["pipeline", "Mine"]}, r"_class_name = \['pipeline', 'Mine'\]: no family"),
    ({"_class_name": "KandinskyPipeline"}, "no family of teachers; choose from .*DDPMPipeline"),
    ({"unet": ["subprocess", "Popen"]}, "unet: names subprocess.Popen, which is not loaded"),
    ({"unet": ["diffusers", "UNet2DModel"]}, "unet: names diffusers.UNet2DModel, which is not loaded"),
    ({"text_encoder": ["planted", "CLIPTextModel"]}, "text_encoder: names planted.CLIPTextModel"),
    ({"tokenizer": ["transformers", "AutoTokenizer"]}, "tokenizer: names transformers.AutoTokenizer"),
    ({"vae": "AutoencoderKL"}, "vae = 'AutoencoderKL': must be a library and a class"),
    ({"unet": [None, None]}, "names no unet"),
]


@pytest.mark.parametrize(("change", "said"), HOSTILE)
def test_a_foreign_class_in_model_index_is_refused_by_name(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    index = save_stand_in("sd", tmp_path) / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(UserError, match=said):
        load_model(tmp_path)


def test_a_part_that_no_family_loads_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_stand_in("sd", tmp_path / "pipeline")
    index = folder / "model_index.json"
    change = {"safety_checker": ["planted", "Checker"], "image_encoder": ["planted", "Encoder"]}
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    (tmp_path / "planted.py").write_text("raise SystemExit('the planted module ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    opened = open_pipeline(folder)
    assert len(opened.conditions(PROMPTS)) == 2
    assert opened.load_denoiser().num_classes == 0
    assert opened.load_vae() is not None


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("model_index.json", "{", "model_index.json: cannot be read"),
        ("model_index.json", "[]", "model_index.json: must be a JSON object"),
        ("unet/config.json", '{"_class_name": "Evil"}', "config.json: _class_name = 'Evil'"),
        ("unet/config.json", '{"_class_name": "UNet2DConditionModel", "sample_size": "x"}', "must be whole numbers"),
        (
            "scheduler/scheduler_config.json",
            '{"_class_name": "FlowMatchEulerDiscreteScheduler"}',
            "no schedule of betas",
        ),
        ("scheduler/scheduler_config.json", '{"beta_schedule": "linear", "beta_start": "x"}', "scheduler_config.json"),
        (
            "scheduler/scheduler_config.json",
            '{"beta_schedule": "linear", "prediction_type": "flow"}',
            "choose from eps",
        ),
    ],
)
def test_damaged_configs_are_refused_by_file(file: str, text: str, said: str, tmp_path: Path) -> None:
    (save_stand_in("sd", tmp_path) / file).write_text(text)
    with pytest.raises(UserError, match=said):
        load_model(tmp_path)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    file = save_stand_in("sd", tmp_path) / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gguf"}}))
    with pytest.raises(UserError, match="quantised weights are not supported"):
        load_model(tmp_path)


WEIGHTS = "diffusion_pytorch_model.safetensors"


def rewrite_header(file: Path, change: Any) -> None:
    """Change a safetensors file's header and leave its numbers as they are."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    new = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + size :])


def outside(header: dict[str, Any]) -> None:
    header[a_matrix(header)]["data_offsets"] = [0, 10**12]


def another_shape(header: dict[str, Any]) -> None:
    entry = header[a_matrix(header)]
    entry["shape"] = [2 * entry["shape"][0], entry["shape"][1] // 2, *entry["shape"][2:]]


def another_name(header: dict[str, Any]) -> None:
    header["planted"] = header.pop(a_matrix(header))


def a_matrix(header: dict[str, Any]) -> str:
    """A tensor that is no vector, of an even number of columns."""
    return next(
        name for name, entry in header.items() if len(entry.get("shape", ())) > 1 and entry["shape"][1] % 2 == 0
    )


LYING = {"ddpm": "unet/diffusion_pytorch_model", "sd": "text_encoder/model", "dit": "vae/diffusion_pytorch_model"}
"""A part with weights, by family."""


def load_all(place: Path) -> None:
    opened = open_pipeline(place)
    opened.load_denoiser()
    if opened.class_of("vae"):
        opened.load_vae()
    if opened.family.takes_text:
        opened.load_encoder()


@pytest.mark.parametrize("lie", [outside, another_shape, another_name])
@pytest.mark.parametrize("family", LYING)
def test_a_lying_safetensors_header_is_refused(family: str, lie: Any, tmp_path: Path) -> None:
    file = save_stand_in(family, tmp_path) / f"{LYING[family]}.safetensors"
    load_all(tmp_path)
    rewrite_header(file, lie)
    with pytest.raises(UserError, match=file.parent.name):
        load_all(tmp_path)


@pytest.mark.parametrize("family", LYING)
def test_a_header_longer_than_its_file_is_refused(family: str, tmp_path: Path) -> None:
    file = save_stand_in(family, tmp_path) / f"{LYING[family]}.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:])
    with pytest.raises(UserError, match=f"{file.parent.name}: cannot be read"):
        load_all(tmp_path)


@pytest.mark.parametrize("family", LYING)
def test_pickled_weights_are_not_read(family: str, tmp_path: Path) -> None:
    file = save_stand_in(family, tmp_path) / f"{LYING[family]}.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(UserError, match=f"{file.parent.name}: its weights are a pickle"):
        load_all(tmp_path)
