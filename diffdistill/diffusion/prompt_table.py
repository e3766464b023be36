"""PromptTable by number: encoded prompts in a table, so that a method draws them as it draws classes.

A label in 0 .. N - 1 stands for a prompt, and N for "no condition", the empty prompt.
"""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.on_device import on_host, upload


class Rows(Protocol):
    """A part of n conditions: a tensor [n, ...], or what gives its rows as if it were one."""

    @property
    def shape(self) -> torch.Size: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: Tensor) -> Tensor: ...


class PromptTable:
    """N conditions and the empty one. Copies of a denoiser share it, and it is no part of their weights."""

    def __init__(
        self,
        shards: Sequence[Cond | Mapping[str, Rows]],
        empty: Cond,
        *,
        key: str | None = None,
        texts: Sequence[str] = (),
    ) -> None:
        """shards: parts of [n_i, ...], one after the other, N = sum of n_i; in memory or memory-mapped.
        empty: the same parts, [1, ...].  key: tells one table from another; default the hash of all numbers.
        texts: the N prompts, where who made the table kept them.
        Raises ValueError if they differ in their parts or in a part's shape.
        """
        self.shards, self.empty, self.texts = tuple(shards), empty, texts
        shapes = {name: part.shape[1:] for name, part in empty.parts().items()}
        for shard in self.shards:
            other = {name: part.shape[1:] for name, part in _parts(shard).items()}
            if other != shapes or len({len(part) for part in _parts(shard).values()}) != 1:
                raise ValueError(f"conditions: a shard has {other}, the null condition {shapes}")
        sizes = torch.tensor([0, *(len(next(iter(_parts(shard).values()))) for shard in self.shards)])
        self._bounds = sizes.cumsum(0)
        self._key = key
        self._found, self._empties = WeakTensorKeyDictionary(), dict[torch.device, Cond]()
        self.sizes: dict[tuple[int, ...], Tensor] = {}
        self._take: Callable[[Sequence[int]], Mapping[str, Tensor]] | None = None

    @staticmethod
    def on_demand(
        take: Callable[[Sequence[int]], Mapping[str, Tensor]], empty: Cond, *, key: str, texts: Sequence[str]
    ) -> "PromptTable":
        """One that holds no rows.  take: makes those of some numbers below N, [B, ...] each part.  texts: the N
        prompts."""
        table = PromptTable([], empty, key=key, texts=texts)
        table._bounds, table._take = torch.tensor([0, len(texts)]), take
        return table

    def with_empty(self, cond: Cond) -> "PromptTable":
        """The same N conditions with another in the place of the empty one.  cond: [1, ...]; parts of the empty one
        that it does not have stay. Raises ValueError where a shape differs."""
        parts, given = self.empty.parts(), cond.parts()
        if wrong := [name for name, part in given.items() if name not in parts or part.shape != parts[name].shape]:
            raise ValueError(f"conditions: {', '.join(wrong)} of the null condition have another shape")
        made = copy.copy(self)
        made._found, made._empties = WeakTensorKeyDictionary(), {}  # of its own: what was looked up had another one
        made.empty = Cond(**(parts | {name: part.to(parts[name]) for name, part in given.items()}))
        made._key = None if self._key is None else f"{self._key} {PromptTable([], made.empty).key}"
        made.__dict__.pop("key", None)
        return made

    def __len__(self) -> int:
        """N: the empty condition is not counted."""
        return int(self._bounds[-1])

    def __deepcopy__(self, memo: object) -> "PromptTable":
        return self

    @cached_property
    def key(self) -> str:
        """The same conditions in the same order have the same key."""
        if self._key is not None:
            return self._key
        digest = hashlib.sha256()
        for table in (*self.shards, self.empty):
            for name, part in _parts(table).items():
                assert isinstance(part, Tensor)
                digest.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
                digest.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def at_size(self, cond: Cond, sides: tuple[int, ...]) -> Cond:
        """Resolved conditions for latents of this height and width: `sizes` holds what is told of some, [1, ...]."""
        size = self.sizes.get(sides)
        if size is None or cond.size is None:
            return cond
        return replace(cond, size=size.to(cond.size).expand_as(cond.size))

    def words(self, index: Tensor) -> list[str]:
        """The prompts with these numbers, [B]; N is the empty one."""
        return ["" if number == len(self) else self.texts[number] for number in index.tolist()]

    def rows(self, index: Tensor) -> Cond:
        """The conditions with these numbers, on the numbers' device: not to be changed in place.

        index: [B] int64 in 0 .. N. What is asked again with the same tensor is not looked up again.
        Raises ValueError on a number outside.
        """
        if index.is_inference():  # of which nobody knows whether they have changed
            return self._gather(index)
        version, found = self._found.get(index, (-1, None))
        if found is None or version != index._version:
            with torch.inference_mode(False):
                found = self._gather(index)
            self._found[index] = index._version, found
        return found

    def _gather(self, index: Tensor) -> Cond:
        number = on_host(index)
        if bool(((number < 0) | (number > len(self))).any()):
            raise ValueError(f"conditions: numbers go from 0 to {len(self)}, the null condition; got {number.tolist()}")
        if len(number) and bool((number == len(self)).all()):
            rows = self._empty_on(index.device).map(lambda part: part.expand(len(number), *part.shape[1:]))
            return rows.map(torch.Tensor.contiguous)  # as other rows lie, so that layers round them alike
        parts = {}
        for name, part in self.empty.parts().items():
            # A GPU takes them from pinned memory while the host goes on.
            is_pinned = index.device.type == "cuda" and part.device.type == "cpu"
            parts[name] = torch.empty(
                len(number), *part.shape[1:], dtype=part.dtype, device=part.device, pin_memory=is_pinned
            )
        if self._take is not None:
            is_known = number < len(self)
            self._fill(parts, ~is_known, self.empty.parts(), torch.zeros_like(number[~is_known]))
            if bool(is_known.any()):
                found = self._take(number[is_known].tolist())
                self._fill(parts, is_known, found, torch.arange(int(is_known.sum())))
            return Cond(**{name: upload(part, index.device) for name, part in parts.items()})
        which = torch.searchsorted(self._bounds, number, right=True) - 1
        for shard in which.unique().tolist():
            is_here = which == shard
            table = self.empty if shard == len(self.shards) else self.shards[shard]
            self._fill(parts, is_here, _parts(table), number[is_here] - self._bounds[shard])
        return Cond(**{name: upload(part, index.device) for name, part in parts.items()})

    def _empty_on(self, device: torch.device) -> Cond:
        """The empty condition, copied to a device once."""
        if device not in self._empties:
            with torch.inference_mode(False):
                self._empties[device] = self.empty.map(lambda part: upload(part, device))
        return self._empties[device]

    @staticmethod
    def _fill(parts: dict[str, Tensor], is_here: Tensor, found: Mapping[str, Any], index: Tensor) -> None:
        for name, part in found.items():
            parts[name][is_here] = part[index].to(parts[name].device)


def _parts(shard: Cond | Mapping[str, Rows]) -> Mapping[str, Any]:
    return shard.parts() if isinstance(shard, Cond) else shard
