"""One evaluation from images to a record: the command, references, efficiency, the evaluator of a training run."""
