"""The commands that bring images and models out of a run: `sample` and `export`."""

from pathlib import Path as FilePath
from typing import Annotated

import typer

from diffdistill.commands.exit_codes import guarded
from diffdistill.commands.next_steps import as_run, exported, say_next
from diffdistill.settings.limits import MAX_BATCH, MAX_COLUMNS, MAX_IMAGES, MAX_INTEGER, MAX_NUMBER, MAX_SAMPLING_STEPS
from diffdistill.settings.terminal import Console

console = Console()

Seed = Annotated[int, typer.Option(help="Seed of the noise.", min=0, max=MAX_INTEGER)]
Style = Annotated[str | None, typer.Option(help='Of a student of several styles: "a", or a mixture as "a=0.3,b=0.7".')]
NegativePrompt = Annotated[
    str | None, typer.Option(help="What cross-attention to the prompt steers away from; default: the run's own.")
]
NegativeScale = Annotated[
    float | None,
    typer.Option(help="How much of it is taken away; default: the run's own, or 0.3.", min=0, max=MAX_NUMBER),
]


@guarded
def sample(
    run: Annotated[str, typer.Argument(help="A run, a checkpoint, an exported folder, or a diffusers pipeline.")],
    out: Annotated[str, typer.Option(help="The PNG to write.")] = "samples.png",
    count: Annotated[
        int | None, typer.Option(help="Number of images; default 100, or each prompt once.", min=1, max=MAX_IMAGES)
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="A class by number or name; several in turn. Default: all in turn.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; several in turn.")] = None,
    prompts: Annotated[str | None, typer.Option(help="A UTF-8 file with a prompt a line.")] = None,
    seed: Seed = 0,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Calls of the network for an image; default: the model's own.", min=1, max=MAX_SAMPLING_STEPS
        ),
    ] = None,
    guidance: Annotated[
        str | None, typer.Option(help="As in eval; default 1, or what an exported folder says.")
    ] = None,
    teacher: Annotated[bool, typer.Option("--teacher", help="The teacher's images beside, of the same noise.")] = False,
    teacher_from: Annotated[
        str | None, typer.Option(help="Where the teacher is now, if it was moved; with --teacher.")
    ] = None,
    teacher_steps: Annotated[
        int | None, typer.Option(help="Default: the teacher's own.", min=1, max=MAX_SAMPLING_STEPS)
    ] = None,
    teacher_guidance: Annotated[str | None, typer.Option(help="Default: what the student was distilled with.")] = None,
    teleport: Annotated[
        float | None,
        typer.Option(
            help="Leave out Heun's steps above this sigma / alpha: a Gaussian of the run's images takes their place.",
            min=0,
            max=MAX_NUMBER,
        ),
    ] = None,
    first_calls: Annotated[
        int,
        typer.Option(
            help="So many of the student's calls are the teacher's, under --teacher-guidance: more variety.",
            min=0,
            max=MAX_SAMPLING_STEPS,
        ),
    ] = 0,
    estimates: Annotated[
        bool,
        typer.Option(
            "--estimates",
            help="A picture of what student and teacher would each make of every state on the way, a column a call; "
            "with --teacher on the teacher's way, too. 8 images by default.",
        ),
    ] = False,
    ema: Annotated[str | None, typer.Option(help="One of the run's more_emas, by its name; default: `ema`.")] = None,
    style: Style = None,
    negative_prompt: NegativePrompt = None,
    negative_scale: NegativeScale = None,
    batch: Annotated[int, typer.Option(help="Images at a time.", min=1, max=MAX_BATCH)] = 16,
    columns: Annotated[int | None, typer.Option(help="Of the grid.", min=1, max=MAX_COLUMNS)] = None,
    device: Annotated[str, typer.Option(help="auto or cpu.")] = "auto",
    trust_code: Annotated[bool, typer.Option("--trust-code", help="Run the code of an exported folder.")] = False,
) -> None:
    """Sample from a teacher or a student and write a grid. A time is that of one image, from noise to pixels.

    Example: diffdistill sample runs/demo/student --count 100 --teacher --out digits.png

    Example: diffdistill sample exported/sd15 --prompt "a red fox" --prompt "two blue birds" --steps 2

    Example: diffdistill sample runs/four-steps --first-calls 1 --estimates --out estimates.png
    """
    from diffdistill.data.prompts import read_prompts
    from diffdistill.diffusion.guidance.policies import parse_guidance
    from diffdistill.distributed.devices import choose_device
    from diffdistill.exported.sample import SampleOptions, run_estimates, run_sample
    from diffdistill.inference.image_generator import SampleRequest

    asked = SampleRequest(
        prompts=(*(prompt or ()), *(read_prompts(prompts, setting="--prompts") if prompts else ())),
        labels=tuple(label or ()),
        seed=seed,
        guidance=None if guidance is None else parse_guidance(guidance),
        num_steps=steps,
        ema=ema,
        style=style,
        negative_prompt=negative_prompt,
        negative_scale=negative_scale,
        device=choose_device(device),
        trusts_code=trust_code,
    )
    options = SampleOptions(
        asked=asked,
        out=FilePath(out),
        count=count,
        batch=batch,
        columns=columns,
        has_teacher=teacher or teacher_from is not None,
        teacher_from=teacher_from,
        teacher_guidance=None if teacher_guidance is None else parse_guidance(teacher_guidance),
        teacher_steps=teacher_steps,
        teleport=teleport,
        first_calls=first_calls,
    )
    if estimates:
        shown = "; ".join(one.caption for one in run_estimates(run, options))
        console.print(f"{out}: {shown}", highlight=False, soft_wrap=True, markup=False)
        return
    made = run_sample(run, options)
    shown = "; ".join([*(f"{one.caption} an image" for one in made), *filter(None, [made[-1].classes])])
    console.print(f"{out}: {len(made[0].images)} images; {shown}", highlight=False, soft_wrap=True, markup=False)
    if as_run(run):
        say_next(("report", run), ("export", run, "--out", exported(run)), also=(f"open {out}",))
    else:
        say_next(also=(f"open {out}",))


