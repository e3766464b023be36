"""A teacher, then any methods, within a budget of time, in slices that can be resumed.

    python scripts/budget.py cifar10 --data "{name: cifar10, root: data, download: true}" --weights resnet20.th
    python scripts/budget.py mnist --data "{name: mnist, root: data, download: true}"

CIFAR-10's budget is an hour of one GPU, MNIST's three hours of one CPU core. Call it again until it says that all is
done: a call takes one slice. The budget is of seconds in which training or measuring ran, written down every few
seconds, so that a killed slice counts, too. The teacher has its share of it, a tenth is for measuring, and the methods
share the rest; each one's steps follow from the time that its first ones take (MNIST's from their CPU time, so that
other work on the machine does not count). The records go to FOLDER/records.jsonl, a picture to FOLDER/samples.png.

--smoke: 50 steps of tiny networks and 60 images: does everything work here? It says nothing about any method.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from diffdistill.data.pictures import save_rows
from diffdistill.eval.features.extractors import Pixels
from diffdistill.eval.metrics.settings import Frechet
from diffdistill.eval.protocols.packaged import PROTOCOLS
from diffdistill.inference.draw import sample_images
from diffdistill.models.load import load_model
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import dump, read_yaml
from diffdistill.storage.atomic import write_text_atomically
from diffdistill.training.config import find_config

TEACHER, PROBE, BEAT = "pretrain", 30, 5  # phases' name, steps that are timed, seconds
COLUMNS, SIDE = 10, 84  # of the picture: images a row, pixels at least


@dataclass(frozen=True)
class Plan:
    """What one set of images gets: recipes NAME_budget of these methods, within so many minutes; protocols, and the
    features' label of each.  teacher: its share of the time.  clock: that the time of a step is read from, as it
    stands in metrics.jsonl.  tiny: the teacher's network where all is to be tried only."""

    minutes: float
    teacher: float
    clock: str
    methods: tuple[str, ...]
    protocols: Mapping[str, str]
    tiny: str


PLANS = {
    "cifar10": Plan(
        minutes=60,
        teacher=0.5,
        clock="seconds",
        methods=("dmd2", "sid", "f_distill"),
        protocols={"cifar10-resnet20": "resnet20-cifar", "cifar10-efficientnet-lite0": "efficientnet-lite0"},
        tiny="{name: ddpmpp, channels: 16, multipliers: [1, 2], blocks: 1, dropout: 0}",
    ),
    "mnist": Plan(
        minutes=180,
        teacher=0.2,
        clock="cpu_seconds",
        methods=("regression", "dmd2", "sid", "f_distill", "sim"),
        protocols={"mnist-pixels": "pixels", "mnist-efficientnet-lite0": "efficientnet-lite0"},
        tiny="{name: unet, channels: [8, 16], attention: [false, true]}",
    ),
}
SMOKE = ("train.global_batch_size=8", "train.checkpoint_every=20", "train.preview_every=0", "train.precision=fp32")


