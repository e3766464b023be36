"""Runs of three steps from every family's stand-in by every method, for tests of what comes out of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from conftest import SMALL_TRAIN
from PIL import Image

from diffdistill.models.load import describe_model, join_students
from diffdistill.models.teachers import Pipeline, open_pipeline
from diffdistill.settings.values import apply_overrides, parse_yaml
from diffdistill.training.config import RunConfig, parse_config
from diffdistill.training.trainer import Trainer
from support.stand_ins import save_stand_in

SCORE = "{name: sid, steps: {init_ratio: 5, init_noise: unit}}"
HEUN = "{name: heun, num_steps: 3, rho: 5}"
METHODS = {
    "dmd2": "{name: dmd2, steps: {init_ratio: 5, init_noise: unit}, fake_updates: 1, gan_weight: 0.01}",
    "hyper_sd": """{name: hyper_sd, stages: [{segments: 2, num_steps: 2, adversarial_weight: 0.1}],
        steps: {num_steps: 1, grid: {num_steps: 4}, init_noise: unit}}""",
    "agd": """{name: agd, adapter: {width: 8, placement: all}, steps: {name: ddim, num_steps: 3}, guidance: [1, 4],
        trajectories: 6}""",
    "sid": SCORE,
    "sim": "{name: sim, steps: {init_ratio: 5, init_noise: unit}}",
    "f_distill": "{name: f_distill, divergence: js, steps: {init_ratio: 5, init_noise: unit}, fake_updates: 1}",
    "uni_instruct": "{name: uni_instruct, steps: {init_ratio: 5, init_noise: unit}}",
    "cdm": "{name: cdm, steps: {init_ratio: 5, later_noise: ddim}, anchor_weight: 0.05}",
    "boot": "{name: boot}",
    "free_flow": "{name: free_flow}",
    "disback": f"{{name: disback, base: {SCORE}, path_length: 2, recording_interval: 1, backtracking_interval: 1}}",
    "msd": f"{{name: msd, base: {SCORE}, num_students: 2, partition: {{name: label_ranges}}}}",
    "regression": f"{{name: regression, steps: {{init_ratio: 5, init_noise: unit}}, pairs: 8, pair_sampler: {HEUN}}}",
    "guidance_distill": "{name: guidance_distill, steps: {name: ddim, num_steps: 3}, width: 8}",
    "rcm": "{name: rcm, steps: {init_ratio: 6000, init_noise: unit}, warmup: 1, fake_updates: 1}",
    "scm": "{name: scm, steps: {init_ratio: 6000, init_noise: unit}}",
    "consistency": "{name: consistency, steps: {init_ratio: 6000, init_noise: unit}}",
    "tdm": "{name: tdm, steps: {init_ratio: 6000, init_noise: unit}}",
    "rectified_flow": f"""{{name: rectified_flow, steps: {{init_ratio: 6000, init_noise: unit}}, pairs: 8,
        pair_sampler: {HEUN}}}""",
    "pso": "{name: pso, steps: {init_ratio: 5, init_noise: unit}, winners: reward}",
    "preference_field": "{name: preference_field, steps: {init_ratio: 5, init_noise: unit}, fake_updates: 1}",
    "score_field": "{name: score_field, steps: {init_ratio: 5, init_noise: unit}}",
    "forget": f"{{name: forget, base: {SCORE}}}",
    "ddk": f"{{name: ddk, base: {SCORE}}}",
    "diversity": f"{{name: diversity, base: {SCORE}}}",
    "mean_flow": "{name: mean_flow, steps: {init_ratio: 6000, init_noise: unit}, width: 8}",
    "pi_flow": "{name: pi_flow, places: 3}",
}
"""The settings of each method that distils a teacher, for one step from unit noise where it is a generator's."""
OF_SEVERAL = {"merge_teachers": "{name: merge_teachers, steps: {name: ddim, num_steps: 3}, width: 8}"}
"""Those of methods that need further teachers, which the caller names."""
NO_STUDENTS = {
    "pretrain": "trains a model on images, such as the teachers of this page",
    "tsm": "trains a smaller diffusion model, for a later run to distil",
}
"""Methods that distil no steps, and what they do."""

OF_THE_SIGNAL = ("boot", "free_flow")
"""Methods whose students are given noise alone, and take no teacher that predicts it."""

