"""Broken and hostile files for every reader: each is read, or refused with a UserError, within seconds.

python tests/fuzz.py [--seconds 120] [READER ...]
"""

import argparse
import hashlib
import io
import json
import os
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from conftest import small_config
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from support.edm_pickles import ARGUMENTS, SHAPE, network_of, waves, write_checkpoint
from support.more_fuzzed import MORE_READERS, Reader
from support.pictures import encode

from diffdistill.data import ImageFolder, Npz, WebDataset
from diffdistill.data.prompts import Prompts
from diffdistill.eval.evaluation.reference import open_reference
from diffdistill.eval.images.files import is_lossy, open_images
from diffdistill.eval.protocols.packaged import find_protocol
from diffdistill.eval.protocols.protocol import Preparation
from diffdistill.eval.records.record import read_records
from diffdistill.models.load import load_model
from diffdistill.models.teachers.edm_checkpoint import read_edm
from diffdistill.networks.edm_unet import DDPMPP
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import dump, dump_yaml
from diffdistill.storage.checkpoint import MANIFEST, list_checkpoints
from diffdistill.storage.shard_files import read_shards
from diffdistill.training.config import load_config
from diffdistill.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
SLOW = 10.0  # seconds for one small file
LARGE = 2**30  # bytes that reading all files of one reader may add to its process at its peak
HOSTILE = (
    *(
        b"9" * 4400,
        b"-1",
        b"0",
        b"1e999",
        b"NaN",
        b"Infinity",
        b"true",
        b"null",
        b'""',
        b"[]",
        b"{}",
        b"18446744073709551616",
        b"0x" + b"f" * 4400,
        b":".join([b"59"] * 3000),
    ),
    *(b"../../../etc/passwd", b"/dev/zero", b"C:\\x", b"\x00", b"\x1b[31m", b"\xff\xfe", "\u202e".encode(), b"\r\n"),
    *(
        b"[" * 3000,
        b'{"a":' * 3000,
        b"&a [*a, *a]",
        b"!!python/object/apply:os.system ['true']",
        b"<<: *a",
        b"__class__",
    ),
    *(b"cos\nsystem\n(S'true'\ntR.", b"\x80\x04", b"F64", b"\xff" * 8, b"\x7f" * 8),
)
"""What has broken other readers: sizes, depths, paths, signs of other formats."""

Mutation = tuple[str, float, bytes]
mutations = st.lists(
    st.tuples(
        st.sampled_from(["put", "replace", "cut", "flip", "repeat"]),
        st.floats(0, 1),
        st.one_of(st.sampled_from(HOSTILE), st.binary(min_size=1, max_size=12)),
    ),
    min_size=1,
    max_size=5,
)


def mutated(content: bytes, changes: Sequence[Mutation]) -> bytes:
    """The content after some changes, each at a share of its length."""
    for kind, share, piece in changes:
        at = min(int(share * len(content)), max(len(content) - 1, 0))
        if kind == "put":
            content = content[:at] + piece + content[at:]
        elif kind == "replace":
            content = content[:at] + piece + content[at + len(piece) :]
        elif kind == "cut":
            content = content[:at] + content[at + 4 * len(piece) :]
        elif kind == "repeat":
            content = content[:at] + content[at : at + 40] * 3 + content[at:]
        elif content:
            content = content[:at] + bytes([content[at] ^ (1 << piece[0] % 8)]) + content[at + 1 :]
    return content


def _configs(_: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((ROOT / "configs").glob("*/digits.yaml"))]


def _read_config(folder: Path, content: bytes) -> None:
    file = folder / "config.yaml"
    file.write_bytes(content)
    load_config(file)


def _overrides(_: Path) -> list[bytes]:
    return [b"train.steps=3", b"method.steps={init_ratio: 4}", b"optimizers.generator.lr=2e-4", b"lora.default.rank=8"]


def _read_override(folder: Path, content: bytes) -> None:
    load_config(ROOT / "configs" / "dmd2" / "digits.yaml", [content.decode("utf-8", "replace")])


def _records(_: Path) -> list[bytes]:
    from support.made_records import MEASURED

    return [json.dumps(dump(MEASURED)).encode() + b"\n", (ROOT / "results" / "digits.jsonl").read_bytes()]


def _read_records(folder: Path, content: bytes) -> None:
    file = folder / "records.jsonl"
    file.write_bytes(content)
    read_records(file)


def _edm(folder: Path) -> list[bytes]:
    net = DDPMPP(channels=16, multipliers=(1, 2, 2), blocks=2, attention_resolutions=(8, 4), augment_dim=9)
    network = network_of(waves(net.build((3, 16, 16), 5, 0.0)), ARGUMENTS["ddpmpp"] | SHAPE)
    return [write_checkpoint(folder / "edm.pkl", {"ema": network}).read_bytes()]


