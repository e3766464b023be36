"""Negative prompts inside attention: cross-attention to the text that steers away from a second text.

Negative-away steer attention (NASA), Nguyen et al. 2024, arXiv:2412.02687, section 3.2: in every cross-attention to the
text Z+ - scale Z- takes the place of Z+, where Z = softmax(q k^T / sqrt(D)) v of either text under the same queries.
Guidance of the output needs a second pass and blends the images of a one-step student; this needs neither.

The second text goes into the network behind the first, and each layer takes them apart again by their lengths: so a
layer that is computed again in the backward pass finds all that it needs in its own inputs, and a call without the
second text is as ever.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffdistill.attention import attention_difference
from diffdistill.attention.backends import constant_in_graphs
from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser
from diffdistill.networks.recompute import parts_of
from diffdistill.settings.numbers import Number
from diffdistill.settings.schema import UserError

JOINED = ("text", "text_mask")


@dataclass(frozen=True)
class NegativePrompt:
    """cond: the encoded prompt, [1, ...] each part.  scale: the paper's alpha."""

    cond: Cond
    scale: Number

    @property
    def length(self) -> int:
        """Tokens of the prompt, padding included."""
        assert self.cond.text is not None
        return self.cond.text.shape[1]

    def behind(self, cond: Cond) -> Cond:
        """`cond` [B, ...] with this text behind its own; pooled texts and sizes stay its own.

        Raises ValueError unless both texts have as many tokens, which is how the layers tell them apart.
        """
        if cond.text is None or cond.text.shape[1] != self.length:
            length = None if cond.text is None else cond.text.shape[1]
            raise ValueError(f"negative prompt: has {self.length} tokens, the prompts have {length}")
        own, mine = cond.parts(), self.cond.parts()
        return replace(cond, **{name: _append(own[name], mine[name]) for name in JOINED if name in own})


def steer_away(denoiser: Denoiser, negative: NegativePrompt | None) -> None:
    """Let a denoiser's cross-attention steer away from a prompt from now on; None: not any more.

    Raises UserError if its network has no cross-attention to its text.
    """
    layers = text_attention(denoiser)
    if negative is not None and not layers:
        raise UserError("negative_prompt: this network has no cross-attention to text")
    for layer in layers:
        plain = layer.processor.plain if isinstance(layer.processor, _Steered) else layer.processor
        layer.set_processor(_Steered(plain, negative.length, negative.scale) if negative else plain)
    denoiser.run_with(negative=negative)


@contextmanager
def at_scale(denoiser: nn.Module, scale: float) -> Iterator[None]:
    """Within it attention that steers away does so by this scale."""
    steered = [layer.processor for layer in text_attention(denoiser) if isinstance(layer.processor, _Steered)]
    usual = [processor.scale for processor in steered]
    for processor in steered:
        processor.scale = scale
    try:
        yield
    finally:
        for processor, own in zip(steered, usual, strict=True):
            processor.scale = own


def text_attention(module: nn.Module) -> list[Any]:
    """diffusers' layers of cross-attention to the text; none where text and image attend to each other jointly."""
    return [part for part in parts_of(module) if getattr(part, "is_cross_attention", False)]


def _append(own: Tensor, mine: Tensor) -> Tensor:
    return torch.cat([own, mine.to(own.device, own.dtype).expand(len(own), *mine.shape[1:])], 1)


class _Steered:
    """A processor of diffusers' attention, as it was but for two texts of `length` tokens each.  steer: see below."""

    steer: ClassVar[Any]

    def __init__(self, plain: Any, length: int, scale: float) -> None:
        self.plain, self.length, self.scale = plain, length, scale

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **more: Any,
    ) -> Any:
        given = (attn, hidden_states, encoder_hidden_states, attention_mask)
        if encoder_hidden_states is None or encoder_hidden_states.shape[1] != 2 * self.length:
            return self.plain(*given, **more)
        if torch.compiler.is_compiling():
            _keep_out_of_graphs()
        return self.steer(self, given, more)


def _steered(processor: _Steered, given: tuple[Any, ...], more: dict[str, Any]) -> Any:
    with _Split(processor.length, processor.scale) as split:
        out = processor.plain(*given, **more)
    if split.calls != 1:
        name = type(processor.plain).__name__
        raise UserError(f"negative_prompt: {name} does not call torch's attention; use diffusers' default")
    return out


_Steered.steer = staticmethod(_steered)


@constant_in_graphs
def _keep_out_of_graphs() -> None:
    """From now on `_steered` stays out of torch.compile's graphs, in which a mode is active in its own handler. Only a
    compiler asks for it: the decorator imports the compiler, which takes a second of CPU time."""
    if _Steered.steer is _steered:
        _Steered.steer = staticmethod(torch.compiler.disable(_steered))


class _Split(TorchFunctionMode):
    """Within it torch's attention to two texts is the difference of the attentions to each."""

    def __init__(self, length: int, scale: float) -> None:
        super().__init__()
        self.length, self.scale, self.calls = length, scale, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._difference(*args, **(kwargs or {}))

    def _difference(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        scale = options.pop("scale", None)
        if any(options.values()):  # dropout_p, is_causal, enable_gqa
            raise UserError(f"negative_prompt: attention to text with {options} is not supported")
        (k, other_k), (v, other_v) = (x.split(self.length, dim=2) for x in (key, value))
        mask, other_mask = (None, None) if attn_mask is None else attn_mask.split(self.length, dim=-1)
        return attention_difference(
            query, k, v, other_k, other_v, weight=self.scale, mask=mask, other_mask=other_mask, scale=scale
        )
