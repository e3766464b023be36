"""How encoded prompts reach the networks: from a cache on disk, in which they may be packed, or encoded as a batch
asks for them."""

import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any, Literal

import torch
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.models.teachers.text_encoders import EncoderDtype
from diffdistill.settings.schema import UserError, schema
from diffdistill.settings.terminal import say

SAMPLED = 8
"""Prompts that are encoded first, to know how large all of them will be."""
WORTH_SAYING = 10**8
"""Bytes from which on the size is said beforehand."""
SPARE = 2**28
"""Bytes of the disk that are left alone."""


@schema
class PromptsConfig:
    """How prompts are encoded.

    encode: cache, all of them once, before training; streaming, per batch, with the encoders in memory.  dtype: of
    the cache; networks get their own.  tokens: counted stores only those inside the encoder's mask, where it gives
    one; zeros replace the others.  encoder_dtype: in which a pipeline's encoders compute; published: that of the
    weights.
    """

    encode: Literal["cache", "streaming"] = "cache"
    dtype: Literal["fp32", "bf16"] = "fp32"
    tokens: Literal["all", "counted"] = "all"
    encoder_dtype: EncoderDtype = "published"

    def __post_init__(self) -> None:
        if self.encode == "streaming" and (self.dtype, self.tokens) != ("fp32", "all"):
            raise ValueError("encode: streaming stores nothing on disk; leave dtype and tokens out")

    @property
    def is_packed(self) -> bool:
        """Whether the cache holds less than the encoders gave."""
        return (self.dtype, self.tokens) != ("fp32", "all")


ALL = PromptsConfig()


@dataclass(frozen=True)
class PackedText:
    """Token embeddings [n, L, C] of which those are kept that a mask counts; as a table's part it gives rows, with
    zeros for the others.  values: [tokens, C], one prompt after the other.  mask: [n, L], nonzero where one counts."""

    values: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.mask.shape, self.values.shape[1]])

    def __getitem__(self, index: Tensor) -> Tensor:
        """index: [B] int64.  Returns [B, L, C]."""
        rows = self.values.new_zeros(len(index), *self.shape[1:])
        for place, number in enumerate(index.tolist()):
            counts = self.mask[number] != 0
            end = int(self._ends[number])
            rows[place, counts] = self.values[end - int(counts.sum()) : end]
        return rows

    @cached_property
    def _ends(self) -> Tensor:
        """Behind each prompt's last token, [n]."""
        return (self.mask != 0).sum(1).cumsum(0)


def pack(rows: Mapping[str, Tensor], config: PromptsConfig) -> dict[str, Tensor]:
    """A shard's parts [n, ...] as the cache holds them."""
    parts = dict(rows)
    if config.tokens == "counted" and "text_mask" in parts:
        parts["text"] = parts["text"][parts["text_mask"] != 0]
    if config.dtype == "bf16":
        parts = {name: part.bfloat16() if part.is_floating_point() else part for name, part in parts.items()}
    return parts


def unpack(shard: Mapping[str, Tensor], config: PromptsConfig) -> dict[str, Any]:
    """What `pack` made, as parts of a prompt table. The numbers stay on the disk."""
    if config.tokens == "counted" and "text_mask" in shard:
        return {**shard, "text": PackedText(shard["text"], shard["text_mask"])}
    return dict(shard)


def first_rows(parts: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Of a shard."""
    return {
        name: PackedText(part.values, part.mask[:count]) if isinstance(part, PackedText) else part[:count]
        for name, part in parts.items()
    }


def check_room(
    encode: Callable[[Sequence[str]], Cond], prompts: Sequence[str], config: PromptsConfig, folder: FilePath
) -> None:
    """Say how large the cache of these prompts will be. Raises UserError where the disk has no room for it.

    folder: of the table, part of which may be there already.
    """
    sample = prompts[:: -(-len(prompts) // SAMPLED)] if prompts else [""]
    packed = pack(encode(sample).parts(), config)
    each = sum(part.numel() * part.element_size() for part in packed.values()) / len(sample)
    total = each * (len(prompts) + 1)
    there = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    room = max(0, shutil.disk_usage(folder).free - SPARE)
    told = f"{len(prompts):,} prompts, {size(each)} each, {size(total)} in {folder.parent}"
    if total - there > room:
        raise UserError(
            f"prompts: {told}, where {size(room)} are free; choose another data.cache, prompts.dtype: bf16, "
            "prompts.tokens: counted, or prompts.encode: streaming, which stores none"
        )
    if total > WORTH_SAYING:
        say(f"encoding {told}")


def size(count: float) -> str:
    """Bytes for people, in decimal units."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


class Streamed:
    """Rows of a prompt table that are encoded when they are asked for; the latest are kept.

    The numbers are those of the encoder alone: without autocast, gradient or inference mode around it.
    """

    def __init__(self, encode: Callable[[Sequence[str]], Cond], prompts: Sequence[str], *, at_once: int) -> None:
        self._encode, self._prompts, self._at_once = encode, prompts, at_once
        self._kept: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    def __call__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The parts [B, ...] of these prompts, on the encoder's device."""
        wanted = list(dict.fromkeys(numbers))
        missing = [number for number in wanted if number not in self._kept]
        for place in range(0, len(missing), self._at_once):
            self._add(missing[place : place + self._at_once])
        rows = [self._kept[number] for number in numbers]
        for number in wanted:
            self._kept.move_to_end(number)
        while len(self._kept) > max(2 * len(wanted), self._at_once):
            self._kept.popitem(last=False)
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _add(self, numbers: Sequence[int]) -> None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device_type, enabled=False):
            parts = self._encode([self._prompts[number] for number in numbers]).parts()
        for place, number in enumerate(numbers):
            self._kept[number] = {name: part[place] for name, part in parts.items()}
