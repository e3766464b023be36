"""Run by `verify` in a new process, as a script: load exported folders where this package cannot be imported.

Argument: a JSON file of [{folder, output, call, lora}]: the arguments that the pipeline is called with, the safetensors
file to write `images` to (or, where it fails, `error` to a text file of that name), and the folder and name of a LoRA
file, with the scheduler beside it, or null.
"""

import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path as FilePath
from typing import Any

BLOCKED = "diffdistill"


class Blocker(MetaPathFinder):
    """Makes the import of this package fail."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.split(".", maxsplit=1)[0] == BLOCKED:
            raise ModuleNotFoundError(f"{fullname}: not to be imported by an exported model")


def call(request: dict[str, Any]) -> None:
    """Load one folder, make images by seed 0, and write them."""
    import torch
    from diffusers import DiffusionPipeline
    from safetensors.torch import save_file

    pipeline = DiffusionPipeline.from_pretrained(
        request["folder"], trust_remote_code=True, local_files_only=True, torch_dtype=torch.float32
    )
    if request["lora"]:
        _load_lora(pipeline, *request["lora"])
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(1)  # for schedulers that are not given the generator
    made = pipeline(**request["call"], generator=torch.Generator().manual_seed(0)).images
    images = made if isinstance(made, torch.Tensor) else torch.from_numpy(made)
    save_file({"images": images.float().contiguous()}, request["output"])


def _load_lora(pipeline: Any, folder: str, file: str) -> None:
    import diffusers

    pipeline.load_lora_weights(folder, weight_name=file)
    config = json.loads((FilePath(folder) / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    pipeline.scheduler = getattr(diffusers, config["_class_name"]).from_pretrained(folder, subfolder="scheduler")


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocker())
    for item in json.loads(FilePath(sys.argv[1]).read_text(encoding="utf-8")):
        try:
            call(item)
        except Exception as error:  # whatever it is, it is what the user is told, and the other folders go on
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            FilePath(item["output"]).with_suffix(".txt").write_text(text, encoding="utf-8")
