"""What is done to a batch before the model sees it."""

from perturbed.lazy import getter, lister

__getattr__ = getter(__name__)
__dir__ = lister(__name__)
