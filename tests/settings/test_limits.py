"""No number, text or file of others makes a reader loop, wait, or ask for the machine's memory."""

import io
import json
import os
import shutil
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from fuzz import _read_checkpoint, peak_bytes

from diffdistill.data.captions import open_file
from diffdistill.data.left_out import LeftOut
from diffdistill.data.npz import Npz
from diffdistill.data.prompts import read_prompts
from diffdistill.data.web_dataset import find_shards
from diffdistill.diffusion.path import VPDiscrete
from diffdistill.eval.evaluation.reference import open_reference
from diffdistill.eval.images.files import open_images
from diffdistill.eval.protocols.captions import read_captions
from diffdistill.eval.protocols.packaged import find_protocol
from diffdistill.eval.protocols.protocol import Preparation
from diffdistill.eval.records.record import parse_record, read_records
from diffdistill.export.record import RECORD, read_record
from diffdistill.models.load import load_model
from diffdistill.models.sentence_encoder import SentenceEncoder
from diffdistill.models.teachers.edm_checkpoint import import_edm
from diffdistill.models.teachers.pickle_reader import PLAIN_CALLS, read_pickle
from diffdistill.models.teachers.pipeline import load_model_of
from diffdistill.models.teachers.sit_checkpoint import import_sit
from diffdistill.networks.adapters import attach_adapters
from diffdistill.networks.parameter_limit import limited_parameters
from diffdistill.settings.links import refuse_links
from diffdistill.settings.reading import read_bytes, read_json, read_log
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import apply_overrides, parse_yaml, read_yaml

