"""Fields of diffusers' configs: each is known, and one that is not understood is refused by its file and name."""

import inspect
import json
import shutil
from collections.abc import Callable
from functools import cache
from os import link
from pathlib import Path
from typing import Any

import diffusers
import pytest
from support.stand_ins import save_stand_in

from diffdistill.models.load import describe_model, load_model
from diffdistill.models.teachers import FAMILIES, find_family, open_pipeline
from diffdistill.models.teachers.fields import NETWORKS, SCHEDULER, VAES, Fields, check_fields
from diffdistill.settings.schema import UserError

OWN_FAMILIES = [find_family(name) for name in FAMILIES.own]
TABLES = {**NETWORKS, **VAES}
IN_CONFIGS_ALONE = {
    f"{name}Transformer2DModel": {"sample_size"}
    for name in ("Flux", "ZImage", "QwenImage", "Chroma", "Flux2", "LongCatImage")
}
IN_CONFIGS_ALONE["QwenImageTransformer2DModel"] |= {"pooled_projection_dim"}
IN_CONFIGS_ALONE["AutoencoderKLFlux2"] = {"force_upcast"}
"""Fields that no argument of the installed class has, and that are read all the same."""
GONE = {"tensor_format", "timestep_values", "predict_epsilon"}
"""Fields of schedulers that older versions of diffusers wrote."""


def arguments_of(name: str) -> dict[str, inspect.Parameter]:
    found = inspect.signature(getattr(diffusers, name).__init__).parameters
    return {key: value for key, value in found.items() if key not in ("self", "args", "kwargs")}


def schedulers() -> list[str]:
    """The schedulers of the installed diffusers that say a noise schedule that some family reads."""
    marks = {"beta_schedule", "trained_betas", "shift", "flow_shift", "sigma_data"}
    names = [
        name for name in dir(diffusers) if name.endswith("Scheduler") and inspect.isclass(getattr(diffusers, name))
    ]
    return [name for name in names if marks & arguments_of(name).keys()]


def test_every_class_that_a_family_loads_has_a_table() -> None:
    networks = {name for family in OWN_FAMILIES for name in family.network_classes}
    vaes = {name for family in OWN_FAMILIES for name in family.parts.get("vae", ())}
    assert networks <= NETWORKS.keys()
    assert vaes <= VAES.keys()


@pytest.mark.parametrize("name", TABLES)
def test_a_table_knows_every_field_of_the_installed_class(name: str) -> None:
    """Fails where diffusers gets a new one: say there what becomes of it."""
    table, arguments = TABLES[name], arguments_of(name)
    assert table.known == arguments.keys() | IN_CONFIGS_ALONE.get(name, set())
    for key, only in table.only.items():
        assert arguments[key].default in only.values, f"{key}: its default must be right, for it may be left out"


def test_the_schedulers_table_knows_every_field_of_the_installed_schedulers() -> None:
    found = {key for name in schedulers() for key in arguments_of(name)}
    assert len(schedulers()) > 15
    assert found - {"clip_denoised"} == SCHEDULER.known - GONE  # consistency models' own, which is of no path here


