"""`diffdistill benchmark`: images in the layout of a benchmark that others measure."""

from pathlib import Path as FilePath
from typing import Annotated, Literal

import typer

from diffdistill.commands.exit_codes import guarded
from diffdistill.commands.next_steps import say_next
from diffdistill.settings.limits import MAX_BATCH, MAX_COLUMNS, MAX_INTEGER, MAX_SAMPLING_STEPS
from diffdistill.settings.terminal import Console, say

console = Console()


@guarded
def benchmark(
    place: Annotated[str, typer.Argument(help="As in sample; it must take prompts.")],
    prompts: Annotated[
        str, typer.Option(help="GenEval's evaluation_metadata.jsonl, or DPG-Bench's folder of .txt files.")
    ],
    out: Annotated[str, typer.Option(help="The folder to write, a new one; OUT.json beside it says how.")],
    layout: Annotated[Literal["geneval", "dpg"], typer.Option(help="Whose script will judge.")] = "geneval",
    images_per_prompt: Annotated[int, typer.Option(help="Both benchmarks take 4.", min=1, max=MAX_COLUMNS)] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the noise.", min=0, max=MAX_INTEGER)] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Calls for an image; default: its own.", min=1, max=MAX_SAMPLING_STEPS)
    ] = None,
    guidance: Annotated[str | None, typer.Option(help="As in sample.")] = None,
    ema: Annotated[str | None, typer.Option(help="As in sample.")] = None,
    batch: Annotated[int, typer.Option(help="Images at a time.", min=1, max=MAX_BATCH)] = 16,
    device: Annotated[str, typer.Option(help="auto or cpu.")] = "auto",
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Run the code of an exported folder.")] = False,
) -> None:
    """Make the images of GenEval or DPG-Bench in their folders, for the scripts of their authors.

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

    count = write_benchmark(place, options, advance)
    console.print(f"{out}: {count} images for {layout}", highlight=False, soft_wrap=True, markup=False)
    say_next(also=(f"judge {out} with the script of {layout}'s authors; {out}.json says how the images were made",))
