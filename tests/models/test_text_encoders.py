"""Text encoders compute in the dtype that their weights are published in, and one at a time is on the device."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.stand_ins import save_stand_in
from torch import nn

from diffdistill.diffusion.cond import Cond
from diffdistill.models.encoders import PipelineEncoder, encode_prompts, encoder_key
from diffdistill.models.teachers import open_pipeline, text_encoders
from diffdistill.settings.schema import UserError

BATCHES = [["a red fox", "two blue birds"], ["a house"]]
SEVERAL = {"sdxl": 2, "sd3": 3, "flux": 2}


def publish(place: Path, part: str, dtype: torch.dtype) -> None:
    """Write a part's weights anew; its config goes on to say float32."""
    file = place / part / "model.safetensors"
    save_file({name: w.to(dtype) if w.is_floating_point() else w for name, w in load_file(file).items()}, file)
    config = place / part / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}))


def assert_equal(found: Sequence[Cond], expected: Sequence[Cond]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.parts().keys() == other.parts().keys()
        assert all(torch.equal(part, other.parts()[name]) for name, part in one.parts().items())


@pytest.mark.parametrize("family", SEVERAL)
def test_one_encoder_at_a_time_is_on_the_device_for_all_batches(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_pipeline(save_stand_in(family, tmp_path / family))
    plain = opened.load_encoder()
    expected = [*(opened.encode(plain, batch) for batch in BATCHES), opened.encode_empty(plain)]
    present: list[nn.Module] = []
    came: list[nn.Module] = []
    asked: list[nn.Module] = []

    def put_on(encoder: nn.Module, device: torch.device) -> None:
        present.append(encoder)
        came.append(encoder)

    def take_off(encoder: nn.Module) -> None:
        present[:] = [one for one in present if one is not encoder]

    def computes(encoder: nn.Module, *_: object) -> None:
        asked.append(encoder)
        assert present == [encoder]

    monkeypatch.setattr(text_encoders, "put_on", put_on)
    monkeypatch.setattr(text_encoders, "take_off", take_off)
    loaded = opened.load_encoder(stays=False)
    encoders = [part for part in loaded.components.values() if isinstance(part, nn.Module)]
    for encoder in encoders:
        inner = getattr(encoder, "encoder", None) or next(encoder.children())  # T5's first child is its embedding
        inner.register_forward_pre_hook(lambda _, __, encoder=encoder: computes(encoder))
    found = opened.encode_all(loaded, BATCHES, has_empty=True)
    assert_equal(found, expected)
    assert len(encoders) == SEVERAL[family]
    assert came == encoders
    assert all(asked.count(encoder) == 3 for encoder in encoders), "each batch goes once through each of them"
    assert not any("forward" in vars(encoder) for encoder in encoders)


def test_later_chunks_have_their_turn_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoders, "AT_ONCE", 2)
    opened = open_pipeline(save_stand_in("flux", tmp_path))
    loaded = opened.load_encoder()
    batches = [[word] for word in ("a", "b", "c", "d", "e")]
    assert_equal(opened.encode_all(loaded, batches), [opened.encode(loaded, batch) for batch in batches])


def test_an_encoder_that_is_asked_again_is_answered(tmp_path: Path) -> None:
    """SDXL's for its empty prompt, where that is encoded as what is to be left out."""
    place = save_stand_in("sdxl", tmp_path)
    index = place / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": False}))
    opened = open_pipeline(place)
    loaded = opened.load_encoder()
    assert_equal(opened.encode_all(loaded, [], has_empty=True), [opened.encode_empty(loaded)])


def test_what_the_weights_are_written_in_decides_and_t5_in_float16_is_computed_in_float32(tmp_path: Path) -> None:
    place = save_stand_in("sd3", tmp_path)
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    opened = open_pipeline(place)
    assert opened.encoder_dtypes("published") == dict.fromkeys(names, torch.float32)
    publish(place, "text_encoder", torch.float16)
    publish(place, "text_encoder_3", torch.float16)
    expected = dict(zip(names, (torch.float16, torch.float32, torch.float32), strict=True))
    assert opened.encoder_dtypes("published") == expected
    publish(place, "text_encoder_3", torch.bfloat16)
    assert opened.encoder_dtypes("published") == {**expected, "text_encoder_3": torch.bfloat16}
    loaded = opened.load_encoder()
    assert {name: getattr(loaded, name).dtype for name in names} == opened.encoder_dtypes("published")
    assert opened.encoder_dtypes("fp32") == dict.fromkeys(names, torch.float32)


def test_an_encoder_of_several_dtypes_is_computed_in_float32(tmp_path: Path) -> None:
    place = save_stand_in("sd", tmp_path)
    publish(place, "text_encoder", torch.float16)
    file = place / "text_encoder" / "model.safetensors"
    first, *_ = tensors = load_file(file)
    save_file({**tensors, first: tensors[first].float()}, file)
    assert open_pipeline(place).encoder_dtypes("published") == {"text_encoder": torch.float32}


def test_embeddings_of_another_dtype_are_cached_apart_in_float32(tmp_path: Path) -> None:
    place, root = save_stand_in("sd", tmp_path / "sd"), tmp_path / "cache"
    publish(place, "text_encoder", torch.bfloat16)
    opened = open_pipeline(place)
    published, full = PipelineEncoder(opened), PipelineEncoder(opened, "fp32")
    assert encoder_key(published, root) != encoder_key(full, root)
    tables = [encode_prompts(encoder, BATCHES[0], root=root) for encoder in (published, full)]
    half, whole = (table.rows(torch.arange(3)).text for table in tables)
    assert half is not None
    assert whole is not None
    assert half.dtype == whole.dtype == torch.float32
    assert torch.equal(half, half.bfloat16().float())
    assert not torch.equal(half, whole)
    torch.testing.assert_close(half, whole, atol=0.05, rtol=0)


def test_an_encoder_in_float32_keeps_its_key(tmp_path: Path) -> None:
    opened = open_pipeline(save_stand_in("sd", tmp_path / "sd"))
    keys = {encoder_key(PipelineEncoder(opened, dtype), tmp_path) for dtype in ("published", "fp32")}
    assert len(keys) == 1


def test_an_overflow_names_the_setting(tmp_path: Path) -> None:
    place = save_stand_in("sd", tmp_path)
    publish(place, "text_encoder", torch.float16)
    file = place / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    (name,) = (name for name in tensors if name.endswith("final_layer_norm.weight"))
    save_file({**tensors, name: torch.full_like(tensors[name], 60000.0)}, file)
    opened = open_pipeline(place)
    with pytest.raises(UserError, match=r"overflows in the half precision .* prompts.encoder_dtype: fp32"):
        opened.conditions(BATCHES[0])
    loaded = opened.load_encoder(dtype="fp32")
    text = opened.encode(loaded, BATCHES[0]).text
    assert text is not None
    assert bool(torch.isfinite(text).all())
