"""`python -m diffdistill`: what launchers of distributed training start."""

from diffdistill.commands.cli import main

if __name__ == "__main__":
    main()
