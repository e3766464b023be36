"""The mathematics of one denoiser: noise levels, D(x_t, t, c), guidance, samplers, random numbers.

No files, no training.

Imports settings alone. Start with `path`, then `denoiser`, then `sampling`.
"""
