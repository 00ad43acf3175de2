"""What is done to parameters and modules."""

from perturbed.lazy import getter, lister

__getattr__ = getter(__name__)
__dir__ = lister(__name__)
