"""The signal network: a teacher's network that is given pure noise, whatever the time, and answers with the signal.

The student of BOOT (Gu et al. 2023, arXiv:2306.05544): the time is that of its output.
"""

from typing import Literal

import torch
from torch import Tensor

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.denoiser import Denoiser, Features, Network, Taps
from diffdistill.networks.guided import GuidedBase
from diffdistill.networks.lora import LoRA
from diffdistill.networks.registry import SignalBase
from diffdistill.settings.numbers import Number
from diffdistill.settings.schema import Fraction, Positive, UserError, schema


@schema
class SignalConfig:
    """Settings of `Signal`: y = skip z + output_scale F(input_scale z, t, c), with F the raw output of `base`."""

    name: Literal["signal"] = "signal"
    base: SignalBase
    input_scale: Positive = 1.0
    output_scale: Number = 1.0
    skip: Number = 0.0

    def build(self, image_shape: tuple[int, int, int], num_classes: int, class_dropout: Fraction) -> "Signal":
        """The network for images [C, H, W]. Raises UserError if the base does not fit them."""
        return Signal(self, self.base.build(image_shape, num_classes, class_dropout))


class Signal(Network):
    """A base network read as a signal: it predicts x0."""

    def __init__(self, config: SignalConfig, base: Network) -> None:
        super().__init__()
        self.config = config
        self.base = base
        self.accepts = base.accepts
        self.num_classes = base.num_classes
        self.has_null_condition = base.has_null_condition
        self.resolution_multiple = base.resolution_multiple

    def forward(self, x: Tensor, time_input: Tensor, cond: Cond) -> Tensor:
        """x: unit noise [B, ...]; time_input: [B], of the output's time.  Returns the signal [B, ...]."""
        return self._read(x, self.base(self.config.input_scale * x, time_input, cond))

    def features(self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None) -> Features:
        """The base's."""
        return self.base.features(self.config.input_scale * x, time_input, cond, taps)

    def forward_with_features(
        self, x: Tensor, time_input: Tensor, cond: Cond, taps: Taps | None = None
    ) -> tuple[Tensor, Features]:
        """The signal, and the base's features."""
        output, features = self.base.forward_with_features(self.config.input_scale * x, time_input, cond, taps)
        return self._read(x, output), features

    def _read(self, x: Tensor, output: Tensor) -> Tensor:
        return self.config.skip * x + self.config.output_scale * output


def signal_config(teacher: Denoiser, network: SignalBase) -> SignalConfig:
    """A student that is given unit noise z and starts, at t_max, as the teacher's estimate from sigma_t_max z.

    network: the teacher's, or one around it.  EDM's skip, which at t_max is next to nothing, is left out: at less noise
    EDM reads D = c_skip x_t + c_out F with c_skip near 1 and c_out near 0, and so would return the noise.
    Raises UserError for a teacher that predicts noise, which says nothing of the signal in pure noise.
    """
    path, kind = teacher.path, teacher.predicts
    t = torch.tensor([path.t_max], dtype=torch.float64)
    sigma = path.sigma(t)
    if kind == "edm":
        scale = float(sigma / (sigma**2 + teacher.sigma_data**2).sqrt())
        return SignalConfig(base=network, input_scale=scale, output_scale=teacher.sigma_data)
    if kind == "eps":
        raise UserError("teacher: predicts eps; its signal at pure noise is a small difference of large numbers")
    skip, one = (float(path.to_x0(torch.full_like(t, value), kind, sigma, t)) for value in (0, 1))
    return SignalConfig(base=network, input_scale=float(sigma), output_scale=one - skip, skip=skip)


def start_from(student: Denoiser, teacher: Denoiser) -> None:
    """Give a signal network its teacher's weights, under an input of w that only the student has."""
    assert isinstance(student.net, Signal)
    base, other = student.net.base, teacher.net
    inner = base.base if isinstance(base, GuidedBase) and not isinstance(other, GuidedBase) else base
    if not isinstance(inner, LoRA):  # which stands over these weights
        inner.load_state_dict(other.state_dict())
