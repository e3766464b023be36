"""Teachers that are made of several files: the weights that diffusers itself would use, and refusals of the rest."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import small_config
from safetensors.torch import load_file, save_file
from support.single_file import save_ldm, save_loaded, save_lora, save_token
from support.stand_ins import WIDTH, save_stand_in
from torch import Tensor

from diffdistill.export.card import write_card
from diffdistill.export.lora_files import write_lora
from diffdistill.export.run import ExportOptions, write
from diffdistill.models.composed import ComposedTeacher, LoRAFile, TokenFile
from diffdistill.models.load import describe_model, load_model
from diffdistill.models.teachers import open_pipeline
from diffdistill.models.teachers.compose import compose, place_of, tell_made_of
from diffdistill.settings.schema import UserError
from diffdistill.training.trainer import Trainer

NEAR = 1e-5  # of float32, where diffusers adds factors at each call and the composed weights hold them
PROMPT = "a red fox"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stand_in("sd", tmp_path_factory.mktemp("base") / "sd")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@torch.no_grad()
def outputs(pipe: Any, prompt: str = PROMPT) -> tuple[Tensor, Tensor]:
    """The text and the UNet's output for it."""
    text = pipe.encode_prompt([prompt], "cpu", 1, False)[0]
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return text, pipe.unet(x, 500, text).sample


def differ(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> list[float]:
    return [float((one - other).abs().max()) for one, other in zip(a, b, strict=True)]


def test_several_loras_are_fused_as_diffusers_weighs_them(place: Path, tmp_path: Path) -> None:
    """In diffusers' keys and in kohya's, with a text encoder's; the teacher is told by it, and found again."""
    first = save_lora(tmp_path / "style.safetensors", place)
    second = save_lora(tmp_path / "person.safetensors", place, is_kohya=True, has_text=True, alpha=1.0)
    loras = (LoRAFile(place=str(first), weight=0.7), LoRAFile(place=str(second), weight=-0.5))
    made = compose(ComposedTeacher(name=str(place), lora=loras))
    expected = diffusers.DiffusionPipeline.from_pretrained(place)
    base = outputs(expected)
    for name, one in zip("ab", loras, strict=True):
        expected.load_lora_weights(one.place, adapter_name=name)
    expected.set_adapters(["a", "b"], [0.7, -0.5])
    found = outputs(diffusers.DiffusionPipeline.from_pretrained(made))
    assert max(differ(found, outputs(expected))) < NEAR
    assert min(differ(found, base)) > 0.1
    assert compose(ComposedTeacher(name=str(place), lora=loras)) == made
    assert compose(ComposedTeacher(name=str(place), lora=loras[:1])) != made
    assert open_pipeline(made).spec.pipeline == made
    told = tell_made_of(open_pipeline(made))
    both = "the LoRA `style.safetensors` with weight 0.7, the LoRA `person.safetensors` with weight -0.5"
    assert told == f"`{place}` with {both}"
    assert [len(one["sha256"]) for one in json.loads((Path(made) / "teacher.json").read_text())["lora"]] == [64, 64]
    assert (Path(made) / "vae/diffusion_pytorch_model.safetensors").samefile(
        place / "vae/diffusion_pytorch_model.safetensors"
    )


def test_a_lora_that_trained_in_pefts_own_layout_is_read(place: Path, tmp_path: Path) -> None:
    """A folder of `save_lora_weights`, named as such."""
    save_lora(tmp_path / "folder.safetensors", place)
    (tmp_path / "mine").mkdir()
    shutil.move(tmp_path / "folder.safetensors", tmp_path / "mine" / "pytorch_lora_weights.safetensors")
    made = compose(ComposedTeacher(name=str(place), lora=(LoRAFile(place=str(tmp_path / "mine")),)))
    assert tell_made_of(open_pipeline(made)) == f"`{place}` with the LoRA `mine` with weight 1"


def test_a_single_file_takes_the_networks_place_without_the_hub(place: Path, tmp_path: Path) -> None:
    unet = diffusers.UNet2DConditionModel.from_pretrained(place / "unet")
    file = save_ldm(unet, tmp_path / "mine.safetensors", change=0.01)
    made = Path(compose(ComposedTeacher(name=str(place), file=str(file))))
    found = load_file(made / "unet" / "diffusion_pytorch_model.safetensors")
    assert found.keys() == unet.state_dict().keys()
    assert all(torch.equal(found[name], weight + 0.01) for name, weight in unet.state_dict().items())
    assert (made / "text_encoder/model.safetensors").samefile(place / "text_encoder/model.safetensors")


def test_a_single_file_of_another_architecture_is_refused(place: Path, tmp_path: Path) -> None:
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=r"file: .*odd\.safetensors: "):
        compose(ComposedTeacher(name=str(place), file=str(tmp_path / "odd.safetensors")))