@guarded
def export(
    run: Annotated[str, typer.Argument(help="A run, a checkpoint, or a folder of joined students.")],
    out: Annotated[
        str | None, typer.Option(help="The folder to write. An exported model that is there is replaced.")
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(
            help="Instead of --out: a folder for a Hugging Face Space, which holds the export, its teacher's if that "
            "was trained here, and the page that `play` shows."
        ),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            help="stock: diffusers' classes only; self-contained: with code of its own; lora: the factors, in "
            "diffusers' keys; kohya: in kohya's, for ComfyUI. auto: stock where that can be, else self-contained."
        ),
    ] = "auto",
    ema: Annotated[str | None, typer.Option(help="One of the run's more_emas, by its name; default: `ema`.")] = None,
    style: Style = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="The scale of calls that name none, for a student that is told it.", min=-MAX_NUMBER, max=MAX_NUMBER
        ),
    ] = None,
    own_pipeline: Annotated[
        bool,
        typer.Option(
            "--own-pipeline",
            help="Add a class of pipeline whose plain call is the student's to a stock folder; loading it runs code.",
        ),
    ] = False,
    quantised: Annotated[
        bool,
        typer.Option(
            "--quantised", help="Store the bits that a student was trained for (qat), by torchao 0.16; stock."
        ),
    ] = False,
    first_calls: Annotated[
        int,
        typer.Option(
            help="Refused: it says how a program lets the teacher make so many of an exported student's calls.",
            min=0,
            max=MAX_SAMPLING_STEPS,
        ),
    ] = 0,
    licence: Annotated[str | None, typer.Option(help="The teacher's, where its own card does not say.")] = None,
    records: Annotated[str | None, typer.Option(help="JSONL of `diffdistill eval`: scores for the card.")] = None,
    verify: Annotated[
        bool, typer.Option(help="Load the folder in a process without diffdistill, and compare its images.")
    ] = True,
    push: Annotated[
        str | None,
        typer.Option(help="Upload as this Hugging Face repository, with your own token (HF_TOKEN, or a login)."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: not a private repository.")] = False,
) -> None:
    """Write a folder that others load, without diffdistill: a diffusers pipeline, or LoRA's file, with a model card.

    Example: diffdistill export runs/demo/student --out exported/digits

    Example: diffdistill export runs/sd15 --out exported/sd15-lora --kind lora --push me/sd15-one-step

    Example: diffdistill export runs/demo/student --space spaces/digits
    """
    import shlex
    from functools import partial

    from diffdistill.eval.board.files import model_index_of
    from diffdistill.export.run import ExportOptions, check_kind
    from diffdistill.export.run import export as run_export
    from diffdistill.export.space import export_space
    from diffdistill.settings.schema import UserError

    if (out is None) == (space is None):
        raise UserError("export: name one folder to write: --out FOLDER, or --space FOLDER for a Hugging Face Space")
    options = ExportOptions(
        kind=check_kind(kind),
        ema=ema,
        style=style,
        is_quantised=quantised,
        guidance_scale=guidance,
        has_own_pipeline=own_pipeline,
        is_verified=verify,
        licence=licence,
        scores=partial(model_index_of, FilePath(records)) if records else None,
        push=push,
        is_public=public,
        first_calls=first_calls,
    )
    made = run_export(run, FilePath(out), options) if out else export_space(run, FilePath(str(space)), options)
    console.print(made.summary, highlight=False, soft_wrap=True, markup=False)
    if space:
        say_next(
            also=(
                f"python {shlex.quote(f'{space}/app.py')}",
                f"read {FilePath(space) / 'README.md'}: how to publish it",
            )
        )
        return
    say_next(
        ("sample", made.folder, "--out", f"{made.folder.name}.png"),
        also=(f"read {made.folder / 'README.md'}: the program that loads it with diffusers alone",),
    )
