"""Recipes for real teachers: each loads, fits its teacher's stand-in, and trains."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.stand_ins import save_stand_in

from diffdistill.methods.agd import AGD
from diffdistill.methods.hyper_sd import HyperSD
from diffdistill.models.teachers import open_pipeline
from diffdistill.models.teachers.hub import is_hub_name
from diffdistill.networks.lora import LoRASettings
from diffdistill.settings.values import dump
from diffdistill.training.config import RunConfig, find_config, load_config
from diffdistill.training.trainer import Trainer

FAMILIES = {"sd15": "sd", "sdxl": "sdxl", "pixart": "pixart", "sd3": "sd3", "dit256": "dit"}
"""The stand-in's family by the recipe's teacher."""
METHODS = ("dmd2", "sid", "sim", "f_distill", "hyper_sd", "agd")
FLOWS = ("z_image", "qwen_image", "chroma", "flux", "flux2", "lumina2", "auraflow", "cogview4", "longcat_image")
"""Families whose recipes are named as they are, of four calls and, with an ending, of one."""
FAMILIES |= {f"{family}{end}": family for family, end in product(FLOWS, ("", "_one"))}
RECIPES = [f"{method}/{teacher}" for method, teacher in product(METHODS, ("sd15", "sdxl", "pixart", "sd3", "dit256"))]
RECIPES += [f"{method}/{family}{end}" for method, family, end in product(("dmd2", "sid"), FLOWS, ("", "_one"))]
ONE_GPU = [recipe for recipe in RECIPES if not recipe.startswith("agd/") and not recipe.endswith("/dit256")]
"""Those that have a sibling for one GPU. The paper's settings of AGD are of one already."""
DECOUPLED = ("sdxl", "lumina2", "z_image", "qwen_image")
FAMILIES |= {f"{family}-decoupled": family for family in DECOUPLED}
FEW_CALLS = ["cdm/sd3", "cdm/longcat_image", "tdm/pixart", "tdm/sdxl", "tdm/sd3"]
FEW_CALLS += [f"dmd2/{family}-decoupled" for family in DECOUPLED]
"""Of students of several calls alone, each with a sibling for one GPU."""
FAMILIES |= {f"{teacher}-one-gpu": family for teacher, family in FAMILIES.items()}
RECIPES += [f"{recipe}-one-gpu" for recipe in ONE_GPU]
RECIPES += ["pi_flow/qwen_image", "pi_flow/flux", *FEW_CALLS, *(f"{recipe}-one-gpu" for recipe in FEW_CALLS)]
LIKE_THEIR_BASE = (
    "_one-one-gpu",
    *(f"{method}/{family}-one-gpu" for method, family in product(("dmd2", "sid"), FLOWS)),
)
"""Siblings that differ by batch and length alone, which the tests make small: their bases are trained."""
QUICK = ("dmd2/pixart", "sid/sd3", "agd/dit256", "dmd2/z_image", "cdm/sd3", "tdm/pixart")
"""Those that the quick tests train."""

PROMPTS = ("a red fox", "two blue birds", "a hat")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every stand-in by its family."""
    folder = tmp_path_factory.mktemp("teachers")
    for family in set(FAMILIES.values()):
        save_stand_in(family, folder / family)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """prompts.txt; captioned/: six images with their captions; classes/: six in three folders. All of 16 x 16."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    rng = torch.Generator().manual_seed(0)
    for number in range(6):
        pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8, generator=rng).numpy()
        for place in (folder / "captioned", folder / "classes" / f"{number % 3}"):
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / f"{number}.png")
        (folder / "captioned" / f"{number}.txt").write_text(PROMPTS[number % 3])
    return folder


