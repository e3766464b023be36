"""Text encoders for networks of our own: a sentence as one vector, by a BERT of transformers' layout in a folder.

Reimers & Gurevych 2019, arXiv:1908.10084: the mean of the last hidden states over the tokens, of unit length.
Only `BertModel` is loaded, from safetensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffdistill.data.collection import listed
from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import freeze
from diffdistill.models.foreign_kernels import refuse_foreign_kernels
from diffdistill.models.loading_bars import turn_off_loading_bars
from diffdistill.networks.parameter_limit import limited_parameters
from diffdistill.settings.reading import read_json
from diffdistill.settings.schema import UserError

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
MAX_TOKENS = 128
MODULES = ("Transformer", "Pooling", "Normalize")
PREFIX = "pooling_mode_"


@dataclass(frozen=True)
class SentenceEncoder:
    """place: a folder with config.json, model.safetensors and a tokenizer, as all-MiniLM-L6-v2's."""

    place: str

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its config.json. Raises UserError if there is none, or it is of another model."""
        file = FilePath(self.place).expanduser() / "config.json"
        found = self._read(file)
        kind = found.get("model_type") if isinstance(found, dict) else None
        if kind != "bert":
            raise UserError(f"text_encoder = {self.place!r}: model_type = {kind!r}; only bert is read")
        refuse_foreign_kernels(found, file)
        return found

    def refuse_other_embeddings(self) -> None:
        """Raise UserError where the folder says that its sentences are embedded in another way than here: by another
        pooling than the mean, or through a further layer. modules.json and 1_Pooling are sentence-transformers'."""
        folder = FilePath(self.place).expanduser()
        if (modules := folder / "modules.json").is_file():
            read = self._read(modules)
            listed = read if isinstance(read, list) else [read]
            kinds = [one.get("type") if isinstance(one, dict) else None for one in listed]
            other = [kind for kind in kinds if str(kind).rpartition(".")[2] not in MODULES]
            if other:
                raise UserError(
                    f"text_encoder = {self.place!r}: {modules} has {other[0]!r}, which is not known (choices: "
                    f"{', '.join(MODULES)})"
                )
        if (file := folder / "1_Pooling" / "config.json").is_file():
            said = self._read(file)
            told = said if isinstance(said, dict) else {}
            modes = [
                key.removeprefix(PREFIX) for key, value in told.items() if key.startswith(PREFIX) and value is True
            ]
            modes += [str(told["pooling_mode"])] if "pooling_mode" in told else []
            if modes and not set(modes) <= {"mean_tokens", "mean"}:
                found = ", ".join(modes)
                raise UserError(
                    f"text_encoder = {self.place!r}: {file} pools by {found}; only the mean of the tokens is known"
                )

    def _read(self, file: FilePath) -> Any:
        try:
            return read_json(file)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"text_encoder = {self.place!r}: {file} cannot be read: {error}") from None

    @property
    def width(self) -> int:
        """Numbers of an embedding."""
        return int(self.config["hidden_size"])

    @property
    def files(self) -> list[FilePath]:
        """All that an embedding depends on."""
        found = [FilePath(self.place).expanduser() / name for name in FILES]
        return [file for file in found if file.is_file()]

    @property
    def halves(self) -> tuple[str, ...]:
        """Nothing in half precision: it is small."""
        return ()

    def load(self, device: torch.device | str = "cpu", *, stays: bool = True) -> tuple[Any, Any]:
        """Tokenizer and frozen model, which is on the device either way. Raises UserError."""
        self.config  # noqa: B018  (refuses other models)
        try:
            from transformers import AutoTokenizer, BertModel
        except ImportError as error:
            raise UserError(f"text_encoder: needs `pip install diffdistill[hf]`: {error}") from None
        without_pooler: Any = type("Encoder", (BertModel,), {"_keys_to_ignore_on_load_unexpected": [r"^pooler\."]})
        folder = str(FilePath(self.place).expanduser())
        turn_off_loading_bars()
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            with limited_parameters():
                model, told = without_pooler.from_pretrained(
                    folder,
                    local_files_only=True,
                    use_safetensors=True,
                    add_pooling_layer=False,
                    dtype=torch.float32,
                    output_loading_info=True,
                )
        except Exception as error:  # transformers and tokenizers have no class for all of theirs
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"text_encoder = {self.place!r}: cannot be read: {type(error).__name__}: {reason}"
            ) from None
        if told["missing_keys"]:  # which transformers would draw at random
            raise UserError(f"text_encoder = {self.place!r}: lacks the weights {listed(sorted(told['missing_keys']))}")
        model.__class__ = BertModel  # an exported folder names its class
        return tokenizer, freeze(model).to(device)

    def encode(self, loaded: tuple[Any, Any], prompts: Sequence[str]) -> Cond:
        """Prompts [N] as pooled_text [N, width].  loaded: of `load`."""
        return Cond(pooled_text=embed(*loaded, prompts))

    def encode_empty(self, loaded: tuple[Any, Any]) -> Cond:
        """The empty prompt: [1, width]."""
        return self.encode(loaded, [""])

    def encode_all(
        self, loaded: tuple[Any, Any], batches: Sequence[Sequence[str]], *, has_empty: bool = False
    ) -> list[Cond]:
        """Batches, and behind them the empty prompt, on the CPU."""
        return [self.encode(loaded, batch).map(Tensor.cpu) for batch in (*batches, *([[""]] if has_empty else []))]


@torch.no_grad()
def embed(tokenizer: Any, model: Any, prompts: Sequence[str]) -> Tensor:
    """Prompts [N] as [N, width], of unit length."""
    asked = tokenizer(list(prompts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    asked = asked.to(model.device)
    hidden: Tensor = model(**asked).last_hidden_state
    mask = asked["attention_mask"][..., None].to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
