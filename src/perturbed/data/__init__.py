"""What a model is trained on: corpora, packing into windows, insertions."""

from perturbed.lazy import getter, lister

__getattr__ = getter(__name__)
__dir__ = lister(__name__)
