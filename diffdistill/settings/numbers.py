"""The types of settings that are numbers, each with its limits."""

from typing import Annotated

from pydantic import Discriminator, Field, Tag

from diffdistill.settings.limits import (
    MAX_BATCH,
    MAX_BLOCKS,
    MAX_CHANNELS,
    MAX_CHOSEN,
    MAX_CLASSES,
    MAX_COUNT,
    MAX_DEPTH,
    MAX_INTEGER,
    MAX_LEVELS,
    MAX_LISTED,
    MAX_NUMBER,
    MAX_PROCESSES,
    MAX_SAMPLING_STEPS,
    MAX_SIDE,
    MAX_WIDTH,
)

TAGS = ("one side", "two sides")  # no names of settings: messages pass over them

Positive = Annotated[float, Field(gt=0, le=MAX_NUMBER, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=MAX_NUMBER, allow_inf_nan=False)]
Number = Annotated[float, Field(ge=-MAX_NUMBER, le=MAX_NUMBER, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1, le=MAX_COUNT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Seed = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Rates = Annotated[tuple[Positive, ...], Field(max_length=MAX_LISTED)]

Resolution = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Sides = Annotated[
    Annotated[Resolution, Tag(TAGS[0])] | Annotated[tuple[Resolution, Resolution], Tag(TAGS[1])],
    Discriminator(lambda value: TAGS[isinstance(value, (list, tuple))]),
]
"""Of a square, or height and width."""
Channels = Annotated[int, Field(ge=1, le=MAX_CHANNELS)]
Width = Annotated[int, Field(ge=1, le=MAX_WIDTH)]
WidthByFour = Annotated[int, Field(ge=4, le=MAX_WIDTH, multiple_of=4)]
Depth = Annotated[int, Field(ge=1, le=MAX_DEPTH)]
Blocks = Annotated[int, Field(ge=1, le=MAX_BLOCKS)]
Classes = Annotated[int, Field(ge=0, le=MAX_CLASSES)]
SamplingSteps = Annotated[int, Field(ge=1, le=MAX_SAMPLING_STEPS)]
Places = Annotated[int, Field(ge=1, le=MAX_CHOSEN)]
Levels = Annotated[int, Field(ge=1, le=MAX_LEVELS)]
BatchSize = Annotated[int, Field(ge=1, le=MAX_BATCH)]
Processes = Annotated[int, Field(ge=1, le=MAX_PROCESSES)]
TableSize = Annotated[int, Field(ge=2, le=MAX_LEVELS)]
Betas = Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(max_length=MAX_LISTED)]


def as_size(sides: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width."""
    return (sides, sides) if isinstance(sides, int) else sides
