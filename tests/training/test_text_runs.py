"""Runs on prompts: encoded once, encoders gone from memory, images only where a method needs them, and bit for bit."""

import gc
import io
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_config
from PIL import Image
from support.stand_ins import save_sentence_encoder, save_stand_in
from torch import Tensor, nn

from diffdistill.data.source import LatentImages, NoImages
from diffdistill.diffusion.cond import Cond
from diffdistill.models import encoders
from diffdistill.models.load import load_model
from diffdistill.models.teachers import Pipeline, open_pipeline
from diffdistill.settings.schema import UserError
from diffdistill.training import plan as plan_module
from diffdistill.training.config import RunConfig
from diffdistill.training.reports import distance
from diffdistill.training.trainer import Trainer

PROMPTS = ["a red fox", "two blue birds", "three dogs"]
TINY = ("train.steps=2", "train.global_batch_size=2", "train.micro_batch_size=null", "health.every=1")
FLAT = "method.steps={init_ratio: 10}"
DATA_FREE = ("method.gan_weight=0", FLAT)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, prompts.txt, and images with captions of the pipeline's size."""
    root = tmp_path_factory.mktemp("text")
    save_stand_in("sd", root / "sd")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    (root / "images").mkdir()
    for number, prompt in enumerate(PROMPTS):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "PNG")
        (root / "images" / f"{number}.png").write_bytes(content.getvalue())
        (root / "images" / f"{number}.txt").write_text(prompt)
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config(method: str, shared: Path, run: Path, data: str, *more: str) -> RunConfig:
    place = {"prompts": "prompts.txt", "captioned_images": "images"}[data]
    named = f"data={json.dumps({'name': data, 'path': str(shared / place)})}"
    return small_config(method, run, named, *TINY, *more, teacher=shared / "sd")


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, module in trainer.trained.items()
        for key, value in module.state_dict().items()
    }


def fail(*_: object, **__: object) -> None:
    raise AssertionError("loaded")


def test_prompts_alone_train_a_method_that_needs_no_images(shared: Path, tmp_path: Path) -> None:
    trainer = Trainer(config("dmd2", shared, tmp_path / "run", "prompts", *DATA_FREE), quiet=True)
    before = weights(trainer)
    trainer.run()
    assert isinstance(trainer.plan.source, NoImages)
    assert trainer.problem.num_classes == 3
    after = weights(trainer)
    # The generator moves from its third iteration on: the fake score begins as the teacher.
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("fake"))
    student = load_model(tmp_path / "run")
    assert (student.spec.pipeline, student.spec.num_classes) == (str(shared / "sd"), 0)


def test_a_forgotten_prompt_is_another_for_the_teacher_alone(shared: Path, tmp_path: Path) -> None:
    """A prompt is a class by its number: every sample is of the second here, which becomes the first."""
    base = ("method.base.gan_weight=0", "method.base.steps={init_ratio: 10}")
    forget = ("method.forgotten=[1]", "method.becomes=0", "method.share=1", "health=null")
    trainer = Trainer(config("forget", shared, tmp_path / "run", "prompts", *base, *forget), quiet=True)
    told: dict[str, list[Tensor]] = {"teacher": [], "fake": [], "generator": []}
    for name, seen in told.items():
        denoiser = trainer.players[name]
        denoiser.net.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[2].text))
    trainer.train_step()
    table = trainer.players.teacher.conditions
    first, second = table.rows(torch.tensor([0, 1])).text
    assert not torch.equal(first, second)
    for name, wanted in (("teacher", first), ("fake", second), ("generator", second)):
        assert told[name], name
        assert all(torch.equal(text, wanted.expand_as(text)) for text in told[name]), name


def test_the_distance_to_a_teacher_that_takes_text_is_of_the_run_s_own_prompts(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SHARE", 1e9), ("MOST", 4), ("FEWEST", 4)):
        monkeypatch.setattr(distance, name, value)
    asked: list[Tensor] = []
    cond_of = distance.Sampling._cond

    def noted(self: distance.Sampling, index: Tensor) -> Cond:
        cond = cond_of(self, index)
        assert cond.label is not None
        asked.append(cond.label)
        return cond

    monkeypatch.setattr(distance.Sampling, "_cond", noted)
    Trainer(
        config("dmd2", shared, tmp_path / "run", "prompts", *DATA_FREE, "health.distance_every=1", "train.log_every=1"),
        quiet=True,
    ).run()
    assert torch.cat(asked[:2]).tolist() == [0, 1, 2, 0]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["health/teacher_distance"] > 0 for line in lines)


