"""What a run needs to go on: collected for a checkpoint, and put back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath

import torch
from torch import Tensor, nn

from diffdistill.storage.checkpoint import flatten, load_strictly, read_group, select_group
from diffdistill.training.ema import EMA
from diffdistill.training.optimizers import optimizer_tensors, parameters_of, restore_optimizer


@dataclass(frozen=True)
class RunState:
    """players: by name, those included that nothing trains.  emas: by group, of the player `student`."""

    players: Mapping[str, nn.Module]
    student: str
    emas: Mapping[str, EMA]
    optimizers: Mapping[str, torch.optim.Optimizer]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All numbers by group, then by name; where the processes share them out, this one's parts."""
        found = {"players": flatten({name: module.state_dict() for name, module in self.players.items()})}
        for group, ema in self.emas.items():
            found[group] = flatten({self.student: ema.module.state_dict()})
        found["optimizers"] = flatten({name: optimizer_tensors(o) for name, o in self.optimizers.items()})
        return found

    def restore(self, checkpoint: FilePath) -> None:
        """Put back what `tensors` gave, on as many processes as there are now.

        Raises UserError if the architecture has changed.
        """
        own = self.tensors()
        weights = read_group(checkpoint, "players", own["players"].get)
        for name, module in self.players.items():
            load_strictly(module, select_group(weights, name), origin=f"{checkpoint} ({name})")
        for group, ema in self.emas.items():
            weights = select_group(read_group(checkpoint, group, own[group].get), self.student)
            load_strictly(ema.module, weights, origin=f"{checkpoint} ({group})")
        moments = read_group(checkpoint, "optimizers", self._parameter)
        for name, optimizer in self.optimizers.items():
            restore_optimizer(optimizer, select_group(moments, name))

    def _parameter(self, name: str) -> Tensor | None:
        """The parameter that a moment, "<player>.<number>.<key>", belongs to."""
        player, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        parameters = parameters_of(self.optimizers[player]) if player in self.optimizers else []
        return parameters[int(number)] if number.isdigit() and int(number) < len(parameters) else None
