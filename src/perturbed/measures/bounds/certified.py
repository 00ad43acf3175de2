"""Certified accuracy: the share of examples whose class nothing within a ball can change, by proof."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import Module

from perturbed.core.run import Run
from perturbed.errors import PlanError, nearest
from perturbed.measures.bounds.graph import trace
from perturbed.measures.bounds.propagate import Ball, Method, Norm, lower_margins
from perturbed.measures.vision import examples

CHUNK = 64
SLACK = 1e-4  # logits by which a margin must exceed 0, far more than float32 rounds off in networks of this size


class _Predictor(Module):
    """A run's prediction as a module of one input."""

    def __init__(self, run: Run, name: str, rest: dict[str, Any]):
        super().__init__()
        self.model, self.name, self.rest, self.predict = run.model, name, rest, run.predict

    def forward(self, x: Tensor) -> Tensor:
        return self.predict({**self.rest, self.name: x})


@dataclass(frozen=True)
class CertifiedAccuracy:
    """Measure: the share of examples that are classified rightly in the whole ball, on the predictor as a whole.

    Gives ``accuracy_certified``, what ``method`` or intervals prove (neither is always the tighter), and
    ``accuracy_interval``, what intervals alone prove. Neither is above the accuracy under any attack within the ball.

    Args:
        eps: radius of the ball, in units of the input.
        norm: ``linf``, ``l2`` or ``l1``.
        method: ``crown`` or ``crown-ibp``.
        fact: the plan's fact that gives the examples.
        suffix: put after each name.
    """

    eps: float = 0.1
    norm: Norm = "linf"
    method: Method = "crown"
    fact: str = "held_out"
    suffix: str = ""

    def __post_init__(self) -> None:
        for field, options in (("norm", get_args(Norm)), ("method", ("crown", "crown-ibp"))):
            if getattr(self, field) not in options:
                value = getattr(self, field)
                raise PlanError(f"CertifiedAccuracy: no {field} {value!r}: {nearest(str(value), options)}")
        if not 0 <= self.eps < math.inf:
            raise PlanError(f"CertifiedAccuracy: eps={self.eps} must be finite and not negative")

    def __call__(self, run: Run) -> dict[str, float]:
        """The shares, each in [0, 1]."""
        name, legal = run.ctx.facts.input, run.ctx.facts.input_range
        if name is None or legal is None:
            raise PlanError("CertifiedAccuracy wants the facts input and input_range: set them in the plan's facts")
        ball = Ball(self.eps, self.norm, legal)
        by_method, by_interval = [], []
        with torch.no_grad():
            for whole in examples(run, self.fact):
                for low in range(0, len(whole["labels"]), CHUNK):
                    batch = {key: values[low : low + CHUNK] for key, values in whole.items()}
                    x, labels = batch.pop(name), batch["labels"]
                    graph = trace(_Predictor(run, name, batch), x)
                    by_method.append((lower_margins(graph, x, labels, ball, self.method) > SLACK).all(1))
                    by_interval.append((lower_margins(graph, x, labels, ball, "ibp") > SLACK).all(1))
        one, other = torch.cat(by_method), torch.cat(by_interval)
        return {
            f"accuracy_certified{self.suffix}": (one | other).float().mean().item(),
            f"accuracy_interval{self.suffix}": other.float().mean().item(),
        }
