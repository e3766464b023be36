"""What a pipeline makes of a number of steps alone, and of nothing, as the card says it."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.habits import STEPS, sampler_of
from support.stand_ins import save_stand_in

from diffdistill.diffusion.cond import Cond
from diffdistill.diffusion.sampling import FewSteps
from diffdistill.export import stock
from diffdistill.export.habits import Habits, habits_of, habitual_calls, show_habits
from diffdistill.export.lora_files import _check_loads, describe
from diffdistill.export.record import ExportRecord
from diffdistill.export.run import ExportOptions, export
from diffdistill.export.stock import fit_pipeline, write_stock
from diffdistill.export.usage import usage_code
from diffdistill.models.load import load_model
from diffdistill.models.spec import TrainedModel
from diffdistill.settings.schema import UserError

R, X, W = "right", "refused", "wrong"
SAID = {  # by family and kind of steps: of a number of steps, of a prompt alone; None: no such folder
    "sd": [(R, X), (R, W), (R, X), (R, X), (X, X), (R, X), (R, X), (R, X)],
    "sd3": [(R, X), None, (R, X), (W, X), (W, X), (W, W), (R, W), (R, X)],
    "flux": [(R, R), None, (R, X), (W, X), (W, X), (W, W), (R, W), (R, R)],
    "z_image": [(R, W), None, (R, X), (W, X), (W, X), (W, W), (R, W), (R, W)],
    "cogview4": [(R, W), None, (W, X), (W, X), (W, X), (W, W), (W, W), (R, W)],
    "longcat_image": [(W, X), None, (W, X), (W, X), (W, X), (W, W), (W, W), (W, X)],
    "dit": [(R, X), None, (R, X), (R, X), None, (R, W), None, (R, X)],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainedModel]:
    home = tmp_path_factory.mktemp("teachers")
    return {family: load_model(save_stand_in(family, home / family)) for family in (*SAID, "sana")}


def cells() -> Iterator[tuple[str, str, tuple[str, str]]]:
    for family, row in SAID.items():
        yield from ((family, name, cell) for name, cell in zip(STEPS, row, strict=True) if cell)


def habits(model: TrainedModel, steps: str, *, is_told_size: bool = True) -> Habits:
    model = replace(model, spec=replace(model.spec, sampler=sampler_of(model, steps)))
    source, found = fit_pipeline(model)
    kind = source.family.stock_pipeline or str(source.index["_class_name"])
    net = source.family.wrap(source.family.stock_network(model.denoiser.net.model), 0, 0.0)
    return habits_of(describe(source, found, kind, net), is_told_size=is_told_size)


@pytest.mark.parametrize(("family", "steps", "said"), list(cells()))
def test_what_is_said_of_the_calls(
    models: dict[str, TrainedModel], family: str, steps: str, said: tuple[str, str]
) -> None:
    """Whether it is so is measured where docs/export-matrix.md is written."""
    found = habits(models[family], steps)
    assert (found.counted, found.plain) == said
    assert found.reasons.keys() == {
        name for name, verdict in zip(("counted", "plain"), said, strict=True) if verdict != R
    }


EXPONENTIAL = [0.98 * 0.4**i for i in range(4)]
KARRAS = [(0.98 ** (1 / 7) + i / 3 * (0.1 ** (1 / 7) - 0.98 ** (1 / 7))) ** 7 for i in range(4)]


@pytest.mark.parametrize("later_noise", ["fresh", "ddim"])
@pytest.mark.parametrize("sigmas", [EXPONENTIAL, KARRAS], ids=["exponential", "karras"])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_flows_that_were_trained_on_a_schedulers_sigmas_are_right_by_their_number(
    models: dict[str, TrainedModel], family: str, sigmas: list[float], later_noise: Any
) -> None:
    """The only schedules of more than two steps that do not begin at sigma = 1."""
    first, *later = (sigma / (1 - sigma) for sigma in sigmas)
    steps = FewSteps(init_ratio=first, later_ratios=tuple(later), init_noise="unit", later_noise=later_noise)
    model = replace(models[family], spec=replace(models[family].spec, sampler=steps))
    source, found = fit_pipeline(model)
    net = source.family.wrap(source.family.stock_network(model.denoiser.net.model), 0, 0.0)
    described = stock.describe(source, found, str(source.index["_class_name"]), net)
    assert habits_of(described, is_told_size=True).counted == R
    other = replace(steps, later_ratios=(*later[:2], later[2] * 1.01))
    _, found = fit_pipeline(replace(model, spec=replace(model.spec, sampler=other)))
    assert habits_of(replace(described, scheduler=found.scheduler, call=found.call), is_told_size=True).counted == W


def test_a_pipeline_that_guides_at_one_is_said_to(models: dict[str, TrainedModel]) -> None:
    found = {family: habits(models[family], "one, unit") for family in ("z_image", "sd3")}
    assert found["z_image"].one == W
    assert found["sd3"].one == R
    shown = show_habits(found["z_image"], "prompt")
    assert "| `pipe(prompt, num_inference_steps=1, guidance_scale=0)` | the student's images |" in shown
    assert "guidance_scale=1)` | **WRONG IMAGES**: this pipeline guides at 1 already |" in shown


def test_a_pipeline_with_a_size_of_its_own_is_said_to_make_it(models: dict[str, TrainedModel]) -> None:
    found = habits(models["sana"], "one, unit", is_told_size=False)
    assert found.counted == W
    assert found.reasons["counted"] == "images of 1024 x 1024"


def test_flux_is_left_without_the_input_for_guidance_and_makes_the_same(
    models: dict[str, TrainedModel], tmp_path: Path
) -> None:
    model = models["flux"]
    model = replace(model, spec=replace(model.spec, sampler=sampler_of(model, "one, unit")))
    write_stock(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())["guidance_embeds"] is False
    after = load_model(tmp_path / "out").denoiser.net
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *model.spec.image_shape, generator=generator)
    cond = Cond(text=torch.randn(2, 5, 32, generator=generator), pooled_text=torch.randn(2, 16, generator=generator))
    told = replace(cond, guidance_input=torch.ones(2))
    time = torch.tensor([300.0, 900.0])
    with torch.no_grad():
        before, other = (
            model.denoiser.net(x, time, replace(told, guidance_input=torch.full((2,), s))) for s in (1.0, 0.0)
        )
        torch.testing.assert_close(after(x, time, cond), before, atol=1e-6, rtol=0)
    assert float((other - before).abs().max()) > 1e-4


def test_wrong_images_are_marked_loudly() -> None:
    shown = show_habits(Habits(4, "wrong", "refused", {"counted": "other steps", "plain": "too many"}), "prompt")
    assert (
        "| `pipe(prompt, num_inference_steps=4, guidance_scale=0)`, or `1` | **WRONG IMAGES**: other steps |" in shown
    )
    assert "| `pipe(prompt)` | an error: too many |" in shown
    assert shown.endswith("**Diffusers warns of none of the wrong ones. Call it as in the program above.**")
    right = show_habits(Habits(1, "right", "right", {}), "")
    assert "| `pipe()` | the student's images |" in right
    assert "WRONG" not in right


def test_a_pipeline_that_the_installed_diffusers_lacks_asks_for_a_newer_one(models: dict[str, TrainedModel]) -> None:
    model = models["sd"]
    source, steps = fit_pipeline(replace(model, spec=replace(model.spec, sampler=sampler_of(model, "one, unit"))))
    other = replace(source, index={**source.index, "_class_name": "LaterPipeline"})
    asked: list[Callable[[], object]] = [
        lambda: habitual_calls("LaterPipeline", 1),
        lambda: _check_loads(other, is_kohya=False),
        lambda: stock.describe(source, steps, "LaterPipeline", model.denoiser.net).absent,
    ]
    for call in asked:
        with pytest.raises(UserError, match="needs a newer diffusers, which has LaterPipeline"):
            call()


def test_a_pipeline_of_its_own_is_for_stock_folders_alone(models: dict[str, TrainedModel], tmp_path: Path) -> None:
    place = str(models["sd"].source)
    said = re.escape("--own-pipeline: is for --kind stock, not lora")
    with pytest.raises(UserError, match=said):
        export(place, tmp_path / "out", ExportOptions(kind="lora", has_own_pipeline=True))


@pytest.mark.parametrize(
    "changed",
    [
        {"pipeline": "print(1) or DiffusionPipeline"},
        {"scheduler": "X; print(1)"},
        {"absent": ("vae=print(1), unet",)},
        {"call": {"a=print(1), b": 1}},
    ],
)
def test_a_program_of_a_card_holds_names_and_values_alone(
    models: dict[str, TrainedModel], changed: dict[str, Any]
) -> None:
    """`verify` runs it, so that nothing of a stranger's folder may stand in it as code."""
    record = ExportRecord(
        version="0", kind="stock", pipeline="StableDiffusionPipeline", call={}, sampler=models["sd"].spec.sampler
    )
    assert "from_pretrained(place)" in usage_code(models["sd"], record, "'here'")
    with pytest.raises(UserError, match="not a valid name"):
        usage_code(models["sd"], replace(record, **changed), "'here'")
