"""Out to diffusers: folders and LoRA files that others load without this package."""
