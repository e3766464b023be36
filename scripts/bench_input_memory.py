"""Resident memory before, while and after prompts and images are encoded, and of a second run that finds them encoded.

python scripts/bench_input_memory.py [--width 1024] [--layers 8]

A stand-in of Stable Diffusion whose text encoder is made large and whose network is small, so that what stays is seen.
Each reading is of a process of its own: VmRSS, and the peak VmHWM, from /proc.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PROMPTS = ("a red fox", "two blue birds", "three dogs", "a cat")


def make_pipeline(folder: Path, width: int, layers: int) -> None:
    """Written by diffusers' own classes."""
    sys.path.insert(0, str(ROOT / "tests"))
    import transformers
    from support import stand_ins

    pipeline = stand_ins.STAND_INS["sd"]()
    shape = pipeline.text_encoder.config.to_dict() | {
        **{"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers},
        **{"num_attention_heads": width // 64, "projection_dim": width},
    }
    pipeline.text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**shape))
    pipeline.unet = stand_ins.unet(cross_attention_dim=width)
    pipeline.save_pretrained(folder)


def read(name: str) -> float:
    """A line of this process's status, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def run(folder: Path) -> None:
    """Encode what is missing, and say what is in memory."""
    from diffdistill.models.encoders import PipelineEncoder, encode_prompts
    from diffdistill.models.teachers import open_pipeline

    pipeline = open_pipeline(folder / "sd")
    import diffusers  # what loading needs in any case is part of the baseline

    _ = diffusers.StableDiffusionPipeline
    torch.ones(8, 8) @ torch.ones(8, 8)
    before = read("VmRSS")
    conditions = encode_prompts(PipelineEncoder(pipeline), PROMPTS, root=folder / "cache")
    conditions.rows(torch.arange(len(PROMPTS) + 1))
    print(f"before {before:6.0f} MiB, peak {read('VmHWM'):6.0f} MiB, after {read('VmRSS'):6.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.run:
        run(asked.run)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_pipeline(folder / "sd", asked.width, asked.layers)
        size = sum(file.stat().st_size for file in (folder / "sd" / "text_encoder").iterdir()) / 2**20
        print(f"text encoder: {size:.0f} MiB of weights")
        for title in ("encoding", "from the cache"):
            print(f"{title:>15}: ", end="", flush=True)
            subprocess.run([sys.executable, __file__, "--run", str(folder)], check=True, env=dict(os.environ))


if __name__ == "__main__":
    main()
