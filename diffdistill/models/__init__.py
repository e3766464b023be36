"""A denoiser on disk: `spec` describes it, `load` reads it, `encoders` and `teachers` are what stands around it.

`teachers` has a file for each family of diffusers pipelines, and EDM's pickles, read as data. Imports distillation
and what is below. Start with `load`.
"""
