"""What people name as a teacher, and what becomes of it: made of the families' stand-ins; its page is made from here.

`python tests/support/pipeline_matrix.py` writes docs/pipelines.md anew.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from os import link
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file

from diffdistill.models.teachers import FAMILIES, find_family

Made = Callable[[str], Path]
"""The folder of a family's stand-in, which must not be changed."""
Verdict = Literal["accepted", "adapted", "refused"]
PAGE = Path(__file__).parents[2] / "docs" / "pipelines.md"
BEGIN, END = "<!-- pipelines -->\n", "<!-- end -->"


@dataclass(frozen=True)
class Row:
    """what: as people have it.  told: what it is read as, or a part of the message.  make: writes it to a folder and
    returns the place that is named."""

    what: str
    verdict: Verdict
    told: str
    make: Callable[[Made, Path], Path]

    @property
    def line(self) -> str:
        return f"| {self.what} | {self.verdict} | {self.told} |"


def linked(place: Path, folder: Path) -> Path:
    """A copy of hard links, whose JSON files are its own."""
    shutil.copytree(place, folder, copy_function=lambda a, b: (shutil.copy if str(a).endswith(".json") else link)(a, b))
    return folder


def edit(file: Path, change: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def edited(family: str, file: str, change: dict[str, Any]) -> Callable[[Made, Path], Path]:
    """A stand-in with a JSON file of its own."""

    def make(made: Made, folder: Path) -> Path:
        place = linked(made(family), folder / "teacher")
        edit(place / file, change)
        return place

    return make


def scheduled(family: str, **config: Any) -> Callable[[Made, Path], Path]:
    """With another scheduler."""

    def make(made: Made, folder: Path) -> Path:
        place = linked(made(family), folder / "teacher")
        edit(place / "scheduler/scheduler_config.json", config)
        if "_class_name" in config:
            edit(place / "model_index.json", {"scheduler": ["diffusers", config["_class_name"]]})
        return place

    return make


def renamed(family: str, end: str, *, part: str = "unet") -> Callable[[Made, Path], Path]:
    """With the weights of a part under another name."""

    def make(made: Made, folder: Path) -> Path:
        place = linked(made(family), folder / "teacher")
        for file in (place / part).glob("*.safetensors"):
            file.rename(file.with_name(file.name.replace(".safetensors", end)))
        return place

    return make


def rooted(made: Made, folder: Path) -> Path:
    place = linked(made("ddpm"), folder / "teacher")
    for file in [*(place / "unet").iterdir(), *(place / "scheduler").iterdir()]:
        shutil.move(file, place / file.name)
    (place / "unet").rmdir()
    (place / "scheduler").rmdir()
    return place


def without_t5(made: Made, folder: Path) -> Path:
    place = linked(made("sd3"), folder / "teacher")
    edit(place / "model_index.json", {"text_encoder_3": [None, None], "tokenizer_3": [None, None]})
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(place / part)
    return place


def left_loaded(made: Made, folder: Path) -> Path:
    place = linked(made("sd"), folder / "teacher")
    file = place / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    for name in [name for name in tensors if name.endswith("to_q.weight")]:
        tensors[name.replace(".weight", ".base_layer.weight")] = tensors.pop(name)
    save_file(tensors, file)
    return place


def lacking(made: Made, folder: Path) -> Path:
    place = linked(made("sd"), folder / "teacher")
    file = place / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    del tensors["conv_in.bias"]
    save_file(tensors, file)
    return place


def one_file(name: str) -> Callable[[Made, Path], Path]:
    def make(made: Made, folder: Path) -> Path:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
        return (folder / name).parent if "/" in name else folder / name

    return make


def kinds() -> list[Row]:
    """Each class of diffusers that a family reads, plain or a variant."""
    stand_ins = {"PixArtSigmaPipeline": "pixart-sigma"}
    rows = []
    for family in map(find_family, FAMILIES.own):
        for kind in (*family.pipelines, *family.variants):
            plain = family.variants.get(kind, kind)
            told = f"`{family.name}`" + (f", as `{plain}`" if kind in family.variants else "")
            stand_in = stand_ins.get(plain, family.name)
            verdict: Verdict = "adapted" if kind in family.variants else "accepted"
            rows.append(Row(f"`{kind}`", verdict, told, edited(stand_in, "model_index.json", {"_class_name": kind})))
    return rows


UNET, INDEX = "unet/config.json", "model_index.json"


def depth(made: Made, folder: Path) -> Path:
    """Stable Diffusion 2's depth folder as people rename its class, with its parts that no family has."""
    parts = {"depth_estimator": ["transformers", "DPTForDepthEstimation"]}
    parts["feature_extractor"] = ["transformers", "DPTImageProcessor"]
    place = edited("sd", UNET, {"in_channels": 5})(made, folder)
    edit(place / INDEX, {"_class_name": "StableDiffusionImg2ImgPipeline", **parts})
    return place


NO_FAMILY = (
    *("StableDiffusionControlNetPipeline", "StableDiffusionInstructPix2PixPipeline", "StableDiffusionUpscalePipeline"),
    *("StableDiffusionDepth2ImgPipeline", "StableDiffusionGLIGENPipeline", "StableDiffusionXLControlNetPipeline"),
    *("FluxFillPipeline", "FluxKontextPipeline", "FluxControlPipeline", "SanaSprintPipeline", "Flux2Pipeline"),
    *("QwenImageEditPipeline", "KandinskyV22Pipeline", "IFPipeline", "KolorsPipeline", "HunyuanDiTPipeline"),
    *("LongCatImageEditPipeline", "CogView4ControlPipeline"),
    *("CogView3PlusPipeline", "StableCascadeDecoderPipeline", "WanPipeline", "StableVideoDiffusionPipeline"),
)
ROWS = [
    *kinds(),
    Row("a network and a scheduler in the root (`google/ddpm-*`)", "adapted", "`ddpm`", rooted),
    Row("weights of one variant alone (`.fp16`)", "adapted", "`sd`, in float32", renamed("sd", ".fp16.safetensors")),
    Row("weights of one variant alone (`.bf16`)", "adapted", "`sd`, in float32", renamed("sd", ".bf16.safetensors")),
    Row("SD3 without its T5", "adapted", "`sd3`, zeros in its place", without_t5),
    Row(
        "a UNet that is told its guidance (LCM's `time_cond_proj_dim`)",
        "adapted",
        "`sd`, in one call",
        edited("sd", UNET, {"time_cond_proj_dim": 32}),
    ),
    Row(
        "`guidance_rescale` in model_index.json",
        "adapted",
        "`sdxl`, by that rule",
        edited("sdxl", INDEX, {"guidance_rescale": 0.7}),
    ),
    Row(
        "zero terminal signal and v-prediction",
        "adapted",
        "`sd`; alpha is 2.4e-4 at the last index",
        scheduled("sd", rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    ),
    Row(
        "an EDM scheduler (playground-v2.5)",
        "adapted",
        "`sdxl` on the path `edm`",
        scheduled(
            "sdxl", _class_name="EDMDPMSolverMultistepScheduler", sigma_data=0.5, sigma_min=0.002, sigma_max=80.0
        ),
    ),
    Row(
        "`shift_terminal`",
        "adapted",
        "the family, whose own steps are not stretched",
        scheduled("flux", shift_terminal=0.02),
    ),
    Row(
        "settings of training's average in a config",
        "adapted",
        "`sd`, without them",
        edited("sd", UNET, {"decay": 0.99}),
    ),
    *(
        Row(
            f"`{kind}`",
            "refused",
            f"_class_name = '{kind}': no family of teachers",
            edited("sd", INDEX, {"_class_name": kind}),
        )
        for kind in NO_FAMILY
    ),
    Row(
        "an inpainting UNet of nine channels",
        "refused",
        "in_channels = 9, out_channels = 4: a network that also takes",
        edited("sd", UNET, {"in_channels": 9}),
    ),
    Row(
        "a depth UNet of five channels, as another class",
        "refused",
        "in_channels = 5, out_channels = 4: a network that also takes",
        depth,
    ),
    Row(
        "SDXL's refiner",
        "refused",
        "requires_aesthetics_score = true: a refiner",
        edited("sdxl", INDEX, {"requires_aesthetics_score": True}),
    ),
    Row(
        "FLUX.2 klein, distilled",
        "refused",
        "is_distilled = true: a student already, which takes no guidance; name the base model",
        edited("flux2", INDEX, {"is_distilled": True}),
    ),
    Row(
        "a UNet with class embeddings",
        "refused",
        "class_embed_type = 'timestep': the network is told more",
        edited("sd", UNET, {"class_embed_type": "timestep"}),
    ),
    Row(
        "an IP-Adapter's UNet",
        "refused",
        "encoder_hid_dim_type = 'ip_image_proj': the network is told more",
        edited("sd", UNET, {"encoder_hid_dim_type": "ip_image_proj"}),
    ),
    Row(
        "a field of a newer diffusers",
        "refused",
        "new_trick = 3: this version does not know the field",
        edited("sd", UNET, {"new_trick": 3}),
    ),
    Row(
        "zero terminal signal and eps",
        "refused",
        "rescale_betas_zero_snr leaves no signal at the last step",
        scheduled("sd", rescale_betas_zero_snr=True),
    ),
    Row(
        "dynamic thresholding",
        "refused",
        "thresholding = True: its pipeline moves each estimate",
        scheduled("ddpm", thresholding=True),
    ),
    Row("inverted sigmas", "refused", "invert_sigmas = True: not supported", scheduled("flux", invert_sigmas=True)),
    Row(
        "a network quantised by bitsandbytes",
        "refused",
        "quantised weights are not supported",
        edited("sd", UNET, {"quantization_config": {"quant_method": "bitsandbytes"}}),
    ),
    Row(
        "a class of remote code",
        "refused",
        "names mine.Network, which is not loaded",
        edited("sd", INDEX, {"unet": ["mine", "Network"]}),
    ),
    Row(
        "weights as `.bin` alone",
        "refused",
        "its weights are a pickle, diffusion_pytorch_model.bin",
        renamed("sd", ".bin"),
    ),
    Row(
        "weights as `.non_ema` alone",
        "refused",
        "holds only the weights without EMA",
        renamed("sd", ".non_ema.safetensors"),
    ),
    Row("a LoRA left loaded", "refused", "was saved with a LoRA left loaded, whose weight is in no file", left_loaded),
    Row("a tensor that is missing", "refused", "the weights are of another architecture: conv_in.bias", lacking),
    Row(
        "a single file",
        "refused",
        "a single file; name the pipeline that it goes with: teacher: {name: PIPELINE, file:",
        one_file("mine.safetensors"),
    ),
    Row(
        "a single file as a pickle",
        "refused",
        "a pickle (.ckpt), which is not opened",
        one_file("mine.ckpt"),
    ),
    Row(
        "a LoRA's folder",
        "refused",
        "a LoRA alone; name the pipeline that it goes with",
        one_file("lora/pytorch_lora_weights.safetensors"),
    ),
    Row(
        "one part of a pipeline",
        "refused",
        "one part of a pipeline (UNet2DConditionModel); name the pipeline's folder",
        lambda made, _: made("sd") / "unet",
    ),
]


def page_with(text: str) -> str:
    """The page with its table as it is now."""
    table = "\n".join(["| what | verdict | read as, or said |", "|---|---|---|", *(row.line for row in ROWS)])
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}{table}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
