"""Built-in control plans: real data, small models of real classes, losses and measures."""

from perturbed.lazy import getter, lister

__getattr__ = getter(__name__)
__dir__ = lister(__name__)
