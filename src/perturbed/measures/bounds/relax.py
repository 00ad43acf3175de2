"""Lines that hold one-dimensional functions between them over an interval.

Each relaxation takes the ends ``low`` and ``high`` of the inputs (of one shape) and returns a ``Lines``: slopes and
intercepts with ``lower_slope * z + lower <= f(z) <= upper_slope * z + upper`` for every z of the interval. The choices
among the sound lines are those of CROWN (Zhang et al. 2018, 1811.00866) and of its public implementation. Where a
tangent goes is found without gradients, as any tangent that holds may be differentiated as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NARROW = 1e-8  # below this width a chord is not told from a tangent
GELU_LOWEST = -0.7517916  # where x * Phi(x) is least
BEND = math.sqrt(2)  # GELU is convex between -BEND and BEND, concave outside

Function = Callable[[Tensor], Tensor]


class Lines(NamedTuple):
    """Slopes and intercepts of a lower and an upper line, each shaped like the input; None is a line through zero."""

    lower_slope: Tensor
    lower: Tensor | None
    upper_slope: Tensor
    upper: Tensor


def tangent(f: Function, df: Function, at: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and intercept of the tangent at ``at``."""
    slope = df(at)
    return slope, f(at) - slope * at


def chord(f: Function, low: Tensor, high: Tensor, df: Function | None = None) -> tuple[Tensor, Tensor]:
    """Slope and intercept of the line through both ends; of nearly equal ones, of slope ``df`` through the first."""
    first = f(low)
    slope = (f(high) - first) / (high - low).clamp(min=NARROW)
    if df is not None:  # a quotient of two rounding errors would be carried on, enlarged, to all that comes before
        slope = torch.where(high - low > 1e-5 * (1 + low.abs()), slope, df(low))
    return slope, first - slope * low


