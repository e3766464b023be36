"""Data sets: what a config may name under `data`."""

from diffdistill.data.digits import Digits

AnyData = Digits
"""The data sets that a config may name."""

__all__ = ["AnyData", "Digits"]
