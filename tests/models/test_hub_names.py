"""Teachers by their name on the Hugging Face hub, which is a folder here: what would be downloaded is copied."""

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
from diffdistill.models.teachers.hub import fetch_pipeline
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
    assert hub.asked == [(NAME, None)]
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
    open_pipeline(NAME)
    assert hub.asked == [(NAME, None)]


def test_a_revision_is_asked_for(hub: Hub) -> None:
    load_model(f"{NAME}@refs/pr/1")
    assert hub.asked == [(NAME, "refs/pr/1")]


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
    with pytest.raises(UserError, match="nobody/nothing: no such folder, and not to be had from the Hugging Face hub"):
        load_model("nobody/nothing")


@pytest.mark.parametrize("place", ["runs/teacher", "repository/unet", "./teacher", "teacher", "a/b/c", "/tmp/nothing"])
def test_paths_are_never_looked_for_on_the_hub(hub: Hub, place: str) -> None:
    assert not is_pipeline(place)
    with pytest.raises(UserError):
        load_model(place)
    assert hub.asked == []