def pick(mask: Tensor, one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Of two lines the first where ``mask`` holds."""
    return torch.where(mask, one[0], two[0]), torch.where(mask, one[1], two[1])


@torch.no_grad()
def bisect(holds: Function, sure: Tensor, doubtful: Tensor, steps: int = 12) -> Tensor:
    """The point nearest to ``doubtful`` at which ``holds``, which is true at ``sure`` and changes once on the way.

    It is found to 2^-steps of the way, on the side where it holds: the line is sound, and wider by as little.
    """
    sure, doubtful = sure.clone(), doubtful.clone()
    for _ in range(steps):
        middle = (sure + doubtful) / 2
        true = holds(middle)
        sure, doubtful = torch.where(true, middle, sure), torch.where(true, doubtful, middle)
    return sure


def leaky_relu(low: Tensor, high: Tensor, slope: float = 0.0) -> Lines:
    """ReLU, or max(z, slope * z) for a slope in [0, 1).

    Above, the chord; below, a line through zero whose slope is 1 where the chord's is above a half.
    """
    below = low.clamp(max=0)
    above = torch.maximum(high.clamp(min=0), below + NARROW)
    upper_slope = (above - slope * below) / (above - below)
    upper = (slope - upper_slope) * below
    lower_slope = torch.where(upper_slope > 0.5, 1.0, slope).to(low.dtype)
    return Lines(lower_slope, None, upper_slope, upper)


def s_shaped(f: Function, slope_at: Function, low: Tensor, high: Tensor) -> Lines:
    """An increasing function, convex below zero and concave above, with f(-z) = 2 f(0) - f(z) (tanh, sigmoid).

    Lower line: the chord where the function is concave all over or lies above it, else the tangent whose far end just
    meets the function at ``high``, but touching no further right than the middle. The upper line is its mirror image.
    ``slope_at`` gives the derivative from the function's value, so that one evaluation serves both.
    """

    def df(z: Tensor) -> Tensor:
        return slope_at(f(z))

    middle = (low + high) / 2
    line = chord(f, low, high, df)
    near, far = torch.stack([low, -high]).clamp(max=0), torch.stack([high, -low]).clamp(min=0)
    end = f(far)

    def meets(d: Tensor) -> Tensor:
        value = f(d)
        return value + slope_at(value) * (far - d) <= end

    at_low, at_high = bisect(meets, near, torch.zeros_like(near)).unbind()
    both = (low < 0) & (high > 0)
    slope = line[0].detach()
    straight_low = (low >= 0) | (both & (slope < df(low)))
    straight_high = (high <= 0) | (both & (slope < df(high)))
    lower = pick(straight_low, line, tangent(f, df, torch.minimum(at_low, middle)))
    upper = pick(straight_high, line, tangent(f, df, torch.maximum(-at_high, middle)))
    return Lines(*lower, *upper)


def tanh(low: Tensor, high: Tensor) -> Lines:
    """The hyperbolic tangent."""
    return s_shaped(torch.tanh, lambda value: 1 - value**2, low, high)


def sigmoid(low: Tensor, high: Tensor) -> Lines:
    """The logistic function."""
    return s_shaped(torch.sigmoid, lambda value: value * (1 - value), low, high)


def gelu_slope(z: Tensor) -> Tensor:
    """The derivative of x * Phi(x)."""
    return 0.5 * (1 + torch.erf(z / BEND)) + z * torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)


def gelu(low: Tensor, high: Tensor) -> Lines:
    """The exact GELU, z * Phi(z), with its two changes of curvature at plus and minus the root of 2."""
    f, df = F.gelu, gelu_slope
    middle, line = (low + high) / 2, chord(f, low, high, df)
    slope, through = line[0].detach(), tangent(f, df, middle)
    bend, lowest = torch.full_like(low, BEND), torch.full_like(low, GELU_LOWEST)
    far_right, far_left = high.clamp(min=BEND), low.clamp(max=-BEND)
    near_right, near_left = low.clamp(min=0, max=BEND), high.clamp(min=-BEND, max=0)

    concave = (high <= -BEND) | (low >= BEND)
    right, left = (low >= 0) & (low < BEND) & (high > BEND), (high <= 0) & (high > -BEND) & (low < -BEND)
    across = (low < 0) & (high > 0)
    # tangents within the convex part that just meet the function at the far end of the concave part
    up_to_right = bisect(lambda d: f(d) + df(d) * (far_right - d) <= f(far_right), lowest, bend)
    up_to_left = bisect(lambda d: f(d) + df(d) * (far_left - d) <= f(far_left), lowest, -bend)
    lower = through
    lower = pick(concave, line, lower)
    lower = pick((right & (slope >= df(low))) | (across & (high > BEND)), tangent(f, df, up_to_right), lower)
    lower = pick(
        (left & (slope <= df(high))) | (across & (low < -BEND) & (high <= BEND)), tangent(f, df, up_to_left), lower
    )
    lower = pick((right & (slope < df(low))) | (left & (slope > df(high))), line, lower)
    # tangents within the concave part that just meet the function at the far end of the convex part
    down_to_right = bisect(lambda d: f(d) + df(d) * (near_right - d) >= f(near_right), far_right, bend)
    down_to_left = bisect(lambda d: f(d) + df(d) * (near_left - d) >= f(near_left), far_left, -bend)
    upper = pick(concave, through, line)
    upper = pick(right & (slope >= df(high)), tangent(f, df, down_to_right), upper)
    upper = pick(left & (slope <= df(low)), tangent(f, df, down_to_left), upper)
    return Lines(*lower, *upper)


def exp(low: Tensor, high: Tensor) -> Lines:
    """The exponential: chord above; tangent below, at most 0.99 right of ``low`` so that it stays positive there."""
    at = torch.minimum((low + high) / 2, low + 0.99)
    return Lines(*tangent(torch.exp, torch.exp, at), *chord(torch.exp, low, high, torch.exp))


def log(low: Tensor, high: Tensor) -> Lines:
    """The logarithm of positive numbers: chord below, tangent at the middle above."""
    width = (high - low).clamp(min=NARROW * low)  # a slope of f for a narrow interval is far from the chord's near 0
    slope = torch.log1p(width / low) / width
    return Lines(slope, torch.log(low) - slope * low, *tangent(torch.log, torch.reciprocal, (low + high) / 2))


def sqrt(low: Tensor, high: Tensor) -> Lines:
    """The root of positive numbers: chord below, tangent at the middle above."""
    slope = 1 / (torch.sqrt(low) + torch.sqrt(high))
    return Lines(slope, torch.sqrt(low) - slope * low, *tangent(torch.sqrt, lambda z: 0.5 * z**-0.5, (low + high) / 2))


def reciprocal(low: Tensor, high: Tensor) -> Lines:
    """One over positive numbers: tangent at the middle below, chord above; no lines (nan) where ``low`` is below 0."""
    low = low.masked_fill(low < 0, math.nan)
    slope = -1 / (low * high)
    return Lines(
        *tangent(torch.reciprocal, lambda z: -1 / z**2, (low + high) / 2), slope, torch.reciprocal(low) - slope * low
    )


def square(low: Tensor, high: Tensor) -> Lines:
    """The square: tangent at the middle below, chord above."""
    middle = (low + high) / 2
    return Lines(2 * middle, -(middle**2), low + high, -low * high)


@dataclass(frozen=True)
class Activation:
    """An elementwise function with its relaxation.

    Args:
        f: the function.
        lines: its relaxation over an interval.
        least: where it is least, if it does not increase all over.
        falling: whether it decreases instead.
        positive: whether it is defined on positive numbers only.
        cheap: whether bounds of what it returns are taken from those of its input, not from a backward pass.
    """

    f: Function
    lines: Callable[[Tensor, Tensor], Lines]
    least: float | None = None
    falling: bool = False
    positive: bool = False
    cheap: bool = True

    def interval(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The least and largest value on each interval; nan where there is none."""
        if self.falling:  # 1 / z has neither on an interval across 0
            low, high = (end.masked_fill(low < 0, math.nan) for end in (low, high))
        first, last = self.f(low), self.f(high)
        if self.falling:
            return last, first
        if self.least is None:
            return first, last
        at = torch.full_like(low, self.least)
        inside = (low < at) & (at < high)
        return torch.where(inside, self.f(at), torch.minimum(first, last)), torch.maximum(first, last)


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(torch.relu, leaky_relu),
    "tanh": Activation(torch.tanh, tanh),
    "sigmoid": Activation(torch.sigmoid, sigmoid),
    "gelu": Activation(F.gelu, gelu, least=GELU_LOWEST, cheap=False),
    "exp": Activation(torch.exp, exp),
    "log": Activation(torch.log, log, positive=True),
    "sqrt": Activation(torch.sqrt, sqrt, positive=True),
    "reciprocal": Activation(torch.reciprocal, reciprocal, falling=True, positive=True),
    "square": Activation(torch.square, square, least=0.0),
}
