"""The one picture of every network: D(x_t, t, c) = E[x_0 | x_t, c].

Teacher, generator and fake score are all `Denoiser`s. A network is a `Network`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, overload

import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import NO_COND, Cond
from diffdistill.diffusion.guidance_rules import LINEAR, GuidanceRule, Linear
from diffdistill.diffusion.on_device import filled
from diffdistill.diffusion.path import Path, Prediction, expand
from diffdistill.diffusion.prompt_table import PromptTable
from diffdistill.settings.schema import UserError

Taps = tuple[int | str, ...] | Literal["fastgen"]
"""Blocks whose outputs are asked for: by their number in order of execution (from the end if negative) or by their
name, and "middle" for the bottleneck; or the network's own list of that name, see networks/taps.py."""

Features = Tensor | tuple[Tensor, ...]
"""The bottleneck [B, C, h, w], or where taps are named the output of each of them, as a map."""


class Network(nn.Module, ABC):
    """What a Denoiser, or a network around another, asks of the module inside it.

    Ours inherit it, which tells type checkers. Nothing asks for the class: any module with these attributes and methods
    will do.
    """

    accepts: frozenset[str]
    """The names of the parts of Cond that it takes."""
    num_classes: int
    """0 for a network without labels. Label `num_classes` then means "no class"."""
    has_null_condition: bool
    """Whether it was trained with the condition dropped, so that guidance has a meaning."""
    resolution_multiple: int
    """Image sides must be multiples of this."""

    @abstractmethod
    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: [B, ...]; time_input: [B], the path's.  Returns [B, ...]: what the Denoiser `predicts`."""

    @abstractmethod
    def features(self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None) -> Features:
        """The bottleneck [B, C, h, w], or the taps in the order named; what comes after them does not run.

        Raises ValueError on a tap that is none of its blocks.
        """

    @abstractmethod
    def forward_with_features(
        self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None
    ) -> tuple[Tensor, Features]:
        """Output and `features` from one pass."""


Want = Literal["x0", "features", "both"]


class CondChange(Protocol):
    """What changes a condition just before the network sees it."""

    def behind(self, cond: Cond) -> Cond: ...


@dataclass(frozen=True)
class Runtime:
    """What a denoiser is run with, beside its weights; `Denoiser.run_with` changes it.

    conditions: what a label stands for, for a network that takes text.  negative: what its attention steers away from.
    autocast: of the network alone; None: as around it.  offload_device: where it computes with weights elsewhere.
    guidance_rule: how its two estimates become one; saved with the model.  decode: what it makes to pixels, for who
    judges these; None where it makes pixels, or nobody does.  num_threads: of the CPU, on which its run was trained;
    None: not known.
    """

    conditions: PromptTable | None = None
    negative: CondChange | None = None
    autocast: torch.dtype | None = None
    offload_device: torch.device | None = None
    guidance_rule: GuidanceRule = LINEAR
    decode: Callable[[Tensor], Tensor] | None = None
    num_threads: int | None = None