def small(recipe: str, teachers: Path, data: Path, run: Path) -> RunConfig:
    """The recipe with a small teacher, batch and data, few trajectories and short stages; nothing else is changed."""
    config, teacher = load_config(find_config(recipe)), recipe.partition("/")[2]
    overrides, num_steps = [], 3
    if isinstance(config.method, AGD):
        overrides = ["method.trajectories=6", "method.steps.num_steps=3"]
    if isinstance(config.method, HyperSD):  # a step of each stage
        stages = [dump(replace(stage, num_steps=1)) for stage in config.method.stages]
        overrides, num_steps = [f"method.stages={json.dumps(stages)}"], len(stages)
    side = open_pipeline(teachers / FAMILIES[teacher]).image_size[0]
    places = {
        "prompts": f"{{name: prompts, path: {data}/prompts.txt}}",
        "webdataset": f"{{name: captioned_images, path: {data}/captioned, resolution: {side}}}",
        "image_folder": f"{{name: image_folder, path: {data}/classes, labels: folders, resolution: {side}}}",
    }
    if config.data.name in places:
        overrides.append(f"data={places[config.data.name]}")
    train = f"steps={num_steps} global_batch_size=4 micro_batch_size=2 device=cpu preview_every=0 log_every=1".split()
    overrides += [f"run={run}", f"teacher={teachers}/{FAMILIES[teacher]}", *(f"train.{setting}" for setting in train)]
    overrides.append("train.on_nonfinite=stop")
    return load_config(find_config(recipe), overrides)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_names_its_teacher_on_the_hub_and_says_that_it_was_not_run(recipe: str) -> None:
    config, text = load_config(find_config(recipe)), find_config(recipe).read_text()
    assert config.teacher is not None
    assert is_hub_name(config.teacher)
    header = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("# "))
    assert "arXiv:" in header
    assert "Not run here." in header
    assert len(text.splitlines()) <= 40


@pytest.mark.parametrize("recipe", ONE_GPU)
def test_a_sibling_for_one_gpu_has_lora_and_a_small_batch_in_pieces_and_is_called_ours(recipe: str) -> None:
    found, paper = load_config(find_config(f"{recipe}-one-gpu")), load_config(find_config(recipe))
    assert found.lora == {"default": LoRASettings(rank=64)}
    assert found.train.global_batch_size == 64 <= paper.train.global_batch_size
    assert found.train.micro_batch_size in (1, 2, 4)
    assert found.train.steps <= 10_000 <= paper.train.steps
    assert (found.teacher, found.data, found.speed) == (paper.teacher, paper.data, paper.speed)
    assert found.run == f"{paper.run}-one-gpu"
    if isinstance(found.method, HyperSD):
        assert sum(stage.num_steps or 0 for stage in found.method.stages) < found.train.steps
    else:
        assert found.method == paper.method
    assert " are ours; " in find_config(f"{recipe}-one-gpu").read_text().replace("\n# ", " ")


@pytest.mark.parametrize("recipe", FEW_CALLS)
def test_a_sibling_of_a_few_call_recipe_differs_in_lora_batch_and_length(recipe: str) -> None:
    found, paper = load_config(find_config(f"{recipe}-one-gpu")), load_config(find_config(recipe))
    for player in ("generator", "fake"):
        assert found.lora.get(player, found.lora["default"]) == LoRASettings(rank=64)
    assert (found.train.global_batch_size, found.train.micro_batch_size) == (64, 1)
    assert found.train.steps <= paper.train.steps
    optimizers, run = found.optimizers, f"{paper.run}-one-gpu"
    assert found == replace(paper, run=run, lora=found.lora, optimizers=optimizers, train=found.train)
    assert " are ours; " in find_config(f"{recipe}-one-gpu").read_text().replace("\n# ", " ")


def cases() -> Sequence[object]:
    trained = [recipe for recipe in RECIPES if not recipe.endswith(LIKE_THEIR_BASE)]
    return [recipe if recipe in QUICK else pytest.param(recipe, marks=pytest.mark.full) for recipe in trained]


@pytest.mark.parametrize("recipe", cases())
def test_a_recipe_trains_three_steps_of_its_teachers_stand_in(
    recipe: str, teachers: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    config = small(recipe, teachers, data, tmp_path / "run")
    trainer = Trainer(config, quiet=True)
    student = trainer.trained[config.method.student]
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    trainer.run()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows if "step" in row} >= {1, 2, 3}
    after = student.state_dict()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in after.values())
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
