"""Rewards that see pixels and read prompts, in runs over a pipeline of latents: the preference models, small."""

import json
from pathlib import Path

import pytest
import torch
from conftest import small_config
from PIL import Image
from support.stand_ins import save_stand_in
from support.tiny_preference import Judges, write_judges

from diffdistill.diffusion.cond import Cond
from diffdistill.distillation.preferences import preference
from diffdistill.distillation.rewards import Feedback, find_reward, reward_of
from diffdistill.eval.features import judges as ours
from diffdistill.eval.features.extractors import LaionAesthetic
from diffdistill.models.encoders import encode_prompts, encoder_of
from diffdistill.models.load import load_model
from diffdistill.models.teachers import open_pipeline
from diffdistill.settings.schema import UserError
from diffdistill.training.assembly import assemble
from diffdistill.training.memory.prediction import plan_memory, rehearse
from diffdistill.training.plan import plan
from diffdistill.training.trainer import Trainer

PROMPTS = ["a red fox", "two blue birds", "three dogs"]


@pytest.fixture
def judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judges:
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    for name in ("PICKSCORE", "HPS", "LAION_AESTHETIC"):
        monkeypatch.setattr(getattr(ours, name), "_loaded", None)
    made = write_judges(tmp_path, monkeypatch)
    monkeypatch.setattr(ours.LAION_AESTHETIC, "features", LaionAesthetic(head_sha256=made.head_sha256))
    return made


@pytest.mark.parametrize("name", ["pickscore", "hps", "laion_aesthetic"])
def test_a_judge_sees_the_decoded_latents_and_the_prompt_of_each_sample(
    judges: Judges, tmp_path: Path, name: str
) -> None:
    pipeline = open_pipeline(save_stand_in("sd", tmp_path / "sd"))
    teacher = pipeline.load_denoiser()
    encoder = encoder_of(pipeline.spec)
    assert encoder is not None
    teacher.run_with(conditions=encode_prompts(encoder, PROMPTS, root=tmp_path / "cache"))
    vae = pipeline.load_vae()
    teacher.run_with(decode=lambda latents: pipeline.family.to_images(vae, latents))
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    missing = Feedback(reward=name, threshold=1e3, weight=2.0).loss(
        latents, Cond(label=torch.tensor([2, 0, 3])), teacher
    )
    judge = find_reward(name)
    images = pipeline.family.to_images(vae, latents)
    assert images.shape == (3, 3, 16, 16)
    scores = judge(images, ["three dogs", "a red fox", ""])  # type: ignore[call-arg, arg-type]
    torch.testing.assert_close(missing, 2 * (1e3 - scores).mean())
    (gradient,) = torch.autograd.grad(missing, latents)
    (wanted,) = torch.autograd.grad(-2 * scores.mean(), latents)
    torch.testing.assert_close(gradient, wanted)
    assert float(gradient.abs().max()) > 0
    other = judge(images.detach(), ["two blue birds"] * 3)  # type: ignore[call-arg, arg-type]
    assert torch.allclose(other, scores) == (name == "laion_aesthetic")
    assert all(weight.grad is None for weight in vae.parameters())