def test_a_field_of_a_newer_diffusers_is_refused_unless_it_is_empty() -> None:
    table = Fields(frozenset({"sample_size"}))
    for empty in (None, False, [], {}, ""):
        check_fields({"sample_size": 8, "use_flux_capacitor": empty, "_class_name": "New"}, table, "config.json")
    with pytest.raises(UserError, match=r"config\.json: use_flux_capacitor = 3: this version does not know the field"):
        check_fields({"use_flux_capacitor": 3}, table, "config.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's stand-in, saved once."""
    return cache(lambda family: save_stand_in(family, tmp_path_factory.mktemp(family)))


def linked(place: Path, folder: Path) -> Path:
    """A copy of hard links, whose JSON files are its own."""
    shutil.copytree(place, folder, copy_function=lambda a, b: (shutil.copy if str(a).endswith(".json") else link)(a, b))
    return folder


def edit(file: Path, change: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


SCHEDULER_FILE, DYNAMIC = "scheduler/scheduler_config.json", {"use_dynamic_shifting": True, "base_image_seq_len": 256}
REFUSED = [
    ("sd", "unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type = 'timestep': the network is told"),
    ("sd", "unet/config.json", {"num_class_embeds": 1000}, "num_class_embeds = 1000: the network is told"),
    ("sd", "unet/config.json", {"encoder_hid_dim_type": "text_image_proj"}, "encoder_hid_dim_type = 'text_image_proj'"),
    ("sd", "unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type = 'text_time': a network"),
    ("sd", "unet/config.json", {"attention_type": "gated"}, "attention_type = 'gated': layers for grounding"),
    ("sd", "unet/config.json", {"in_channels": 9}, "in_channels = 9, out_channels = 4: a network that also takes"),
    ("sd", "unet/config.json", {"brand_new": 1}, "brand_new = 1: this version does not know the field"),
    ("sd", "vae/config.json", {"brand_new": 1}, "vae/config.json: brand_new = 1"),
    ("sdxl", "unet/config.json", {"addition_embed_type": None}, "addition_embed_type = None: a network"),
    ("sdxl", "unet/config.json", {"class_embed_type": "projection"}, "class_embed_type = 'projection'"),
    ("sdxl", "model_index.json", {"requires_aesthetics_score": True}, "requires_aesthetics_score = true: a refiner"),
    ("ddpm", "unet/config.json", {"class_embed_type": "identity"}, "class_embed_type = 'identity': classes are numb"),
    ("ddpm", "unet/config.json", {"time_embedding_type": "fourier"}, "time_embedding_type = 'fourier': this network"),
    ("ddpm", "scheduler/scheduler_config.json", {"thresholding": True}, "thresholding = True: its pipeline moves"),
    ("ddpm", "scheduler/scheduler_config.json", {"predict_epsilon": False}, "predict_epsilon = False: is of an older"),
    ("sd", "scheduler/scheduler_config.json", {"timestep_type": "continuous"}, "timestep_type = 'continuous'"),
    ("sd", "scheduler/scheduler_config.json", {"snr_shift_scale": 3.0}, "snr_shift_scale = 3.0: moves the schedule"),
    ("flux", "transformer/config.json", {"patch_size": 2}, "patch_size = 2: its tokens are packed by the pipeline"),
    ("flux", "transformer/config.json", {"in_channels": 24, "out_channels": 16}, "in_channels = 24, out_channels = 16"),
    ("sana", "transformer/config.json", {"guidance_embeds": True}, "guidance_embeds = True: a student already"),
    ("pixart", "transformer/config.json", {"attention_type": "gated"}, "attention_type = 'gated'"),
    ("z_image", "transformer/config.json", {"siglip_feat_dim": 8}, "siglip_feat_dim = 8: a network that is also given"),
    ("qwen_image", "transformer/config.json", {"zero_cond_t": True}, "zero_cond_t = True: the network is told more"),
    ("qwen_image", "transformer/config.json", {"in_channels": 32}, "in_channels = 32, out_channels = 16: a network"),
    (
        "qwen_image",
        "transformer/config.json",
        {"out_channels": None},
        "in_channels = 16, out_channels = 64: a network",
    ),
    (
        "sd",
        "unet/config.json",
        {"time_cond_proj_dim": 2},
        "time_cond_proj_dim = 2: must be a whole number of at least 4",
    ),
    ("sdxl", "unet/config.json", {"time_cond_proj_dim": 3}, "time_cond_proj_dim = 3: must be"),
    ("z_image", SCHEDULER_FILE, {"time_shift_type": "cubic"}, "time_shift_type = 'cubic': is not read"),
    ("z_image", SCHEDULER_FILE, DYNAMIC | {"base_shift": 1e9}, "base_shift, max_shift: a dynamic shift of exp("),
    ("z_image", SCHEDULER_FILE, DYNAMIC | {"base_shift": None}, "scheduler_config.json"),
    ("z_image", SCHEDULER_FILE, DYNAMIC | {"max_image_seq_len": 256}, "base_image_seq_len = max_image_seq_len = 256"),
]


@pytest.mark.parametrize(("family", "file", "change", "said"), REFUSED, ids=[f"{r[0]}-{r[3][:24]}" for r in REFUSED])
def test_what_is_not_understood_is_refused_before_weights_are_read(
    family: str, file: str, change: dict[str, Any], said: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    place = linked(made(family), tmp_path / "teacher")
    edit(place / file, change)
    with pytest.raises(UserError) as error:
        describe_model(place)
    assert said in str(error.value)
    assert file in str(error.value)


def test_fields_of_other_programs_and_schedulers_are_harmless(made: Callable[[str], Path], tmp_path: Path) -> None:
    """An average's own settings, and a field of a scheduler that the class that is named does not take."""
    place = linked(made("sd"), tmp_path / "teacher")
    edit(place / "unet/config.json", {"decay": 0.9999, "optimization_step": 37000, "encoder_hid_dim_type": None})
    edit(place / "scheduler/scheduler_config.json", {"skip_prk_steps": True, "sample_max_value": 1.0})
    found, plain = describe_model(place), describe_model(made("sd"))
    assert found.model.path == plain.model.path
    assert (found.image_shape, found.model.predicts) == (plain.image_shape, plain.model.predicts)


AXES = {"axes_dims": [4, 4, 4]}  # which diffusers asserts to be a head's width in all


def test_a_config_that_diffusers_asserts_to_be_another_is_refused(made: Callable[[str], Path], tmp_path: Path) -> None:
    place = linked(made("z_image"), tmp_path / "teacher")
    edit(place / "transformer/config.json", AXES)
    with pytest.raises(UserError, match=r"transformer: cannot be read: AssertionError"):
        load_model(place)
    spec = describe_model(place)
    with pytest.raises(UserError, match=r"network\.options: ZImageTransformer2DModel: "):
        spec.model.network.build(spec.image_shape, 0, 0.0)


@pytest.mark.parametrize("blocks", [None, 3, []])
@pytest.mark.parametrize(("family", "field"), [("sd", "block_out_channels"), ("qwen_image", "temperal_downsample")])
def test_a_vae_that_does_not_say_its_size_is_refused(
    family: str, field: str, blocks: object, made: Callable[[str], Path], tmp_path: Path
) -> None:
    place = linked(made(family), tmp_path / "teacher")
    edit(place / "vae/config.json", {field: blocks})
    opened = open_pipeline(place)
    if (family, blocks) == ("qwen_image", []):  # which downsamples nowhere
        assert opened.vae_factor == 1
        return
    with pytest.raises(UserError, match=r"vae/config\.json: does not say how many pixels one latent covers"):
        _ = opened.image_size


@pytest.mark.parametrize("kind", ["ZImageTransformer2DModel", "ZImagePipeline"])
def test_a_class_that_the_installed_diffusers_lacks_asks_for_a_newer_one(
    kind: str, made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_pipeline(made("z_image"))
    spec = opened.spec
    monkeypatch.delitem(diffusers._class_to_module, kind)
    monkeypatch.delattr(diffusers, kind, raising=False)
    asked: list[Callable[[], object]] = [opened.load_encoder]
    if kind == "ZImageTransformer2DModel":
        asked = [
            lambda: describe_model(made("z_image")),
            opened.load_denoiser,
            lambda: opened.family.full_options({}),
            lambda: spec.model.network.build(spec.image_shape, 0, 0.0),
        ]
    for call in asked:
        with pytest.raises(UserError) as error:
            call()
        version = diffusers.__version__
        assert str(error.value) == f"this family needs a newer diffusers, which has {kind}; {version} is installed"
