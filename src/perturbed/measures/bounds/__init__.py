"""Certified bounds of a network's output while its input or its weights move in a ball."""

from perturbed.measures.bounds.certified import CertifiedAccuracy
from perturbed.measures.bounds.graph import Graph, UnsupportedOperator, trace
from perturbed.measures.bounds.propagate import Ball, Propagation, bounds, lower_margins, margins_of

__all__ = [
    "Ball", "CertifiedAccuracy", "Graph", "Propagation", "UnsupportedOperator", "bounds", "lower_margins", "margins_of",
    "trace",
]  # fmt: skip
