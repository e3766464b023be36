"""Whatever makes images, exported folders among them: `image_generators` opens a place, `sample` makes the grid.

Imports export, inference and what is below. Start with `image_generators`."""
