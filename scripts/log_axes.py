"""Logarithmic axes of the docs' figures: labelled at 1, 2 and 5, with a light grid."""

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

INK, GRID = "#24292f", "#e7eaee"


def log_axes(panel: Axes, *, label_size: int) -> None:
    """Give a panel these axes."""
    panel.set(xscale="log", yscale="log")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    panel.grid(which="both", color=GRID, linewidth=0.6)
    panel.tick_params(labelsize=label_size)
