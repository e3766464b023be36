"""The device that a command is told by `--device`."""

import torch

from diffdistill.settings.schema import UserError

DEVICES = ("auto", "cpu")


def check_device(name: str) -> None:
    """Raises UserError naming the choices."""
    if name not in DEVICES:
        raise UserError(f"--device {name}: choose from {', '.join(DEVICES)}")


def choose_device(name: str) -> torch.device:
    """cpu, or auto, which is the GPU where there is one. Raises UserError for another one."""
    check_device(name)
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu")