def _read_edm(folder: Path, content: bytes) -> None:
    file = folder / "edm.pkl"
    file.write_bytes(content)
    read_edm(file)


def _archives(_: Path) -> list[bytes]:
    made = []
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", kind) as archive:
            for name in ("0/a.png", "0/b.png", "1/c.jpg"):
                archive.writestr(name, encode(Image.new("RGB", (8, 8), (200, 10, 30))))
        made.append(file.getvalue())
    return made


def _read_archive(folder: Path, content: bytes) -> None:
    (folder / "images.zip").write_bytes(content)
    ImageFolder(path=str(folder / "images.zip"), labels="folders", cache=str(folder / "cache")).load()


def _shards(_: Path) -> list[bytes]:
    made = []
    for ending, text in (("txt", b"a red fox"), ("json", b'{"caption": "a red fox"}')):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            for name, content in (("a.png", encode(Image.new("RGB", (8, 8), (200, 10, 30)))), (f"a.{ending}", text)):
                about = tarfile.TarInfo(name)
                about.size = len(content)
                archive.addfile(about, io.BytesIO(content))
        made.append(file.getvalue()[:3072])
    return made


def _read_shards(folder: Path, content: bytes) -> None:
    (folder / "0.tar").write_bytes(content)
    ending = "json" if b".json" in content else "txt"
    WebDataset(path=str(folder), captions_ending=ending, cache=str(folder / "cache")).load()


def _arrays(folder: Path) -> list[bytes]:
    file = io.BytesIO()
    np.savez(file, images=np.zeros((3, 8, 8, 3), np.uint8), labels=np.arange(3))
    return [file.getvalue()]


def _read_arrays(folder: Path, content: bytes) -> None:
    (folder / "images.npz").write_bytes(content)
    Npz(path=str(folder / "images.npz"), cache=str(folder / "cache")).load()


def _checkpoints(folder: Path) -> list[bytes]:
    """state.json, players.safetensors and the manifest of one checkpoint, each behind its name."""
    run = folder / "run"
    Trainer(small_config("pretrain", run, "train.steps=1", "ema=null"), quiet=True).run()
    return [f"{file.name}\n".encode() + file.read_bytes() for file in sorted(_checkpoint_of(folder).iterdir())]


def _checkpoint_of(folder: Path) -> Path:
    return list_checkpoints(folder / "run" / "checkpoints")[-1]


def _read_checkpoint(folder: Path, content: bytes) -> None:
    """With hashes that fit, as an author who means harm would write them."""
    name, _, content = content.partition(b"\n")
    source = _checkpoint_of(folder.parent / "seeds")
    target = folder / "step-00000001"
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(content if file.name.encode() == name else file.read_bytes())
    if name != MANIFEST.encode():
        files = [f for f in sorted(target.iterdir()) if f.name != MANIFEST]
        hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        own = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
        (target / MANIFEST).write_text(json.dumps({"files": hashes, "self": own}))
    load_model(target)


def _parts(_: Path) -> list[bytes]:
    """The first of two parts of some tensors, as one process of two writes it."""
    return [_part(0)]


def _part(number: int) -> bytes:
    tensors = {"w": torch.ones(3, 2), "bias": torch.zeros(2), "step": torch.tensor(1.0)}
    if number:
        del tensors["step"]
    offsets = {"w": [3 * number, 0], "bias": [2 * number], "step": []}
    where = {name: {"saved_offsets": offsets[name]} for name in tensors}
    return save(tensors, metadata={"DCP_SHARDING_INFO": json.dumps(where)})


def _protocols(_: Path) -> list[bytes]:
    return [dump_yaml(find_protocol(name)).encode() for name in ("digits-pixels", "coco2014-fid30k")]


def _read_protocol(folder: Path, content: bytes) -> None:
    file = folder / "protocol.yaml"
    file.write_bytes(content)
    find_protocol(str(file))


def _prompt_files(_: Path) -> list[bytes]:
    """Each behind its ending."""
    return [b"txt\na red fox\na blue hen\n", b'jsonl\n{"prompt": "a red fox"}\n', b"csv\nprompt,more\na red fox,1\n"]


def _read_prompts(folder: Path, content: bytes) -> None:
    ending, _, content = content.partition(b"\n")
    file = folder / f"prompts.{ending.decode()}"
    file.write_bytes(content)
    Prompts(path=str(file)).captions()


