"""`diffdistill benchmark`: images in the layout that a benchmark's own scripts read."""

from pathlib import Path as FilePath
from typing import Annotated, Literal

import typer

from diffdistill.commands import options as opt
from diffdistill.commands.exit_codes import guarded
from diffdistill.commands.next_steps import say_next
from diffdistill.settings.limits import MAX_COLUMNS
from diffdistill.settings.terminal import Console, say

console = Console()


@guarded
def benchmark(
    model: Annotated[
        str, typer.Argument(help="A run, a checkpoint, an exported folder or a diffusers pipeline that takes prompts.")
    ],
    prompts: Annotated[
        str, typer.Option(help="evaluation_metadata.jsonl of GenEval, or the folder of .txt files of DPG-Bench.")
    ],
    out: Annotated[str, typer.Option(help="New folder to write; OUT.json records how the images were made.")],
    layout: Annotated[Literal["geneval", "dpg"], typer.Option(help="The benchmark: GenEval or DPG-Bench.")] = "geneval",
    images_per_prompt: Annotated[
        int, typer.Option(help="Images per prompt; both benchmarks use 4.", min=1, max=MAX_COLUMNS)
    ] = 4,
    seed: opt.Seed = 0,
    steps: opt.Steps = None,
    guidance: opt.Guidance = None,
    ema: opt.Ema = None,
    batch: opt.Batch = 16,
    device: opt.Device = "auto",
    trust_code: opt.TrustCode = False,
) -> None:
    """Generate the images of GenEval or DPG-Bench in the layout that their own scripts read.

    Example: diffdistill benchmark runs/sdxl --prompts geneval/prompts/evaluation_metadata.jsonl --out images/geneval
    """
    from diffdistill.diffusion.guidance.policies import parse_guidance
    from diffdistill.distributed.devices import choose_device
    from diffdistill.exported.benchmarks import BenchmarkOptions, write_benchmark
    from diffdistill.inference.image_generator import SampleRequest

    asked = SampleRequest(
        seed=seed,
        guidance=None if guidance is None else parse_guidance(guidance),
        num_steps=steps,
        ema=ema,
        device=choose_device(device),
        trusts_code=trust_code,
    )
    options = BenchmarkOptions(layout, FilePath(prompts), FilePath(out), asked, images_per_prompt, batch)
    made = 0

    def advance(count: int) -> None:
        nonlocal made
        if (made + count) // 100 > made // 100:
            say(f"{layout}: {made + count} images")
        made += count

    count = write_benchmark(model, options, advance)
    console.print(f"{out}: {count} images for {layout}", highlight=False, soft_wrap=True, markup=False)
    say_next(also=(f"evaluate {out} with {layout}'s own script; {out}.json records how the images were made",))