SECONDS = 60  # of a machine that others use, too


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """Whoever waits for a pipe is woken, and fails."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"still not done after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def into_checkpoint(name: str) -> Callable[[Path, Path], object]:
    def read(odd: Path, teacher: Path) -> object:
        copy = odd.parent / "copy"
        (source,) = (teacher / "checkpoints").glob("step-*")
        shutil.copytree(source, copy)
        (copy / name).unlink()
        (copy / name).symlink_to(odd)
        return load_model(copy)

    return read


def into_folder(name: str, read: Callable[[Path], object]) -> Callable[[Path, Path], object]:
    def into(odd: Path, teacher: Path) -> object:
        folder = odd.parent / "folder"
        folder.mkdir()
        (folder / name).symlink_to(odd)
        return read(folder)

    return into


READERS: dict[str, Callable[[Path, Path], object]] = {
    "config": lambda odd, _: read_yaml(odd),
    "protocol": lambda odd, _: find_protocol(str(odd)),
    "prompts": lambda odd, _: read_prompts(str(odd), setting="--prompts"),
    "a table of prompts": lambda odd, _: open_file(odd),
    "captions": lambda odd, _: read_captions(find_protocol("coco2014-fid30k"), str(odd)),
    "records": lambda odd, _: read_records(odd),
    "npz": lambda odd, _: Npz(path=str(odd), cache=str(odd.parent)).load(),
    "judged images": lambda odd, _: open_images(str(odd), Preparation(), channels=1),
    "adapters": lambda odd, _: attach_adapters(None, odd),  # type: ignore[arg-type]
    "reference": lambda odd, _: open_reference(odd, label="pixels", num_images=None),
    "EDM's pickle": lambda odd, _: import_edm(odd, odd.parent / "out"),
    "SiT's checkpoint": lambda odd, _: import_sit(odd, odd.parent / "out"),
    "state.json": into_checkpoint("state.json"),
    "manifest.json": into_checkpoint("manifest.json"),
    "weights": into_checkpoint("players.safetensors"),
    "model_index.json": into_folder("model_index.json", load_model),
    "router.json": into_folder("router.json", load_model),
    "a text encoder": into_folder("config.json", lambda folder: SentenceEncoder(str(folder)).config),
}


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("reader", READERS)
def test_pipes_and_devices_are_refused_not_waited_for(
    reader: str, kind: str, tmp_path: Path, quick_teacher: Path
) -> None:
    odd = tmp_path / ("odd.npz" if reader == "npz" else "odd")
    if kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.symlink_to("/dev/zero")
    with pytest.raises(UserError):
        READERS[reader](odd, quick_teacher)


def test_who_gives_a_pipe_is_told_what_to_do(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "odd")
    for read in ("config", "prompts", "captions", "records"):
        with pytest.raises(UserError, match=r"odd.*: a pipe or a device.*save its content to a file"):
            READERS[read](tmp_path / "odd", tmp_path)


def test_an_exported_folder_with_a_pipe_for_its_record_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / RECORD)
    assert read_record(tmp_path) is None


@pytest.mark.parametrize(("reader", "size"), [("config", 2**19), ("state.json", 2**27), ("prompts", 2**32)])
def test_files_that_are_too_large_are_refused_unread(
    reader: str, size: int, tmp_path: Path, quick_teacher: Path
) -> None:
    file = tmp_path / "odd"
    with file.open("wb") as handle:
        handle.truncate(size)
    with pytest.raises(UserError, match=r"bytes|hash|SHA"):
        READERS[reader](file, quick_teacher)


def test_lines_are_counted_before_they_are_made(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\n" * 3_000_001)
    before = peak_bytes()
    with pytest.raises(UserError, match="3,000,001 lines; at most 3,000,000"):
        read_prompts(str(tmp_path / "a.txt"), setting="--prompts")
    assert peak_bytes() - before < 2**27


def test_a_network_of_a_million_layers_is_refused_in_time() -> None:
    def build() -> None:
        with limited_parameters():
            for _ in range(10**6):
                torch.nn.LayerNorm(1)

    with pytest.raises(UserError, match="more than 30,000 tensors"):
        build()


def test_a_pipeline_s_network_has_the_same_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (4,)}
    UNet2DModel(**blocks, layers_per_block=1, norm_num_groups=2).save_pretrained(tmp_path)
    assert load_model_of("UNet2DModel", tmp_path)
    monkeypatch.setattr("diffdistill.networks.parameter_limit.MAX_TENSORS", 5)
    with pytest.raises(UserError, match=f"{tmp_path}: network: more than 5 tensors"):
        load_model_of("UNet2DModel", tmp_path)


@pytest.mark.parametrize("count", [1, 10**10, 10**30, -1, "x", 2.5, None])
def test_a_scheduler_s_config_makes_no_table_beyond_all(count: object) -> None:
    with pytest.raises(UserError, match=r"num_train_timesteps = .*: must be 2 to 4,096"):
        VPDiscrete.from_scheduler({"num_train_timesteps": count})


@pytest.mark.parametrize("config", [{"beta_end": float("nan")}, {"beta_schedule": "x"}, {"trained_betas": ["a"]}])
def test_a_scheduler_s_config_without_betas_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="scheduler config"):
        VPDiscrete.from_scheduler(config)


def test_a_pipe_in_a_run_s_folder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl: is a pipe or a device"):
        refuse_links(tmp_path)
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read"):
        read_log(tmp_path / "metrics.jsonl")


def test_a_reference_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mu.npy", b"")
    content = bytearray(file.read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[directory + 24 : directory + 28] = (2**31).to_bytes(4, "little")
    file.write_bytes(content)
    with pytest.raises(UserError, match="zip bomb"):
        open_reference(file, label="pixels", num_images=None)


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "growing"
    file.write_bytes(b"x" * 100)
    monkeypatch.setattr("diffdistill.settings.reading.check_regular", lambda file, limit: 1)
    with pytest.raises(OSError, match="more than 50 bytes"):
        read_bytes(file, limit=50)


@pytest.mark.parametrize(
    "text",
    [
        "1:" * 100_000 + "1",
        "1:" * 100_000 + "1.0",
        "-" + "9" * 5000,
        "0x" + "f" * 5000,
        "[" * 5_000 + "]" * 5_000,
        "{a: " * 80 + "1" + "}" * 80,
        "x" * 2**19,
        "[" + "1, " * 2**17 + "]",
    ],
    ids=["base 60", "base 60 with a fraction", "digits", "hex", "lists", "groups", "text", "many"],
)
def test_yaml_that_takes_long_is_refused_at_once(text: str) -> None:
    began = time.process_time()
    with pytest.raises(UserError, match=r"too large|deep|at most|valid YAML"):
        parse_yaml(text, origin="here")
    with pytest.raises(UserError):
        apply_overrides({}, [f"a={text}"])
    assert time.process_time() - began < 5


def test_an_override_is_not_nested_without_end() -> None:
    with pytest.raises(UserError, match="nested more than 64 deep"):
        apply_overrides({}, [".".join("a" * 10_000) + "=1"])


def test_json_is_not_nested_without_end(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for depth in (65, 900, 200_000):
        file.write_text("[" * depth + "]" * depth)
        with pytest.raises(ValueError, match="nested more than 64 deep"):
            read_json(file)
    file.write_text("[" * 64 + "]" * 64)
    assert read_json(file)


RECORD_LINE = {
    "schema": 1,
    "kind": "reported",
    "name": "a",
    "protocol": {"name": "p"},
    "metrics": {"fid": {"values": [1.0], "min": 1.0, "mean": 1.0, "std": None}},
    "source": {"title": "t", "url": "u", "place": "p"},
}


@pytest.mark.parametrize(
    "values", ["[1.7e308, 1.7e308]", "[1e999]", "[NaN]", "[-Infinity]", "[1" + "0" * 400 + "]", "[1e101]"]
)
def test_records_of_numbers_beyond_all_are_refused(values: str) -> None:
    line = json.dumps(RECORD_LINE).replace("[1.0]", values)
    with pytest.raises(UserError, match="here"):
        parse_record(line, origin="here")


def test_a_record_of_deep_json_is_refused() -> None:
    line = json.dumps(RECORD_LINE | {"protocol": {"name": "p", "x": 1}}).replace(
        '"x": 1', '"x": ' + "[" * 500 + "]" * 500
    )
    with pytest.raises(UserError, match="deep"):
        parse_record(line, origin="here")


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("{0..99999}{0..99999}", "10,000,000,000"), ("{0..9}" * 30, None), ("{0..99999999999999999999}", None)],
)
def test_a_pattern_of_shards_is_bounded_as_a_whole(pattern: str, count: str | None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"names {count or '[0-9,^]+( or more)?'} shards; at most"):
        find_shards(f"{tmp_path}/{pattern}.tar", LeftOut())


HOSTILE_STATES: dict[str, dict[str, Any]] = {
    "classes": {"num_classes": 10**12},
    "more classes than an integer holds": {"num_classes": 10**30},
    "no classes": {"num_classes": -(10**12)},
    "sides": {"image_shape": [1, 10**6, 10**6]},
    "values": {"image_shape": [4096, 16_384, 16_384]},
    "dimensions": {"image_shape": [1] * 1000},
    "width": {"network": {"name": "mlp", "width": 10**9}},
    "blocks": {"network": {"name": "mlp", "blocks": 10**9}},
    "width and classes at their limits": {"network": {"name": "mlp", "width": 65_536}, "num_classes": 1_000_000},
    "blocks at their limit": {"network": {"name": "mlp", "width": 65_536, "blocks": 1_024}},
    "levels": {"network": {"name": "unet", "channels": [65_536] * 64, "attention": [True] * 64, "blocks": 64}},
    "a sampler": {"sampler": {"name": "ddim", "num_steps": 10**9}},
    "a path": {"path": {"name": "vp_discrete", "num_steps": 10**9}},
    "a scale": {"negative_scale": 1e300},
}


@pytest.mark.parametrize("said", HOSTILE_STATES)
def test_a_checkpoint_of_numbers_out_of_range_is_refused_in_little_memory(
    said: str, quick_teacher: Path, tmp_path: Path
) -> None:
    source = next((quick_teacher / "checkpoints").iterdir())
    state = json.loads((source / "state.json").read_text())
    for key, value in HOSTILE_STATES[said].items():
        holder = state["model"]["model"] if key in ("network", "path") else state["model"]
        holder[key] = value
    (tmp_path / "seeds").mkdir()
    (tmp_path / "seeds" / "run").symlink_to(quick_teacher)
    (tmp_path / "one").mkdir()
    before = peak_bytes()
    with pytest.raises(UserError):
        _read_checkpoint(tmp_path / "one", b"state.json\n" + json.dumps(state).encode())
    assert peak_bytes() - before < 2**29


def test_shards_of_several_braces_are_all_combinations_in_order(tmp_path: Path) -> None:
    names = [f"{a}-{b:03d}.tar" for a in (1, 2) for b in range(8, 11)]
    for name in names:
        (tmp_path / name).touch()
    assert [shard.name for shard in find_shards(f"{tmp_path}/{{1..2}}-{{008..010}}.tar", LeftOut())] == names


def _text(text: bytes) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text


BOMBS = {
    "one text as bytes again and again": b"\x80\x02" + _text(b"a" * 2**20) + b"q\x010" + _text(b"latin1") + b"q\x020("
    + b"c_codecs\nencode\nh\x01h\x02\x86R" * 2000 + b"l.",
    "one list as sets": b"\x80\x02(" + b"".join(b"J" + n.to_bytes(4, "little") for n in range(90_000)) + b"lq\x010("
    + b"c__builtin__\nset\nh\x01\x85R" * 2000 + b"l.",
    "many small things": b"\x80\x04]" + b"(" + b"}\x940" * 2_000_000 + b"e.",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_is_given_no_more_memory_than_it_deserves(bomb: str, tmp_path: Path) -> None:
    file = tmp_path / "a.pkl"
    file.write_bytes(BOMBS[bomb])
    before = peak_bytes()
    with pytest.raises(UserError, match="refused, and nothing was run"):
        read_pickle(file, calls=PLAIN_CALLS, records=frozenset())
    assert peak_bytes() - before < 2**29


def test_one_storage_is_not_made_into_tensor_upon_tensor(tmp_path: Path) -> None:
    storage = io.BytesIO()
    torch.save(torch.zeros(2**20).storage(), storage)
    content = b"B" + len(storage.getvalue()).to_bytes(4, "little") + storage.getvalue()
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(h\x01K\x00J\x00\x00\x10\x00\x85K\x01\x85\x89N" + b"tR"
    file = tmp_path / "a.pkl"
    head = b"\x80\x04ctorch.storage\n_load_from_bytes\n" + content + b"\x85Rq\x010("
    file.write_bytes(head + made * 3 + b"l.")
    assert len(read_pickle(file, calls=PLAIN_CALLS, records=frozenset())) == 3  # a few may share one
    file.write_bytes(head + made * 500 + b"l.")
    before = peak_bytes()
    with pytest.raises(UserError, match="far more made than it holds"):
        read_pickle(file, calls=PLAIN_CALLS, records=frozenset())
    assert peak_bytes() - before < 2**28


def test_a_text_encoder_has_the_same_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertModel(transformers.BertConfig(vocab_size=10, **sizes)).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    assert SentenceEncoder(str(tmp_path)).load()
    monkeypatch.setattr("diffdistill.networks.parameter_limit.MAX_TENSORS", 5)
    with pytest.raises(UserError, match=r"text_encoder = .*more than 5 tensors"):
        SentenceEncoder(str(tmp_path)).load()
