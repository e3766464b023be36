"""Run by `verify` in a new process, as a script: run cards' programs where this package cannot be imported.

Argument: a JSON file of [{code, output, call}]: the program, which makes `pipe` and one `image`; the safetensors file
to write that image to as `shown`, and as `images` what the pipeline makes of the arguments `call` (or, where it fails,
the error to a text file of that name).
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
    """Run one program, call its pipeline once more, by seed 0, and write all images."""
    import torch
    from safetensors.torch import save_file

    made: dict[str, Any] = {}
    exec(compile(request["code"], "README.md", "exec"), made)
    pipeline = made["pipe"]
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(1)  # for schedulers that are not given the generator
    images = pipeline(**request["call"], generator=torch.Generator().manual_seed(0)).images
    found = {"images": _tensor(images), "shown": _tensor(made["image"])}
    save_file({name: image.float().contiguous() for name, image in found.items()}, request["output"])


def _tensor(image: Any) -> Any:
    """Of a picture's 8 bits in [0, 1], [H, W, C], or of what the pipeline makes as it is."""
    import numpy as np
    import torch

    if isinstance(image, torch.Tensor):
        return image
    if isinstance(image, np.ndarray):
        return torch.from_numpy(image)
    pixels = torch.from_numpy(np.array(image)) / 255
    return pixels if pixels.ndim == 3 else pixels.unsqueeze(-1)


if __name__ == "__main__":
    sys.meta_path.insert(0, Blocker())
    for item in json.loads(FilePath(sys.argv[1]).read_text(encoding="utf-8")):
        try:
            call(item)
        except Exception as error:  # whatever it is, it is what the user is told, and the other folders go on
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            FilePath(item["output"]).with_suffix(".txt").write_text(text, encoding="utf-8")
