"""What people name as a model that is none by itself, and what they should say instead."""

from pathlib import Path as FilePath

from diffdistill.settings.reading import read_json

LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def no_run(place: FilePath) -> str | None:
    """Why a place is neither a run nor a pipeline, where one can see what it is instead; else None."""
    if place.is_file() and place.suffix in PICKLES:
        return f"a pickle ({place.suffix}), which is not opened, for it may be a program; give the same as .safetensors"
    if place.is_file() and place.suffix == ".safetensors":
        return (
            f"a single file; name the pipeline that it goes with: teacher: {{name: PIPELINE, file: {place}}}, or of a "
            f"LoRA teacher: {{name: PIPELINE, lora: [{{place: {place}}}]}}"
        )
    if not place.is_dir() or (place / "checkpoints").is_dir():
        return None
    if any((place / name).is_file() for name in LORA_FILES):
        asked = f"{{name: PIPELINE, lora: [{{place: {place}}}]}}"
        return f"a LoRA alone; name the pipeline that it goes with: teacher: {asked}"
    try:
        kind = read_json(place / "config.json").get("_class_name")
    except (OSError, ValueError, AttributeError):
        return None
    return f"one part of a pipeline ({kind}); name the pipeline's folder, with model_index.json" if kind else None
