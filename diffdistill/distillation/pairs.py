"""Pairs of noise and the image that a teacher's ODE makes of it."""

import json
from dataclasses import replace
from pathlib import Path as FilePath

import torch
from torch import Tensor

from diffdistill.data.gaussian import gaussian_of
from diffdistill.diffusion.denoiser import Denoiser, device_of
from diffdistill.diffusion.guidance_rules import LINEAR
from diffdistill.diffusion.sampling import TCD, AnySampler, FewSteps, Sampler
from diffdistill.diffusion.step_random import StepRandom
from diffdistill.diffusion.teleport import Teleport, rest_of_grid
from diffdistill.distillation.method import Batch, Method, Players, Problem
from diffdistill.networks.given import content_key
from diffdistill.settings.schema import UserError
from diffdistill.storage.atomic import write_tensors_atomically, write_text_atomically
from diffdistill.storage.checkpoint import read_tensors

CHUNK = 256  # noises in the teacher at once
SHARD = 16 * CHUNK  # pairs of one file
FACTS = "pairs.json"

Pairs = dict[str, Tensor]


class OnStoredPairs(Method):
    """A method of a student that learns a teacher's pairs, which are made before the first step.

    teleport: a setting of the method: pairs begin where a Gaussian of the run's images arrives, so it needs them.
    """

    teleport: float | None

    @property
    def needs_images(self) -> bool:
        return self.teleport is not None

    @property
    def one_shape(self) -> str | None:
        return None if self.teleport is None else "its stored pairs are of one size"


@torch.no_grad()
def teacher_pairs(
    problem: Problem,
    seed: int,
    count: int,
    sampler: Sampler,
    *,
    guidance: float,
    folder: str | None = None,
    held_out: int = 0,
    teleport: float | None = None,
) -> Pairs:
    """noise, unit: [N, ...]; image: [N, ...]; label: [N] int64, of all classes, whatever the run is about.

    N is `count`, and behind these the further pairs that are `held_out`.

    sampler: deterministic, so that an image is a function of its noise.  folder: keeps what is made, in shards: what
    was stopped goes on there, and a later run takes what fits.  teleport: see `check_teleport`, which was asked.
    Raises UserError without a teacher, and where the folder holds pairs of another teacher, sampler, scale, seed, list
    of prompts, or Gaussian.
    """
    teacher = problem.teacher
    if teacher is None:
        raise UserError("teacher: the pairs are sampled from a teacher; name a pretrained run")
    others = range(count, count + held_out)
    plain = sampler
    if teleport is not None:
        sampler = _teleported(problem, teacher, plain, teleport)
    if folder is None:
        return _joined(
            [_made(teacher, problem, seed, part, sampler, guidance) for part in (range(count), others) if part]
        )
    place = FilePath(folder).expanduser()
    _open(place, _facts(teacher, problem, seed, plain, guidance) | _facts_of_start(problem, teleport))
    shards = []
    for number, first in enumerate(range(0, count, SHARD)):
        file, indices = place / f"pairs-{number:06d}.safetensors", range(first, min(first + SHARD, count))
        shard = read_tensors(file, str(device_of(teacher))) if file.exists() else {}
        if len(shard.get("label", ())) < len(indices):
            shard = _made(teacher, problem, seed, indices, sampler, guidance)
            write_tensors_atomically(file, shard)
        shards.append({name: value[: len(indices)] for name, value in shard.items()})
    if others:
        shards.append(_made(teacher, problem, seed, others, sampler, guidance))
    return _joined(shards)


def _joined(parts: list[Pairs]) -> Pairs:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def memorisation(
    method: Method, players: Players, rng: StepRandom, problem: Problem, batch: Batch, pairs: int
) -> dict[str, float]:
    """The loss on pairs that were held out, behind the first `pairs` of those stored, over that on as many of these.

    The same noise levels for both. 1 where pairs are not told apart; it rises as a student learns its own by heart.
    Empty where none were held out, as in checkpoints of before.
    """
    held_out = len(batch.stored["label"]) - pairs
    if held_out <= 0:
        return {}
    fresh = pairs + torch.arange(held_out, device=rng.index.device)
    draw = method.draw(replace(rng, index=fresh), problem)
    loss = next(iter(method.updates)).loss
    found = [float(method.call(loss, players, draw | {"pair": pair}, batch).total) for pair in (fresh, draw["pair"])]
    return {"memorisation": found[0] / max(found[1], 1e-12)}


