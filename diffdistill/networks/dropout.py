"""The dropout of a player: a copy has its teacher's, unless a run says otherwise.

A place of dropout is torch's own module, or a module that calls the function with its attribute `dropout`, a number.
What LoRA's factors drop of their input is theirs (`lora`), no place of the network's.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import Field
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from diffdistill.networks.lora import lora_of
from diffdistill.settings.schema import UserError

Dropout = Annotated[float, Field(ge=0, lt=1)]
OF_FACTORS = "lora_dropout"  # peft's name


def dropout_of(module: nn.Module) -> float | None:
    """The greatest probability with which a part of a network is dropped in training; None where nothing can be."""
    return max((getattr(part, name) for part, name in _places(module)), default=None)


def set_dropout(module: nn.Module, probability: float) -> None:
    """Drop with this probability in every place of the network's. Where there is none nothing happens."""
    for part, name in _places(module):
        setattr(part, name, probability)


def apply_dropout(players: Mapping[str, nn.Module], dropout: Mapping[str, float | None]) -> None:
    """Give players their own, or that under `default`; null: as it is.

    Raises UserError for a name that is no player's, and for a player that has no place to drop anything.
    """
    for name, probability in dropout.items():
        if name not in players and name != "default":
            raise UserError(f"dropout.{name}: no such player; choose from {', '.join([*players, 'default'])}")
        if probability and name != "default" and dropout_of(players[name]) is None:
            raise UserError(f"dropout.{name} = {probability:g}: its network has no dropout; use 0 or null")
    for name, module in players.items():
        probability = dropout.get(name, dropout.get("default"))
        if probability is not None:
            set_dropout(module, probability)


def _places(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules, and the name of the attribute that holds their probability."""
    factors = lora_of(module)
    for tree in (module, *((factors.shared_tree,) if factors else ())):  # which is not registered
        for path, part in tree.named_modules():
            if isinstance(part, _DropoutNd):
                if OF_FACTORS not in path.split("."):
                    yield part, "p"
            elif type(vars(part).get("dropout")) in (int, float):  # not what diffusers finds in a config
                yield part, "dropout"
