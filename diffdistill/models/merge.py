"""Weights of runs between those of others: a linear mix of checkpoints.

Cideron et al. 2024, arXiv:2410.06084, mix a model of quality with one of diversity; Wortsman et al. 2022,
arXiv:2203.05482, average models that began alike.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from diffdistill.models.load import PLAYERS, find_checkpoint, find_teacher, is_routed
from diffdistill.models.places import SHA256, content_of
from diffdistill.models.spec import ModelSpec
from diffdistill.networks.lora import LoRASettings, lora_settings_of, with_lora_settings
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import dump, validate
from diffdistill.storage.checkpoint import (
    Checkpoint,
    flatten,
    list_checkpoints,
    list_groups,
    load_checkpoint,
    save_checkpoint,
    select_group,
)

AGREED = 1e-6  # of weights that sum to one
MERGED = "merged"  # in a checkpoint's state: what it was mixed of
ENDS = {".lora_A.weight": 0, ".lora_B.weight": 1}
"""The ends of factors' names, and the axis of each that is the rank."""

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Merged:
    """folder: the checkpoint.  players: that were mixed; left_out: those that not all runs have alike.
    has_one_start: whether all runs began at the same teacher; mixes of others are noise."""

    folder: FilePath
    players: tuple[str, ...]
    left_out: tuple[str, ...]
    has_one_start: bool


@dataclass(frozen=True)
class _Run:
    target: FilePath
    checkpoint: Checkpoint
    spec: ModelSpec

    @property
    def student(self) -> str:
        return str(self.checkpoint.state["student"])

    @property
    def players(self) -> list[str]:
        return sorted({name.partition(".")[0] for name in self.checkpoint.tensors["players"]})

    def of(self, player: str, group: str = "players") -> Weights:
        """Its weights; of an average that the run does not have the player's own."""
        tensors = self.checkpoint.tensors
        return select_group(tensors.get(group, tensors["players"]), player)


def merge_runs(
    places: Sequence[str | FilePath],
    out: FilePath,
    weights: Sequence[float],
    by_player: Mapping[str, Sequence[float]] | None = None,
) -> Merged:
    """Write out/checkpoints/step-..., sum_i w_i theta_i, of players and averages alike.

    places: runs or checkpoints of one architecture.  weights: one for each, which sum to 1; of two runs, that of the
    second is enough.  by_player: other weights, by player. Steps, sampler and config are the first's.
    LoRA's factors: their products are mixed, exactly, by factors side by side; of such runs only the student is kept.
    Raises UserError where the runs do not fit, and where `out` holds a run.
    """
    if list_checkpoints(out / "checkpoints"):
        raise UserError(f"--out {out}: holds a run already; name a new folder")
    runs = [_read(place) for place in places]
    _check_alike(runs)
    first, has_factors = runs[0], runs[0].spec.base is not None
    shared = [name for name in first.players if name == first.student or _is_shared(name, runs)]
    kept = [first.student] if has_factors else shared
    unknown = sorted(set(by_player or {}) - set(kept))
    if unknown:
        raise UserError(f"--player {unknown[0]}: not one of the merged players: {', '.join(kept)}")
    shares = {name: _shares((by_player or {}).get(name, weights), len(runs)) for name in kept}
    averages = {group for run in runs for group in run.checkpoint.tensors if _is_average(group)}
    averages = {name for name in averages if name == "ema" or all(name in run.checkpoint.tensors for run in runs)}
    members = {"players": kept, **{name: [first.student] for name in sorted(averages)}}
    mixed = _mixed_factors if has_factors else _mixed
    tensors = {
        group: flatten({name: mixed(runs, shares[name], name, group, members) for name in names})
        for group, names in members.items()
    }
    state = _state(runs, kept, shares, tensors)
    try:
        made = save_checkpoint(out / "checkpoints", Checkpoint(first.checkpoint.step, tensors, state), keep=1)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from None
    left_out = sorted({name for run in runs for name in run.players} - set(kept))
    starts = {str((run.checkpoint.state.get(SHA256) or {}).get("teacher")) for run in runs}
    return Merged(made, tuple(kept), tuple(left_out), len(starts) == 1)


