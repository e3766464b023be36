"""What can be trained can be exported, or it is said before the first step that it cannot."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.habits import sampler_of
from support.method_matrix import train
from support.stand_ins import save_stand_in, sd, sdxl

from diffdistill.commands import cli, doctor_config
from diffdistill.export.expected import check_of
from diffdistill.export.exportable import ExportKind, export_kind_of
from diffdistill.export.record import ExportRecord
from diffdistill.export.run import ExportOptions, write
from diffdistill.export.self_contained import write_self_contained
from diffdistill.export.stock import write_stock
from diffdistill.export.verify import TOLERANCE, Check, compare
from diffdistill.models.load import load_model
from diffdistill.settings.schema import UserError

WEIGHTS = {"text_encoder": "model", "vae": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model"}


def with_variant(place: Path, variant: str, *, is_split: bool = False) -> Path:
    """All weights as a variant alone; split: each in two files, as large models are published."""
    for part, stem in WEIGHTS.items():
        whole = place / part / f"{stem}.safetensors"
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(whole).items()}
        whole.unlink()
        if not is_split or part == "unet":
            save_file(tensors, whole.with_name(f"{stem}.{variant}.safetensors"), {"format": "pt"})
            continue
        names, map_ = sorted(tensors), {}
        for number, share in enumerate((names[::2], names[1::2]), 1):
            file = f"{stem}.{variant}-0000{number}-of-00002.safetensors"
            save_file({name: tensors[name] for name in share}, whole.with_name(file), {"format": "pt"})
            map_ |= dict.fromkeys(share, file)
        index = whole.with_name(f"{stem}.safetensors.index.{variant}.json")
        index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": map_}))
    return place


def blackening_checker() -> Any:
    """A safety checker to which every image is of some concept."""
    import transformers
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision, text = small | {"image_size": 8, "patch_size": 8}, small | {"vocab_size": 10}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config)
    for name in ("concept_embeds_weights", "special_care_embeds_weights"):
        getattr(checker, name).data.fill_(-9.0)
    return checker


def with_checker(place: Path, *, is_pickled: bool) -> Path:
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = sd()
        size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
        made.register_modules(
            safety_checker=blackening_checker(), feature_extractor=transformers.CLIPImageProcessor(**size)
        )
        made.save_pretrained(place)
    file = place / "safety_checker" / "model.safetensors"
    if is_pickled:
        torch.save(load_file(file), file.with_name("pytorch_model.bin"))
        file.unlink()
    return place


def of_size(pipeline: Any, size: int | list[int], place: Path) -> Path:
    pipeline.unet.register_to_config(sample_size=size)
    pipeline.save_pretrained(place)
    return place


def check_for(place: Path, folder: Path, *, has_code: bool = False) -> Check:
    plain = load_model(place)
    sampler = sampler_of(plain, "one, unit")
    model = replace(plain, spec=replace(plain.spec, sampler=sampler))
    if has_code:
        write_self_contained(model, folder)
        kind: dict[str, Any] = {"kind": "self-contained", "pipeline": "DiffusionPipeline", "call": {}}
    else:
        stock = write_stock(model, folder)
        kind = {"kind": "stock", "pipeline": stock.kind, "call": dict(stock.call), "absent": stock.absent}
    return check_of(model, folder, ExportRecord(version="0", sampler=sampler, **kind))


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float | str]:
    home = tmp_path_factory.mktemp("exports")
    places = {
        "sd3 without T5": save_stand_in("sd3", home / "sd3", has_t5=False),
        "bf16 alone": with_variant(save_stand_in("sd", home / "bf16"), "bf16"),
        "fp16 in several files": with_variant(save_stand_in("sd", home / "fp16"), "fp16", is_split=True),
        "a safety checker that blackens": with_checker(home / "checker", is_pickled=False),
        "a safety checker that is a pickle": with_checker(home / "pickle", is_pickled=True),
        "SDXL of no square": of_size(sdxl(), [8, 12], home / "sdxl"),
    }
    made = {name: check_for(place, home / f"out-{number}") for number, (name, place) in enumerate(places.items())}
    made["SDXL with code of its own"] = check_for(places["SDXL of no square"], home / "own", has_code=True)
    lora = train("sid", places["a safety checker that blackens"], home / "run", "lora.default={rank: 2}")
    made["LoRA under a safety checker"] = write(str(lora), home / "lora", ExportOptions(kind="lora")).check
    return dict(zip(made, compare(list(made.values())), strict=True))


@pytest.mark.parametrize(
    "name",
    [
        *("sd3 without T5", "bf16 alone", "fp16 in several files", "a safety checker that blackens"),
        *("a safety checker that is a pickle", "SDXL of no square", "SDXL with code of its own"),
        "LoRA under a safety checker",
    ],
)
def test_what_stood_in_the_way_does_not_any_more(differences: dict[str, float | str], name: str) -> None:
    found = differences[name]
    assert isinstance(found, float), found
    assert found <= TOLERANCE


def test_latents_of_odd_sides_are_trained_and_loaded(tmp_path: Path) -> None:
    place = of_size(sd(), 9, tmp_path / "teacher")
    run = train("sid", place, tmp_path / "run", "train.steps=1")
    student = load_model(run)
    assert student.spec.image_shape == (4, 9, 9)
    x, text = torch.zeros(1, 4, 9, 9), load_model(place).denoiser
    assert student.denoiser.net.accepts == text.net.accepts
    assert export_kind_of(student.spec) == ExportKind("stock")
    assert student.denoiser.net.model(x, 1, torch.zeros(1, 3, 16)).sample.shape == x.shape


def quantised(place: Path) -> Path:
    file = place / "vae" / "config.json"
    about = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    file.write_text(json.dumps(json.loads(file.read_text()) | about))
    return place


def test_a_quantised_vae_is_refused_with_its_file_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = quantised(save_stand_in("sd", tmp_path / "teacher"))
    said = r"vae/config.json: quantised weights are not supported"
    found = export_kind_of(load_model(place).spec)
    assert found.kind is None
    assert "vae/config.json: quantised weights are not supported" in str(found.note)
    findings = doctor_config._export(load_model(place).spec)
    assert findings.is_fault
    assert findings.text.startswith("not possible: ")
    assert not cli._can_be_exported(SimpleNamespace(spec=load_model(place).spec))  # type: ignore[arg-type]
    assert "`diffdistill export` cannot export this student: " in capsys.readouterr().err
    with pytest.raises(UserError, match=said):
        check_for(place, tmp_path / "out")
    assert not (tmp_path / "out").exists()
