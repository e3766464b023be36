"""Text encoders in the dtype that they are published in, and on the device one at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path as FilePath
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.models.teachers.installed import diffusers_class
from diffdistill.models.teachers.variants import WEIGHTS, variant_in, variant_of
from diffdistill.settings.schema import UserError

EncoderDtype = Literal["published", "fp32"]
HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}  # by safetensors' names
AT_ONCE = 16
"""Calls between which encoders take turns: what all of them were told is in memory in the meantime."""
LAST_STATES = 2
"""Of an encoder's hidden states so many are kept until its pipeline's other encoders have had their turn."""

T = TypeVar("T")


def published_dtype(folder: FilePath, name: str) -> torch.dtype:
    """Half precision where all weights that would be loaded from a part's folder are of it, whatever its config says.

    Float32 elsewhere, and in the place of float16 for classes of which transformers itself keeps modules in float32,
    as T5's: in float16 they overflow.  name: its class in transformers.
    """
    variant, found = variant_of(folder) or "", set()
    files = [
        file for kind in WEIGHTS for file in folder.glob(f"{kind}*.safetensors") if variant_in(file.name) == variant
    ]
    try:
        for file in files:
            with safe_open(file, "pt") as weights:
                found |= {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return torch.float32  # whoever loads it says what is wrong
    found = {dtype for dtype in found if dtype.startswith(("F", "BF"))}
    dtype = HALVES.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32
    overflows = dtype == torch.float16 and getattr(diffusers_class(name, "transformers"), "_keep_in_fp32_modules", None)
    return torch.float32 if overflows else dtype


def in_float32(cond: Cond, place: str) -> Cond:
    """What encoders in half precision gave, in float32. Raises UserError where they overflowed."""
    halves = {name: part for name, part in cond.parts().items() if part.dtype in HALVES.values()}
    if any(not bool(torch.isfinite(part).all()) for part in halves.values()):
        raise UserError(
            f"{place}: a text encoder overflows in the half precision that it is published in; "
            "set prompts.encoder_dtype: fp32"
        )
    return replace(cond, **{name: part.float() for name, part in halves.items()})


def check_tokenizer(folder: FilePath) -> None:
    """Raise UserError unless there is a vocabulary that can be read: without one transformers knows no word."""
    names = {file.name for file in folder.glob("*")}
    if names & {"tokenizer.json", "vocab.json"}:
        return
    if not any(name.endswith(".model") for name in names):
        raise UserError(f"{folder}: holds no vocabulary: tokenizer.json, vocab.json or a sentencepiece model")
    if find_spec("sentencepiece") is None:
        raise UserError(f"{folder}: reading a sentencepiece model needs `pip install diffdistill[hf]`")


def on_device(kind: type, device: torch.device | str) -> Any:
    """The class of a pipeline that computes on this device, wherever its encoders are in the meantime."""
    return type(kind.__name__, (kind,), {"device": property(lambda pipeline: torch.device(device))})


def by_turns(encoders: Sequence[nn.Module], calls: Sequence[Callable[[], T]], device: torch.device) -> list[T]:
    """What calls return that ask these encoders, of which one at a time is on the device.

    Each call is made again for each encoder that it asks, up to where it asks the next one; what the earlier ones told
    it is remembered, so that every encoder computes once.
    """
    turns = _Turns(encoders, device)
    return [
        result for first in range(0, len(calls), AT_ONCE) for result in turns.results(calls[first : first + AT_ONCE])
    ]


class _WaitsError(Exception):
    """An encoder was asked that is not on the device."""


class _Turns:
    def __init__(self, encoders: Sequence[nn.Module], device: torch.device) -> None:
        self._encoders, self._device = encoders, device
        self._here: nn.Module | None = None
        self._may_change = True
        self._told: list[Any] = []  # the current call, of the encoders in the order in which it asks them
        self._place = 0

    def results(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        told: list[list[Any]] = [[] for _ in calls]
        made: dict[int, T] = {}
        with self._asked():
            while len(made) < len(calls):
                self._may_change = True
                for number in (number for number in range(len(calls)) if number not in made):
                    self._told, self._place = told[number], 0
                    try:
                        made[number] = calls[number]()
                    except _WaitsError:
                        continue
                    told[number] = []
        return [made[number] for number in range(len(calls))]

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Encoders that answer by `_ask`."""
        for encoder in self._encoders:
            encoder.forward = partial(self._ask, encoder, encoder.forward)
        try:
            yield
        finally:
            for encoder in self._encoders:
                del encoder.forward

    def _ask(self, encoder: nn.Module, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        self._place += 1
        if self._place <= len(self._told):
            return _moved(self._told[self._place - 1], self._device)
        if self._may_change:
            self._bring(encoder)
        elif encoder is not self._here:
            raise _WaitsError
        output = forward(*inputs, **named)
        if len(self._encoders) > 1:
            self._told.append(_moved(output, "cpu"))
        return output

    def _bring(self, encoder: nn.Module) -> None:
        """Whoever asks first since the others wait; these leave before it comes."""
        self._may_change = False
        if encoder is self._here:
            return
        for other in self._encoders:
            if other is not encoder:
                take_off(other)
        self._here = encoder
        put_on(encoder, self._device)


def take_off(encoder: nn.Module) -> None:
    """The encoder from its device to memory."""
    encoder.to("cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def put_on(encoder: nn.Module, device: torch.device) -> None:
    encoder.to(device)


def _moved(output: Any, device: torch.device | str) -> Any:
    """An encoder's output of transformers on another device."""
    parts = dict(output)
    if (states := parts.get("hidden_states")) is not None:
        parts["hidden_states"] = (*[None] * (len(states) - LAST_STATES), *states[-LAST_STATES:])
    return type(output)(**{name: _part(part, device) for name, part in parts.items()})


def _part(part: Any, device: torch.device | str) -> Any:
    if isinstance(part, tuple):
        return tuple(_part(one, device) for one in part)
    return part.to(device) if isinstance(part, Tensor) else part
