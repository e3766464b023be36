"""Run by `verify` in a new process, as a script: run cards' programs where this package cannot be imported.

Argument: a JSON file of [{code, output, calls}]: the program, which makes `pipe` and one `image`; the safetensors file
to write that image to as `shown`, and what the pipeline makes of the arguments in `calls` under their names. Errors go
to text files of that name: of the program, and of each call.
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
    """Run one program, make its pipeline's other calls, by seed 0, and write all images."""
    import torch
    from safetensors.torch import save_file

    made: dict[str, Any] = {}
    exec(compile(request["code"], "README.md", "exec"), made)
    pipeline, found = made["pipe"], {"shown": _tensor(made["image"])}
    pipeline.set_progress_bar_config(disable=True)
    for name, arguments in request["calls"].items():
        torch.manual_seed(1)  # for schedulers that are not given the generator
        try:
            found[name] = _tensor(pipeline(**arguments, generator=torch.Generator().manual_seed(0)).images)
        except Exception as error:
            _write_error(request["output"], error, f".{name}.txt")
    save_file({name: image.float().contiguous() for name, image in found.items()}, request["output"])


def _write_error(output: str, error: Exception, ending: str) -> None:
    """Whatever it is, it is what the user is told."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    FilePath(output).with_suffix(ending).write_text(text, encoding="utf-8")


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
        except Exception as error:  # the other folders go on
            _write_error(item["output"], error, ".txt")