class Denoiser(nn.Module):
    """A network seen as D(x_t, t, c), whatever it predicts.

    net: a `Network`; path: where its noise levels live; predicts: what its output means;
    sigma_data: the data's standard deviation, used by predicts="edm" only.
    Raises UserError where path and prediction do not fit.
    """

    def __init__(self, net: Network, path: Path, predicts: Prediction, *, sigma_data: float = 0.5) -> None:
        super().__init__()
        if predicts not in path.predictions:
            choices = ", ".join(path.predictions)
            raise UserError(f"predicts: {predicts!r} does not fit the path; choose from {choices}")
        self.net = net
        self.path = path
        self.predicts: Prediction = predicts
        self.sigma_data = sigma_data
        self.runtime = Runtime()

    def run_with(self, **changes: Any) -> None:
        """Change what it is run with from now on.  changes: fields of `Runtime`, by name."""
        self.runtime = replace(self.runtime, **changes)

    def with_net(self, net: Network) -> "Denoiser":
        """The same around another network, which may be of the same weights."""
        made = Denoiser(net, self.path, self.predicts, sigma_data=self.sigma_data)
        made.runtime = self.runtime
        return made

    @property
    def conditions(self) -> PromptTable | None:
        """What a label stands for, for a network that takes text."""
        return self.runtime.conditions

    @conditions.setter
    def conditions(self, table: PromptTable | None) -> None:
        """`run_with(conditions=table)`, in programs that use a model; nothing here assigns it."""
        self.run_with(conditions=table)

    @property
    def offload_device(self) -> torch.device | None:
        """Where it computes, if its weights are elsewhere."""
        return self.runtime.offload_device

    @property
    def takes_guidance(self) -> bool:
        """Whether another scale than 1 means something: it knows "no class", or takes the scale as its input."""
        return self.net.has_null_condition or "guidance_input" in self.net.accepts

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond = NO_COND,
        *,
        guidance: float | Tensor = 1.0,
        uncond: Cond | None = None,
    ) -> Tensor:
        """Denoise x_t: D(x_t, t, c), [B, ...] in float32 or wider.

        x_t: [B, ...]; t: [B] in the path's time; cond: parts of [B, ...].
        guidance: w of D_u + w (D_c - D_u), or of the model's own rule; a number or [B]. 1 evaluates the network on
        `cond` alone and 0 on `uncond` alone; any other value evaluates both in one batch. A network that takes the
        scale as its input gets w instead, whatever it is, in one evaluation, unless cond has one.
        uncond: default `unconditional(cond)`.
        Raises ValueError on a condition that the network does not take, and where it knows no "no class".
        Guidance: Ho & Salimans 2022, arXiv:2207.12598; the scale here is their 1 + w.
        """
        made: Tensor = super().__call__(x_t, t, cond, guidance=guidance, uncond=uncond)
        return made

    @overload
    def features(
        self, x_t: Tensor, t: Tensor, cond: Cond = ..., *, guidance: float | Tensor = ..., taps: None = None
    ) -> Tensor: ...
    @overload
    def features(
        self, x_t: Tensor, t: Tensor, cond: Cond = ..., *, guidance: float | Tensor = ..., taps: Taps | None
    ) -> Features: ...
    def features(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond = NO_COND,
        *,
        guidance: float | Tensor = 1.0,
        taps: Taps | None = None,
    ) -> Features:
        """The bottleneck [B, C, h, w] at x_t, or the taps; what comes after them does not run.

        Raises ValueError as a call, on an unknown tap, and on two conditions at once, which is any w but 1 and 0.
        """
        made: Features = super().__call__(x_t, t, cond, guidance=guidance, want="features", taps=taps)
        return made

    @overload
    def with_features(
        self, x_t: Tensor, t: Tensor, cond: Cond = ..., *, guidance: float | Tensor = ..., taps: None = None
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def with_features(
        self, x_t: Tensor, t: Tensor, cond: Cond = ..., *, guidance: float | Tensor = ..., taps: Taps | None
    ) -> tuple[Tensor, Features]: ...
    def with_features(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond = NO_COND,
        *,
        guidance: float | Tensor = 1.0,
        taps: Taps | None = None,
    ) -> tuple[Tensor, Features]:
        """D and `features` from one pass. Raises ValueError as `features`."""
        made: tuple[Tensor, Features] = super().__call__(x_t, t, cond, guidance=guidance, want="both", taps=taps)
        return made

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond = NO_COND,
        *,
        guidance: float | Tensor = 1.0,
        uncond: Cond | None = None,
        want: Want = "x0",
        taps: Taps | None = None,
    ) -> Any:
        """What a call, `features` and `with_features` are made of: one entry, which torch.compile and hooks see."""
        if "guidance_input" in self.net.accepts and cond.guidance_input is None:
            given = torch.as_tensor(guidance, dtype=torch.promote_types(x_t.dtype, torch.float32), device=x_t.device)
            cond, guidance = replace(cond, guidance_input=given.expand(len(x_t))), 1.0
        unknown = set(cond.parts()).difference(self._accepts)
        if unknown:
            raise ValueError(f"this network takes {sorted(self._accepts)}, not {sorted(unknown)}")
        if isinstance(guidance, (int, float)) and guidance == 1:
            return self._evaluate(x_t, t, cond, want, taps)
        null = self.unconditional(cond) if uncond is None else uncond
        if isinstance(guidance, (int, float)) and guidance == 0:
            return self._evaluate(x_t, t, null, want, taps)
        if want != "x0":
            raise ValueError("features belong to one condition: use guidance 0 or 1")
        both = self._evaluate(
            torch.cat([x_t, x_t]), torch.cat([t, t]), Cond.cat(self.resolve(null), self.resolve(cond))
        )
        without, with_cond = both.chunk(2)
        return self.combine(without, with_cond, guidance, x_t, t)

    def combine(
        self, without_cond: Tensor, with_cond: Tensor, guidance: float | Tensor, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """Both estimates of x0 at (x_t, t), [B, ...], as one, by the model's rule.  guidance: w, a number or [B]."""
        rule = self.runtime.guidance_rule
        scale = expand(guidance, x_t) if isinstance(guidance, Tensor) else guidance
        if isinstance(rule, Linear):  # the same in every form
            return rule(without_cond, with_cond, scale)
        kind = self.predicts
        without_cond, with_cond = (self.path.from_x0(x0, kind, x_t, t) for x0 in (without_cond, with_cond))
        return self.path.to_x0(rule(without_cond, with_cond, scale), kind, x_t, t)

    @property
    def num_classes(self) -> int:
        """How many conditions a label may stand for: classes or encoded prompts; 0 if there are none."""
        return self.net.num_classes if self.conditions is None else len(self.conditions)

    @property
    def _accepts(self) -> frozenset[str]:
        return self.net.accepts if self.conditions is None else self.net.accepts | {"label"}

    def class_cond(self, label: Tensor) -> Cond:
        """The condition for classes, or prompts by number, [B]; empty if the network takes none."""
        return Cond(label=label) if self.num_classes else NO_COND

    def unconditional(self, cond: Cond) -> Cond:
        """`cond` with the class, or the prompt, taken away. Raises ValueError if the network was never trained so."""
        if self.net.has_null_condition and cond.label is not None:
            return replace(cond, label=filled(len(cond.label), self.num_classes, cond.label.device))
        if not self.net.has_null_condition or self.conditions is None or cond.text is None:
            raise ValueError("guidance: this network was trained without dropping its condition; use guidance 1")
        null = filled(len(cond.text), self.num_classes, cond.text.device)
        return replace(cond, **self._rows(null).parts())

    def drop_condition(self, cond: Cond, is_dropped: Tensor) -> Cond:
        """`unconditional` for some samples only.  is_dropped: [B] bool.  Raises ValueError as it does."""
        null = self.unconditional(cond).parts()
        chosen = {name: is_dropped.reshape(-1, *[1] * (part.ndim - 1)) for name, part in null.items()}
        return Cond(**{name: torch.where(chosen[name], null[name], part) for name, part in cond.parts().items()})

    def convert(self, x0: Tensor, kind: Literal["score", "eps", "v", "flow"], x_t: Tensor, t: Tensor) -> Tensor:
        """D at (x_t, t) as score, eps, v or flow."""
        return self.path.from_x0(x0, kind, x_t, t)

    def resolve(self, cond: Cond) -> Cond:
        """What the network is given for `cond`: the encoded prompts in the place of their numbers."""
        if self.conditions is None or cond.label is None:
            return cond
        return replace(self._rows(cond.label), **replace(cond, label=None).parts())

    def _rows(self, label: Tensor) -> Cond:
        """Encoded prompts, in the network's type of numbers."""
        assert self.conditions is not None
        dtype = next((p.dtype for p in self.net.parameters()), torch.float32)
        return self.conditions.rows(label).map(lambda part: part.to(dtype) if part.is_floating_point() else part)

    def _evaluate(self, x_t: Tensor, t: Tensor, cond: Cond, want: Want = "x0", taps: Taps | None = None) -> Any:
        cond = self.resolve(cond)
        if self.conditions is not None:
            cond = self.conditions.at_size(cond, tuple(x_t.shape[2:]))
        if self.runtime.negative is not None:
            cond = self.runtime.negative.behind(cond)
        if self.runtime.autocast is not None:
            with torch.autocast(x_t.device.type, self.runtime.autocast):
                return self._call(x_t, t, cond, want, taps)
        return self._call(x_t, t, cond, want, taps)

    def _call(self, x_t: Tensor, t: Tensor, cond: Cond, want: Want, taps: Taps | None) -> Any:
        named = () if taps is None else (taps,)  # networks that know the bottleneck alone take no such argument
        scaled = expand(self._input_scale(t), x_t) * x_t
        time_input = self.path.time_input(t).to(scaled.dtype)
        if want == "features":
            return self.net.features(scaled, time_input, cond, *named)
        if want == "both":
            output, features = self.net.forward_with_features(scaled, time_input, cond, *named)
            return self._read(output, x_t, t), features
        return self._read(self.net(scaled, time_input, cond), x_t, t)

    def _input_scale(self, t: Tensor) -> Tensor:
        if self.predicts != "edm":
            return torch.ones_like(t, dtype=torch.float64)
        return (self.sigma_data**2 + t.double() ** 2).rsqrt()

    def _read(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's output as x0, in float32 or wider: autocast ends here."""
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        if self.predicts != "edm":
            return self.path.to_x0(output, self.predicts, x_t, t)
        total = t.double() ** 2 + self.sigma_data**2  # Karras et al. 2022, table 1
        skip, scale = self.sigma_data**2 / total, t.double() * self.sigma_data / total.sqrt()
        return expand(skip, x_t) * x_t + expand(scale, x_t) * output


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its numbers are; the CPU if it has none."""
    offloaded: torch.device | None = getattr(module, "offload_device", None)
    return offloaded or next(
        (tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu")
    )


def compute_on(module: nn.Module, device: torch.device | None) -> None:
    """Say where a module computes whose weights are elsewhere, for `device_of`; None: where they are."""
    if isinstance(module, Denoiser):
        module.run_with(offload_device=device)
    else:
        module.offload_device = device  # type: ignore[assignment]


def freeze(module: nn.Module) -> nn.Module:
    """Eval mode and no parameter gradients. Gradients still flow through to the inputs."""
    return module.eval().requires_grad_(False)
