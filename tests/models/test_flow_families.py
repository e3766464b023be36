"""Families of flows in the manner of Flux: their VAEs, texts of many lengths, and what each does of its own."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from support.other_libraries import layout_of
from support.stand_ins import save_stand_in
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.guidance_rules import Renormalised
from diffdistill.models.load import load_model
from diffdistill.models.teachers import Pipeline, open_pipeline
from diffdistill.models.teachers.packing import padded, texts_of, trimmed

PROMPTS = ["a red fox", "two blue birds in a tree"]
FAMILIES = ("z_image", "qwen_image", "chroma", "flux2", "lumina2", "auraflow")


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

    def keep(_: Any, __: int, ___: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        last.append(given["latents"].clone())
        return given

    theirs = call(pipeline, opened, output_type="pt", callback_on_step_end=keep)
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


def test_texts_of_many_lengths_are_one_table() -> None:
    texts = [torch.randn(length, 3, generator=seeded(length)) for length in (2, 5, 1)]
    cond = padded(texts, 8)
    assert cond.text.shape == (3, 8, 3)
    assert cond.text_mask.sum(1).tolist() == [2, 5, 1]
    assert all(torch.equal(a, b) for a, b in zip(texts_of(cond), texts, strict=True))
    text, mask = trimmed(cond)
    assert text.shape == (3, 5, 3)
    assert torch.equal(text[mask], torch.cat(texts))


def test_qwen_images_guidance_keeps_the_norm_of_each_token(tmp_path: Path) -> None:
    teacher = load_model(save_stand_in("qwen_image", tmp_path))
    assert teacher.spec.model.guidance_rule == Renormalised(over="patch")