def test_prompts_may_hold_learned_tokens(place: Path, tmp_path: Path) -> None:
    file = save_token(tmp_path / "fox.safetensors", "<fox>", width=WIDTH, vectors=2)
    made = compose(ComposedTeacher(name=str(place), textual_inversion=(TokenFile(place=str(file)),)))
    expected = diffusers.DiffusionPipeline.from_pretrained(place)
    expected.load_textual_inversion(str(file))
    opened = open_pipeline(made)
    text = opened.conditions(["a red <fox>", "a red fox"]).rows(torch.tensor([0, 1])).text
    assert torch.equal(text[:1], expected.encode_prompt(["a red <fox>"], "cpu", 1, False)[0])
    assert not torch.allclose(text[0], text[1], atol=1e-2)


def test_sdxls_tokens_are_of_both_its_encoders(tmp_path: Path) -> None:
    place = save_stand_in("sdxl", tmp_path / "sdxl")
    file = save_token(tmp_path / "fox.safetensors", "clip_l", "clip_g", width=WIDTH, vectors=2)
    made = compose(ComposedTeacher(name=str(place), textual_inversion=(TokenFile(place=str(file), token="<fox>"),)))
    expected, vectors = diffusers.DiffusionPipeline.from_pretrained(place), load_file(file)
    for name, end in (("clip_l", ""), ("clip_g", "_2")):
        parts = {part: getattr(expected, f"{part}{end}") for part in ("text_encoder", "tokenizer")}
        expected.load_textual_inversion(vectors[name], token="<fox>", **parts)
    found = open_pipeline(made).conditions(["a red <fox>", "a red fox"]).rows(torch.tensor([0, 1]))
    text, _, pooled, _ = expected.encode_prompt("a red <fox>", do_classifier_free_guidance=False)
    torch.testing.assert_close(found.text[:1], text, atol=NEAR, rtol=0)
    torch.testing.assert_close(found.pooled_text[:1], pooled, atol=NEAR, rtol=0)
    moved = (found.text[0] - found.text[1]).abs().amax(0)
    assert min(float(moved[:WIDTH].max()), float(moved[WIDTH:].max())) > 1e-2  # of each encoder


def test_a_file_of_both_encoders_tokens_is_refused_by_a_pipeline_of_one(place: Path, tmp_path: Path) -> None:
    file = save_token(tmp_path / "fox.safetensors", "clip_l", "clip_g", width=WIDTH)
    tokens = (TokenFile(place=str(file), token="<fox>"),)
    refused(place, "fox.safetensors: clip_g: the pipeline has no encoder for it", textual_inversion=tokens)
    tokens = (TokenFile(place=str(save_token(tmp_path / "wide.safetensors", "clip_l", width=2 * WIDTH)), token="<w>"),)
    refused(place, "textual_inversion: ", textual_inversion=tokens)


@pytest.mark.parametrize("family", ["sd3", "flux", "cogview4"])
def test_a_lora_over_a_transformer_is_fused_as_diffusers_weighs_it(family: str, tmp_path: Path) -> None:
    place = save_stand_in(family, tmp_path / family)
    file = save_lora(tmp_path / "style.safetensors", place, network="transformer")
    made = compose(ComposedTeacher(name=str(place), lora=(LoRAFile(place=str(file), weight=0.7),)))
    pipe = diffusers.DiffusionPipeline.from_pretrained(place)
    base = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(str(file), adapter_name="a")
    pipe.set_adapters(["a"], [0.7])
    pipe.fuse_lora(adapter_names=["a"])
    pipe.unload_lora_weights()
    expected = pipe.transformer.state_dict()
    found = load_file(next((Path(made) / "transformer").glob("*.safetensors")))
    assert found.keys() == expected.keys()
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) < NEAR
    changed = {name for name in found if not torch.equal(found[name], base[name])}
    factors = {name.removeprefix("transformer.") for name in load_file(file) if "lora_A" in name}
    assert changed == {name.replace("lora_A.", "") for name in factors}
    assert load_model(made).spec.pipeline == made


def refused(place: Path, said: str, **settings: Any) -> None:
    with pytest.raises(UserError) as error:
        compose(ComposedTeacher(name=str(place), **settings))
    assert said in str(error.value)


