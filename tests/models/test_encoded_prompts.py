"""Which pipelines share the cached embeddings of their prompts, and which have some of their own."""

import json
import shutil
from pathlib import Path

import torch
from support.stand_ins import save_stand_in
from support.tiny_parts import LENGTH

from diffdistill.models.encoders import PipelineEncoder, encode_prompts
from diffdistill.models.teachers import open_pipeline

PROMPTS = ["a red fox", "two blue birds"]


def test_a_pipeline_for_another_size_has_conditions_of_its_own(tmp_path: Path) -> None:
    """SDXL's tell the size, and the encoders of both are the same."""
    first = save_stand_in("sdxl", tmp_path / "first")
    second = Path(shutil.copytree(first, tmp_path / "second"))
    file = second / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": 16}))
    sizes = []
    for place in (first, second):
        conditions = encode_prompts(PipelineEncoder(open_pipeline(place)), PROMPTS, root=tmp_path / "cache")
        sizes.append(conditions.rows(torch.tensor([0])).size.tolist())
    assert sizes == [[[16, 16, 0, 0, 16, 16]], [[32, 32, 0, 0, 32, 32]]]


def test_a_copy_of_a_pipeline_shares_its_conditions(tmp_path: Path) -> None:
    first = save_stand_in("sd", tmp_path / "first")
    second = Path(shutil.copytree(first, tmp_path / "second"))
    keys = {
        encode_prompts(PipelineEncoder(open_pipeline(place)), PROMPTS, root=tmp_path / "cache").key
        for place in (first, second)
    }
    assert len(keys) == 1


def test_a_pipeline_without_its_optional_encoder_is_encoded(tmp_path: Path) -> None:
    opened = open_pipeline(save_stand_in("sd3", tmp_path / "sd3", has_t5=False))
    found = encode_prompts(PipelineEncoder(opened), PROMPTS, root=tmp_path / "cache")
    assert not found.rows(torch.arange(2)).text[:, LENGTH:].any()
