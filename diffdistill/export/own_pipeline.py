"""A class of pipeline for a stock folder, whose plain call makes the student's images. Loading it runs its file."""

import hashlib
from pathlib import Path as FilePath

from diffdistill.export.stock import StockFolder
from diffdistill.storage.atomic import write_text_atomically

TEXT = '''"""{kind} for a student: its plain call takes the steps that the student was trained for, without guidance."""

from diffusers import {kind}

STEPS = {steps}
CALL = {call}


class StudentPipeline({kind}):
    """Arguments that are not named here are those of {kind}."""

    def __call__(self, *args, num_inference_steps=None, guidance_scale=None, **named):
        """num_inference_steps: {steps}, or None.  guidance_scale: 0, 1 or None.  Raises ValueError on others."""
        if num_inference_steps not in (None, STEPS):
            raise ValueError(f"num_inference_steps: this student was trained for {{STEPS}}")
        if guidance_scale not in (None, 0, 1):
            raise ValueError("guidance_scale: this student has its teacher's guidance in it; leave it out")
        return super().__call__(*args, **{{**CALL, **named}})
'''


def write_own_pipeline(folder: FilePath, stock: StockFolder, number: int) -> str:
    """Write the file.  number: of the student's steps.

    Returns the module's name, which depends on its text: diffusers keeps the modules of all folders in one place.
    """
    text = TEXT.format(kind=stock.kind, steps=number, call=repr(dict(stock.call)))
    module = f"student_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    write_text_atomically(folder / f"{module}.py", text)
    return module
