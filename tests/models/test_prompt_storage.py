"""How encoded prompts are kept: packed, of half the bytes, not at all; and what a run makes of them."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import small_config
from support.stand_ins import save_stand_in
from torch import Tensor

from diffdistill.data.shards import build_table
from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.prompt_table import PromptTable
from diffdistill.models.encoders import PipelineEncoder, encode_prompts
from diffdistill.models.prompt_storage import PackedText, PromptsConfig, Streamed, check_room, pack, size, unpack
from diffdistill.models.teachers import open_pipeline
from diffdistill.settings.schema import UserError
from diffdistill.training.trainer import Trainer

PROMPTS = ["a red fox", "two", "three blue birds on a very long branch", "dogs"]
TEXT_FAMILIES = ("flux", "pixart", "sana", "sd", "sd3", "sdxl")
COUNTED = PromptsConfig(tokens="counted")
HALF = PromptsConfig(dtype="bf16")
STREAMING = PromptsConfig(encode="streaming")
EVERY = torch.tensor([2, 0, 4, 3, 1, 2])  # in any order, one twice, and the empty one


def tables(family: str, root: Path, *configs: PromptsConfig) -> list[PromptTable]:
    place = save_stand_in(family, root / family)
    encoder = PipelineEncoder(open_pipeline(place))
    return [encode_prompts(encoder, PROMPTS, root=root / "cache", config=config) for config in configs]


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_streamed_rows_are_those_of_the_cache_to_the_bit(family: str, tmp_path: Path) -> None:
    cached, streamed = tables(family, tmp_path, PromptsConfig(), STREAMING)
    shutil.rmtree(tmp_path / "cache")
    assert (len(streamed), streamed.key, streamed.texts) == (4, cached.key, cached.texts)
    wanted = cached.rows(EVERY).parts()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):  # as an evaluation or a step in bf16 asks
        found = streamed.rows(EVERY).parts()
    assert found.keys() == wanted.keys()
    for name, part in wanted.items():
        assert torch.equal(found[name], part), name
    again = streamed.rows(EVERY).parts()
    (again["text"] * torch.ones((), requires_grad=True)).sum().backward()  # what is kept may be in a graph


@pytest.mark.parametrize("family", ["pixart", "sana"])
def test_tokens_that_the_mask_does_not_count_are_not_kept_and_change_no_bit(family: str, tmp_path: Path) -> None:
    whole, counted = tables(family, tmp_path, PromptsConfig(), COUNTED)
    text, mask = whole.rows(EVERY).text, whole.rows(EVERY).text_mask
    assert text is not None
    assert mask is not None
    assert not bool(mask.all())
    assert torch.equal(counted.rows(EVERY).text, text * (mask[..., None] != 0))
    assert torch.equal(counted.rows(EVERY).text_mask, mask)
    assert counted.key != whole.key
    pipeline = open_pipeline(tmp_path / family)
    denoiser = pipeline.load_denoiser()
    x = torch.randn(6, *pipeline.spec.image_shape, generator=torch.Generator().manual_seed(0))
    t = denoiser.path.t_max * torch.linspace(0.2, 0.9, 6)
    made = []
    for table in (whole, counted):
        denoiser.run_with(conditions=table)
        made.append(denoiser(x, t, Cond(label=EVERY), guidance=3.0))
    assert torch.equal(*made)
    files = {
        name: sum(f.stat().st_size for f in (tmp_path / "cache" / name).glob("*.safetensors"))
        for name in (whole.key, counted.key)
    }
    assert files[counted.key] < files[whole.key]


@pytest.mark.parametrize("config", [HALF, PromptsConfig(dtype="bf16", tokens="counted")])
def test_a_cache_in_bf16_holds_the_same_numbers_rounded(config: PromptsConfig, tmp_path: Path) -> None:
    whole, half = tables("pixart", tmp_path, PromptsConfig(), config)
    for name, part in whole.rows(EVERY).parts().items():
        wanted = part.bfloat16() if part.is_floating_point() else part
        if name == "text" and config.tokens == "counted":
            wanted = wanted * (whole.rows(EVERY).text_mask[..., None] != 0)
        assert torch.equal(half.rows(EVERY).parts()[name], wanted)
    denoiser = open_pipeline(tmp_path / "pixart").load_denoiser()
    denoiser.run_with(conditions=half)
    resolved = denoiser.resolve(Cond(label=EVERY)).text
    assert resolved is not None
    assert resolved.dtype == torch.float32  # what its network computes in
    again = encode_prompts(
        PipelineEncoder(open_pipeline(tmp_path / "pixart")), PROMPTS, root=tmp_path / "cache", config=config
    )
    assert torch.equal(again.rows(EVERY).text, half.rows(EVERY).text)


def test_packed_text_of_several_shards_gives_every_row(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    mask = (torch.rand(7, 5, generator=rng) < 0.5).long()  # counted tokens need not stand in front; one row has none
    mask[3] = 0
    text = torch.randn(7, 5, 2, generator=rng) * mask[..., None]

    def make(first: int, last: int) -> dict[str, Tensor]:
        return pack({"text": text[first:last], "text_mask": mask[first:last]}, COUNTED)

    shards = build_table(tmp_path, "k", 7, rows_per_shard=3, start=lambda: make, title="", about={})
    parts = [unpack(shard, COUNTED) for shard in shards]
    assert all(isinstance(part["text"], PackedText) for part in parts)
    table = PromptTable(parts, Cond(text=torch.zeros(1, 5, 2), text_mask=mask[:1]))
    order = torch.tensor([6, 3, 0, 4, 2])
    assert torch.equal(table.rows(order).text, text[order])


def test_the_size_is_said_and_the_disk_asked_before_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []

    def encode(prompts: Sequence[str]) -> Cond:
        seen.append(len(prompts))
        return Cond(text=torch.zeros(len(prompts), 333, 4096), pooled_text=torch.zeros(len(prompts), 2048))

    prompts = [f"prompt {number}" for number in range(1_000_000)]
    (tmp_path / "key").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=8 * 10**12))
    check_room(encode, prompts, PromptsConfig(), tmp_path / "key")
    assert sum(seen) == 8
    assert f"1,000,000 prompts, 5.46 MB each, 5.46 TB in {tmp_path}" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=3 * 10**12))
    with pytest.raises(UserError, match=r"5\.46 TB in .* where 3 TB are free; .*prompts\.encode: streaming"):
        check_room(encode, prompts, PromptsConfig(), tmp_path / "key")
    check_room(encode, prompts, HALF, tmp_path / "key")  # 2.73 TB


def test_a_full_disk_is_found_before_a_shard_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=0))
    with pytest.raises(UserError, match="prompts: 4 prompts"):
        tables("sd", tmp_path, PromptsConfig())
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    tables("sd", tmp_path / "other", STREAMING)  # which needs no room


def test_few_rows_are_kept_and_no_prompt_of_a_batch_is_encoded_twice() -> None:
    asked: list[str] = []

    def encode(prompts: Sequence[str]) -> Cond:
        asked.extend(prompts)
        return Cond(pooled_text=torch.tensor([[float(prompt)] for prompt in prompts]))

    take = Streamed(encode, [str(number) for number in range(100)], at_once=4)
    assert take([7, 3, 7])["pooled_text"].flatten().tolist() == [7, 3, 7]
    take([3, 7])  # the teacher after the generator
    assert asked == ["7", "3"]
    for first in range(0, 100, 10):
        take(list(range(first, first + 10)))
    assert len(take._kept) == 20
    assert take([99])["pooled_text"].item() == 99


@pytest.mark.parametrize("more", [(), ("train.precision=bf16",)])
def test_a_run_is_the_same_to_the_bit_streaming_or_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    save_stand_in("sd", tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    data = json.dumps({"name": "prompts", "path": str(tmp_path / "prompts.txt")})
    settings = ("train.steps=3", "train.global_batch_size=2", "train.micro_batch_size=null", "method.gan_weight=0")
    students: list[dict[str, Any]] = []
    for encode in ("cache", "streaming"):
        config = small_config(
            "dmd2",
            tmp_path / encode,
            f"data={data}",
            *settings,
            *more,
            "method.steps={init_ratio: 10}",
            "method.guidance=2",
            f"prompts.encode={encode}",
            teacher=tmp_path / "sd",
        )
        trainer = Trainer(config, quiet=True)
        trainer.run()
        students.append({f"{n}.{k}": v for n, m in trainer.trained.items() for k, v in m.state_dict().items()})
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])


def test_streaming_keeps_nothing_that_could_be_packed() -> None:
    with pytest.raises(UserError, match="streaming stores nothing on disk"):
        PromptsConfig(encode="streaming", dtype="bf16")


@pytest.mark.parametrize(("count", "text"), [(12, "12 bytes"), (5.46e12, "5.46 TB"), (2_000, "2 kB")])
def test_sizes_are_told_in_decimal_units(count: float, text: str) -> None:
    assert size(count) == text