def check_deterministic(setting: str, sampler: AnySampler) -> None:
    """Raise ValueError, naming the setting, for a sampler whose image is no function of its noise."""
    is_fresh = isinstance(sampler, FewSteps) and sampler.later_noise == "fresh"
    is_fresh = is_fresh or (isinstance(sampler, TCD) and sampler.eta > 0)
    if is_fresh and sampler.num_evaluations > 1:
        raise ValueError(f"{setting}: {sampler.name} adds fresh noise between its steps; use heun or ddim")


def check_teleport(problem: Problem, sampler: Sampler, ratio: float | None, guidance: float) -> None:
    """Raise UserError where pairs cannot begin at this noise-to-signal ratio, at the data's Gaussian.

    Then Heun's steps above it are left out.  None: they begin at noise.
    """
    teacher, data = problem.teacher, problem.data
    if ratio is None or teacher is None:
        return
    setting = "method.teleport ="
    rest_of_grid(sampler, teacher.path, ratio, setting)
    faults = {
        "needs the run's images, of which the Gaussian is": data is None or len(data) < 2,
        "goes by class, and the teacher takes prompts; leave it out": teacher.conditions is not None,
        "goes with guidance in a straight line; leave guidance_rule out, or set guidance: 1": guidance != 1
        and teacher.runtime.guidance_rule != LINEAR,
    }
    for fault, is_so in faults.items():
        if is_so:
            raise UserError(f"{setting} {ratio:g}: {fault}")


def _teleported(problem: Problem, teacher: Denoiser, sampler: Sampler, ratio: float) -> Teleport:
    assert problem.data is not None
    rest, start = rest_of_grid(sampler, teacher.path, ratio, "method.teleport =")
    return Teleport(rest, start, gaussian_of(problem.data, by_class=bool(teacher.num_classes)))


def _made(teacher: Denoiser, problem: Problem, seed: int, indices: range, sampler: Sampler, guidance: float) -> Pairs:
    """The pairs of these numbers, each a function of (seed, number) and of what makes it."""
    rng = StepRandom(seed, 0, torch.arange(indices.start, indices.stop, device=device_of(teacher)))
    noise = rng.normal("pair noise", problem.image_shape)
    label = rng.integers("pair label", max(problem.num_classes, 1))
    parts = [
        sampler(teacher, noise[i : i + CHUNK], teacher.class_cond(label[i : i + CHUNK]), guidance=guidance)
        for i in range(0, len(noise), CHUNK)
    ]
    return {"noise": noise, "image": torch.cat(parts), "label": label}


def _facts(teacher: Denoiser, problem: Problem, seed: int, sampler: Sampler, guidance: float) -> dict[str, object]:
    """Whatever a pair depends on, besides its number."""
    classes, shape = problem.num_classes, list(problem.image_shape)
    made_by = {"teacher": content_key(teacher), "sampler": repr(sampler), "guidance": guidance}
    prompts = {} if teacher.conditions is None else {"conditions": teacher.conditions.key}  # a label is a prompt's
    return {"seed": seed, **made_by, **prompts, "num_classes": classes, "image_shape": shape, "shard": SHARD}


def _facts_of_start(problem: Problem, teleport: float | None) -> dict[str, object]:
    return {} if teleport is None else {"teleport": teleport, "data": problem.data.key if problem.data else None}


def _open(folder: FilePath, facts: dict[str, object]) -> None:
    """Make the folder, or see that its pairs are these."""
    file = folder / FACTS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        if found is None:
            write_text_atomically(file, json.dumps(facts, indent=1))
    except (OSError, ValueError) as error:
        raise UserError(f"pairs_folder = {str(folder)!r}: cannot be used: {error}") from None
    if found is not None and found != facts:
        known = found if isinstance(found, dict) else {}
        other = ", ".join(name for name in known | facts if known.get(name) != facts.get(name))
        raise UserError(f"pairs_folder = {str(folder)!r}: holds pairs with another {other}; name another folder")
