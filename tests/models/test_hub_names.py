"""Teachers by their name on the Hugging Face hub, which is a folder here: what would be downloaded is copied."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import RepositoryNotFoundError, filter_repo_objects
from support.stand_ins import save_stand_in

from diffdistill.models.load import load_model
from diffdistill.models.teachers import is_pipeline, open_pipeline
from diffdistill.models.teachers.hub import LONGEST_REASON, _reason, fetch_pipeline
from diffdistill.settings.schema import UserError

NAME = "somebody/tiny-pipeline"


class Hub:
    """Stands for the hub: `repository` is what NAME holds, `asked` what was asked for, `cache` where it goes."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache = repository, cache
        self.asked: list[tuple[str, str | None]] = []

    def download(self, name: str, *, revision: str | None, allow_patterns: Any, ignore_patterns: Any) -> str:
        self.asked.append((name, revision))
        if name != NAME:
            raise RepositoryNotFoundError("404 Client Error: Repository Not Found", response=_NotFound())  # type: ignore[arg-type]
        files = [str(file.relative_to(self.repository)) for file in self.repository.rglob("*") if file.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (self.cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.repository / file, self.cache / file)
        return str(self.cache)


class _NotFound:
    headers: dict[str, str] = {}  # noqa: RUF012
    request = None


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub(save_stand_in("sd", tmp_path / "repository"), tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.download)
    monkeypatch.chdir(tmp_path)
    fetch_pipeline.cache_clear()
    yield made
    fetch_pipeline.cache_clear()


def test_a_name_on_the_hub_is_a_teacher(hub: Hub) -> None:
    teacher, own = load_model(NAME), load_model(hub.repository)
    assert set(hub.asked) == {(NAME, None)}
    assert teacher.spec.pipeline == NAME
    assert str(teacher.source) == NAME
    for name, weight in own.denoiser.state_dict().items():
        assert torch.equal(weight, teacher.denoiser.state_dict()[name])


def test_its_prompts_and_latents_come_from_there_too(hub: Hub) -> None:
    opened = open_pipeline(NAME)
    assert len(opened.conditions(["a red fox"])) == 1
    assert opened.load_vae() is not None


def test_the_hub_is_asked_once_whoever_opens_the_pipeline(hub: Hub) -> None:
    load_model(NAME)
    before = list(hub.asked)
    open_pipeline(NAME)
    assert hub.asked == before


def test_a_revision_is_asked_for(hub: Hub) -> None:
    load_model(f"{NAME}@refs/pr/1")
    assert set(hub.asked) == {(NAME, "refs/pr/1")}


def test_all_files_are_of_the_commit_that_was_there_at_first(hub: Hub, tmp_path: Path) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    hub.cache = tmp_path / commit
    load_model(NAME)
    assert hub.asked == [(NAME, None), (NAME, commit)]


def as_variants(repository: Path, *variants: str) -> None:
    """Leave the weights of these variants alone."""
    for file in repository.rglob("*.safetensors"):
        for variant in variants:
            shutil.copy(file, file.with_name(f"{file.stem}.{variant}.safetensors"))
        file.unlink()


@pytest.mark.parametrize(("variants", "taken"), [(("fp16",), "fp16"), (("bf16", "fp16"), "bf16"), (("fp32",), "fp32")])
def test_weights_of_one_variant_are_fetched_where_there_are_no_others(
    hub: Hub, variants: tuple[str, ...], taken: str
) -> None:
    as_variants(hub.repository, *variants)
    for part in ("unet", "vae"):
        shutil.copy(
            hub.repository / part / f"diffusion_pytorch_model.{taken}.safetensors",
            hub.repository / part / "diffusion_pytorch_model.non_ema.safetensors",
        )
    teacher = load_model(NAME).denoiser
    assert open_pipeline(NAME).load_vae() is not None
    assert len(open_pipeline(NAME).conditions(["a red fox"])) == 1
    got = sorted(file.name for file in hub.cache.rglob("*.safetensors"))
    assert got == [f"diffusion_pytorch_model.{taken}.safetensors"] * 2 + [f"model.{taken}.safetensors"]
    own = load_model(hub.cache).denoiser.state_dict()
    assert all(torch.equal(own[name], weight) for name, weight in teacher.state_dict().items())


def test_parts_that_the_family_does_not_load_are_not_fetched(hub: Hub) -> None:
    for part in ("safety_checker", "image_encoder", "text_encoders"):
        (hub.repository / part).mkdir()
        (hub.repository / part / "config.json").write_text("{}")
        (hub.repository / part / "model.safetensors").write_bytes(b"large")
    index = json.loads((hub.repository / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    (hub.repository / "model_index.json").write_text(json.dumps(index))
    load_model(NAME)
    assert {file.name for file in hub.cache.iterdir() if file.is_dir()} == {
        *("unet", "vae", "scheduler", "text_encoder", "tokenizer")
    }


def test_nothing_is_fetched_of_a_pipeline_of_no_family(hub: Hub) -> None:
    (hub.repository / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(UserError, match="_class_name = 'KandinskyPipeline': no family of teachers"):
        load_model(NAME)
    assert [file.name for file in hub.cache.rglob("*")] == ["model_index.json"]


def test_a_network_in_the_root_is_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.repository = save_stand_in("ddpm", tmp_path / "ddpm")
    for file in [*(hub.repository / "unet").iterdir(), *(hub.repository / "scheduler").iterdir()]:
        shutil.move(file, hub.repository / file.name)
    (hub.repository / "ema").mkdir()
    (hub.repository / "ema" / "diffusion_pytorch_model.safetensors").write_bytes(b"large")
    assert load_model(NAME).spec.image_shape == (3, 8, 8)
    assert [str(file.relative_to(hub.cache)) for file in hub.cache.rglob("*.safetensors")] == [
        "diffusion_pytorch_model.safetensors"
    ]


@pytest.mark.parametrize("config", [None, {"model_type": "custom"}, {"_class_name": "AutoencoderKL"}])
def test_of_files_beside_the_parts_none_is_fetched(hub: Hub, config: dict[str, str] | None) -> None:
    """Whatever a config.json in the root is of."""
    others = ["mine.safetensors", "diffusion_pytorch_model.safetensors", "lora/style.safetensors", "onnx/u.safetensors"]
    for file in others:
        (hub.repository / file).parent.mkdir(exist_ok=True)
        (hub.repository / file).write_bytes(b"large")
    if config:
        (hub.repository / "config.json").write_text(json.dumps(config))
    load_model(NAME)
    assert not [file for file in others if (hub.cache / file).exists()]


def test_neither_pickles_nor_code_nor_second_copies_are_downloaded(hub: Hub) -> None:
    unwanted = ["unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "v1-5.ckpt", "v1-5.safetensors"]
    unwanted += ["pipeline.py", "unet/model.py", "unet/diffusion_pytorch_model.fp16.safetensors"]
    for file in unwanted:
        (hub.repository / file).write_bytes(b"not wanted")
    (hub.repository / "README.md").write_text("---\nlicense: mit\n---\n")
    load_model(NAME)
    got = {str(file.relative_to(hub.cache)) for file in hub.cache.rglob("*")}
    assert got.isdisjoint(unwanted)
    assert {"model_index.json", "unet/config.json", "tokenizer/tokenizer.json", "README.md"} <= got


def test_a_name_that_the_hub_lacks_is_said_to_be_neither(hub: Hub) -> None:
    with pytest.raises(UserError, match="nobody/nothing: no such folder, and not available from the Hugging Face hub"):
        load_model("nobody/nothing")


@pytest.mark.parametrize("place", ["runs/teacher", "repository/unet", "./teacher", "teacher", "a/b/c", "/tmp/nothing"])
def test_paths_are_never_looked_for_on_the_hub(hub: Hub, place: str) -> None:
    assert not is_pipeline(place)
    with pytest.raises(UserError):
        load_model(place)
    assert hub.asked == []


def test_what_the_hub_says_is_not_cut_in_a_sentence() -> None:
    sentence = "Please make sure that you are authenticated and have the right to read the repository. "
    assert _reason(ValueError(sentence * 4)) == f"ValueError: {(sentence * 4).strip()}"
    said = _reason(ValueError(sentence * 100))
    assert len(said) <= 12 + LONGEST_REASON
    assert said.endswith("the repository.")
    assert len(_reason(ValueError("x" * 5000))) == 12 + LONGEST_REASON
