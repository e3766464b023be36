"""LoRA's factors in the keys of diffusers and of kohya."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from support.method_matrix import origin, train
from support.stand_ins import save_stand_in
from torch import Tensor

from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.export import lora_files
from diffdistill.export.comfyui import WORKFLOW
from diffdistill.export.lora_files import diffusers_keys, factors_of, kohya_keys, write_lora
from diffdistill.export.run import ExportOptions, export
from diffdistill.models.load import load_model
from diffdistill.networks.lora import LoRA, LoRASettings, lora_of, merge_lora, with_lora

PIPELINES = {"sd": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}


@pytest.fixture(scope="module", params=PIPELINES)
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Denoiser, LoRA]:
    """A family, a denoiser with factors on all of its layers that change them, and those."""
    plain = load_model(save_stand_in(request.param, tmp_path_factory.mktemp(request.param))).denoiser
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = with_lora(plain, LoRASettings(rank=2, alpha=3))
        found = lora_of(denoiser)
        assert found is not None
        for parameter in found.adapters.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return request.param, denoiser, found


def change_of(down: Tensor, up: Tensor) -> Tensor:
    """What two factors add to a layer's weight."""
    if down.ndim == 2:
        return up @ down
    return torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)


def test_the_factors_add_up_to_what_merging_adds(scene: tuple[str, Denoiser, LoRA]) -> None:
    _, denoiser, found = scene
    model = found.shared_tree.model
    merged = merge_lora(denoiser).net.model
    factors = factors_of(found)
    assert len(factors) > 40
    for name, (down, up) in factors.items():
        base = model.get_submodule(name).get_base_layer().weight
        torch.testing.assert_close(
            merged.get_submodule(name).weight - base, change_of(down, up), atol=1e-6, rtol=0, msg=name
        )


def test_diffusers_own_converter_reads_kohyas_keys_as_the_same_factors(scene: tuple[str, Denoiser, LoRA]) -> None:
    family, _, found = scene
    written = kohya_keys(factors_of(found))
    assert {key.rpartition(".lora_")[0] or key.removesuffix(".alpha") for key in written} == {
        key.partition(".")[0] for key in written
    }
    state, alphas = PIPELINES[family].lora_state_dict(dict(written), unet_config=found.shared_tree.model.config)
    read = convert_unet_state_dict_to_peft({key.removeprefix("unet."): value for key, value in state.items()})
    expected = {key.removeprefix("unet."): value for key, value in diffusers_keys(factors_of(found), "unet").items()}
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], value) for key, value in expected.items())
    assert set(alphas.values()) == {2.0}  # the rank: a factor of 1
    assert len(alphas) == len(expected) // 2


def test_a_file_in_diffusers_keys_is_what_its_own_pipeline_writes(
    scene: tuple[str, Denoiser, LoRA], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    family, _, found = scene
    plain = {f"{name}.{end}": f for name, pair in factors_of(found).items() for end, f in zip(ENDS, pair, strict=True)}
    PIPELINES[family].save_lora_weights(tmp_path, unet_lora_layers=plain)
    theirs = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    ours = diffusers_keys(factors_of(found), "unet")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], value) for key, value in ours.items())


def keys_of_comfyui(layers: Iterable[str]) -> set[str]:
    """Of a UNet's layers in diffusers' names, in LoRA files: `model_lora_keys_unet` in its comfy/lora.py."""
    found = {f"lora_unet_{name.replace('.', '_')}" for name in layers}
    for name in layers:
        processed = name.replace(".to_", ".processor.to_")
        found.add(f"unet.{processed.removesuffix('.0') if processed.endswith('.to_out.0') else processed}")
    return found


@pytest.mark.parametrize("is_kohya", [True, False])
def test_a_workflow_for_comfyui_lies_beside_keys_that_it_reads_alone(
    is_kohya: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    plain = load_model(save_stand_in("sd", tmp_path / "sd"))
    plain = replace(plain, spec=replace(plain.spec, sampler=FewSteps(init_ratio=2.5)))
    model = replace(plain, denoiser=with_lora(plain.denoiser, LoRASettings(rank=2)))
    monkeypatch.setattr(lora_files, "_check_base", lambda *_: None)  # it looks at a run
    write_lora(model, tmp_path / "out", is_kohya=is_kohya)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    written = {key.rpartition(".lora_")[0] for key in load_file(file) if not key.endswith(".alpha")}
    layers = [name for name, _ in plain.denoiser.net.model.named_modules()]
    assert (written <= keys_of_comfyui(layers)) is is_kohya
    assert (tmp_path / "out" / WORKFLOW).exists() is is_kohya


ENDS = ("lora_A.weight", "lora_B.weight")


@pytest.mark.full
def test_factors_are_exported_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train("sid", origin("sd", "sid", Path("sd")), Path("run"), "lora.default={rank: 2}", "train.steps=1")
    monkeypatch.chdir("/")
    made = export(str(tmp_path / "run"), tmp_path / "out", ExportOptions(kind="lora", is_verified=False))
    assert made.kind == "lora"
    assert load_model(tmp_path / "run").spec.pipeline == str(tmp_path / "sd")
