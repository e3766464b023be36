"""What is for something else than distance, each by the figure that it is for, the plain student beside it: as tables.

    python scripts/purpose_tables.py measure     # results/purposes.jsonl; minutes of one core; what is there is kept
    python scripts/purpose_tables.py table       # the records into docs/purposes.md

Three seeds of small MLPs on digits, each seed with a teacher of its own, one thread. `--only` measures single tables.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
import typer
from torch import Tensor

from diffdistill.data.digits import Digits
from diffdistill.diffusion.cond import NO_COND
from diffdistill.diffusion.sampling import Heun
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.teleport import LowRankGaussian, Teleport
from diffdistill.distillation.rewards import contrast
from diffdistill.eval.evaluation.digits import generate, score
from diffdistill.eval.metrics.distances import frechet_from_features
from diffdistill.models.load import load_model
from diffdistill.models.merge import merge_runs
from diffdistill.models.spec import TrainedModel
from diffdistill.models.styles import at_style
from diffdistill.networks.qat import QuantisedTraining, on_grid, stored_bytes
from diffdistill.training.config import find_config, load_config
from diffdistill.training.reports.health import mean_distance
from diffdistill.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
RECORDS, PAGE = ROOT / "results" / "purposes.jsonl", ROOT / "docs" / "purposes.md"
PER_CLASS, FORGOTTEN, EARLY = 180, 3, 300
TEACHER = ("model.network={name: mlp, width: 128, blocks: 3}", "train.steps=1500", "train.keep_checkpoints=9")
RATES = (
    "optimizers={generator: {lr: 5e-4, betas: [0, 0.999], decay: linear, decay_start: 0.5, clip_norm: 2000}, "
    "fake: {lr: 8e-4, betas: [0, 0.999], decay: linear, decay_start: 0.5, clip_norm: 100}}"
)
QUIET = ("train.num_threads=1", "train.preview_every=0", "health=null", "trackers=[]")
STEPS = "{init_ratio: 20, init_noise: sigma}"
PLAIN, SID = ("regression/digits", f"method.steps={STEPS}"), ("sid/digits", RATES, f"method.steps={STEPS}")
SLOWLY = ("optimizers.generator.lr=1.25e-4", "optimizers.fake.lr=4e-4", "train.steps=120", "ema.halflife_images=1000")
FURTHER = ("train.steps=200", "ema.halflife_images=2000")  # from the plain student on
Figures = dict[str, float]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class Seed:
    """The runs of one seed in a folder, each trained when it is first asked for."""

    def __init__(self, folder: Path, seed: int, scale: float) -> None:
        self.folder, self.seed, self.scale = folder / str(seed), seed, scale

    def run(self, name: str, config: str, *overrides: str) -> Path:
        place = self.folder / name
        given = (f"run={place}", f"train.seed={self.seed}", *overrides, *QUIET)
        found = load_config(find_config(config), given)
        train = replace(found.train, steps=max(1, int(self.scale * found.train.steps)))
        Trainer(replace(found, train=train), quiet=True, resume=place.exists()).run()
        return place

    @cached_property
    def teacher(self) -> Path:
        return self.run("teacher", "pretrain/digits", *TEACHER, f"train.checkpoint_every={self.early}")

    @property
    def early(self) -> int:
        """The step of the teacher that has not learnt long."""
        return max(1, int(self.scale * EARLY))

    def student(self, name: str, config: str, *overrides: str) -> Path:
        return self.run(name, config, f"teacher={self.teacher}", *overrides)

    @cached_property
    def plain(self) -> Path:
        """By regression on 4,000 pairs."""
        return self.student("plain", *PLAIN, "train.steps=1200")

    @cached_property
    def trained_on(self) -> Path:
        """The plain student, trained on by SiD."""
        return self.further("trained-on", *SID)

    def further(self, name: str, config: str, *overrides: str) -> Path:
        return self.student(name, config, f"init={self.plain}", *FURTHER, *overrides)

    @cached_property
    def guided(self) -> Path:
        """The plain student, trained on by SiD under guidance."""
        return self.further("guided", *SID, "method.guidance=1.5", *SLOWLY)


def forget(seed: Seed) -> Iterator[tuple[str, Figures]]:
    """Share of images that the nearest training image calls forgotten, and the FD of the rest."""
    images, labels = Digits(split="train").tensors()
    others = images[labels != FORGOTTEN]
    base, shares = f"method.base.steps={STEPS}", (0.1, 0.3)
    made = {"teacher": seed.teacher, "plain student": seed.plain, "the same, 200 steps of SiD": seed.trained_on}
    for part in shares:
        place = seed.further(f"forget-{part}", "forget/digits", RATES, base, f"method.share={part}")
        made[f"`forget` around SiD, 200 steps, share {part:g}"] = place
    asked = torch.arange(10 * PER_CLASS) // PER_CLASS
    for name, place in made.items():
        found = samples(place)
        called = nearest(found)
        yield (
            name,
            {
                "called three, of all": share(called),
                "called three, of those asked for one": share(called[asked == FORGOTTEN]),
                "FD of the rest": frechet(found[asked != FORGOTTEN], others),
            },
        )
    real, of = Digits(split="test").tensors()
    yield "test images of the rest", {"called three, of all": share(nearest(real[of != FORGOTTEN]))}


def reward(seed: Seed) -> Iterator[tuple[str, Figures]]:
    """Mean contrast, the reward, against the distance."""
    yield "training images", {"reward": float(contrast(_training()[0], NO_COND).mean())}
    yield "plain student", rewarded(seed.plain)
    steps = f"method.steps={STEPS}"
    yield "`pso`, 200 steps", rewarded(seed.further("pso", "pso/digits", steps))
    yield "`pso`, 60 steps at a tenth of the rate", rewarded(seed.further("pso-slow", "pso/digits", steps, *TENTH))
    for strength in (0.2, 1.0):
        given = (steps, f"method.strength={strength}", *HALF)
        place = seed.further(f"field-{strength}", "preference_field/digits", *given)
        yield f"`preference_field`, strength {strength:g}, 200 steps", rewarded(place)


TENTH = ("optimizers.generator.lr=1e-5", "train.steps=60", "ema.halflife_images=500")
HALF = ("optimizers.generator.lr=1.5e-4", "optimizers.default.lr=3e-4")


def diversity(seed: Seed) -> Iterator[tuple[str, Figures]]:
    """Quality against diversity: guidance 1.5 alone, with the reward, and merged with the plain student."""
    yield "plain student", varied(samples(seed.plain))
    yield "guided, 120 steps of SiD", varied(samples(seed.guided))
    for weight in (0.25, 1.0):
        more = (f"method.weight={weight}", "method.base.guidance=1.5", f"method.base.steps={STEPS}", *SLOWLY)
        place = seed.further(f"diverse-{weight}", "diversity/digits", RATES, *more)
        yield f"guided, `diversity` of weight {weight:g}", varied(samples(place))
    for weight in (0.25, 0.5, 0.75):
        place = seed.folder / f"merged-{weight}"
        if not place.exists():
            merge_runs([seed.guided, seed.plain], place, (weight,))
        yield f"`merge`, {weight:g} of the plain one", varied(samples(place))


def bits(seed: Seed) -> Iterator[tuple[str, Figures]]:
    """Bits of the weights in the blocks against bytes and distance, trained so and rounded alone."""
    whole = load_model(seed.plain)
    yield "32, the plain student", {"KiB": stored_bytes(whole.denoiser.net, None) / 1024, **distance(whole)}
    for number in (8, 4, 3, 2):
        few, rounded = QuantisedTraining(bits=number), load_model(seed.plain)
        on_grid(rounded.denoiser.net, few)
        place = seed.further(f"bits-{number}", *PLAIN, f"qat={{bits: {number}}}")
        figures = {"KiB": stored_bytes(whole.denoiser.net, few) / 1024, **distance(load_model(place))}
        yield f"{number}", {**figures, "fd-pixels, rounded alone": distance(rounded)["fd-pixels"]}


def styles(seed: Seed) -> Iterator[tuple[str, Figures]]:
    """Two teachers and one student in either style: the distance to the data, and to either teacher's images."""
    early = seed.teacher / "checkpoints" / f"step-{seed.early:08d}"
    teachers = {"early": load_model(early), "late": load_model(seed.teacher)}
    place = seed.student(
        "merged",
        "merge_teachers/digits",
        f"teachers={{early: {early}, late: {seed.teacher}}}",
        "method.feature_weight=0",
        "method.feature_taps=null",
        "train.steps=400",
    )
    student = load_model(place)
    models = {f"teacher {name}": model for name, model in teachers.items()}
    models |= {f"student, as {name}": at_style(student, name) for name in teachers}
    models["student, half of each"] = at_style(student, "early=0.5,late=0.5")
    images = {name: generated(model) for name, model in models.items()}
    for name, made in images.items():
        apart = {f"RMS to {other}": rms(made, images[f"teacher {other}"]) for other in teachers}
        yield name, {"fd-pixels": score(made).fd_pixels, **apart}


