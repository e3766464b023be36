"""Networks that a program gives as objects: this process knows them by the key of their content."""

import hashlib
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser, Network, Taps
from diffdistill.diffusion.guidance_rules import LINEAR
from diffdistill.diffusion.path import Path, Prediction
from diffdistill.networks.taps import MIDDLE
from diffdistill.settings.faults import did_you_mean
from diffdistill.settings.schema import UserError, schema

_GIVEN: dict[str, Denoiser] = {}


@schema
class GivenNetwork:
    """A network that only the program that gives it can make.  kind: its class.  key: of the teacher that it was of."""

    name: Literal["given"] = "given"
    kind: str
    key: str

    def build(self, image_shape: tuple[int, ...], num_classes: int, class_dropout: float) -> Network:
        """A copy of what was given, with its weights."""
        found = given(self.key)
        if found is None:
            raise UserError(
                f"network: is a {self.kind} object from a Python program, which a config cannot build; in Python, call "
                f"dd.give_teacher(denoiser, image_shape={image_shape}) first"
            )
        return deepcopy(found.net)


def given(key: str) -> Denoiser | None:
    """The denoiser of this key, if this process has been given it."""
    return _GIVEN.get(key)


def keep(denoiser: Denoiser) -> GivenNetwork:
    """Keep a denoiser until this process ends. Returns its network's settings."""
    key = content_key(denoiser)
    _GIVEN[key] = denoiser
    module = denoiser.net.module if isinstance(denoiser.net, ModuleNetwork) else denoiser.net
    return GivenNetwork(kind=type(module).__name__, key=key)


def content_key(denoiser: Denoiser) -> str:
    """The SHA-256, as 32 digits, of every weight, of what the network's output means and of how it is guided."""
    digest = hashlib.sha256(f"{denoiser.path!r} {denoiser.predicts} {denoiser.sigma_data}".encode())
    if denoiser.runtime.guidance_rule != LINEAR:
        digest.update(repr(denoiser.runtime.guidance_rule).encode())
    for name, tensor in denoiser.net.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(dtype=torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def as_denoiser(
    module: nn.Module,
    path: Path,
    predicts: Prediction,
    *,
    num_classes: int = 0,
    has_null_condition: bool = False,
    sigma_data: float = 0.5,
    tap: str | None = None,
) -> Denoiser:
    """Any module as a Denoiser.

    module: called with x_t [B, C, H, W] and the path's time input [B], and, if there are classes, with labels [B], of
    which `num_classes` means none where `has_null_condition`. It returns [B, C, H, W], or what has them as `sample`.

    predicts: what its output means; for "edm" it is also given c_in x_t, see `sigma_data`.
    tap: the submodule whose output [B, C, h, w] a discriminator reads; None: no method with a GAN.
    Raises UserError where path and prediction do not fit, or there is no such submodule.
    """
    names = [name for name, _ in module.named_modules() if name]
    if tap is not None and tap not in names:
        raise UserError(f"tap = {tap!r}: {type(module).__name__} has no such submodule{did_you_mean(tap, names)}")
    return Denoiser(ModuleNetwork(module, num_classes, has_null_condition, tap), path, predicts, sigma_data=sigma_data)


class ModuleNetwork(Network):
    """A module seen as a network; see `as_denoiser`."""

    def __init__(self, module: nn.Module, num_classes: int, has_null_condition: bool, tap: str | None) -> None:
        super().__init__()
        self.module, self.tap = module, tap
        self.num_classes, self.has_null_condition = num_classes, has_null_condition
        self.accepts = frozenset({"label"} if num_classes else ())
        self.resolution_multiple = 1

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        made: Any = self.module(x, time_input, *self._labels(x, cond))
        found: Tensor = getattr(made, "sample", made)
        return found

    def features(self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None) -> Tensor:
        """All of the module runs: what follows the tap is its own affair."""
        return self.forward_with_features(x, time_input, cond, taps)[1]

    def forward_with_features(
        self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None
    ) -> tuple[Tensor, Tensor]:
        if taps not in (None, (MIDDLE,)):
            raise ValueError(f"taps: this network has the one that `as_denoiser` was given, not {taps}")
        if self.tap is None:
            raise UserError("a discriminator reads features; name a submodule with as_denoiser(..., tap=)")
        seen: list[Tensor] = []
        handle = self.module.get_submodule(self.tap).register_forward_hook(lambda *call: seen.append(call[2]))
        try:
            return self(x, time_input, cond), seen[-1]
        finally:
            handle.remove()

    def _labels(self, x: Tensor, cond: Cond) -> list[Tensor]:
        if not self.num_classes:
            return []
        if cond.label is None:
            raise ValueError("this network needs a class")
        return [cond.label]
