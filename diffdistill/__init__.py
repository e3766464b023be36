"""diffdistill: one-step image generators, distilled from diffusion models."""

__version__ = "0.1.0"
