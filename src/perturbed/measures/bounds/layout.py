"""Where the examples of a batch are in the values of an exported graph.

Bounds are made one example at a time, so every perturbed node has the batch as its axis 0. The model itself may hold
the batch elsewhere, alone ([T, B, D]) or in one axis with others ([T, B * heads, d] and [T * B, D] of attention). Its
value is then a node [B, ...] of each example's own entries, in the model's order, and the place that the batch has
among them. A reshape keeps that order and only moves the place; what acts along the batch is told by its axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from perturbed.measures.bounds.operators import Node


@dataclass(frozen=True)
class Place:
    """The axis of a model's value that holds the batch, and what else that axis holds.

    Its entries are numbered by (outer, batch, inner), the last fastest.

    Args:
        axis: in the model's value; None if it has no batch, as a perturbed parameter, repeated for each example.
        outer: entries of one example that vary slower than the batch in that axis.
        inner: entries of one example that vary faster.
    """

    axis: int | None = 0
    outer: int = 1
    inner: int = 1

    @property
    def alone(self) -> bool:
        """Whether the axis holds nothing but the batch."""
        return self.outer * self.inner == 1

    def own(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of one example's entries, from that of the model's value, whose batch axis may be 1."""
        if self.axis is None:
            return tuple(shape)
        kept = () if self.alone else (1 if shape[self.axis] == 1 else self.outer * self.inner,)
        return (*shape[: self.axis], *kept, *shape[self.axis + 1 :])

    def along(self, axis: int) -> int | None:
        """The node's axis that is the model's ``axis``; None if that one holds the batch."""
        return None if axis == self.axis else self._behind(axis)

    def _behind(self, axis: int) -> int:
        return axis if self.axis is not None and self.alone and axis > self.axis else axis + 1

    def permuted(self, order: Sequence[int]) -> tuple[list[int], Place]:
        """The order of the node's axes for one of the model's, and the place of the batch after it."""
        if self.axis is None:
            return [0, *(axis + 1 for axis in order)], self
        kept = [axis for axis in order if axis != self.axis or not self.alone]
        return [0, *map(self._behind, kept)], replace(self, axis=list(order).index(self.axis))

    def shifted(self, by: int) -> Place:
        """The place with ``by`` more axes in front of it."""
        return self if self.axis is None else replace(self, axis=self.axis + by)

    def without(self, axes: Sequence[int]) -> Place:
        """The place with those other axes of the model's value removed."""
        return self if self.axis is None else self.shifted(-sum(a < self.axis for a in axes))

    def reshaped(self, old: Sequence[int], new: Sequence[int], batch: int) -> Place | None:
        """The place in a value of shape ``old`` once it has shape ``new``; None if that divides the batch."""
        if self.axis is None:
            return self
        stride, found = self.inner * math.prod(old[self.axis + 1 :]), []
        for axis, size in enumerate(new):
            inner, between = divmod(stride, math.prod(new[axis + 1 :]))
            if not between and inner and size % (batch * inner) == 0:
                found.append(Place(axis, size // (batch * inner), inner))
        before = self.axis  # of a batch of one there can be several; the simplest is taken
        return min(found, key=lambda p: (not p.alone, abs((p.axis or 0) - before)), default=None)

    def apart(self, value: Tensor) -> Tensor:
        """The model's value with the batch in front [B, ...], or [1, ...] where its batch axis is 1."""
        if self.axis is None or (value.shape[self.axis] == 1 and not self.alone):
            return value.unsqueeze(0)
        if self.alone:
            return value.movedim(self.axis, 0)
        parts = value.unflatten(self.axis, (self.outer, -1, self.inner))  # type: ignore[no-untyped-call]
        return parts.movedim(self.axis + 1, 0).flatten(self.axis + 1, self.axis + 2)  # type: ignore[no-any-return]

    def together(self, value: Tensor) -> Tensor:
        """A value [B, ...] as the model holds it: the inverse of ``apart``."""
        if self.axis is None:
            return value[0]
        if self.alone:
            return value.movedim(0, self.axis)
        parts = value.unflatten(self.axis + 1, (self.outer, self.inner))  # type: ignore[no-untyped-call]
        return parts.movedim(0, self.axis + 1).flatten(self.axis, self.axis + 2)  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class Placed:
    """A perturbed value of the exported graph.

    Args:
        node: its entries, with the batch in front.
        place: of the batch in the model's value.
    """

    node: Node
    place: Place

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the model's value."""
        batch, *own = self.node.shape
        axis = self.place.axis
        if axis is None:
            return tuple(own)
        if self.place.alone:
            return (*own[:axis], batch, *own[axis:])
        return (*own[:axis], batch * own[axis], *own[axis + 1 :])
