"""Exported folders: their images, without this package, are the run's own; and what is written, kept and refused."""

import ast
import json
import multiprocessing
import os
import shutil
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.method_matrix import origin, train
from support.stand_ins import save_sentence_encoder, save_stand_in
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.diffusion.denoiser import freeze
from diffdistill.diffusion.path import VPDiscrete
from diffdistill.diffusion.sampling import DDIM, TCD, AnySampler, FewSteps, Heun
from diffdistill.eval.board.files import model_index_of
from diffdistill.export import run as command
from diffdistill.export.card import CardFacts, _metadata, _summary
from diffdistill.export.expected import check_of
from diffdistill.export.habits import habitual_calls
from diffdistill.export.own_pipeline import write_own_pipeline
from diffdistill.export.parts import _copy_part
from diffdistill.export.record import RECORD, ExportRecord, read_record
from diffdistill.export.run import ExportOptions, export, write
from diffdistill.export.self_contained import write_self_contained
from diffdistill.export.stock import write_stock
from diffdistill.export.usage import asked_of, folder_code
from diffdistill.export.verify import TOLERANCE, Check, ExportError, Found, measure, verify
from diffdistill.models.composed import ComposedTeacher
from diffdistill.models.load import load_model
from diffdistill.models.spec import ModelConfig, ModelSpec, TrainedModel
from diffdistill.models.teachers import open_pipeline
from diffdistill.models.teachers.compose import compose
from diffdistill.networks.unet import UNetConfig
from diffdistill.settings.schema import UserError