class Budget:
    """FOLDER/budget.json: the seconds that each phase has used, and the steps that it was given."""

    def __init__(self, folder: Path, plan: Plan, minutes: float | None, methods: Sequence[str]) -> None:
        self.file, self.total, self.clock = folder / "budget.json", 60 * (minutes or plan.minutes), plan.clock
        share = (0.9 - plan.teacher) / len(methods)
        self.shares = {TEACHER: plan.teacher, "measuring": 0.1} | dict.fromkeys(methods, share)
        kept: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.seconds: dict[str, float] = kept.get("seconds", {})
        self.steps: dict[str, int] = kept.get("steps", {})

    def left(self, phase: str) -> float:
        return self.shares[phase] * self.total - self.seconds.get(phase, 0.0)

    def charge(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self.save()

    def save(self) -> None:
        kept = {"seconds": {k: round(v, 1) for k, v in self.seconds.items()}, "steps": self.steps}
        write_text_atomically(self.file, json.dumps(kept, indent=1) + "\n")


class Slice:
    """One call's time."""

    def __init__(self, minutes: float, budget: Budget) -> None:
        self.end, self.budget = time.monotonic() + 60 * minutes, budget
        self.is_whole = True  # nothing has run in it

    def run(self, phase: str, *command: str) -> bool:
        """Run a command of ours to its end, or until the slice ends; charged as it goes. Returns whether it ended.

        Ends the program with the command's message if it fails.
        """
        self.is_whole = False
        process = subprocess.Popen([sys.executable, "-m", "diffdistill", *command], stderr=subprocess.PIPE, text=True)
        try:
            while True:
                began = time.monotonic()
                try:
                    _, said = process.communicate(timeout=min(BEAT, max(self.end - began, 0.1)))
                except subprocess.TimeoutExpired:
                    self.budget.charge(phase, time.monotonic() - began)
                    if time.monotonic() >= self.end:
                        process.send_signal(signal.SIGTERM)  # it saves a checkpoint and leaves
                        process.communicate()
                        return False
                    continue
                self.budget.charge(phase, time.monotonic() - began)
                if process.returncode:
                    sys.exit(f"{phase}: {' '.join(command)}\n{said.strip()[-2000:]}")
                return True
        finally:
            if process.poll() is None:
                process.kill()


def main(
    images: Annotated[str, typer.Argument(help=f"Of which set: {', '.join(PLANS)}.")],
    data: Annotated[str | None, typer.Option(help="Its training images, as under `data` of a config.")] = None,
    weights: Annotated[str | None, typer.Option(help="The ResNet-20's file, resnet20.th.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="May be given again. Default: the plan's.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Default: runs/IMAGES-budget.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Of training and measuring, in all.")] = None,
    slice_minutes: Annotated[float, typer.Option(help="Of one call.")] = 9.0,
    smoke: Annotated[bool, typer.Option("--smoke", help="A few steps only.")] = False,
) -> None:
    """One slice."""
    if images not in PLANS:
        sys.exit(f"error: {images}: choose from {', '.join(PLANS)}")
    plan = PLANS[images]
    methods, data = method or list(plan.methods), data or f"{{name: {images}}}"
    try:
        configs = {name: find_config(f"{name}/{images}_budget") for name in (TEACHER, *methods)}
    except UserError as error:
        sys.exit(f"error: {error}")
    folder = folder or Path(f"runs/{images}-budget")
    folder.mkdir(parents=True, exist_ok=True)
    budget = Budget(folder, plan, minutes, methods)
    part = Slice(slice_minutes, budget)
    for phase, config in configs.items():
        given = [f"data={data}", *(SMOKE if smoke else ())]
        if phase != TEACHER:
            given.append(f"teacher={folder / TEACHER}")
        elif smoke:
            given.append(f"model.network={plan.tiny}")
        if not _train(phase, config, given, folder, part, steps=50 if smoke else None):
            return _say_rest(budget, phase)
    for protocol, known in plan.protocols.items():
        # Of the ResNet-20 there is but one file of weights, and what is tried only may go without it.
        label = Pixels().label if smoke and not weights and known == "resnet20-cifar" else known
        if not _measure(protocol, label, [TEACHER, *methods], folder, part, data, weights, is_smoke=smoke):
            return _say_rest(budget, "measuring")
    _draw([TEACHER, *methods], folder)
    used = sum(budget.seconds.values()) / 60
    print(f"all is done: {folder}/records.jsonl, {folder}/samples.png; {used:.1f} minutes were used")
    return None


def _train(phase: str, config: Path, given: Sequence[str], folder: Path, part: Slice, *, steps: int | None) -> bool:
    """Train one model to its end, or as far as the slice goes. Returns whether it is at its end."""
    command = "pretrain" if phase == TEACHER else "train"
    budget = part.budget
    if phase not in budget.steps:
        found = steps or _affordable(phase, command, config, given, folder, part)
        if found is None:
            return False
        budget.steps[phase] = found
        budget.save()
    last = folder / phase / "checkpoints" / f"step-{budget.steps[phase]:08d}"
    place = [f"run={folder / phase}", f"train.steps={budget.steps[phase]}"]
    return last.exists() or part.run(phase, command, str(config), *given, *place, "--resume")


def _affordable(phase: str, command: str, config: Path, given: Sequence[str], folder: Path, part: Slice) -> int | None:
    """How many steps fit into the phase's share, by the time of the later half of a few; None where the slice ends
    first.  Ends the program where a whole slice is too short for them."""
    run, was_whole = folder / "timing" / f"{phase}-{os.getpid()}", part.is_whole
    few = (f"run={run}", f"train.steps={PROBE}", f"train.log_every={PROBE // 6}", "train.preview_every=0")
    if not part.run(phase, command, str(config), *given, *few):
        return sys.exit(f"{phase}: {PROBE} steps do not fit into a slice") if was_whole else None
    reports = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    half = reports[len(reports) // 2 - 1]
    clock = part.budget.clock
    seconds = (reports[-1][clock] - half[clock]) / (reports[-1]["step"] - half["step"])
    return max(PROBE, int(0.95 * part.budget.left(phase) / seconds))


def _measure(
    protocol: str,
    label: str,
    names: Sequence[str],
    folder: Path,
    part: Slice,
    data: str,
    weights: str | None,
    *,
    is_smoke: bool,
) -> bool:
    """Add a record for each model that has none by this protocol. Returns whether all have."""
    own = [f"--weights={label}={weights}"] if weights and label == "resnet20-cifar" else []
    chosen = _small(protocol, label, folder) if is_smoke else protocol
    images = folder / "real"
    file = images / f"{PROTOCOLS[protocol].reference.name}-{label}.npz"  # type: ignore[union-attr]
    if not file.exists() and not part.run(
        "measuring", "reference", data, f"--protocol={chosen}", f"--out={images}", *own
    ):
        return False
    records = folder / "records.jsonl"
    for name in names:
        title = f"{name}, {protocol}"
        if records.exists() and f'"name": "{title}"' in records.read_text():
            continue
        options = [
            f"--protocol={chosen}",
            f"--name={title}",
            f"--records={records}",
            f"--reference={label}={file}",
            *own,
        ]
        if not part.run("measuring", "eval", str(folder / name), *options):
            return False
    return True


def _draw(names: Sequence[str], folder: Path) -> None:
    """FOLDER/samples.png: a row of each model's images, from the same noise and of the same classes."""
    rows = {}
    for name in names:
        model, label = load_model(folder / name), "teacher" if name == TEACHER else name
        rows[f"{label}\n{model.spec.sampler.num_evaluations} NFE"] = sample_images(model, count=COLUMNS)
    save_rows(folder / "samples.png", rows, min_side=SIDE)


def _small(protocol: str, label: str, folder: Path) -> str:
    """The protocol on 60 images, under another name.  label: of its features, or of pixels in their place."""
    full = PROTOCOLS[protocol]
    assert full.reference is not None
    first = full.metrics[0]
    assert isinstance(first, Frechet)
    if label == Pixels().label:
        first = replace(first, features=Pixels())
    reference = replace(full.reference, num_images=200)
    small = replace(full, name=f"{protocol}-smoke", num_images=60, reference=reference, metrics=(first,))
    file = folder / f"{small.name}.yaml"
    file.write_text(yaml.safe_dump(dump(small), sort_keys=False))
    assert read_yaml(file)
    return str(file)


def _say_rest(budget: Budget, phase: str) -> None:
    used = sum(budget.seconds.values()) / 60
    print(f"this slice ended in {phase}; {used:.1f} of {budget.total / 60:.0f} minutes are used; call again to go on")


if __name__ == "__main__":
    typer.run(main)