def read_weights(text: str) -> tuple[str, tuple[float, ...]]:
    """`generator=0.3` or `generator=0.2,0.3,0.5` as a player's name and its weights. Raises UserError."""
    name, _, told = text.partition("=")
    try:
        weights = tuple(float(number) for number in told.split(","))
    except ValueError:
        weights = ()
    if not name or not weights or not all(math.isfinite(weight) for weight in weights):
        raise UserError(f"--player {text}: give a player and its weights, as in fake=0.5")
    return name, weights


def mix(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """sum_i w_i x_i, in float64 around the heaviest: equal tensors, and a weight of 1, give a tensor's own bits."""
    heaviest = max(range(len(shares)), key=lambda i: shares[i])
    origin = tensors[heaviest]
    if not origin.is_floating_point():
        if any(not torch.equal(origin, other) for other in tensors):
            raise UserError("merge: the runs hold integers that differ, which cannot be merged")
        return origin.clone()
    total = origin.double()
    for tensor, share in zip(tensors, shares, strict=True):
        total = total + share * (tensor.double() - origin.double())
    return total.to(origin.dtype)


def mix_factors(parts: Sequence[Weights], gains: Sequence[float], shares: Sequence[float]) -> dict[str, Tensor]:
    """Factors whose product is sum_i gain_i B_i A_i: A one above the other, B side by side. Other weights are mixed by
    their shares."""
    made = {}
    for name in parts[0]:
        axis = next((axis for end, axis in ENDS.items() if name.endswith(end)), None)
        columns = [part[name] for part in parts]
        if axis is None:
            made[name] = mix(columns, shares)
        else:
            scaled = columns if axis == 0 else [gain * one for gain, one in zip(gains, columns, strict=True)]
            made[name] = torch.cat(scaled, axis)
    return made


def _mixed(
    runs: Sequence[_Run], shares: Sequence[float], player: str, group: str, members: Mapping[str, list[str]]
) -> dict[str, Tensor]:
    parts = [run.of(player, group) for run in runs]
    return {name: mix([part[name] for part in parts], shares) for name in parts[0]}


def _mixed_factors(
    runs: Sequence[_Run], shares: Sequence[float], player: str, group: str, members: Mapping[str, list[str]]
) -> dict[str, Tensor]:
    """Runs of no weight are left out, and runs of equal weights are one, so that ranks do not grow in vain."""
    found: list[tuple[_Run, float]] = []
    for run, share in zip(runs, shares, strict=True):
        same = next((n for n, (other, _) in enumerate(found) if _is_equal(run, other, player, members)), None)
        if same is None:
            found.append((run, share))
        else:
            found[same] = (run, found[same][1] + share)
    kept = [(run, 1.0 if abs(share - 1) <= AGREED else share) for run, share in found if share]
    gains = [share * _scale(run.spec) / _scale(runs[0].spec) for run, share in kept]
    return mix_factors([run.of(player, group) for run, _ in kept], gains, [share for _, share in kept])


def _is_equal(run: _Run, other: _Run, player: str, members: Mapping[str, list[str]]) -> bool:
    """Whether two runs have a player's very weights, in all groups, at one scale."""
    both = [(run.of(player, group), other.of(player, group)) for group in members]
    return _scale(run.spec) == _scale(other.spec) and all(
        tensor.shape == theirs[name].shape and torch.equal(tensor, theirs[name])
        for own, theirs in both
        for name, tensor in own.items()
    )


def _is_average(group: str) -> bool:
    return group == "ema" or group.startswith("ema-")


def _read(place: str | FilePath) -> _Run:
    if is_routed(FilePath(place)):
        raise UserError(f"{place}: holds joined students; merge them one by one")
    target = find_checkpoint(FilePath(place))
    groups = tuple(group for group in list_groups(target) if group == "players" or _is_average(group))
    checkpoint = load_checkpoint(target, groups=groups)
    if "student" not in checkpoint.state:
        raise UserError(f"{target}/state.json: does not name a student")
    spec = validate(ModelSpec, checkpoint.state.get("model"), origin=f"{target}/state.json", is_saved=True)
    return _Run(target, checkpoint, spec)


def _check_alike(runs: Sequence[_Run]) -> None:
    if len(runs) < 2:
        raise UserError("merge: needs at least two runs")
    first = runs[0]
    for run in runs[1:]:
        if _plain(run.spec) != _plain(first.spec) or run.student != first.student:
            raise UserError(f"{run.target}: another network, image shape, sampler or LoRA's base than {first.target}")
        if not _is_shared(first.student, (first, run), takes_ranks=True):
            raise UserError(f"{run.target}: names or shapes of its weights differ from {first.target}")


def _plain(spec: ModelSpec) -> ModelSpec:
    """What has to be the same: not the classes, nor the rank of factors."""
    plain = replace(spec, classes=(), class_names=())
    found = lora_settings_of(spec.model.network)
    if found is None:
        return plain
    network = with_lora_settings(spec.model.network, replace(found, rank=1, alpha=None, dropout=0.0))
    return replace(plain, model=replace(spec.model, network=network))


def _is_shared(player: str, runs: Sequence[_Run], *, takes_ranks: bool = False) -> bool:
    """Whether all runs have the player, with weights of the same names and shapes.  takes_ranks: but for ranks."""
    kinds = [(run.checkpoint.state.get(PLAYERS) or {}).get(player) for run in runs]
    shapes = [{name: _shape(name, tensor, takes_ranks) for name, tensor in run.of(player).items()} for run in runs]
    return bool(shapes[0]) and all(one == shapes[0] for one in shapes) and all(kind == kinds[0] for kind in kinds)


def _shape(name: str, tensor: Tensor, takes_ranks: bool) -> tuple[int, ...]:
    axis = next((axis for end, axis in ENDS.items() if name.endswith(end)), None) if takes_ranks else None
    return tuple(-1 if place == axis else size for place, size in enumerate(tensor.shape))


def _shares(weights: Sequence[float], count: int) -> tuple[float, ...]:
    shares = (1 - weights[0], weights[0]) if len(weights) == 1 and count == 2 else tuple(weights)
    if len(shares) != count:
        raise UserError(f"--weight: {count} runs need as many weights; there are {len(shares)}")
    if abs(sum(shares) - 1) > AGREED:
        raise UserError(f"--weight: must sum to 1; {' + '.join(f'{share:g}' for share in shares)} = {sum(shares):g}")
    return shares


def _settings(spec: ModelSpec) -> LoRASettings:
    found = lora_settings_of(spec.model.network)
    assert found is not None
    return found


def _scale(spec: ModelSpec) -> float:
    settings = _settings(spec)
    return (settings.alpha or settings.rank) / settings.rank


def _state(
    runs: Sequence[_Run], kept: Sequence[str], shares: Mapping[str, Sequence[float]], tensors: Mapping[str, Weights]
) -> dict[str, Any]:
    """The first run's, of what is kept, and what it is made of."""
    first = runs[0]
    names = ("format", "student", "model", "config", "teacher", "teachers", SHA256, PLAYERS)
    state = {name: value for name, value in first.checkpoint.state.items() if name in names}
    if state.get("teacher"):
        place = find_teacher(first.target, state)
        state["teacher"] = os.path.abspath(place) if FilePath(place).is_dir() else place
    if PLAYERS in state:
        state[PLAYERS] = {name: kind for name, kind in state[PLAYERS].items() if name in kept}
    if first.spec.base is not None:
        settings = _settings(first.spec)
        rank = next(t.shape[0] for name, t in tensors["players"].items() if name.endswith(".lora_A.weight"))
        wider = replace(settings, rank=rank, alpha=settings.alpha and settings.alpha * rank / settings.rank)
        network = with_lora_settings(first.spec.model.network, wider)
        state["model"] = dump(replace(first.spec, model=replace(first.spec.model, network=network)))
    state[MERGED] = [
        {
            "place": os.path.abspath(run.target),
            "step": run.checkpoint.step,
            "sha256": content_of(run.target),
            "weights": {name: shares[name][number] for name in kept},
        }
        for number, run in enumerate(runs)
    ]
    return state
