"""Recipes named by their number of steps: each stands over its model's recipe, and has as many levels as it says."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from support.stand_ins import save_stand_in

from diffdistill.diffusion.path import Flow, VPDiscrete
from diffdistill.diffusion.path import Path as NoisePath
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.hyper_sd import HyperSD
from diffdistill.settings.values import read_yaml
from diffdistill.training.config import find_config, load_config
from diffdistill.training.plan import plan

STABLE_DIFFUSION = VPDiscrete(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
SHIFTS = {
    "sd3": 3.0,
    "z_image": 6.0,
    "qwen_image": 2.0,
    "chroma": 3.0,
    "flux": 3.158,
    "flux2": 7.56,
    "lumina2": 6.0,
    "auraflow": 1.73,
    "cogview4": 3.25,
    "longcat_image": 3.158,
}
PATHS: dict[str, NoisePath] = {
    "sd15": STABLE_DIFFUSION,
    "sdxl": STABLE_DIFFUSION,
    "pixart": VPDiscrete(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    **{family: Flow(shift=shift) for family, shift in SHIFTS.items()},
}
"""Of the published models, by their schedulers."""
STAND_INS = {"sd15": "sd"}
NUMBERS = (2, 4, 8)
CASES = [*product(PATHS, NUMBERS), ("sdxl", 1)]
QUICK = (("sdxl", 2), ("z_image", 8))
every_recipe = pytest.mark.parametrize(("family", "number"), CASES)


@every_recipe
def test_a_recipe_s_levels_are_even_in_time_and_as_many_as_its_name_says(family: str, number: int) -> None:
    config, path = load_config(find_config(f"dmd2/{family}-{number}")), PATHS[family]
    assert isinstance(config.method, DMD2)
    assert (config.method.levels, config.method.steps.num_evaluations) == (None, number)
    times = config.method.steps.times(path)
    if isinstance(path, Flow):
        even = torch.tensor([0.999, *(1 - i / number for i in range(1, number))], dtype=torch.float64)
        torch.testing.assert_close(times, even, rtol=0, atol=1e-4)  # ratios of four digits
    else:
        first = 399 if number == 1 else 999
        assert times.tolist() == [first, *(1000 - 1000 * i // number - 1 for i in range(1, number))]


@every_recipe
def test_a_recipe_differs_from_its_model_s_in_its_levels_alone(family: str, number: int) -> None:
    name = f"dmd2/{family}-{number}"
    own, found, base = (read_yaml(find_config(name)), load_config(find_config(name)), f"dmd2/{family}")
    assert own["base"] == base
    assert set(own) <= {"base", "run", "method"} | ({"train"} if number == 1 else set())
    assert set(own.get("method", {})) <= {"steps"}
    known = load_config(find_config(base))
    assert (found.teacher, found.data, found.optimizers) == (known.teacher, known.data, known.optimizers)
    assert found.run == f"{known.run}-{number}"


@every_recipe
def test_a_recipe_says_what_is_published_and_that_it_was_not_run(family: str, number: int) -> None:
    lines = find_config(f"dmd2/{family}-{number}").read_text().splitlines()
    header = " ".join(line.removeprefix("# ") for line in lines if line.startswith("# "))
    assert all(said in header for said in ("Yin et al. 2024, arXiv:2405.14867", f"dmd2/{family}", "Not run here."))


@pytest.mark.parametrize(
    ("family", "number"), [case if case in QUICK else pytest.param(*case, marks=pytest.mark.full) for case in CASES]
)
def test_a_run_can_be_planned_of_a_recipe(
    family: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What doctor looks at first: players, sampler and data fit the teacher's stand-in."""
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    save_stand_in(STAND_INS.get(family, family), tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a red fox\ntwo blue birds")
    overrides = [f"teacher={tmp_path}/teacher", f"data={{name: prompts, path: {tmp_path}/prompts.txt}}"]
    overrides += ["method.gan_weight=0", f"run={tmp_path}/run", "train.device=cpu"]
    made = plan(load_config(find_config(f"dmd2/{family}-{number}"), overrides), resume=None)
    assert made.spec.sampler.num_evaluations == number
    assert {"generator", "fake"} <= made.trained.keys()


@pytest.mark.parametrize(("family", "number"), list(product(("sd15", "sdxl", "pixart", "sd3"), NUMBERS)))
def test_hyper_sd_stops_at_the_stage_of_as_many_segments(family: str, number: int) -> None:
    name, base = f"hyper_sd/{family}-{number}", load_config(find_config(f"hyper_sd/{family}"))
    found = load_config(find_config(name))
    assert isinstance(found.method, HyperSD)
    assert isinstance(base.method, HyperSD)
    assert found.method.steps == replace(base.method.steps, num_steps=number)
    kept = tuple(stage for stage in base.method.stages if stage.segments >= number)
    assert [replace(stage, num_steps=1) for stage in found.method.stages] == [replace(one, num_steps=1) for one in kept]
    assert found.method.stages[-1].segments == number
    assert found.train.steps == 10_000 * len(kept)
    same = replace(base, run=f"{base.run}-{number}", method=found.method, train=found.train)
    assert found == same
    header = find_config(name).read_text().replace("\n# ", " ")
    assert all(said in header for said in ("Ren et al. 2024, arXiv:2404.13686", f"hyper_sd/{family}", "Not run here."))
