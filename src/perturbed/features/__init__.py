"""What is done to hidden states and attention."""

from perturbed.lazy import getter, lister

__getattr__ = getter(__name__)
__dir__ = lister(__name__)
