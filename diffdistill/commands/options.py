"""Options that several commands share, and those of the commands that have many. One option has one text."""

from typing import Annotated

import typer

from diffdistill.settings.limits import (
    MAX_BATCH,
    MAX_COLUMNS,
    MAX_COUNT,
    MAX_IMAGES,
    MAX_INTEGER,
    MAX_LEVELS,
    MAX_NUMBER,
    MAX_SAMPLING_STEPS,
)

TEACHER, FURTHER, FILES = "The teacher", "Further options", "Files"
"""Groups of options in --help."""

# Training
Config = Annotated[str, typer.Argument(help="A YAML file, or a packaged config such as dmd2/digits.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as key.sub=value.")]
Resume = Annotated[bool, typer.Option("--resume", help="Resume from the run's newest checkpoint.")]
FromCheckpoint = Annotated[
    str | None, typer.Option("--checkpoint", help="With --resume: from this checkpoint, such as step-00000500.")
]
AllowChanges = Annotated[
    bool, typer.Option("--allow-changes", help="With --resume: accept changed settings, which are listed.")
]
Sweeps = Annotated[
    list[str] | None,
    typer.Option("--sweep", help="key=value,value,...: train every combination and compare them. Repeatable."),
]
TrustFeatures = Annotated[
    bool, typer.Option("--trust-code", help="Allow feature extractors that are programs (TorchScript).")
]
TrustEvaluated = Annotated[
    bool,
    typer.Option("--trust-code", help="Allow an exported folder's own code, and TorchScript feature extractors."),
]

# Sampling
Seed = Annotated[int, typer.Option(help="Random seed of the noise.", min=0, max=MAX_INTEGER)]
Steps = Annotated[
    int | None,
    typer.Option(help="NFE: network evaluations per image; default: the model's own.", min=1, max=MAX_SAMPLING_STEPS),
]
Guidance = Annotated[
    str | None,
    typer.Option(
        help="Scale w of D_u + w (D_c - D_u), 1 is none; or a policy, as {name: adaptive, scale: 2}. Default: 1, or "
        "that of an exported folder."
    ),
]
Batch = Annotated[int, typer.Option(help="Batch size.", min=1, max=MAX_BATCH)]
Device = Annotated[str, typer.Option(help="auto or cpu.")]
Ema = Annotated[str | None, typer.Option(help="Name of one of the run's `more_emas`; default: `ema`.")]
TrustCode = Annotated[bool, typer.Option("--trust-code", help="Allow the code of an exported folder to run.")]
Style = Annotated[
    str | None,
    typer.Option(help='For a student of several styles: "a", or a mixture "a=0.3,b=0.7".', rich_help_panel=FURTHER),
]
Count = Annotated[
    int | None, typer.Option(help="Number of images; default: 100, or one per prompt.", min=1, max=MAX_IMAGES)
]
Label = Annotated[
    list[str] | None, typer.Option(help="Class, by number or name. Repeatable. Default: all classes in turn.")
]
Prompt = Annotated[list[str] | None, typer.Option(help="Text prompt. Repeatable.")]
Prompts = Annotated[str | None, typer.Option(help="UTF-8 text file with one prompt per line.")]
Columns = Annotated[int | None, typer.Option(help="Columns of the grid.", min=1, max=MAX_COLUMNS)]
NegativePrompt = Annotated[
    str | None,
    typer.Option(help="Negative prompt, in cross-attention (NASA); default: the run's.", rich_help_panel=FURTHER),
]
NegativeScale = Annotated[
    float | None,
    typer.Option(
        help="Weight of the negative prompt; default: the run's, or 0.3.",
        min=0,
        max=MAX_NUMBER,
        rich_help_panel=FURTHER,
    ),
]
WithTeacher = Annotated[
    bool, typer.Option("--teacher", help="Also sample the teacher, from the same noise.", rich_help_panel=TEACHER)
]
TeacherFrom = Annotated[
    str | None, typer.Option(help="Path of the teacher, if it was moved; implies --teacher.", rich_help_panel=TEACHER)
]
TeacherSteps = Annotated[
    int | None,
    typer.Option(help="NFE of the teacher; default: its own.", min=1, max=MAX_SAMPLING_STEPS, rich_help_panel=TEACHER),
]
TeacherGuidance = Annotated[
    str | None, typer.Option(help="Guidance of the teacher; default: that of distillation.", rich_help_panel=TEACHER)
]
FirstSteps = Annotated[
    int,
    typer.Option(
        help="Let the teacher make the student's first steps, this many NFE, with --teacher-guidance: more diversity.",
        min=0,
        max=MAX_SAMPLING_STEPS,
        rich_help_panel=TEACHER,
    ),
]
Estimates = Annotated[
    bool,
    typer.Option(
        "--estimates",
        help="Show x0 as student and teacher predict it at every step of the trajectory, one column per step; with "
        "--teacher also on the teacher's trajectory. Default: 8 images.",
        rich_help_panel=TEACHER,
    ),
]
Teleport = Annotated[
    float | None,
    typer.Option(
        help="Skip Heun's steps above this noise-to-signal ratio: start from a Gaussian fitted to the run's images.",
        min=0,
        max=MAX_NUMBER,
        rich_help_panel=FURTHER,
    ),
]

