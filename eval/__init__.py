"""Evaluation: features, distances, protocols. Install name: diffdistill.eval."""

if __name__ != "diffdistill.eval":
    raise ImportError("import diffdistill.eval; the folder `eval` is that package's home")