def teleport(seed: Seed) -> Iterator[tuple[str, Figures]]:
    """Heun's first steps by a Gaussian of the data, beside Heun with as few evaluations from the start."""
    gaussian = LowRankGaussian.fit(*Digits(split="train").tensors())
    model = load_model(seed.teacher)
    heun, path = model.spec.sampler, model.denoiser.path
    assert isinstance(heun, Heun)
    grid = path.karras_times(heun.num_steps, heun.rho)
    index = torch.arange(10 * PER_CLASS)
    noise = StepRandom(seed.seed, 0, index).normal("z", model.spec.image_shape)
    cond = model.denoiser.class_cond(index // PER_CLASS)
    with torch.no_grad():
        whole = heun(model.denoiser, noise, cond)
        for left in (0, 4, 8, 10, 12):
            rest = replace(heun, num_steps=heun.num_steps - left)
            start = float(path.ratio(grid[left]))
            made = Teleport(rest, start, gaussian)(model.denoiser, noise, cond) if left else whole
            shorter = rest(model.denoiser, noise, cond)
            yield (
                f"{left}",
                {
                    "evaluations": rest.num_evaluations,
                    "RMS from the whole grid's": rms(made, whole),
                    "the same of fewer steps": rms(shorter, whole),
                    "fd-pixels": score(made).fd_pixels,
                    "the same of fewer steps ": score(shorter).fd_pixels,
                },
            )


TABLES: dict[str, Callable[[Seed], Iterator[tuple[str, Figures]]]] = {
    "forget": forget,
    "reward": reward,
    "diversity": diversity,
    "bits": bits,
    "styles": styles,
    "teleport": teleport,
}


def samples(place: Path) -> Tensor:
    return generated(load_model(place))


def generated(model: TrainedModel) -> Tensor:
    """The protocol's images, class by class."""
    return generate(model.denoiser, model.spec.sampler)


def distance(model: TrainedModel) -> Figures:
    return {"fd-pixels": score(generated(model)).fd_pixels}


def rewarded(place: Path) -> Figures:
    made = samples(place)
    found = score(made)
    return {"reward": float(contrast(made, NO_COND).mean()), "fd-pixels": found.fd_pixels, "recall": found.recall}


def varied(made: Tensor) -> Figures:
    """Diversity is the mean RMS distance of two images of one class over that of the training images."""
    found, labels = score(made), torch.arange(len(made)) // PER_CLASS
    apart = mean_distance(made, labels) / mean_distance(*Digits(split="train").tensors())
    return {"fd-pixels": found.fd_pixels, "precision": found.precision, "recall": found.recall, "diversity": apart}


def frechet(made: Tensor, real: Tensor) -> float:
    return frechet_from_features(made.flatten(1), real.flatten(1))


def rms(made: Tensor, wanted: Tensor) -> float:
    return float((made - wanted).square().mean().sqrt())


def nearest(images: Tensor) -> Tensor:
    """The class of the nearest training image, [B]."""
    known, labels = _training()
    return labels[torch.cdist(images.flatten(1), known.flatten(1)).argmin(1)]


@cache
def _training() -> tuple[Tensor, Tensor]:
    return Digits(split="train").tensors()


def share(called: Tensor) -> float:
    return float((called == FORGOTTEN).double().mean())


@app.command()
def measure(
    folder: Annotated[Path, typer.Option(help="Where the runs are.")] = ROOT / "runs" / "purposes",
    records: Annotated[Path, typer.Option(help="Where the records are.")] = RECORDS,
    seeds: Annotated[int, typer.Option(help="Seeds, so many from `first`.", min=1)] = 3,
    first: Annotated[int, typer.Option(help="The first seed.", min=0)] = 0,
    only: Annotated[list[str] | None, typer.Option(help="A table's name; may be given again.")] = None,
    scale: Annotated[float, typer.Option(help="Of all runs' steps, for a trial.", min=0)] = 1.0,
) -> None:
    """Train what is not there yet, and add a line for each row and seed."""
    torch.set_num_threads(1)
    there = {(r["table"], r["seed"]) for r in _read(records)}
    for number in range(first, first + seeds):
        seed = Seed(folder, number, scale)
        for name in only or TABLES:
            if (name, number) in there:
                continue
            rows = [{"table": name, "row": row, "seed": number, "figures": f} for row, f in TABLES[name](seed)]
            records.parent.mkdir(exist_ok=True)
            with records.open("a", encoding="utf-8") as lines:
                lines.writelines(json.dumps(row) + "\n" for row in rows)
            print(f"{name}, seed {number}: {len(rows)} rows", flush=True)


@app.command()
def table(
    records: Annotated[Path, typer.Option(help="Where the records are.")] = RECORDS,
    page: Annotated[Path, typer.Option(help="The page with a mark for each table.")] = PAGE,
) -> None:
    """Put each table between its marks."""
    text, found = page.read_text(encoding="utf-8"), _read(records)
    for name in TABLES:
        made = "\n".join(_table([r for r in found if r["table"] == name]))
        mark, end = f"<!-- table: {name} -->", "<!-- end -->"
        before, rest = text.split(mark)
        text = f"{before}{mark}\n\n{made}\n\n{end}{rest.split(end, 1)[1]}"
    page.write_text(text, encoding="utf-8")


def _read(records: Path) -> list[dict]:
    return [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()] if records.exists() else []


def _table(records: list[dict]) -> Iterator[str]:
    columns = list(dict.fromkeys(column for r in records for column in r["figures"]))
    yield "| | " + " | ".join(c.strip() for c in columns) + " |"
    yield "|---|" + "---|" * len(columns)
    for row in dict.fromkeys(r["row"] for r in records):
        cells = [_cell([r["figures"][c] for r in records if r["row"] == row and c in r["figures"]]) for c in columns]
        yield f"| {row} | " + " | ".join(cells) + " |"


def _cell(values: list[float]) -> str:
    """The mean, and the least and the greatest of the seeds."""
    if not values:
        return ""
    if min(values) == max(values):
        return f"{values[0]:.4g}"
    return f"{fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    app()
