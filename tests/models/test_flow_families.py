"""Families of flows in the manner of Flux: their VAEs, texts of many lengths, and what each does of its own."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from support.other_libraries import layout_of
from support.stand_ins import save_stand_in
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.guidance_rules import Renormalised
from diffdistill.diffusion.path import Flow
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.export.exportable import ExportKind, export_kind_of
from diffdistill.models.load import load_model
from diffdistill.models.teachers import Pipeline, find_family, open_pipeline
from diffdistill.models.teachers.families.flux2 import _mu
from diffdistill.models.teachers.packing import padded, texts_of, trimmed
from diffdistill.networks.negative_prompts import NegativePrompt, steer_away
from diffdistill.settings.schema import UserError

PROMPTS = ["a red fox", "two blue birds in a tree"]
FAMILIES = ("z_image", "qwen_image", "chroma", "flux2", "lumina2", "auraflow", "cogview4", "longcat_image")


@pytest.fixture(scope="module", params=FAMILIES)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return open_pipeline(save_stand_in(request.param, tmp_path_factory.mktemp(request.param)))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def call(pipeline: Any, opened: Pipeline, **more: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    size = dict(zip(("height", "width"), opened.image_size, strict=True))
    return pipeline(prompt=["a hat"], num_inference_steps=2, generator=seeded(1), **size, **more).images


def test_images_are_the_pipelines_own(opened: Pipeline) -> None:
    """Of the latents after its last step."""
    pipeline, last = diffusers.DiffusionPipeline.from_pretrained(opened.folder), []

    step = pipeline.scheduler.step

    def keep(*given: Any, **options: Any) -> Any:
        made = step(*given, **options)
        last.append(made[0].clone())
        return made

    pipeline.scheduler.step = keep
    theirs = call(pipeline, opened, output_type="pt")
    latents = layout_of(opened.family.name, opened.spec.image_shape).read(last[-1])
    ours = opened.family.to_images(opened.load_vae(), latents)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, atol=1e-6, rtol=0)
    assert theirs.std() > 1e-3


def test_latents_are_of_the_statistics_of_images(opened: Pipeline) -> None:
    """Latents of a sample of the posterior: its mean and deviation times a noise of the latents' shape, normalised as
    `to_images` undoes it."""
    vae, family = opened.load_vae(), opened.family
    images = torch.rand(2, 3, *opened.image_size, generator=seeded(2)) * 2 - 1
    eps = torch.randn(2, *opened.spec.image_shape, generator=seeded(3))
    mean, moved = family.to_latents(vae, images, torch.zeros_like(eps)), family.to_latents(vae, images, eps)
    assert mean.shape == eps.shape
    assert (moved - mean).abs().max() > 1e-3
    with torch.no_grad():
        expected = vae.decode(vae.encode(as_their_vae_takes(images, vae)).latent_dist.mean).sample
    torch.testing.assert_close(family.to_images(vae, mean), expected.reshape(images.shape), atol=1e-5, rtol=0)


def as_their_vae_takes(images: Tensor, vae: Any) -> Tensor:
    return images.unsqueeze(2) if "QwenImage" in type(vae).__name__ else images


def test_a_sample_sees_its_own_prompt_however_long_the_others_are(opened: Pipeline) -> None:
    teacher = load_model(opened.folder)
    teacher.denoiser.run_with(conditions=opened.conditions(PROMPTS))
    x = torch.randn(2, *opened.spec.image_shape, generator=seeded(1))
    t, label = torch.full((2,), 0.4, dtype=torch.float64), torch.arange(2)
    with torch.no_grad():
        found = teacher.denoiser(x, t, Cond(label=label))
        alone = teacher.denoiser(x[:1], t[:1], Cond(label=label[:1]))
        other = teacher.denoiser(x, t, Cond(label=label.flip(0)))
    torch.testing.assert_close(alone, found[:1], atol=1e-5, rtol=0)
    assert (other - found).abs().max() > 1e-4


def test_a_student_of_each_leaves_as_a_stock_folder_and_it_is_said_before_the_first_step(opened: Pipeline) -> None:
    spec = replace(opened.spec, sampler=FewSteps(init_ratio=5, init_noise="unit"))
    assert export_kind_of(spec) == ExportKind("stock")


def test_text_and_image_attend_jointly_so_that_no_negative_prompt_can_steer(opened: Pipeline) -> None:
    with pytest.raises(UserError, match="has no cross-attention to text"):
        steer_away(load_model(opened.folder).denoiser, NegativePrompt(Cond(), 0.3))


@pytest.mark.parametrize("tokens", [1024, 4096, 5000])
@pytest.mark.parametrize("steps", [4, 50])
def test_flux2s_shift_is_its_pipelines(tokens: int, steps: int) -> None:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    assert _mu(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-9)


def test_flux2s_path_has_the_shift_of_fifty_steps_at_its_own_size() -> None:
    options = {"in_channels": 128}
    path, _ = find_family("flux2").noise({"shift": 1.0, "use_dynamic_shifting": True}, options)
    assert path.shift == pytest.approx(math.exp(_mu(64 * 64, 50)))


def test_lumina2s_dynamic_shift_is_of_as_many_tokens_as_its_latents_have_channels() -> None:
    """As its pipeline counts them."""
    options = {"in_channels": 16, "sample_size": 128}
    path, _ = find_family("lumina2").noise({"shift": 1.0, "use_dynamic_shifting": True}, options)
    assert path.shift == pytest.approx(math.exp(0.5 + 0.65 * (16 - 256) / 3840))


def test_auraflow_is_taken_for_what_its_positions_allow_whatever_its_sample_size() -> None:
    family = find_family("auraflow")
    assert family.image_shape({"pos_embed_max_size": 9216, "sample_size": 64}) == (4, 128, 128)
    assert family.image_shape({"pos_embed_max_size": 1024, "sample_size": 64}) == (4, 64, 64)


def test_chromas_mask_is_added_to_attentions_scores(tmp_path: Path) -> None:
    """As diffusers does it, so that what the mask does not count is seen; and it is seen by blocks of one stream."""
    teacher = load_model(save_stand_in("chroma", tmp_path)).denoiser
    cond = open_pipeline(tmp_path).conditions(["a hat"]).rows(torch.tensor([0]))
    x, t = torch.randn(1, 4, 8, 8, generator=seeded(1)), torch.tensor([0.4], dtype=torch.float64)
    assert cond.text_mask is None  # by which a cache of counted tokens would drop what is seen
    count = int(cond.text_bias.sum())
    assert count == len("a hat") + 3  # a space before it, its end, and the first token behind
    moved = replace(cond, text=torch.where(cond.text_bias[..., None] == 1, cond.text, cond.text + 1))
    with torch.no_grad():
        plain = teacher(x, t, cond)
        assert (teacher(x, t, moved) - plain).abs().max() > 1e-4
        assert (teacher(x, t, replace(cond, text_bias=torch.ones_like(cond.text_bias))) - plain).abs().max() > 1e-5


def test_texts_of_many_lengths_are_one_table() -> None:
    texts = [torch.randn(length, 3, generator=seeded(length)) for length in (2, 5, 1)]
    cond = padded(texts, 8)
    assert cond.text.shape == (3, 8, 3)
    assert cond.text_mask.sum(1).tolist() == [2, 5, 1]
    assert all(torch.equal(a, b) for a, b in zip(texts_of(cond), texts, strict=True))
    text, mask = trimmed(cond)
    assert text.shape == (3, 5, 3)
    assert torch.equal(text[mask], torch.cat(texts))


def test_prompts_without_a_token_are_the_same_alone_and_beside_others(tmp_path: Path) -> None:
    """Lumina 2's empty prompt has no token where its tokenizer adds none: guidance's second call is of these alone."""
    opened = open_pipeline(save_stand_in("lumina2", tmp_path))
    teacher = load_model(opened.folder).denoiser
    both = opened.conditions(["a hat", "a red fox"]).rows(torch.arange(2))
    assert both.text_mask is not None
    both = replace(both, text_mask=both.text_mask * torch.tensor([[1], [0]]))
    alone = replace(both, text_mask=0 * both.text_mask)
    x, t = torch.randn(2, *opened.spec.image_shape, generator=seeded(1)), torch.full((2,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(teacher(x, t, alone)[1], teacher(x, t, both)[1], rtol=0, atol=1e-5)


def test_qwen_images_guidance_keeps_the_norm_of_each_token(tmp_path: Path) -> None:
    teacher = load_model(save_stand_in("qwen_image", tmp_path))
    assert teacher.spec.model.guidance_rule == Renormalised(over="patch")


def test_cogview4s_network_is_told_the_time_before_the_shift() -> None:
    """A shift grows with the root of the number of tokens, and what a network is told does not know it."""
    scheduler = {"shift": 1.0, "use_dynamic_shifting": True, "time_shift_type": "linear"}
    scheduler |= {"base_shift": 0.25, "max_shift": 0.75}
    path, _ = find_family("cogview4").noise(scheduler, {"in_channels": 16})
    assert path.shift == pytest.approx(0.25 + 0.75 * 4)
    t = torch.tensor([0.5, 0.25], dtype=torch.float64)
    assert path.time_input(t).tolist() == [500, 250]
    assert torch.equal(path.time_of_input(path.time_input(t)), t)
    assert path.sigma(t)[0] == pytest.approx(3.25 / 4.25)
    assert FewSteps(init_ratio=5, later_ratios=(1,)).times(path).tolist() == [0.606, 0.235]  # whole thousandths


def test_a_prompt_of_cogview4_is_as_it_is_alone_whatever_the_others_are(tmp_path: Path) -> None:
    opened = open_pipeline(save_stand_in("cogview4", tmp_path))
    pipeline = diffusers.CogView4Pipeline.from_pretrained(tmp_path)
    prompts = ["a red fox", "two blue birds in a tree", "a hat"]
    found = opened.conditions(prompts).rows(torch.arange(3))
    assert found.text_mask.sum(1).tolist() == [16, 32, 16]
    for text, prompt in zip(texts_of(found), prompts, strict=True):
        expected, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        torch.testing.assert_close(text[None], expected, atol=1e-5, rtol=0)
    assert found.size.tolist() == [[16, 16, 0, 0, 16, 16]] * 3


@pytest.mark.parametrize("length", [1000, 833])
@pytest.mark.parametrize("count", [1, 2, 4, 50, 100, 124])
def test_cogview4s_steps_of_a_number_are_its_pipelines(count: int, length: int) -> None:
    told = find_family("cogview4").told_steps({"num_inference_steps": count}, length)
    assert told["timesteps"] == np.linspace(length, 1, count).astype(np.int64).tolist()
    assert told["sigmas"] == [time / length for time in told["timesteps"]]


@pytest.mark.parametrize("ratios", [(999, 2.99, 0.998, 0.333), (3247, 9.75, 3.25, 1.083)])
def test_whole_thousandths_of_the_time_hardly_move_the_recipes_levels(
    ratios: tuple[float, ...],
) -> None:
    """At 1024 pixels. A student is trained at the rounded level, and exported with it."""
    path = Flow(shift=3.25, network_time="time")
    asked = path.time_of_ratio(torch.tensor(ratios, dtype=torch.float64))
    times = FewSteps(init_ratio=ratios[0], later_ratios=ratios[1:]).times(path)
    assert torch.equal(times, (1000 * times).round() / 1000)
    assert float((path.sigma(times) - path.sigma(asked)).abs().max()) < 1.5e-4