def _pictures(_: Path) -> list[bytes]:
    image = Image.effect_noise((40, 24), 60).convert("RGB")
    return [encode(image, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM")]


def _read_picture(folder: Path, content: bytes) -> None:
    """As data and as what is judged."""
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(content)
    try:
        ImageFolder(path=str(folder / "images"), cache=str(folder / "cache")).load()
    finally:
        preparation = Preparation(encoding="jpeg" if is_lossy(content) else "lossless")
        open_images(str(folder / "images"), preparation, channels=3).rows(torch.arange(1))


def _references(_: Path) -> list[bytes]:
    file = io.BytesIO()
    np.savez(file, mu=np.zeros(8), sigma=np.eye(8))
    small = io.BytesIO()
    np.savez_compressed(small, mu=np.zeros(8), sigma=np.eye(8))
    return [file.getvalue(), small.getvalue()]


def _read_reference(folder: Path, content: bytes) -> None:
    (folder / "a.npz").write_bytes(content)
    open_reference(folder / "a.npz", label="pixels", num_images=100)


def _read_parts(folder: Path, content: bytes) -> None:
    (folder / "0.safetensors").write_bytes(content)
    (folder / "1.safetensors").write_bytes(_part(1))
    found = read_shards(folder, lambda _: None)
    assert all(tensor.numel() < 1000 for tensor in found.values())


READERS = {
    "config": Reader(_configs, _read_config),
    "override": Reader(_overrides, _read_override),
    "records": Reader(_records, _read_records),
    "EDM": Reader(_edm, _read_edm),
    "zip of images": Reader(_archives, _read_archive),
    "tar of samples": Reader(_shards, _read_shards),
    "npz": Reader(_arrays, _read_arrays),
    "protocol": Reader(_protocols, _read_protocol),
    "prompts": Reader(_prompt_files, _read_prompts, is_named=True),
    "picture": Reader(_pictures, _read_picture),
    "reference": Reader(_references, _read_reference),
    "checkpoint": Reader(_checkpoints, _read_checkpoint, is_named=True),
    "sharded checkpoint": Reader(_parts, _read_parts),
    **MORE_READERS,
}


def peak_bytes() -> int:
    """The most memory that this process has held."""
    import resource  # Unix alone has it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Fuzzer:
    """Feeds one reader.  tried, refused: files so far.  slowest: seconds of one.  added: bytes at the peak of all."""

    def __init__(self, name: str, folder: Path) -> None:
        self.reader, self.folder = READERS[name], folder
        self.tried = self.refused = self.added = 0
        self.slowest = 0.0
        (folder / "seeds").mkdir(parents=True)
        self.seeds = self.reader.seeds(folder / "seeds")
        self.before = peak_bytes()

    def feed(self, content: bytes) -> None:
        """One file. Raises whatever the reader should not have raised."""
        self.tried += 1
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            try:
                self.reader.read(Path(place), content)
            except UserError:
                self.refused += 1
        taken = time.perf_counter() - began
        self.slowest = max(self.slowest, taken)
        self.added = peak_bytes() - self.before
        assert taken < SLOW, f"{taken:.1f} s for {len(content)} bytes"
        assert self.added < LARGE, f"{self.added / 2**20:,.0f} MiB for {len(content)} bytes"

    def run(self, examples: int, number: int = 0) -> None:
        """So many changed files, a function of `number`. Raises what the smallest bad one gives."""

        @seed(number)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        )
        @given(st.sampled_from(range(len(self.seeds))), mutations)
        def one(which: int, changes: list[Mutation]) -> None:
            name, head, body = b"", b"", self.seeds[which]
            if self.reader.is_named:
                name, head, body = body.partition(b"\n")
            self.feed(name + head + mutated(body, changes))

        one()


def feed_for(seconds: float, fuzzer: Fuzzer, least: int = 0) -> int:
    """Changed files for so long and at least so many, or until one is neither read nor refused. Returns how many."""
    until, number = time.monotonic() + seconds, 0
    while time.monotonic() < until or fuzzer.tried < least:
        fuzzer.run(100, number := number + 1)
    return fuzzer.tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("readers", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    codes = [in_a_process_of_its_own(name, options.seconds) for name in options.readers or READERS]
    sys.exit(any(codes))


def in_a_process_of_its_own(name: str, seconds: float) -> int:
    """Feed a reader and print its row of the table, so that its peak is no other's. Returns the exit status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    code = 1
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["DIFFDISTILL_CACHE"] = folder
            fuzzer, found = Fuzzer(name, Path(folder)), "nothing"
            limit_memory()
            try:
                feed_for(seconds, fuzzer)
                code = 0
            except Exception as error:
                found = "see below"
                traceback.print_exception(error)
            told = f"{fuzzer.slowest:.1f} s | {fuzzer.added / 2**20:,.0f} MiB | {found}"
            print(f"| {name} | {fuzzer.tried:,} | {fuzzer.refused:,} | {told} |", flush=True)
    finally:
        os._exit(code)


def limit_memory() -> None:
    """Give this process two gigabytes of addresses more: who asks for more than it may fill is told so at once."""
    import resource

    if sys.platform == "linux":
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2 * LARGE, size + 2 * LARGE))


if __name__ == "__main__":
    main()
