"""What is done while predicting."""

from perturbed.lazy import getter, lister

__getattr__ = getter(__name__)
__dir__ = lister(__name__)
