"""What is judged: images of a model, a pipeline or files, and their preparation."""
