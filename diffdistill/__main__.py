"""`python -m diffdistill`: what launchers of several processes start."""

from diffdistill.cli import main

if __name__ == "__main__":
    main()