def test_a_resumed_run_on_prompts_is_the_same_bit_for_bit(shared: Path, tmp_path: Path) -> None:
    whole = Trainer(config("dmd2", shared, tmp_path / "whole", "prompts", *DATA_FREE), quiet=True)
    whole.run()
    Trainer(config("dmd2", shared, tmp_path / "parts", "prompts", *DATA_FREE, "train.steps=1"), quiet=True).run()
    rest = Trainer(config("dmd2", shared, tmp_path / "parts", "prompts", *DATA_FREE), quiet=True, resume=True)
    rest.run()
    expected, found = weights(whole), weights(rest)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_resumed_run_refuses_other_prompts(shared: Path, tmp_path: Path) -> None:
    Trainer(config("sim", shared, tmp_path / "run", "prompts", FLAT, "train.steps=1"), quiet=True).run()
    (tmp_path / "others.txt").write_text("\n".join(PROMPTS[::-1]))
    again = config("sim", shared, tmp_path / "run", "prompts", FLAT, f"data.path={tmp_path / 'others.txt'}")
    with pytest.raises(UserError, match="differ from those at the start of the run"):
        Trainer(again, quiet=True, resume=True)


def test_captioned_images_become_latents_of_the_teacher_s_vae(shared: Path, tmp_path: Path) -> None:
    trainer = Trainer(config("dmd2", shared, tmp_path / "run", "captioned_images", FLAT), quiet=True)
    assert isinstance(trainer.plan.source, LatentImages)
    assert trainer.plan.source.image_shape == (4, 8, 8)
    assert trainer.plan.source.labels is not None
    assert trainer.plan.source.labels.tolist() == [0, 1, 2]
    pipeline = open_pipeline(shared / "sd")
    pixels = np.stack([np.asarray(Image.open(shared / "images" / f"{number}.png")) for number in range(3)])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    vae = pipeline.load_vae()
    with torch.no_grad():
        mean, more = (pipeline.family.to_latents(vae, images, torch.full((3, 4, 8, 8), eps)) for eps in (0.0, 1.0))
    # One sample of the posterior: so many deviations from its mean, the noise of the image's number.
    eps = (trainer.plan.source.rows(torch.arange(3)) - mean) / (more - mean)
    expected = encoders.StepRandom(encoders.LATENT_SEED, 0, torch.arange(3)).normal("latents", (4, 8, 8))
    torch.testing.assert_close(eps, expected, rtol=0, atol=1e-2)
    trainer.run()