UNIT = {"init_noise": "unit"}
SD_LAST, SD_HALF = (
    VPDiscrete.from_scheduler({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
    .ratio(torch.tensor([999.0, 499.0]))
    .tolist()
)
LAST, HALF = VPDiscrete().ratio(torch.tensor([999.0, 499.0])).tolist()
SAMPLERS: dict[str, tuple[str, AnySampler]] = {
    "sd, one step from sigma_t n": ("sd", FewSteps(init_ratio=5)),
    "sd, fresh noise": ("sd", FewSteps(init_ratio=5, later_ratios=(2, 0.5), **UNIT)),
    "sd, deterministic": ("sd", FewSteps(init_ratio=5, later_ratios=(1,), later_noise="ddim")),
    "sd, TCD": ("sd", TCD(num_steps=4, eta=0.6, **UNIT)),
    "sd, one step of TCD": ("sd", TCD(num_steps=1, **UNIT)),
    "sd, DDIM": ("sd", DDIM(num_steps=3)),
    "dit, TCD": ("dit", TCD(num_steps=4, **UNIT)),
    "dit, one step of TCD": ("dit", TCD(num_steps=1, eta=0.5, **UNIT)),
    "dit, fresh noise at even times": ("dit", FewSteps(init_ratio=LAST, later_ratios=(HALF,), **UNIT)),
    "sd3, fresh noise": ("sd3", FewSteps(init_ratio=20, later_ratios=(2, 0.5), **UNIT)),
    "sd3, TCD without noise": ("sd3", TCD(num_steps=2, eta=0, grid=DDIM(num_steps=4), **UNIT)),
    "sana, fresh noise": ("sana", FewSteps(init_ratio=20, later_ratios=(2,), **UNIT)),
    "sd, DDIM from unit noise": (
        "sd",
        FewSteps(init_ratio=SD_LAST, later_ratios=(SD_HALF,), later_noise="ddim", **UNIT),
    ),
    "sd, DDIM at other times": ("sd", FewSteps(init_ratio=LAST, later_ratios=(1,), later_noise="ddim", **UNIT)),
    "sd, one step from unit noise": ("sd", FewSteps(init_ratio=5, **UNIT)),
    "flux, one step": ("flux", FewSteps(init_ratio=20, **UNIT)),
    "flux, fresh noise": ("flux", FewSteps(init_ratio=20, later_ratios=(2, 0.5), **UNIT)),
    "pixart, fresh noise": ("pixart", FewSteps(init_ratio=5, later_ratios=(2,), **UNIT)),
    "ddpm, one step": ("ddpm", FewSteps(init_ratio=5, **UNIT)),
}
FAMILIES = ("sd", "dit", "sd3", "sana", "pixart", "ddpm", "flux")
RIGHT = {  # also by a number of steps alone, with guidance_scale=0
    *("sd, one step from sigma_t n", "sd, one step from unit noise", "sd, DDIM", "sd, DDIM from unit noise"),
    *("dit, fresh noise at even times", "ddpm, one step", "flux, one step", "sana, fresh noise"),
}
REFUSES_PLAIN = {"sd, one step from unit noise", "sd, DDIM from unit noise", "ddpm, one step", "sana, fresh noise"}
REFUSES_PLAIN |= {"sd, DDIM at other times"}
"""A prompt and nothing else is an error."""
SIZED: dict[str, tuple[str, tuple[int, int]]] = {
    "sd of 32 x 16": ("sd", (32, 16)),
    "sd3 of 32 x 32": ("sd3", (32, 32)),
    "ddpm of 16 x 8": ("ddpm", (16, 8)),
    "pixart of 32 x 16": ("pixart", (32, 16)),
    "flux of 16 x 32": ("flux", (16, 32)),
}
"""Over teachers that are told a size: by a call that names it."""
SAYS_SIZE = ("sd of 32 x 16", "sd3 of 32 x 32", "ddpm of 16 x 8")
"""Those whose folder says it too, for a number of steps alone."""
RIGHT |= set(SAYS_SIZE)
OF_OWN_CODE: dict[str, tuple[str, AnySampler]] = {
    "sd3-own": ("sd3", FewSteps(init_ratio=20, later_ratios=(2,))),
    "sd-own": ("sd", Heun(num_steps=2)),
}
"""Steps that no scheduler makes, in folders with code of their own."""
REFUSED: dict[str, tuple[str, AnySampler, str]] = {
    "the first noise again": ("sd", FewSteps(later_ratios=(1,), later_noise="fixed"), "later_noise: fixed"),
    "a second order": ("sd", Heun(), "the steps of heun"),
    "fresh noise from sigma": ("sd", FewSteps(later_ratios=(1,)), "train with init_noise: unit"),
    "TCD from sigma": ("sd", TCD(), "train with init_noise: unit"),
    "a flow from sigma": ("sd3", FewSteps(), "train with init_noise: unit"),
    "noise between TCD's steps on a flow": ("sd3", TCD(**UNIT), "several TCD steps on a flow"),
    "uneven times": ("dit", FewSteps(init_ratio=50, later_ratios=(2,), **UNIT), "this pipeline takes no timesteps"),
    "eta": ("dit", TCD(eta=0.5, **UNIT), "TCD has eta 0.3"),
    "another start": ("ddpm", FewSteps(), "train with init_noise: unit"),
}


def with_sampler(place: Path, sampler: AnySampler) -> TrainedModel:
    found = load_model(place)
    return replace(found, spec=replace(found.spec, sampler=sampler))


def small_text_model(encoder: Path) -> TrainedModel:
    """A network of our own that draws sentences."""
    spec = ModelSpec(
        model=ModelConfig(network=UNetConfig(channels=(8, 16), text_width=16)),
        image_shape=(3, 8, 8),
        num_classes=0,
        class_dropout=0.1,
        sampler=FewSteps(init_ratio=5, later_ratios=(2,)),
        text_encoder=str(encoder),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = spec.build()
        for parameter in denoiser.parameters():  # its last layer starts at nothing
            torch.nn.init.normal_(parameter, std=0.1)
    freeze(denoiser)
    return TrainedModel(denoiser, spec, encoder)


def stock_check(model: TrainedModel, folder: Path, name: str, *, has_pipeline: bool = False) -> Check:
    """Of those calls of habit too that `name` stands for."""
    stock = write_stock(model, folder)
    sampler, number = model.spec.sampler, model.spec.sampler.num_evaluations
    record = ExportRecord(
        version="0",
        kind="stock",
        pipeline=stock.kind,
        call=dict(stock.call),
        sampler=sampler,
        own_pipeline=write_own_pipeline(folder, stock, number) if has_pipeline else None,
        absent=stock.absent,
    )
    size = ("height", "width") if name not in SAYS_SIZE else ()
    check, size = check_of(model, folder, record), (*size, "use_resolution_binning")
    asked = asked_of(model, 2) | {name: stock.call[name] for name in size if name in stock.call} | {"output_type": "np"}
    calls = {name: asked | call for name, call in habitual_calls(stock.kind, number).items()}
    kept = ["zero"] if name in RIGHT else []
    kept += ["plain"] if name in REFUSES_PLAIN or has_pipeline else []
    return replace(check, habits={call: calls[call] for call in kept})


def own_check(model: TrainedModel, folder: Path) -> Check:
    write_self_contained(model, folder)
    kind = "DiffusionPipeline"
    record = ExportRecord(version="0", kind="self-contained", pipeline=kind, call={}, sampler=model.spec.sampler)
    return check_of(model, folder, record)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("teachers")
    return {family: save_stand_in(family, home / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def checks(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Check]:
    """Stock folders of every kind of steps, and trained students of every kind of folder."""
    home, made = tmp_path_factory.mktemp("exported"), {}
    for number, (name, (family, sampler)) in enumerate(SAMPLERS.items()):
        model = with_sampler(places[family], sampler)
        made[name] = stock_check(model, home / f"{number}", name)
    for name, (family, pixels) in SIZED.items():
        place = compose(ComposedTeacher(name=str(places[family]), resolution=pixels))
        made[name] = stock_check(with_sampler(Path(place), FewSteps(init_ratio=5, **UNIT)), home / name, name)
    for name, (family, sampler) in OF_OWN_CODE.items():
        model = with_sampler(places[family], sampler)
        made[name] = own_check(model, home / name)
    sentences = small_text_model(save_sentence_encoder(home / "encoder"))
    made["sentences"] = own_check(sentences, home / "sentences")
    for name, (family, method, kind, *more) in STUDENTS.items():
        teacher = origin(family, method, home / f"{name}-teacher")
        place = train(method, teacher, home / f"{name}-run", *more)
        made[name] = write(str(place), home / name, ExportOptions(kind=kind)).check  # type: ignore[arg-type]
    half = with_half_encoders(save_stand_in("sdxl", home / "half-teacher"))
    made["half"] = stock_check(with_sampler(half, FewSteps(init_ratio=5)), home / "half", "half")
    one = with_sampler(places["sd"], FewSteps(init_ratio=5))
    made["own pipeline"] = stock_check(one, home / "own-pipeline", "own pipeline", has_pipeline=True)
    lora = train("sid", half, home / "half-run", *VISIBLE)
    made["half-lora"] = write(str(lora), home / "half-lora", ExportOptions(kind="lora")).check
    made |= {f"{name} not loaded": without_lora_file(made[name]) for name in ("lora", "kohya", "half-lora")}
    return made | {"planted": planted(made["signal"], home / "planted")}


VISIBLE = ("lora.default={rank: 2, alpha: 4}", "optimizers.default.lr=0.1")
"""LoRA that changes the images: at a common learning rate three steps do so by 1e-6."""
OTHERS = ("sentences", "half", "half-lora", "own pipeline")
STUDENTS = {
    "router": ("unet", "msd", "auto"),
    "signal": ("mlp", "boot", "auto"),
    "adapters-on-text": ("sd", "agd", "auto"),
    "lora": ("sd", "sid", "lora", *VISIBLE),
    "kohya": ("sdxl", "sid", "kohya", *VISIBLE),
}
"""Family, method, kind of folder, overrides."""


def without_lora_file(check: Check) -> Check:
    """Planted: the program does not load the file. Its pipeline's images stand as another call, too."""
    lines = check.code.splitlines()
    kept = [line for line in lines if "load_lora_weights" not in line]
    assert len(kept) == len(lines) - 1
    return replace(check, code="\n".join(kept), habits={"the teacher": check.call})


def with_half_encoders(place: Path) -> Path:
    """As SDXL and SD3 are published: float32 networks, and encoders whose configs name half precision."""
    for file in place.glob("text_encoder*/config.json"):
        config = json.loads(file.read_text())
        config.pop("dtype")
        file.write_text(json.dumps(config | {"torch_dtype": "float16"}))
    return place


@pytest.fixture(scope="module")
def found(checks: dict[str, Check]) -> dict[str, Found]:
    """Of all folders, loaded in one process without this package."""
    return dict(zip(checks, measure(list(checks.values())), strict=True))


@pytest.fixture(scope="module")
def differences(found: dict[str, Found]) -> dict[str, float | str]:
    return {name: one.difference for name, one in found.items()}


@pytest.mark.parametrize("name", [*SAMPLERS, *SIZED, *OF_OWN_CODE, *STUDENTS, *OTHERS])
def test_a_folder_makes_the_runs_images_where_this_package_cannot_be_imported(
    differences: dict[str, float | str], name: str
) -> None:
    found = differences[name]
    assert isinstance(found, float), found
    assert found <= TOLERANCE


@pytest.mark.parametrize("name", sorted(RIGHT | {"own pipeline"}))
def test_a_number_of_steps_alone_makes_the_same_images_and_a_prompt_alone_does_not_make_others(
    found: dict[str, Found], name: str
) -> None:
    habits = found[name].habits
    if name in RIGHT:
        assert isinstance(habits["zero"], float), habits["zero"]
        assert habits["zero"] <= TOLERANCE
    if name in REFUSES_PLAIN:
        assert str(habits["plain"]).startswith("ValueError")
    if name == "own pipeline":
        assert isinstance(habits["plain"], float), habits["plain"]
        assert habits["plain"] <= TOLERANCE


@pytest.mark.parametrize("name", REFUSED)
def test_steps_that_no_scheduler_of_diffusers_makes_are_refused_with_what_would(
    places: dict[str, Path], tmp_path: Path, name: str
) -> None:
    family, sampler, said = REFUSED[name]
    with pytest.raises(UserError, match=said):
        write_stock(with_sampler(places[family], sampler), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_call_names_the_trained_times_and_turns_guidance_off(checks: dict[str, Check]) -> None:
    call = checks["sd, fresh noise"].call
    assert call["guidance_scale"] == 1.0
    assert len(call["timesteps"]) == 3
    index = json.loads((checks["sd, fresh noise"].folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["scheduler"] == ["diffusers", "LCMScheduler"]
    assert checks["dit, TCD"].call["num_inference_steps"] == 4


@pytest.mark.parametrize("name", ["lora", "kohya", "half-lora"])
def test_a_lora_file_that_is_not_loaded_is_found(found: dict[str, Found], name: str) -> None:
    """The students of these checks are far enough from their teachers."""
    assert "another image" in str(found[f"{name} not loaded"].difference)
    assert float(found[f"{name} not loaded"].habits["the teacher"]) > 1000 * TOLERANCE


def test_a_lora_file_holds_its_factors_alone(checks: dict[str, Check]) -> None:
    for name in ("lora", "kohya"):
        folder = checks[name].folder
        assert not (folder / "model_index.json").exists()
        assert all(float(t.abs().max()) > 0 for t in load_file(next(folder.glob("*.safetensors"))).values())


def test_an_exported_file_imports_torch_and_diffusers_only(checks: dict[str, Check]) -> None:
    for name in ("router", "signal", "adapters-on-text"):
        files = sorted(checks[name].folder.rglob("*.py"))
        assert [file.name for file in files][-1] == "pipeline.py"
        for file in files:
            for node in ast.walk(ast.parse(file.read_text())):
                found = [node.module] if isinstance(node, ast.ImportFrom) else []
                found += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                outside = {str(found).split(".")[0] for found in found} - sys.stdlib_module_names
                assert outside <= {"torch", "diffusers"}


def test_two_folders_never_share_a_file_of_code_that_differs(checks: dict[str, Check]) -> None:
    files = [file for name in ("router", "signal", "adapters-on-text") for file in checks[name].folder.rglob("*.py")]
    by_name: dict[str, set[str]] = {}
    for file in files:
        by_name.setdefault(file.name, set()).add(file.read_text())
    assert len(by_name) == 4
    assert all(len(texts) == 1 for texts in by_name.values())


def test_a_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    check = Check(Path("there"), "", {}, torch.zeros(1), torch.zeros(1))
    monkeypatch.setattr("diffdistill.export.verify.compare", lambda _: [TOLERANCE, 2e-5])
    with pytest.raises(ExportError, match=r"there: its images differ from the run's by up to 2e-05"):
        verify([check, check])


def test_a_folder_that_imports_this_package_is_found(differences: dict[str, float | str]) -> None:
    assert "not to be imported by an exported model" in str(differences["planted"])


def planted(check: Check, folder: Path) -> Check:
    """A copy whose code imports this package."""
    shutil.copytree(check.folder, folder)
    (file,) = (folder / "model").glob("network_*.py")
    changed = file.read_text() + "\nimport importlib\nimportlib.import_module('diffdistill.diffusion.path')\n"
    file.with_name("network_planted.py").write_text(changed)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"model": ["network_planted", "Model"]}))
    return replace(check, folder=folder, code=check.code.replace(str(check.folder), str(folder)))


# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional student that is told the guidance scale."""
    home = tmp_path_factory.mktemp("agd")
    return train("agd", origin("mlp", "agd", home / "teacher"), home / "run")


def out_of(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_the_command_writes_verifies_and_says_what_it_wrote(run: Path, tmp_path: Path) -> None:
    result = out_of(run, "--out", tmp_path / "deep" / "digits")
    assert result.exit_code == 0, result.output
    assert "self-contained (Adapted is not one of diffusers' networks), the run's images" in result.stdout
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["digits"]
    names = {path.name for path in (tmp_path / "deep" / "digits").iterdir()}
    assert names == {"README.md", RECORD, "model", "model_index.json", "pipeline.py", "samples.png"}


def unverified(run: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Export, and the card's front matter."""
    export(str(run), out, ExportOptions(is_verified=False, **options))
    _, front, _ = (out / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front)  # type: ignore[no-any-return]


def test_the_scale_of_a_student_that_is_told_it_is_the_middle_unless_named(run: Path, tmp_path: Path) -> None:
    for scale, expected in ((None, 2.5), (3.0, 3.0)):
        unverified(run, tmp_path / "out", guidance_scale=scale)
        config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
        assert config["guidance_scale"] == expected


def test_a_card_says_how_to_call_how_it_was_made_and_under_which_licence(
    places: dict[str, Path], tmp_path: Path
) -> None:
    teacher = shutil.copytree(places["sd"], tmp_path / "teacher")
    (teacher / "README.md").write_text("---\nlicense: other\nlicense_name: house\nlicense_link: LICENSE\n---\n# It\n")
    (teacher / "LICENSE").write_text("Be kind.")
    place = train("sid", teacher, tmp_path / "run")
    front = unverified(place, tmp_path / "out")
    assert {key: front[key] for key in ("license", "license_name", "pipeline_tag", "library_name")} == {
        "license": "other",
        "license_name": "house",
        "pipeline_tag": "text-to-image",
        "library_name": "diffusers",
    }
    assert "base_model" not in front  # a folder here is none of the hub's
    card = (tmp_path / "out" / "README.md").read_text()
    steps = read_record(tmp_path / "out").call["timesteps"]  # type: ignore[union-attr]
    assert f"pipe(prompt='a red square', timesteps={steps}, guidance_scale=1.0, generator=" in card
    assert "name: sid" in card
    assert "Distilled with diffdistill by `sid`, from `teacher`: images of 16 x 16 pixels in 1 NFE" in card
    assert "| `pipe(prompt, num_inference_steps=1, guidance_scale=0)`, or `1` | the student's images |" in card
    assert "The teacher's, `other`, holds for this student as well." in card
    assert (tmp_path / "out" / "LICENSE").read_text() == "Be kind."
    assert (tmp_path / "out" / "samples.png").stat().st_size > 0


def test_a_card_names_the_teacher_that_its_folder_was_of(places: dict[str, Path], tmp_path: Path) -> None:
    teacher = shutil.copytree(places["sd"], tmp_path / "copy")
    index = json.loads((teacher / "model_index.json").read_text())
    (teacher / "model_index.json").write_text(json.dumps(index | {"_name_or_path": "their/diffusion"}))
    for place, named in ((teacher, "their/diffusion"), (places["sd"], None)):
        model = with_sampler(place, FewSteps(init_ratio=5))
        record = ExportRecord(
            version="0", kind="stock", pipeline="x", call={}, sampler=model.spec.sampler, teacher="a/b"
        )
        facts = CardFacts(str(place), model, record, {})
        assert _metadata(facts, {}).get("base_model") == named
        assert _summary(facts).startswith(
            f"Distilled with diffdistill, from `a/b`{' (their/diffusion)' * bool(named)}:"
        )


def test_a_card_without_a_licence_tells_to_look_it_up(places: dict[str, Path], run: Path, tmp_path: Path) -> None:
    assert "license" not in unverified(run, tmp_path / "own")
    assert "The teacher's, which was trained here" in (tmp_path / "own" / "README.md").read_text()
    assert unverified(run, tmp_path / "named", licence="mit")["license"] == "mit"


def test_scores_of_this_model_stand_in_the_card_and_others_are_refused(run: Path, tmp_path: Path) -> None:
    records, options = tmp_path / "records.jsonl", ["--repeats", "1", "--records"]
    done = CliRunner().invoke(app, ["eval", str(run), *options, str(records)])
    assert done.exit_code == 0, done.output
    front = unverified(run, tmp_path / "out", scores=partial(model_index_of, records))
    (model,) = front["model-index"]
    metrics = {metric["type"]: metric["value"] for result in model["results"] for metric in result["metrics"]}
    assert all(isinstance(value, float) for value in metrics.values())
    assert metrics
    with pytest.raises(UserError, match=r"records.jsonl: has no record of .*teacher"):
        unverified(run.parent / "teacher", tmp_path / "other", scores=partial(model_index_of, records))
    assert not (tmp_path / "other").exists()


def test_a_folder_that_fails_is_never_there(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def differ(_: object) -> list[float]:
        raise ExportError("its images differ")

    monkeypatch.setattr(command, "verify", differ)
    result = out_of(run, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "its images differ" in result.stderr
    assert list(tmp_path.iterdir()) == []


def export_and_die(run: Path, out: Path) -> None:
    """Killed when the folder is nearly whole."""
    command.verify = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, misc, return-value]
    export(str(run), out, ExportOptions())


def test_an_export_that_is_killed_leaves_no_folder_and_the_next_one_works(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    unverified(run, out)
    before = (out / "model" / "config.json").read_text()
    process = multiprocessing.get_context("fork").Process(target=export_and_die, args=(run, out))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (out / "model" / "config.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir() if path != out] == [".exporting-out"]
    unverified(run, out, guidance_scale=1.5)
    assert json.loads((out / "model" / "config.json").read_text())["guidance_scale"] == 1.5
    assert list(tmp_path.iterdir()) == [out]


def test_what_is_not_an_exported_model_is_never_overwritten(run: Path, places: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(places["sd"])
    for taken, said in (
        (places["sd"], "holds something other than an exported model"),
        (run, "holds something other than an exported model"),
        (tmp_path / "file", "exists and is not a folder"),
        (tmp_path / "link", "exists and is not a folder"),
        (tmp_path / "file" / "below", "cannot be written"),
    ):
        with pytest.raises(UserError, match=said):
            export(str(run), taken, ExportOptions())
    assert (places["sd"] / "model_index.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--kind", "onnx"), "--kind onnx: choose from auto, stock, self-contained, lora, kohya"),
        (("--kind", "stock"), "--kind stock: Adapted is not one of diffusers' networks; use --kind self-contained"),
        (("--kind", "lora"), "has no LoRA factors; use --kind stock"),
        (("--ema", "short"), "no EMA 'short'"),
        (("--push", "two words"), "--push two words: must be a name as in your-name/model"),
        (("--records", "none.jsonl"), "none.jsonl"),
    ],
)
def test_what_cannot_be_is_refused_in_one_message(
    run: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    result = out_of(run, "--out", tmp_path / "out", "--no-verify", *arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_scale_is_refused_for_a_student_that_is_not_told_it(quick_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--guidance 2: this student does not take the scale as input"):
        export(str(quick_teacher), tmp_path / "out", ExportOptions(guidance_scale=2.0))


def test_lora_over_another_network_than_the_pipelines_is_not_exported_as_its_lora(
    places: dict[str, Path], tmp_path: Path
) -> None:
    tuned = train("sid", places["sd"], tmp_path / "tuned")
    place = train("sid", tuned, tmp_path / "run", "lora.default={rank: 2}")
    with pytest.raises(UserError, match=r"its factors belong to .*tuned"):
        export(str(place), tmp_path / "out", ExportOptions(kind="lora"))


def test_parts_in_half_precision_are_copied_under_the_name_that_diffusers_looks_for(
    places: dict[str, Path], tmp_path: Path
) -> None:
    teacher = shutil.copytree(places["sd"], tmp_path / "teacher")
    file = teacher / "text_encoder" / "model.safetensors"
    save_file({name: t.half() for name, t in load_file(file).items()}, file.with_name("model.fp16.safetensors"))
    file.unlink()
    (teacher / "vae" / "pickle.bin").write_bytes(b"cos\nsystem\n")
    model = with_sampler(teacher, FewSteps(init_ratio=5))
    write_stock(model, tmp_path / "out")
    assert (tmp_path / "out" / "text_encoder" / "model.safetensors").exists()
    assert not list((tmp_path / "out").rglob("*.bin"))
    assert not list((tmp_path / "out").rglob("*.fp16.*"))


def test_encoders_in_half_precision_are_read_and_copied_in_the_precision_of_their_weights(
    checks: dict[str, Check],
) -> None:
    folder = checks["half"].folder
    teacher = folder.with_name("half-teacher")
    for part in ("text_encoder", "text_encoder_2"):
        assert json.loads((folder / part / "config.json").read_text())["dtype"] == "float32"
        written = load_file(teacher / part / "model.safetensors")
        loaded = dict(getattr(open_pipeline(teacher).load_encoder(), part).named_parameters())
        assert loaded.keys() == written.keys()
        assert all(torch.equal(loaded[name], weight) for name, weight in written.items())
    nested = folder.parent / "nested"
    (nested / "source" / "encoder").mkdir(parents=True)
    (nested / "source" / "encoder" / "config.json").write_text(
        json.dumps({"torch_dtype": "bfloat16", "text_config": {"torch_dtype": "float16", "width": 3}, "none": {}})
    )
    _copy_part(nested / "source" / "encoder", nested / "copy")
    assert json.loads((nested / "copy" / "config.json").read_text()) == {
        "text_config": {"width": 3, "dtype": "float32"},
        "none": {},
        "dtype": "float32",
    }


# The hub


class Hub:
    """In the place of `HfApi`: remembers what it is asked."""

    asked: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012
    fails = False

    def create_repo(self, repo: str, **options: Any) -> str:
        if Hub.fails:
            raise RuntimeError(f"403 for the token {os.environ['HF_TOKEN']}")
        Hub.asked.append((repo, options))
        return f"https://huggingface.co/{repo}"

    def upload_folder(self, **options: Any) -> None:
        Hub.asked.append(("upload", options))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    Hub.asked, Hub.fails = [], False
    return Hub


def test_a_push_is_the_users_own_and_private_and_keeps_no_token(run: Path, tmp_path: Path, hub: type[Hub]) -> None:
    result = out_of(run, "--out", tmp_path / "out", "--no-verify", "--push", "me/digits")
    assert result.exit_code == 0, result.output
    assert "not verified; pushed to https://huggingface.co/me/digits" in result.stdout
    (repo, made), (_, uploaded) = hub.asked
    assert (repo, made) == ("me/digits", {"private": True, "exist_ok": True})
    assert uploaded["folder_path"] == tmp_path / "out"
    assert "hf_secret" not in result.output + repr(hub.asked)
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file() and b"hf_secret" in file.read_bytes()]


def test_what_the_hub_refuses_is_said_without_the_token(run: Path, tmp_path: Path, hub: type[Hub]) -> None:
    hub.fails = True
    result = out_of(run, "--out", tmp_path / "out", "--no-verify", "--push", "me/digits")
    assert result.exit_code == 2
    assert "--push me/digits: RuntimeError: 403 for the token ***" in result.stderr
    assert (tmp_path / "out" / "README.md").exists()


def test_a_push_without_a_login_is_refused_before_any_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    result = out_of(run, "--out", tmp_path / "out", "--push", "me/digits")
    assert result.exit_code == 2
    assert "set HF_TOKEN, or run `hf auth login`" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_program_of_the_card_is_the_one_that_is_verified_and_runs_in_any_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: type[Hub]
) -> None:
    ran: list[Check] = []
    monkeypatch.setattr(command, "verify", lambda checks: ran.extend(checks) or [0.0])
    built = repr(str(tmp_path / ".exporting-out"))
    for push, place in (("me/digits", "'me/digits'"), (None, repr(str(tmp_path / "out")))):
        export(str(run), tmp_path / "out", ExportOptions(push=push))
        card = (tmp_path / "out" / "README.md").read_text()
        assert built in ran[-1].code
        assert card.partition("```python\n")[2].partition("\n```")[0] == ran[-1].code.replace(built, place)


def test_a_folder_of_the_users_home_is_shown_without_its_name_and_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    code = folder_code(tmp_path / "out")
    assert code == "str(Path('~/out').expanduser())"
    assert eval(code, {"Path": Path}) == str(tmp_path / "out")
