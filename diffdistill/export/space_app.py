"""A page that samples several models side by side, from the same noise. The app.py of a Hugging Face Space is a copy
of this file: it imports gradio, torch and diffusers only, and shows the folders that space.json beside it names."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

SHOWN_SIDE = 360
MAX_COUNT, BATCH = 36, 16
MAX_SEED = 2**31 - 1
CSS = ".model img {image-rendering: pixelated} footer {display: none !important}"


@dataclass(frozen=True)
class PageRequest:
    """What the page asks for. Image i is of noise number i of the seed, for every model.

    label: a class; None for all in turn.  steps, guidance: of the students, and of the teacher; None: each one's own.
    """

    count: int = 9
    seed: int = 0
    prompt: str = ""
    label: str | None = None
    steps: int | None = None
    guidance: float | None = None
    teacher_steps: int | None = None
    teacher_guidance: float | None = None

    def of(self, *, is_teacher: bool) -> tuple[int | None, float | None]:
        """Steps and guidance."""
        return (self.teacher_steps, self.teacher_guidance) if is_teacher else (self.steps, self.guidance)


@dataclass(frozen=True)
class Drawn:
    """images: of one model.  seconds: of one image.  fault: why there are none."""

    images: Sequence[Image.Image] = ()
    num_evaluations: int = 0
    seconds: float = 0.0
    fault: str = ""


class PageModels(Protocol):
    """The models.  names: what stands over each, the teacher's first where there is one.  classes: to choose from."""

    names: list[str]
    has_teacher: bool
    takes_text: bool
    classes: list[str]

    def draw(self, request: PageRequest) -> list[Drawn]: ...


def request_of(values: dict[str, Any]) -> PageRequest:
    """From the fields of the page, of which some are empty; a browser may send anything."""
    seed, count = int(values.get("seed") or 0), int(values.get("count") or 1)
    filled = {name: value for name, value in values.items() if value not in (None, "")}
    return PageRequest(**filled | {"seed": min(max(seed, 0), MAX_SEED), "count": min(max(count, 1), MAX_COUNT)})


def caption(drawn: Drawn, slowest: float) -> str:
    """What stands under a model's images.  slowest: seconds of an image of the slowest model."""
    if drawn.fault:
        return f"**No images.** {drawn.fault}"
    ratio = slowest / drawn.seconds if drawn.seconds else 1.0
    faster = f", {ratio:.0f} times as fast" if ratio >= 1.5 else ""
    return f"**{1000 * drawn.seconds:.3g} ms** per image{faster}; {drawn.num_evaluations} NFE"


