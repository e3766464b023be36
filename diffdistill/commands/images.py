"""The commands that take images and models from a run: `sample` and `export`."""

from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated

import typer

from diffdistill.commands import options as opt
from diffdistill.commands.exit_codes import guarded
from diffdistill.commands.next_steps import as_run, exported, say_next
from diffdistill.settings.terminal import Console

if TYPE_CHECKING:
    from diffdistill.exported.sample import SampleOptions

console = Console()


@guarded
def sample(
    run: Annotated[str, typer.Argument(help="A run, a checkpoint, an exported folder, or a diffusers pipeline.")],
    out: Annotated[str, typer.Option(help="PNG file to write.")] = "samples.png",
    count: opt.Count = None,
    label: opt.Label = None,
    prompt: opt.Prompt = None,
    prompts: opt.Prompts = None,
    seed: opt.Seed = 0,
    steps: opt.Steps = None,
    guidance: opt.Guidance = None,
    teacher: opt.WithTeacher = False,
    teacher_from: opt.TeacherFrom = None,
    teacher_steps: opt.TeacherSteps = None,
    teacher_guidance: opt.TeacherGuidance = None,
    teleport: opt.Teleport = None,
    first_steps: opt.FirstSteps = 0,
    estimates: opt.Estimates = False,
    ema: opt.Ema = None,
    style: opt.Style = None,
    negative_prompt: opt.NegativePrompt = None,
    negative_scale: opt.NegativeScale = None,
    batch: opt.Batch = 16,
    columns: opt.Columns = None,
    device: opt.Device = "auto",
    trust_code: opt.TrustCode = False,
) -> None:
    """Sample a student or a teacher and write a grid of images. Times are per image, from noise to pixels.

    Example: diffdistill sample runs/demo/student --count 100 --teacher --out digits.png

    Example: diffdistill sample exported/sd15 --prompt "a red fox" --prompt "two blue birds" --steps 2

    Example: diffdistill sample runs/four-steps --first-steps 1 --estimates --out estimates.png
    """
    from diffdistill.data.prompts import read_prompts
    from diffdistill.diffusion.guidance.policies import parse_guidance
    from diffdistill.distributed.devices import choose_device
    from diffdistill.exported.sample import SampleOptions
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
        first_steps=first_steps,
    )
    if estimates:
        _write_estimates(run, options)
    else:
        _write_samples(run, options)


def _write_estimates(run: str, options: "SampleOptions") -> None:
    from diffdistill.exported.sample import run_estimates

    _print(f"{options.out}: {'; '.join(one.caption for one in run_estimates(run, options))}")


def _write_samples(run: str, options: "SampleOptions") -> None:
    from diffdistill.exported.sample import run_sample

    made, out = run_sample(run, options), options.out
    shown = "; ".join([*(f"{one.caption} per image" for one in made), *filter(None, [made[-1].classes])])
    _print(f"{out}: {len(made[0].images)} images; {shown}")
    after = [("report", run), ("export", run, "--out", exported(run))] if as_run(run) else []
    say_next(*after, also=(f"open {out}",))


@guarded
def export(
    run: Annotated[str, typer.Argument(help="A run, a checkpoint, or a folder of joined students.")],
    out: opt.ExportOut = None,
    space: opt.Space = None,
    kind: opt.Kind = "auto",
    ema: opt.Ema = None,
    style: opt.Style = None,
    guidance: opt.GuidanceScale = None,
    own_pipeline: opt.OwnPipeline = False,
    quantised: opt.Quantised = False,
    first_steps: opt.NoFirstSteps = 0,
    licence: opt.Licence = None,
    records: opt.CardRecords = None,
    verify: opt.Verify = True,
    push: opt.Push = None,
    public: opt.Public = False,
) -> None:
    """Export a student with a model card: a diffusers pipeline, or a LoRA file. Loading needs no diffdistill.

    Example: diffdistill export runs/demo/student --out exported/digits

    Example: diffdistill export runs/sd15 --out exported/sd15-lora --kind lora --push me/sd15-one-step

    Example: diffdistill export runs/demo/student --space spaces/digits
    """
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
        first_steps=first_steps,
    )
    made = run_export(run, FilePath(out), options) if out else export_space(run, FilePath(str(space)), options)
    _print(made.summary)
    if space:
        _say_how_to_publish(FilePath(space))
        return
    say_next(
        ("sample", made.folder, "--out", f"{made.folder.name}.png"),
        also=(f"read {made.folder / 'README.md'}: how to load it with diffusers alone",),
    )


def _say_how_to_publish(space: FilePath) -> None:
    import shlex

    say_next(also=(f"python {shlex.quote(f'{space}/app.py')}", f"read {space / 'README.md'}: how to publish it"))


def _print(line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)