def test_what_cannot_be_added_is_refused(place: Path, tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "lora.safetensors", place)
    tensors = load_file(lora)
    first, factor = next(iter(tensors.items()))

    def written(name: str, changed: dict[str, Tensor]) -> tuple[LoRAFile, ...]:
        save_file(changed, tmp_path / name)
        return (LoRAFile(place=str(tmp_path / name)),)

    (tmp_path / "old.ckpt").write_bytes(b"\x80\x04")
    (tmp_path / "two").mkdir()
    refused(place, "old.ckpt: a pickle (.ckpt), which may run code and is not opened", file=str(tmp_path / "old.ckpt"))
    refused(place, "nothing.safetensors: no such file", lora=(LoRAFile(place=str(tmp_path / "nothing.safetensors")),))
    others = {name.replace("unet.", "unet.other_"): tensor for name, tensor in tensors.items()}
    refused(place, "does not fit StableDiffusionPipeline", lora=written("others.safetensors", others))
    one = {**tensors, **{first.replace("to_q.lora_A", f"to_x.lora_{end}"): factor.clone() for end in "AB"}}
    refused(place, "1 of its 17 pairs of factors fit no layer", lora=written("one.safetensors", one))
    dora = {**tensors, "unet.x.dora_scale": torch.ones(1)}
    refused(place, "holds magnitudes of DoRA", lora=written("dora.safetensors", dora))
    dead = {name: tensor * float("nan") for name, tensor in tensors.items()}
    refused(place, "is not finite", lora=written("dead.safetensors", dead))
    save_file({"emb_params": torch.zeros(1, WIDTH)}, tmp_path / "nameless.safetensors")
    tokens = (TokenFile(place=str(tmp_path / "nameless.safetensors")),)
    refused(place, "does not name its token", textual_inversion=tokens)
    refused(
        save_stand_in("ddpm", tmp_path / "ddpm"), "DDPMPipeline loads no LoRA files", lora=(LoRAFile(place=str(lora)),)
    )


def test_a_folder_with_a_lora_left_loaded_says_what_to_do(place: Path, tmp_path: Path) -> None:
    folder = save_loaded(place, tmp_path / "left", save_lora(tmp_path / "lora.safetensors", place))
    with pytest.raises(UserError, match="was saved with a LoRA left loaded, whose weight is in no file; save it after"):
        load_model(folder)


def test_a_plain_place_is_itself(place: Path) -> None:
    assert place_of("runs/teacher") == "runs/teacher"
    assert place_of(ComposedTeacher(name=str(place))) == str(place)


def test_a_run_takes_a_composed_teacher_and_finds_it_again(place: Path, tmp_path: Path, cache: Path) -> None:
    """Its student's factors stand over it; the checkpoint, the export and its card say what it was made of; where the
    cache has lost it, it is made again."""
    lora = save_lora(tmp_path / "style.safetensors", place)
    (tmp_path / "prompts.txt").write_text("a red fox\ntwo blue birds")
    teacher = {"name": str(place), "lora": [{"place": str(lora), "weight": 0.7}]}
    settings = (
        f"data={json.dumps({'name': 'prompts', 'path': str(tmp_path / 'prompts.txt')})}",
        *("train.steps=1", "train.global_batch_size=2", "train.micro_batch_size=null", "method.gan_weight=0"),
        *("method.steps={init_ratio: 10}", "lora.default={rank: 2}", "health=null", f"teacher={json.dumps(teacher)}"),
    )
    config = small_config("dmd2", tmp_path / "run", *settings)
    Trainer(config).run()
    state = json.loads(next((tmp_path / "run" / "checkpoints").glob("*/state.json")).read_text())
    assert state["config"]["teacher"]["lora"] == [{"place": str(lora), "weight": 0.7}]
    made = Path(state["teacher"])
    assert made.parent == cache
    before = load_model(tmp_path / "run").denoiser.state_dict()
    shutil.rmtree(made)
    again = load_model(tmp_path / "run")
    assert made.is_dir()
    assert again.spec.pipeline == str(made)
    assert all(torch.equal(before[name], weight) for name, weight in again.denoiser.state_dict().items())
    Trainer(config, resume=True)
    written = write(str(tmp_path / "run"), tmp_path / "out", ExportOptions(kind="stock"))
    assert json.loads((tmp_path / "out" / "teacher.json").read_text())["lora"][0]["weight"] == 0.7
    write_card(tmp_path / "out", written.facts, name="out", place="out", difference=None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "with the LoRA `style.safetensors` with weight 0.7" in card
    assert "place: style.safetensors" in card
    assert str(lora) not in card
    with pytest.raises(UserError, match="which others do not have; use --kind stock"):
        write_lora(again, tmp_path / "lora", is_kohya=False)
    assert describe_model(made).image_shape == (4, 8, 8)