def grid(images: Sequence[Image.Image]) -> Image.Image:
    """Row by row, in a square as nearly as can be; small images are enlarged by a whole number."""
    columns = next(n for n in range(1, MAX_COUNT + 1) if n * n >= len(images))
    width, height = images[0].size
    times = max(1, SHOWN_SIDE // (columns * max(width, height)))
    cell = (width * times + 2, height * times + 2)
    sheet = Image.new("RGB", (columns * cell[0] - 2, -(-len(images) // columns) * cell[1] - 2), "white")
    for number, image in enumerate(images):
        large = image.convert("RGB").resize((width * times, height * times), Image.Resampling.NEAREST)
        sheet.paste(large, (number % columns * cell[0], number // columns * cell[1]))
    return sheet


def page(models: PageModels, title: str) -> Any:
    """The page, as gradio's Blocks."""
    import gradio as gr

    def draw(*values: Any) -> list[Any]:
        drawn = models.draw(request_of(dict(zip(asked, values, strict=True))))
        slowest = max(one.seconds for one in drawn)
        return [*(grid(one.images) if one.images else None for one in drawn), *(caption(one, slowest) for one in drawn)]

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 600)) as blocks:
        gr.Markdown(f"# {title}\nAll models start from the same noise: image *i* of each has the same seed.")
        asked: dict[str, Any] = {}
        with gr.Row():
            if models.takes_text:
                asked["prompt"] = gr.Textbox("a red fox", label="Prompt", max_length=1000, scale=3)
            elif models.classes:
                choices = [("all in turn", ""), *((name, name) for name in models.classes)]
                asked["label"] = gr.Dropdown(choices, value="", label="Class")
            asked["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
            asked["count"] = gr.Slider(1, MAX_COUNT, 4 if models.takes_text else 9, step=1, label="Images")
        with gr.Accordion("Steps and guidance", open=False), gr.Row():
            for who in ("teacher", "student") if models.has_teacher else ("student",):
                prefix = "teacher_" if who == "teacher" else ""
                own: Any = {"value": None, "placeholder": "default"}
                whole: Any = {"precision": 0, "minimum": 1, "maximum": 1000}
                asked[f"{prefix}steps"] = gr.Number(label=f"NFE of the {who}", **whole, **own)
                asked[f"{prefix}guidance"] = gr.Number(label=f"Guidance of the {who}", step=0.5, **own)
        button = gr.Button("Sample", variant="primary", elem_id="draw")
        pictures, captions = [], []
        with gr.Row():
            for name in models.names:
                with gr.Column(min_width=260):
                    gr.Markdown(f"### {name}")
                    shown = gr.Image(show_label=False, format="png", buttons=["download"], elem_classes="model")
                    pictures.append(shown)
                    captions.append(gr.Markdown(elem_classes="caption", container=False))
        gr.on([blocks.load, button.click], draw, list(asked.values()), [*pictures, *captions], api_visibility="private")
    return blocks


def serve(models: PageModels, title: str, *, host: str | None = None, port: int | None = None) -> None:
    """Serve the page until it is stopped; no share link, nothing of other hosts.  host, port: None: gradio's own."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    plain = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page(models, title).launch(
        server_name=host, server_port=port, share=False, theme=plain, css=CSS, footer_links=[], ssr_mode=False
    )


class Folders:
    """Exported folders, loaded by diffusers.  place: of space.json."""

    def __init__(self, place: Path) -> None:
        told = json.loads((place / "space.json").read_text(encoding="utf-8"))
        self.models: list[dict[str, Any]] = told["models"]
        self.takes_text, self.classes, self.labels = told["takes_text"], told["classes"], told["labels"]
        self.names, self.has_teacher = [model["name"] for model in self.models], bool(self.models[0]["is_teacher"])
        self.pipelines = [_load(place / model["folder"], model) for model in self.models]

    def draw(self, request: PageRequest) -> list[Drawn]:
        return [self._draw(pipe, model, request) for pipe, model in zip(self.pipelines, self.models, strict=True)]

    def _draw(self, pipe: Any, model: dict[str, Any], request: PageRequest) -> Drawn:
        steps, scale = request.of(is_teacher=model["is_teacher"])
        call = dict(model["call"])
        if model["takes_steps"]:
            call |= {"num_inference_steps": steps} if steps else {}
            call |= {"guidance_scale": scale} if scale is not None else {}
        elif steps or scale is not None:
            return Drawn(fault="NFE and guidance of this export are fixed; leave them empty.")
        try:
            self._call(pipe, call, request, range(1))
            began, every = time.perf_counter(), range(request.count)
            images = [one for i in every[::BATCH] for one in self._call(pipe, call, request, every[i : i + BATCH])]
        except (ValueError, torch.OutOfMemoryError) as error:  # of diffusers, of the folder's pipeline, of the device
            return Drawn(fault=str(error))
        nfe = int(pipe.model.sampler_for(steps).num_evaluations) if model["takes_steps"] else model["num_evaluations"]
        return Drawn(images, nfe, (time.perf_counter() - began) / len(images))

    def _call(self, pipe: Any, call: dict[str, Any], request: PageRequest, index: range) -> list[Image.Image]:
        chosen = [self.labels[self.classes.index(request.label)]] if request.label else self.labels
        asked: dict[str, Any] = {"batch_size": len(index)}
        if self.takes_text:
            asked = {"prompt": [request.prompt] * len(index)}
        elif chosen:
            asked = {"class_labels": [chosen[i % len(chosen)] for i in index]}
        noise = [torch.Generator().manual_seed(request.seed * MAX_COUNT + i) for i in index]
        return list(pipe(**asked, **call, generator=noise).images)


def _load(folder: Path, model: dict[str, Any]) -> Any:
    """Code runs only where the folder's own pipeline is code, which was exported with this file."""
    import diffusers

    options = {"trust_remote_code": model["has_code"], "local_files_only": True, "use_safetensors": True}
    kind, absent = getattr(diffusers, model["pipeline"]), dict.fromkeys(model["absent"])
    pipe = kind.from_pretrained(folder, **absent, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    serve(Folders(Path(__file__).parent), "One step, beside its teacher")