def test_a_second_run_loads_neither_text_encoder_nor_vae(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Trainer(config("dmd2", shared, tmp_path / "a", "captioned_images", FLAT), quiet=True)
    monkeypatch.setattr(Pipeline, "load_encoder", fail)
    monkeypatch.setattr(Pipeline, "load_vae", fail)
    second = Trainer(config("dmd2", shared, tmp_path / "b", "captioned_images", FLAT), quiet=True)
    assert torch.equal(first.plan.source.rows(torch.arange(3)), second.plan.source.rows(torch.arange(3)))
    conditions = [trainer.plan.teacher.denoiser.conditions for trainer in (first, second) if trainer.plan.teacher]
    texts = [found.rows(torch.arange(4)).text for found in conditions if found]
    assert torch.equal(*texts)


def test_encoders_have_left_memory_before_the_networks_come(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[nn.Module]] = []

    def watched(load: Callable[..., Any]) -> Callable[..., Any]:
        def loads(pipeline: Pipeline, *arguments: Any, **named: Any) -> Any:
            made = load(pipeline, *arguments, **named)
            parts = made.components.values() if hasattr(made, "components") else [made]
            seen.extend(weakref.ref(part) for part in parts if isinstance(part, nn.Module))
            return made

        return loads

    def checked(*arguments: Any) -> Any:
        gc.collect()
        assert len(seen) == 2
        assert all(reference() is None for reference in seen), "an encoder is still there"
        return load_teacher(*arguments)

    load_teacher = plan_module.load_teacher
    monkeypatch.setattr(Pipeline, "load_encoder", watched(Pipeline.load_encoder))
    monkeypatch.setattr(Pipeline, "load_vae", watched(Pipeline.load_vae))
    monkeypatch.setattr("diffdistill.training.plan.load_teacher", checked)
    Trainer(config("dmd2", shared, tmp_path / "run", "captioned_images", FLAT), quiet=True)


@pytest.mark.parametrize(
    ("method", "data", "more", "said"),
    [
        ("dmd2", "prompts", (FLAT,), "data: dmd2 needs real images with these settings; prompts has only prompts"),
        ("hyper_sd", "prompts", (), "data: hyper_sd needs real images"),
        (
            "sim",
            "prompts",
            (FLAT, "data={name: digits}"),
            "the model takes prompts, and digits has none; choose prompts",
        ),
        ("dmd2", "captioned_images", (FLAT, "data.resolution=8"), r"data.resolution = 8: .* images of \[16, 16\]"),
        ("sim", "prompts", (FLAT, "text_encoder=somewhere"), "text_encoder: is the teacher's; leave it out"),
    ],
)
def test_a_missing_input_is_said_before_any_work_starts(
    method: str,
    data: str,
    more: tuple[str, ...],
    said: str,
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("load_encoder", "load_vae", "load_denoiser"):
        monkeypatch.setattr(Pipeline, name, fail)
    with pytest.raises(UserError, match=said):
        Trainer(config(method, shared, tmp_path / "run", data, *more), quiet=True)
    assert not (tmp_path / "run").exists()


def test_prompts_for_a_teacher_without_text_are_refused(quick_teacher: Path, shared: Path, tmp_path: Path) -> None:
    data = f"data={json.dumps({'name': 'prompts', 'path': str(shared / 'prompts.txt')})}"
    with pytest.raises(UserError, match="prompts has only prompts, and the model takes none"):
        Trainer(small_config("sim", tmp_path / "run", data, teacher=quick_teacher), quiet=True)


def test_captions_are_no_classes_for_a_model_without_text(
    shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = f"data={json.dumps({'name': 'captioned_images', 'path': str(shared / 'images'), 'resolution': 8})}"
    trainer = Trainer(small_config("pretrain", tmp_path / "run", data), quiet=True)
    assert (trainer.plan.source.num_classes, trainer.plan.source.labels, trainer.plan.spec.num_classes) == (0, None, 0)
    assert "the captions of captioned_images are not used" in " ".join(capfd.readouterr().err.split())


def test_a_network_of_our_own_learns_from_sentences_and_is_distilled(shared: Path, tmp_path: Path) -> None:
    encoder = save_sentence_encoder(tmp_path / "encoder")
    data = f"data={json.dumps({'name': 'captioned_images', 'path': str(shared / 'images'), 'resolution': 8})}"
    network = "model.network={name: unet, channels: [8, 16], text_width: 16}"
    own = small_config("pretrain", tmp_path / "teacher", data, *TINY, network, f"text_encoder={encoder}")
    pooling = encoder / "1_Pooling" / "config.json"
    pooling.parent.mkdir()
    pooling.write_text('{"pooling_mode_cls_token": true}')
    with pytest.raises(UserError, match="pools by cls_token"):
        Trainer(own, quiet=True)
    pooling.write_text('{"pooling_mode_mean_tokens": true}')
    Trainer(own, quiet=True).run()
    teacher = load_model(tmp_path / "teacher")
    assert (teacher.spec.text_encoder, teacher.spec.num_classes) == (str(encoder), 0)
    assert teacher.denoiser.net.has_null_condition
    prompts = f"data={json.dumps({'name': 'prompts', 'path': str(shared / 'prompts.txt')})}"
    student = small_config(
        "dmd2", tmp_path / "run", prompts, *TINY, *DATA_FREE, "method.guidance=2", teacher=tmp_path / "teacher"
    )
    Trainer(student, quiet=True).run()
    assert load_model(tmp_path / "run").spec.text_encoder == str(encoder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "model.network={name: unet, channels: [8, 16], text_width: 8}",
            "text_width = 8: text_encoder has width 16",
        ),
        ("text_encoder=null", "the model takes none|text_width = 16: needs a text_encoder"),
    ],
)
def test_a_network_and_a_text_encoder_that_do_not_fit_are_refused(
    change: str, said: str, shared: Path, tmp_path: Path
) -> None:
    encoder = save_sentence_encoder(tmp_path / "encoder")
    data = f"data={json.dumps({'name': 'captioned_images', 'path': str(shared / 'images'), 'resolution': 8})}"
    network = "model.network={name: unet, channels: [8, 16], text_width: 16}"
    with pytest.raises(UserError, match=said):
        Trainer(
            small_config("pretrain", tmp_path / "run", data, network, f"text_encoder={encoder}", change), quiet=True
        )
