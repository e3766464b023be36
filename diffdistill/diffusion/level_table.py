"""A discrete path's levels on the devices where they are asked for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffdistill.diffusion.on_device import upload


@dataclass(frozen=True)
class LevelTable:
    """values: log(alpha/sigma) at every index.  slopes: from each to the next.  rising: -values."""

    values: Tensor
    slopes: Tensor
    rising: Tensor


def table_on(device: torch.device, tables: dict[torch.device, LevelTable], log_ratios: Tensor) -> LevelTable:
    """The table of a path on a device, copied there once.  tables: the path's, which are added to."""
    if device not in tables:
        with torch.inference_mode(False):
            values = upload(log_ratios, device)
            tables[device] = LevelTable(values, values.diff(), -values)
    return tables[device]
