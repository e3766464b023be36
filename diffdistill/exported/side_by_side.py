"""Teacher and students from the same noise: what `diffdistill play` draws, without its page."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffdistill.data.pictures import to_uint8
from diffdistill.diffusion.guidance.policies import Guidance
from diffdistill.export.space_app import Drawn, PageRequest
from diffdistill.exported.image_generators import Opened, open_place, open_teacher, timed_images
from diffdistill.exported.sample import teacher_of
from diffdistill.inference.image_generator import SampleRequest
from diffdistill.models.load import find_checkpoint, first_student
from diffdistill.models.teachers.hub import is_hub_name
from diffdistill.settings.schema import UserError
from diffdistill.settings.terminal import say

BATCH = 16
MAX_MODELS = 8


@dataclass(frozen=True)
class Player:
    """name: over its images.  guidance: where none is asked for; None: the model's own."""

    name: str
    opened: Opened
    is_teacher: bool = False
    guidance: Guidance | None = None


class SideBySide:
    """The models of some places, and before them the teacher of the first that has one, loaded once."""

    def __init__(self, places: Sequence[str], asked: SampleRequest, *, teacher_from: str | None = None) -> None:
        """asked: the device, and whether code may run.  teacher_from: where the teacher is now, if it was moved.

        Raises UserError on places that cannot be opened, and on models that are not told alike what to draw.
        """
        if len(places) > MAX_MODELS:
            raise UserError(f"play: {len(places)} models; at most {MAX_MODELS} fit side by side")
        self.asked, self.places = asked, places
        players = [Player(name, open_place(place, asked)) for name, place in zip(_names(places), places, strict=True)]
        teacher = _teacher(places, teacher_from)
        if teacher is not None:
            place, guidance = teacher
            same = [number for number, one in enumerate(places) if _exact(one) == _exact(place)]
            found = players.pop(same[0]).opened if same else self._open_teacher(place, players, teacher_from)
            players = [*([Player("teacher", found, True, guidance)] if found else []), *players]
        self.players, self.has_teacher = players, players[0].is_teacher
        self.names = [player.name for player in players]
        first = players[0].opened
        for player in players[1:]:
            if _told(player.opened) != _told(first):
                raise UserError(
                    f"play: {players[0].name} and {player.name} differ in image size, classes or prompts; only models "
                    "with the same conditions can be shown side by side"
                )
        self.takes_text = first.takes_text
        names = first.class_names
        self.classes = [names[number] if names else str(number) for number in first.classes]

    def draw(self, request: PageRequest) -> list[Drawn]:
        """The same noise through every model; what a model does not know is said in its place."""
        return [self._draw(player, request) for player in self.players]

    def _open_teacher(self, place: str, students: Sequence[Player], now: str | None) -> Opened | None:
        """None, which is said, where it is not on this machine or cannot be opened. Raises UserError where it is the
        place that the user gave."""
        try:
            if now is None and is_hub_name(place) and place not in {one.opened.pipeline for one in students}:
                raise UserError(f"{place}: is on the hub and is downloaded only on request: --teacher-from {place}")
            return open_teacher(place, self.asked, [*self.places, *([now] if now else [])])
        except UserError as error:
            if now is not None:
                raise
            say(f"shown without a teacher: {error}")
            return None

    def _draw(self, player: Player, request: PageRequest) -> Drawn:
        steps, guidance = request.of(is_teacher=player.is_teacher)
        asked = replace(
            self.asked,
            prompts=(request.prompt,) if self.takes_text else (),
            labels=(request.label,) if request.label else (),
            seed=request.seed,
            num_steps=steps,
            guidance=player.guidance if guidance is None else guidance,
        )
        try:
            imager = player.opened.generator(asked)
            images, seconds = timed_images(imager, request.count, BATCH)
        except (UserError, torch.OutOfMemoryError) as error:
            return Drawn(fault=str(error))
        return Drawn(pictures(images), imager.num_evaluations, seconds)


def pictures(images: Tensor) -> list[Image.Image]:
    """[N, C, H, W] in [-1, 1], of one channel or three, as pictures."""
    shown = to_uint8(images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1))
    return [Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0))) for image in shown]


def _told(opened: Opened) -> tuple[object, ...]:
    """What must be alike for the same noise and the same request to mean the same."""
    return opened.image_shape, opened.takes_text, opened.classes


def _names(places: Sequence[str]) -> list[str]:
    """The last part of each path; the whole where two are alike."""
    short = [FilePath(place).resolve().name for place in places]
    return [name if short.count(name) == 1 else place for name, place in zip(short, places, strict=True)]


def _exact(place: str) -> FilePath:
    """Of a run the checkpoint that is loaded; any other place is its own."""
    path = FilePath(place)
    try:
        return find_checkpoint(first_student(path)).resolve()
    except UserError:
        return path.resolve()


def _teacher(places: Sequence[str], now: str | None) -> tuple[str, float] | None:
    """The place of the teacher of the first place that has one, and its guidance."""
    faults = []
    for place in places:
        try:
            return teacher_of(place, now=now)
        except UserError as error:
            faults.append(str(error))
    if now is not None:
        raise UserError(faults[0])
    say(f"shown without a teacher: {faults[0]}")
    return None