ON_THE_PATH = ("hyper_sd", "rcm", "scm", "consistency", "tdm", "rectified_flow", "mean_flow")
"""Methods whose students begin with the path's own noise: unit noise only where sigma is 1, unlike in `OWN`."""

EDM = "path: {name: edm, sigma_min: 0.02, sigma_max: 20}, sigma_data: 0.75"
EDM_UNET = "channels: 8, multipliers: [1, 2], blocks: 1, attention_resolutions: [4]"
OWN = {
    name: f"{{network: {{{network}}}, {EDM}}}"
    for name, network in {
        "unet": "name: unet, channels: [8, 16]",
        "own dit": "name: dit, width: 16, depth: 2, heads: 2",
        "mlp": "name: mlp, width: 32, blocks: 2",
        "ddpmpp": f"name: ddpmpp, {EDM_UNET}",
        "adm": f"name: adm, head_channels: 8, {EDM_UNET}",
    }.items()
}
"""Our own networks, as `model` of a config, on digits."""
NEED_CLASSES = ("agd", "ddk", "msd", "guidance_distill")
PROMPTS = ("a red fox", "two blue birds", "a hat")
COUNT = 8  # images


def origin(family: str, method: str, folder: Path, *overrides: str) -> Path:
    """A family's stand-in, or a run of one of our own networks, of which overrides are.

    `ddpm` has classes for the methods that need some, and what students of the signal start from predicts v.
    """
    if family in OWN:
        text = f"method: {{name: pretrain}}\nmodel: {OWN[family]}\noptimizers: {{default: {{lr: 1e-3}}}}"
        settings = parse_yaml(f"{text}\ntrain: {SMALL_TRAIN}", origin="the tests' settings") | {"run": str(folder)}
        return _run(parse_config(apply_overrides(settings, ["train.steps=3", *overrides])))
    classes = {"num_classes": 5} if family == "ddpm" and method in NEED_CLASSES else {}
    save_stand_in(family, folder, **classes)
    file = folder / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(file.read_text())
    if method in OF_THE_SIGNAL and scheduler.get("prediction_type") == "epsilon":
        file.write_text(json.dumps(scheduler | {"prediction_type": "v_prediction"}))
    return folder


def train(method: str, teacher: Path, run: Path, *overrides: str) -> Path:
    """Three steps of a method from a pipeline's folder, or a run's. Returns the student's place.

    MSD's students are trained and joined. Raises UserError where method and teacher do not fit.
    """
    config = config_of(method, teacher, run, *overrides)
    if method != "msd":
        return _run(config)
    students = [config_of(method, teacher, run / f"{i}", f"method.student_index={i}", *overrides) for i in range(2)]
    join_students(run, [_run(student) for student in students])
    return run


def config_of(method: str, teacher: Path, run: Path, *overrides: str) -> RunConfig:
    pipeline, method_text = describe_model(teacher).pipeline, (METHODS | OF_SEVERAL)[method]
    if pipeline is None and method in ON_THE_PATH:
        method_text = method_text.replace("init_ratio: 6000", "init_ratio: 5").replace("unit", "sigma")
    text = f"method: {method_text}\noptimizers: {{default: {{lr: 1e-3}}}}\ntrain: {SMALL_TRAIN}"
    settings = parse_yaml(text, origin="the tests' settings") | {"run": str(run), "teacher": str(teacher)}
    if pipeline is not None:
        settings["data"] = data_for(open_pipeline(pipeline), run.parent / "data")
        settings["data"]["cache"] = str(run.parent / "cache")
    return parse_config(apply_overrides(settings, ["train.steps=3", "train.global_batch_size=4", *overrides]))


def data_for(source: Pipeline, folder: Path) -> dict[str, Any]:
    """Noise for images of a teacher's size: with captions, or with its classes."""
    spec, (height, width) = source.spec, source.image_size
    count = max(COUNT, spec.num_classes)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    folder = folder / f"{height}-{spec.num_classes}"
    folder.mkdir(parents=True, exist_ok=True)
    if source.family.takes_text:
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text(PROMPTS[number % len(PROMPTS)])
        return {"name": "captioned_images", "path": str(folder)}
    labels = {"labels": np.arange(count)} if spec.num_classes else {}
    np.savez(folder / "images.npz", images=images, **labels)
    return {"name": "npz", "path": str(folder / "images.npz")}


def _run(config: RunConfig) -> Path:
    Trainer(config, quiet=True).run()
    return Path(config.run)
