"""Learning-rate schedules: pure functions of (step, steps) that give a factor on the initial rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from perturbed.errors import PlanError


@dataclass(frozen=True)
class WarmupCosine:
    """A linear rise over the first ``warmup`` of the steps, then half a cosine down to ``floor``.

    With n = round(warmup * steps) warm-up steps and u = (step - n) / (steps - n)::

        (step + 1) / (n + 1)                              while step < n
        floor + (1 - floor) * (1 + cos(pi u)) / 2         from then on

    so that the first step already learns, the peak is 1 and the last step is one short of ``floor``.

    Args:
        warmup: share of the steps, in [0, 1).
        floor: factor at the end, in [0, 1].
    """

    warmup: float = 0.05
    floor: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1 or not 0 <= self.floor <= 1:
            raise PlanError(f"{self!r}: warmup must be in [0, 1) and floor in [0, 1]")

    def __call__(self, step: int, steps: int) -> float:
        """The factor at ``step`` of ``steps``."""
        rise = round(self.warmup * steps)
        if step < rise:
            return (step + 1) / (rise + 1)
        u = (step - rise) / max(1, steps - rise)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * u)) / 2
