"""The bars that other libraries draw while they load weights are off: they say nothing of the run."""

import sys

FOREIGN = ("diffusers.utils.logging", "transformers.utils.logging")


def turn_off_loading_bars() -> None:
    """Of the libraries that are imported by now. Bars of downloads stay as they are."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars

    had_bars = not are_progress_bars_disabled()
    for name in FOREIGN:
        module = sys.modules.get(name)
        if module is not None:
            module.disable_progress_bar()
    if had_bars and are_progress_bars_disabled():  # transformers turns off the hub's as well
        enable_progress_bars()
