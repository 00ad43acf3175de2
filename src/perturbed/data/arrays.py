"""Batches drawn in epochs from examples held in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perturbed.core.context import Ctx
from perturbed.core.plan import Batch
from perturbed.errors import PlanError


class EpochOrder:
    """Which rows each batch holds: every example once an epoch, in a new order each epoch.

    The examples left over when the size is no multiple of the batch sit out that epoch. The rows are a function of the
    seed, the stage and the step, so any arm of a seed sees the same order. With several processes each takes its own
    share of the batches.

    Args:
        examples: how many there are.
        batch: examples in a batch.
        ctx: gives the step and the random streams.

    Raises:
        PlanError: there is less than one batch for every process.
    """

    def __init__(self, examples: int, batch: int, ctx: Ctx):
        self.examples, self.batch, self.ctx = examples, batch, ctx
        if not 1 <= batch <= examples // ctx.world:
            raise PlanError(
                f"stage {ctx.stage!r} has {examples} examples for batches of {batch} in {ctx.world} process(es): "
                f"choose a batch between 1 and {examples // ctx.world}"
            )
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def rows(self) -> Tensor:
        """Indices [batch] of the batch of the step that ``ctx`` stands at."""
        epoch, place = divmod(self.ctx.step * self.ctx.world + self.ctx.rank, self.examples // self.batch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(self.examples, generator=self.ctx.streams.once(f"order of epoch {epoch}"))
        return self._order[place * self.batch : (place + 1) * self.batch]


class EpochStream:
    """An endless stream of equal batches of examples held in memory, in the order of ``EpochOrder``; it has no state.

    Args:
        arrays: tensors that share their first dimension, one row an example.
        batch: examples in a batch.
        ctx: gives the step and the random streams.

    Raises:
        PlanError: the tensors differ in length, or hold less than one batch for every process.
    """

    def __init__(self, arrays: Mapping[str, Tensor], batch: int, ctx: Ctx):
        lengths = {name: len(values) for name, values in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise PlanError(f"the arrays of stage {ctx.stage!r} must have one length, but have {lengths}")
        self.arrays = dict(arrays)
        self.order = EpochOrder(next(iter(lengths.values())), batch, ctx)

    def __next__(self) -> Batch:
        """The batch of the step that the run stands at."""
        rows = self.order.rows()
        return {name: values[rows] for name, values in self.arrays.items()}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the step says where the stream stands."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to put back."""


@dataclass(frozen=True)
class Epochs:
    """Data slot: an ``EpochStream`` over what ``source`` gives.

    Args:
        source: gives the tensors by name; its content decides the key of the stage, so it is best a frozen dataclass
            with a ``fingerprint``.
        batch: examples in a batch.
    """

    source: Callable[[], Mapping[str, Tensor]]
    batch: int

    def __call__(self, ctx: Ctx) -> EpochStream:
        """The stream of one stage."""
        return EpochStream(self.source(), self.batch, ctx)
