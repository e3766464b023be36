"""What an exported pipeline makes of the calls that people are used to: a number of steps alone, or nothing at all."""

import inspect
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffdistill.export.stock import StockFolder
from diffdistill.models.teachers import Pipeline
from diffdistill.models.teachers.installed import diffusers_class

Verdict = Literal["right", "refused", "wrong"]
SHOWN: Mapping[Verdict, str] = {
    "right": "the student's images",
    "refused": "an error: {}",
    "wrong": "**WRONG IMAGES**: {}",
}
NEAR = 1e-4  # of values of about 1


@dataclass(frozen=True)
class Habits:
    """number: N, of the student's steps.  counted: of `num_inference_steps=N, guidance_scale=0`.  plain: of a prompt
    and nothing else.  reasons: why it is not right, by the call's name.  guides_at_one: whether the scale 1 guides."""

    number: int
    counted: Verdict
    plain: Verdict
    reasons: Mapping[str, str]
    guides_at_one: bool = False

    @property
    def one(self) -> Verdict:
        """Of `guidance_scale=1` in the place of 0."""
        return "wrong" if self.counted == "right" and self.guides_at_one else self.counted


def habits_of(stock: StockFolder, *, is_told_size: bool = False) -> Habits:
    """What these calls make of a student's pipeline.

    is_told_size: whether they name the size, where the pipeline has one of its own.  The scheduler runs them with a
    function for the network.
    """
    source, scheduler, call, net = stock.source, stock.scheduler, stock.call, stock.net
    defaults = _defaults(stock.kind)
    steps = {name: call[name] for name in ("timesteps", "sigmas", "num_inference_steps") if name in call}
    number = len(next(iter(steps.values()))) if "num_inference_steps" not in steps else steps["num_inference_steps"]
    wanted = _run(source, scheduler, steps, call.get("eta"))
    eta = 0.0 if defaults.get("eta") is not None else None
    reasons: dict[str, str] = {}

    def judge(name: str, count: int, wrong: str | None) -> Verdict:
        try:
            made = _run(source, scheduler, {"num_inference_steps": count}, eta)
        except (ValueError, IndexError) as error:
            reasons[name] = " ".join(str(error).split()).partition(". ")[0]
            return "refused"
        if not torch.allclose(made, wanted, atol=NEAR, rtol=NEAR):
            wrong = f"{count} steps are not those that it was trained for"
        if wrong:
            reasons[name] = wrong
        return "wrong" if wrong else "right"

    size = None if is_told_size else _wrong_size(stock, defaults)
    is_told = "guidance_input" in net.accepts
    scale = defaults.get("guidance_scale") or 1.0
    is_guided = scale > 1 and (is_told or net.has_null_condition)
    guided = f"guidance of {scale:g} on top of the student's own" if is_guided else None
    told = "its network is told guidance_scale=0" if is_told else None
    anew = "of another prompt, which its text encoder writes anew" if source.family.rewrites_prompts else None
    return Habits(
        number=number,
        counted=judge("counted", number, size or anew or told),
        plain=judge("plain", defaults["num_inference_steps"], size or anew or guided),
        reasons=reasons,
        guides_at_one=source.family.guides_above < 1 and net.has_null_condition,
    )


def habitual_calls(kind: str, number: int) -> dict[str, dict[str, Any]]:
    """The arguments of these calls beside the prompt: `zero` and `one`, of guidance, and `plain`.  kind: the class."""
    guided = "guidance_scale" in _defaults(kind)
    scales = {"zero": 0.0, "one": 1.0}
    counted = {
        name: {"num_inference_steps": number} | ({"guidance_scale": scale} if guided else {})
        for name, scale in scales.items()
    }
    return {**counted, "plain": {}}


def _defaults(kind: str) -> dict[str, Any]:
    """The arguments of a pipeline's call."""
    parameters = inspect.signature(diffusers_class(kind).__call__).parameters
    return {name: given.default for name, given in parameters.items()}


def show_habits(habits: Habits, asked: str) -> str:
    """A table for the card.  asked: what the pipeline is always told, by the name of its argument."""
    counted = f"{asked}{', ' if asked else ''}num_inference_steps={habits.number}, guidance_scale="
    is_one_alike = habits.one == habits.counted
    calls = {"counted": f"`pipe({counted}0)`" + (", or `1`" if is_one_alike else "")}
    calls |= {} if is_one_alike else {"one": f"`pipe({counted}1)`"}
    calls["plain"] = f"`pipe({asked})`"
    reasons = {"one": "this pipeline guides at 1 already"} | dict(habits.reasons)
    lines = ["| another call | what it makes |", "|---|---|"]
    for name, call in calls.items():
        verdict: Verdict = getattr(habits, name)
        lines.append(f"| {call} | {SHOWN[verdict].format(reasons.get(name))} |")
    if "wrong" in (habits.one, habits.plain):
        lines += ["", "**Diffusers warns of none of the wrong ones. Call it as in the program above.**"]
    return "\n".join(lines)


def _wrong_size(stock: StockFolder, defaults: Mapping[str, Any]) -> str | None:
    """Where the pipeline makes images of another size than the student's, unless it is told."""
    source = stock.source
    if not source.family.names_size and source.asked_size:
        height, width = (side * source.vae_factor for side in source.family.image_shape(source.options)[1:])
        return None if stock.says_size else f"images of {height} x {width}"
    if not source.family.names_size:
        return "its pipeline has to be told the size of images that are no squares" if "height" in stock.call else None
    side = defaults.get("height") or source.family.default_side * source.vae_factor
    return None if source.image_size == (side, side) else f"images of {side} x {side}"


def _run(source: Pipeline, scheduler: Any, steps: Mapping[str, Any], eta: float | None) -> Tensor:
    """The pipeline's loop, with a function of x and t in the network's place. Raises what the scheduler raises."""
    scheduler, family = deepcopy(scheduler), source.family
    told = family.told_steps(steps, scheduler.config.num_train_timesteps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(1, 2, 2, 2) * float(getattr(scheduler, "init_noise_sigma", 1.0))
        scheduler.set_timesteps(**told)
        if family.sets_begin:
            scheduler.set_begin_index(0)
        takes_eta = eta is not None and "eta" in inspect.signature(scheduler.step).parameters
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            made = torch.sin(seen + t / 1000)
            x = scheduler.step(made, t, x, **({"eta": eta} if takes_eta else {})).prev_sample
    return x
