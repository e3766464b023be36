"""Images from a model: `draw` by its sampler, `image_generator` with text encoder and VAE around it.

Imports models and what is below. Start with `draw`."""
