"""The command `play`: a web page that samples teacher and students side by side."""

from pathlib import Path as FilePath
from typing import Annotated

import typer

from diffdistill.commands import options as opt
from diffdistill.commands.exit_codes import guarded
from diffdistill.commands.next_steps import as_run, say_next
from diffdistill.settings.terminal import Console

console = Console()


@guarded
def play(
    runs: Annotated[list[str], typer.Argument(help="Runs, checkpoints, exported folders or diffusers pipelines.")],
    teacher_from: Annotated[str | None, typer.Option(help="Path of the teacher, if it was moved.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 opens the page to your network.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Port; default: the first free one from 7860.", min=1, max=65_535)
    ] = None,
    device: opt.Device = "auto",
    trust_code: opt.TrustCode = False,
) -> None:
    """Open a web page that samples students and their teacher from the same noise. Needs the extra `play`.

    Ctrl-C ends it. Nothing is sent to other hosts; there is no public link.

    Example: diffdistill play runs/demo/student
    """
    import importlib.util

    from diffdistill.distributed.devices import choose_device
    from diffdistill.export.space_app import serve
    from diffdistill.exported.side_by_side import SideBySide
    from diffdistill.inference.image_generator import SampleRequest
    from diffdistill.settings.schema import UserError

    chosen = choose_device(device)
    if importlib.util.find_spec("gradio") is None:
        raise UserError("play: needs gradio, which is not installed: pip install 'diffdistill[play]'")
    models = SideBySide(runs, SampleRequest(device=chosen, trusts_code=trust_code), teacher_from=teacher_from)
    console.print(f"{', '.join(models.names)}: Ctrl-C ends the page", highlight=False, soft_wrap=True, markup=False)
    serve(models, "diffdistill", host=host, port=port)
    if as_run(runs[0]):
        say_next(("export", runs[0], "--space", f"spaces/{FilePath(runs[0]).resolve().name}"))
