"""``python -m perturbed``: the command line, as ``accelerate launch -m perturbed`` needs it."""

from perturbed.cli import main

if __name__ == "__main__":
    main()
