"""Students of every family by several kinds of steps, for the calls that people are used to. Nothing is trained."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from diffdistill.diffusion.path import Flow
from diffdistill.diffusion.sampling import DDIM, TCD, AnySampler, FewSteps
from diffdistill.export.expected import check_of
from diffdistill.export.habits import Habits, habits_of, habitual_calls
from diffdistill.export.record import ExportRecord
from diffdistill.export.stock import write_stock
from diffdistill.export.usage import asked_of
from diffdistill.export.verify import Check
from diffdistill.models.load import load_model
from diffdistill.models.spec import TrainedModel
from diffdistill.settings.schema import UserError
from support.stand_ins import STAND_INS, save_stand_in

TIMES = (999.0, 749.0, 499.0, 249.0)
STEPS = ("one, unit", "one, sigma", "two, fresh", "four, fresh", "four, uneven", "four, DDIM", "TCD", "one, TCD")


@dataclass
class Case:
    """said: what `habits` tells.  measured: the greatest difference of each call, or what it raised."""

    family: str
    steps: str
    said: Habits | None = None
    check: Check | None = None
    refusal: str = ""
    measured: dict[str, float | str] = field(default_factory=dict)


def sampler_of(model: TrainedModel, steps: str) -> AnySampler:
    path = model.denoiser.path
    levels = TIMES if not isinstance(path, Flow) else tuple(t / 1000 for t in TIMES)
    ratios = path.ratio(torch.tensor(levels)).tolist()
    unit = {"init_noise": "unit"}
    return {
        "one, unit": FewSteps(init_ratio=5, **unit),
        "one, sigma": FewSteps(init_ratio=2.5),
        "two, fresh": FewSteps(init_ratio=ratios[0], later_ratios=(ratios[2],), **unit),
        "four, fresh": FewSteps(init_ratio=ratios[0], later_ratios=tuple(ratios[1:]), **unit),
        "four, uneven": FewSteps(init_ratio=5, later_ratios=(3, 1, 0.3), **unit),
        "four, DDIM": FewSteps(init_ratio=ratios[0], later_ratios=tuple(ratios[1:]), later_noise="ddim", **unit),
        "TCD": TCD(num_steps=2, eta=0, grid=DDIM(num_steps=4), **unit),
        "one, TCD": TCD(num_steps=1, grid=DDIM(num_steps=4), **unit),
    }[steps]


def cases(folder: Path, families: Sequence[str] = tuple(STAND_INS), steps: Sequence[str] = STEPS) -> Iterator[Case]:
    """Written folders with checks of the card's program and these calls; or why there is none."""
    for family in families:
        place = folder / family
        model = load_model(place if place.exists() else save_stand_in(family, place))
        for number, name in enumerate(steps):
            yield _case(Case(family, name), model, folder / f"{family}-{number}")


def _case(case: Case, plain: TrainedModel, folder: Path) -> Case:
    sampler = sampler_of(plain, case.steps)
    model = replace(plain, spec=replace(plain.spec, sampler=sampler))
    try:
        stock = write_stock(model, folder)
    except UserError as error:
        case.refusal = str(error)
        return case
    record = ExportRecord(
        version="0", kind="stock", pipeline=stock.kind, call=dict(stock.call), sampler=sampler, absent=stock.absent
    )
    case.said = habits_of(stock, is_told_size=True)
    own = {name: stock.call[name] for name in ("height", "width", "use_resolution_binning") if name in stock.call}
    asked = {**asked_of(model, 2), **own, "output_type": "np"}
    calls = {name: {**asked, **call} for name, call in habitual_calls(stock.kind, case.said.number).items()}
    case.check = replace(check_of(model, folder, record), habits=json.loads(json.dumps(calls)))
    return case