# Export
ExportOut = Annotated[str | None, typer.Option(help="Folder to write; an earlier export there is replaced.")]


def _check_space(folder: str | None) -> str | None:
    """`--space --out DIR` would take "--out" for the folder's name."""
    if folder is not None and folder.startswith("-"):
        raise typer.BadParameter(f"is followed by its folder, not by {folder}: write --space FOLDER, without --out")
    return folder


Space = Annotated[
    str | None,
    typer.Option(
        callback=_check_space,
        help="Instead of --out: folder of a Hugging Face Space with the export, its teacher if that was trained here, "
        "and the page of `play`.",
    ),
]
Kind = Annotated[
    str,
    typer.Option(
        help="stock: classes of diffusers only; self-contained: with its own code; lora: a LoRA file with diffusers' "
        "keys; kohya: with kohya's, for ComfyUI; auto: stock if possible, else self-contained."
    ),
]
GuidanceScale = Annotated[
    float | None,
    typer.Option(
        help="Default guidance_scale of the exported pipeline, for a student that takes it as input.",
        min=-MAX_NUMBER,
        max=MAX_NUMBER,
    ),
]
OwnPipeline = Annotated[
    bool,
    typer.Option(
        "--own-pipeline",
        help="Add to a stock folder a pipeline class whose default call samples the student. Loading it runs code.",
    ),
]
Quantised = Annotated[
    bool,
    typer.Option(
        "--quantised", help="Store the quantised weights of a student trained with `qat`: torchao 0.16, stock."
    ),
]
NoFirstSteps = Annotated[
    int,
    typer.Option(
        help="Not possible in a folder; the message says how a program does it.", min=0, max=MAX_SAMPLING_STEPS
    ),
]
Licence = Annotated[str | None, typer.Option(help="Licence of the teacher, if its model card does not state it.")]
CardRecords = Annotated[
    str | None, typer.Option(help="Records of `diffdistill eval` (JSONL): scores for the model card.")
]
Verify = Annotated[bool, typer.Option(help="Load the folder in a process without diffdistill and compare its images.")]
Push = Annotated[
    str | None, typer.Option(help="Upload to this Hugging Face repository with your token (HF_TOKEN, or a login).")
]
Public = Annotated[bool, typer.Option("--public", help="With --push: make the repository public.")]

# Evaluation
Evaluated = Annotated[
    list[str],
    typer.Argument(
        help="Runs, checkpoints, diffusers pipelines, folders or zips of images, .npz files; or: compare A B."
    ),
]
Protocol = Annotated[
    str | None, typer.Option(help="Name or YAML file of a protocol; default: digits-pixels for digits models.")
]
Against = Annotated[
    str | None,
    typer.Option(help="A teacher or another model: the distance to it and its floor; or images to compare with."),
]
Repeats = Annotated[
    int | None,
    typer.Option(help="Repeats with new image seeds; default: the protocol's.", min=1, max=MAX_SAMPLING_STEPS),
]
FirstSeed = Annotated[int, typer.Option(help="First range of image seeds.", min=0, max=MAX_COUNT)]
GuidancePolicy = Annotated[
    str, typer.Option(help="Scale w of D_u + w (D_c - D_u), 1 is none; or a policy, as {name: adaptive, scale: 2}.")
]
SamplerText = Annotated[str | None, typer.Option(help='Sampler, as "{name: ddim}"; default: the model\'s own.')]
RecordName = Annotated[list[str] | None, typer.Option(help="Name of each model in records and tables. Repeatable.")]
EvalBatch = Annotated[int, typer.Option(help="Batch size.", min=1, max=256)]
Weights = Annotated[
    list[str] | None,
    typer.Option(help="LABEL=FILE: weights of a feature extractor. Repeatable.", rich_help_panel=FILES),
]
References = Annotated[
    list[str] | None,
    typer.Option(help="LABEL=FILE: reference statistics of real images. Repeatable.", rich_help_panel=FILES),
]
Captions = Annotated[str | None, typer.Option(help="The protocol's captions, one per line.", rich_help_panel=FILES)]
Features = Annotated[str | None, typer.Option(help="Folder to keep the features in.", rich_help_panel=FILES)]
RecordsFile = Annotated[
    str | None, typer.Option(help="JSONL file to append one record per model to.", rich_help_panel=FILES)
]
Grid = Annotated[
    bool,
    typer.Option("--grid", help="With --records: also write a PNG of 100 images.", rich_help_panel=FILES),
]
SaveImages = Annotated[str | None, typer.Option(help="Folder to write every image to, as PNG.", rich_help_panel=FILES)]
TableOut = Annotated[str | None, typer.Option(help="JSON file to write the table to.", rich_help_panel=FILES)]
Efficiency = Annotated[bool, typer.Option("--efficiency", help="Measure latency, throughput and memory too.")]
Replicates = Annotated[
    int | None,
    typer.Option(help="Replicates of the intervals: of `compare` (200), of --against (50).", min=2, max=MAX_LEVELS),
]
Confidence = Annotated[
    float, typer.Option(help="Confidence level of the intervals of `compare` and --against.", min=0, max=1)
]