def test_scores_and_preferences_of_judges_are_the_same_under_autocast(judges: Judges, tmp_path: Path) -> None:
    pipeline = open_pipeline(save_stand_in("sd", tmp_path / "sd"))
    teacher = pipeline.load_denoiser()
    encoder, vae = encoder_of(pipeline.spec), pipeline.load_vae()
    assert encoder is not None
    table = encode_prompts(encoder, PROMPTS, root=tmp_path / "cache")
    teacher.run_with(conditions=table, decode=lambda latents: pipeline.family.to_images(vae, latents))
    first, change = torch.randn(2, 8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    second, cond = first + 1e-3 * change, Cond(label=torch.arange(8) % 3)

    def found(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        scores = reward_of(name, first, cond, teacher)
        assert scores.dtype == torch.float32
        return scores, preference(name, first, second, cond, teacher)

    for name in ("pickscore", "hps", "laion_aesthetic"):
        with torch.autocast("cpu", torch.bfloat16):
            inside = found(name)
        for half, full in zip(inside, found(name), strict=True):
            assert torch.equal(half, full)
        assert bool(inside[1].all())  # no ties
        assert torch.isfinite(reward_of(name, first.bfloat16(), cond, teacher)).all()


def test_a_run_learns_from_a_judge_and_is_saved_without_it(judges: Judges, tmp_path: Path) -> None:
    save_stand_in("sd", tmp_path / "sd")
    (tmp_path / "captioned").mkdir()
    for number, prompt in enumerate(PROMPTS):
        Image.new("RGB", (16, 16), (80 * number, 10, 200)).save(tmp_path / "captioned" / f"{number}.png")
        (tmp_path / "captioned" / f"{number}.txt").write_text(prompt)
    data = json.dumps({"name": "captioned_images", "path": str(tmp_path / "captioned")})
    tiny = ("train.steps=2", "train.global_batch_size=2", "train.micro_batch_size=null", "train.log_every=1")
    students = {}
    for weight in (0, 1):
        feedback = f"method.feedback=[{{reward: hps, threshold: 10, weight: {weight}}}]"
        run = tmp_path / f"run{weight}"
        config = small_config("hyper_sd", run, f"data={data}", *tiny, feedback, teacher=tmp_path / "sd")
        if weight:
            made = assemble(plan(config, resume=None))
            expected, counted = plan_memory(made.plan, made.iteration), rehearse(made)
            assert {"VAE", "hps"} <= expected.players.keys()
            bytes_of = [{name: found.weights for name, found in one.players.items()} for one in (expected, counted)]
            assert bytes_of[0] == bytes_of[1]
            assert expected.players["hps"].weights > expected.players["VAE"].weights > 0
        Trainer(config, quiet=True).run()
        students[weight] = load_model(run).denoiser.state_dict()
        missing = [json.loads(line)["generator/hps"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert all(9 * weight <= value <= 11 * weight for value in missing)  # a cosine is missing to ten
    assert any(not torch.equal(students[0][name], students[1][name]) for name in students[0])
    assert students[0].keys() == open_pipeline(tmp_path / "sd").load_denoiser().state_dict().keys()


def test_a_teacher_without_prompts_is_refused_at_once(judges: Judges, tmp_path: Path) -> None:
    teacher = open_pipeline(save_stand_in("ddpm", tmp_path / "ddpm")).load_denoiser()
    with pytest.raises(UserError, match="'pickscore' needs prompts, and the teacher takes none"):
        Feedback(reward="pickscore", threshold=1.0).check(teacher)
    Feedback(reward="laion_aesthetic", threshold=1.0).check(teacher)
    with pytest.raises(UserError, match="'laion_aesthetic' needs a teacher"):
        Feedback(reward="laion_aesthetic", threshold=1.0).check(None)
    with pytest.raises(UserError, match="1 or 3 channels, not 4"):
        Feedback(reward="laion_aesthetic", threshold=1.0).loss(torch.zeros(1, 4, 8, 8), Cond(), teacher)


def test_missing_weights_are_named_before_training(judges: Judges, tmp_path: Path) -> None:
    pipeline = open_pipeline(save_stand_in("sd", tmp_path / "sd"))
    teacher = pipeline.load_denoiser()
    teacher.run_with(conditions=pipeline.conditions(PROMPTS))
    with pytest.raises(UserError, match="needs prompts"):
        Feedback(reward="hps", threshold=1.0).check(teacher)  # a table whose words nobody kept
    judges.files["hps-v2.1"].unlink()
    encoder = encoder_of(pipeline.spec)
    assert encoder is not None
    teacher.run_with(conditions=encode_prompts(encoder, PROMPTS, root=tmp_path / "cache"))
    with pytest.raises(UserError, match=r"HPS_v2\.1_compressed\.pt"):
        Feedback(reward="hps", threshold=1.0).check(teacher)
