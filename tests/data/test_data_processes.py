"""Data at scale: shards and cached latents are read by number, in one order whatever the number of processes."""

import io
import json
import tarfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from conftest import small_config
from PIL import Image
from support.fleet import run_together
from support.stand_ins import save_stand_in
from torch import Tensor

from diffdistill.data.order import DataOrder
from diffdistill.data.source import ImageSource, LatentImages, MappedImages
from diffdistill.models import encoders
from diffdistill.storage.checkpoint import list_checkpoints, load_checkpoint
from diffdistill.training.config import RunConfig
from diffdistill.training.trainer import Trainer

SHARDS, EACH, BATCH = 3, 10, 8  # an epoch ends inside a step
PARTS = ((1, 2), (2, 3), (4, 3))
"""Processes and steps of the parts of a run. None ends with an epoch."""
STEPS = sum(steps for _, steps in PARTS)
ROUNDING = 1e-5  # of the largest number, after some steps of Adam in float32

MakeRun = Callable[[str, int], RunConfig]
Seen = list[list[int]]


def write_shards(folder: Path, side: int) -> Path:
    """Tars of captioned images of noise. Returns the pattern that means them all."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:02d}.tar", "w") as archive:
            for number in range(shard * EACH, (shard + 1) * EACH):
                picture = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(picture, "PNG")
                for ending, content in (("png", picture.getvalue()), ("txt", f"prompt {number % 4}".encode())):
                    about = tarfile.TarInfo(f"{number:03d}.{ending}")
                    about.size = len(content)
                    archive.addfile(about, io.BytesIO(content))
    return folder / f"{{00..{SHARDS - 1:02d}}}.tar"


@pytest.fixture(params=["webdataset", pytest.param("latents", marks=pytest.mark.full)])
def make_run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    """`make_run(name, steps)`: a run from shards, of the images themselves or of their latents and prompts."""
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(encoders, "LATENT_SHARD", 7)  # several, of another length than the tars
    has_latents = request.param == "latents"
    data = {"name": "webdataset", "path": str(write_shards(tmp_path / "shards", 16 if has_latents else 8))}
    teacher = save_stand_in("sd", tmp_path / "sd") if has_latents else None
    own = ("method.gan_weight=0.1", "method.steps={init_ratio: 10}") if has_latents else ()

    def make(name: str, steps: int) -> RunConfig:
        common = (f"data={json.dumps(data)}", f"train.steps={steps}", f"train.global_batch_size={BATCH}", "health=null")
        method = "dmd2" if has_latents else "pretrain"
        return small_config(method, tmp_path / name, *common, *own, "trackers=[]", teacher=teacher)

    return make


def train(config: RunConfig, *, resume: bool) -> tuple[type[ImageSource], Seen]:
    """What the images came from, and the numbers of those that this process was given, step by step."""
    taken, take = [], DataOrder.take

    def watched(self: DataOrder, first: int, count: int, *, next_first: int) -> tuple[Tensor, Tensor | None]:
        taken.append(self.rows(first, count).tolist())
        return take(self, first, count, next_first=next_first)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataOrder, "take", watched)
        trainer = Trainer(config, resume=resume, quiet=True)
        trainer.run()
    return type(trainer.plan.source), taken


def seen_by(count: int, config: RunConfig, *, resume: bool = False) -> tuple[type[ImageSource], Seen]:
    """The same for the whole batch, of so many processes."""
    if count == 1:
        return train(config, resume=resume)
    (kind, *_), parts = zip(*run_together(count, lambda: train(config, resume=resume)), strict=True)
    return kind, [[row for rows in step for row in rows] for step in zip(*parts, strict=True)]


def distance(first: RunConfig, second: RunConfig) -> float:
    """Between the ends of two runs, optimisers' states included, relative to the largest number."""
    one, other = (
        load_checkpoint(list_checkpoints(Path(run.run) / "checkpoints")[-1]).tensors for run in (first, second)
    )
    pairs = [(t, other[group][name]) for group, tensors in one.items() for name, t in tensors.items()]
    assert {group: tensors.keys() for group, tensors in one.items()} == {
        g: tensors.keys() for g, tensors in other.items()
    }
    return max(float((a - b).abs().max()) for a, b in pairs) / max(float(a.abs().max()) for a, _ in pairs)


def test_a_run_sees_the_same_images_whoever_goes_on_with_it(make_run: MakeRun) -> None:
    whole = make_run("whole", STEPS)
    kind, expected = seen_by(1, whole)
    found: Seen = []
    for (count, steps), end in zip(PARTS, accumulate(steps for _, steps in PARTS), strict=True):
        moved = make_run("moved", end)
        same_kind, seen = seen_by(count, moved, resume=bool(found))
        assert (same_kind, len(seen)) == (kind, steps)
        found += seen
    assert kind is (LatentImages if whole.method.name == "dmd2" else MappedImages)
    assert found == expected
    total = SHARDS * EACH
    order = [row for rows in expected for row in rows]
    epochs = [order[first : first + total] for first in range(0, STEPS * BATCH - total + 1, total)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(total))] * len(epochs)
    assert epochs[0] != epochs[1] != sorted(epochs[1])
    assert distance(whole, moved) <= ROUNDING


def test_processes_that_find_a_damaged_shard_say_it_once(
    make_run: MakeRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shard = tmp_path / "shards" / "01.tar"
    shard.write_bytes(shard.read_bytes()[:9000])
    assert (
        run_together(2, lambda: len(Trainer(make_run("run", 1), quiet=True).plan.source)) == [(SHARDS - 1) * EACH] * 2
    )
    assert capfd.readouterr().err.count("1 of 3 shards are damaged and are left out: 01.tar (") == 1


def test_a_run_s_warnings_name_the_shard_that_is_left_out_once(make_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "shards" / "01.tar").write_bytes(b"")
    for steps in (1, 2):
        Trainer(make_run("run", steps), resume=True, quiet=True).run()
    lines = (tmp_path / "run" / "warnings.txt").read_text().splitlines()
    assert [line for line in lines if "01.tar" in line] == [
        f"{tmp_path}/shards/{{00..02}}.tar: 1 of 3 shards are damaged and are left out: 01.tar (not a tar that can be "
        "read (compressed ones are not): empty file)"
    ]
