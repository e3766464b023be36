"""One file per method. Install name: diffdistill.methods."""

if __name__ != "diffdistill.methods":
    raise ImportError("import diffdistill.methods; the folder `methods` is that package's home")
