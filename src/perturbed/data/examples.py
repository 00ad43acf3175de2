"""Anyone's own examples: a ``datasets.Dataset``, a torch data set or a list, as the batches of a stage."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from perturbed.core.context import Ctx
from perturbed.core.keys import describe, digest
from perturbed.core.plan import Batch
from perturbed.data.arrays import EpochOrder
from perturbed.data.content import content_hash
from perturbed.errors import PlanError

Collate = Callable[[list[Any]], Mapping[str, Any]]
LABELS = "labels"
_ALSO_LABELS = ("label", "label_ids")


def to_tensor(value: Any) -> Tensor | None:
    """A number, array, tensor or (nested) list of them as a tensor; None for anything else (text, images, None).

    Floating numbers that are no tensor yet become float32, as models want them.

    Raises:
        ValueError: a nested list is ragged.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
        parts = [to_tensor(item) for item in value]
        return None if any(p is None for p in parts) else torch.stack(parts)  # type: ignore[arg-type]
    if not isinstance(value, np.ndarray | np.generic | int | float | list | tuple):
        return None
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        return None
    return torch.as_tensor(array.astype(np.float32) if array.dtype == np.float64 else array)


def named(example: Any, input: str) -> dict[str, Any]:
    """An example as a dict: a pair (x, y), as torch data sets give, is x under ``input`` and y under ``labels``.

    A column ``label`` or ``label_ids`` is read as ``labels``, as Transformers does.

    Raises:
        PlanError: it is neither a mapping nor a pair.
    """
    if isinstance(example, tuple | list) and len(example) == 2:
        return {input: example[0], LABELS: example[1]}
    if not isinstance(example, Mapping):
        raise PlanError(
            f"an example is a {type(example).__name__}, not a dict or a pair (input, label): give collate=, a function "
            "from a list of examples to a dict of tensors"
        )
    return {LABELS if name in _ALSO_LABELS and LABELS not in example else name: v for name, v in example.items()}


@dataclass(frozen=True)
class Stack:
    """Collate: each named column of the examples stacked to a tensor [B, ...].

    Args:
        columns: names.
        input: the name of x where examples are pairs (x, y).
    """

    columns: tuple[str, ...]
    input: str

    def __call__(self, examples: list[Any]) -> Batch:
        """The batch.

        Raises:
            PlanError: a column is missing somewhere, no tensor there, or of unequal shapes.
        """
        rows = [named(example, self.input) for example in examples]
        return {name: self._stacked(name, rows) for name in self.columns}

    @staticmethod
    def _stacked(name: str, rows: list[dict[str, Any]]) -> Tensor:
        try:
            parts = [to_tensor(row.get(name)) for row in rows]
        except (ValueError, RuntimeError) as e:
            raise PlanError(f"column {name!r} holds a list that makes no tensor: {e}") from e
        if any(part is None for part in parts):
            raise PlanError(f"column {name!r} is a tensor in some examples and missing or no tensor in others")
        shapes = {tuple(part.shape) for part in parts if part is not None}
        if len(shapes) > 1:
            one, two = sorted(shapes)[:2]
            raise PlanError(
                f"column {name!r} has examples of shapes {list(one)} and {list(two)}: make them equal, or give "
                "collate= (such as transformers.DataCollatorWithPadding(tokenizer))"
            )
        return torch.stack(parts)  # type: ignore[arg-type]


def columns(example: Mapping[str, Any], wanted: Sequence[str]) -> tuple[str, ...]:
    """The columns of an example that are tensors; of the others one line says that they are left out.

    Args:
        example: as ``named`` gives it.
        wanted: what the model takes.

    Raises:
        PlanError: a column that the model takes is no tensor, or none is.
    """
    kept = {name for name, value in example.items() if _tensor_like(value)}
    lost = [name for name in example if name not in kept]
    needed = [name for name in lost if name in wanted]
    if needed:
        kind = type(example[needed[0]]).__name__
        raise PlanError(
            f"the model takes {needed[0]!r}, but that column is a {kind}, no tensor: convert it or give collate="
        )
    if not kept:
        raise PlanError(
            f"no column of the data is a tensor (there is {', '.join(example)}): convert them or give collate="
        )
    if lost:
        _say_once(f"perturbed: note: left out of the batches, as they are no tensors: {', '.join(lost)}")
    return tuple(name for name in example if name in kept)


def _tensor_like(value: Any) -> bool:
    try:
        return to_tensor(value) is not None
    except (ValueError, RuntimeError):
        return True  # a ragged list: kept, so that stacking says what is wrong


@cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def data_hash(data: Any) -> str:
    """Hash of what a data set holds: of a ``datasets.Dataset`` its fingerprint, of others their examples.

    Raises:
        Unkeyed: it cannot be told, as of a torch data set that computes its examples or reads them from files.
    """
    if isinstance(data, Subset):
        return content_hash("subset", data_hash(data.dataset), [int(i) for i in data.indices])
    if isinstance(data, TensorDataset):
        return content_hash(data.tensors)
    if isinstance(data, list | tuple | np.ndarray):
        return content_hash(data)
    return digest(describe(data))


@dataclass(frozen=True, eq=False)
class Table:
    """A data set with a length, read by index, and how its examples become a batch.

    Args:
        data: anything with ``len`` and ``[i]``.
        collate: makes a dict of tensors from a list of examples.
    """

    data: Any = field(repr=False)
    collate: Collate

    def __len__(self) -> int:
        return len(self.data)

    def take(self, rows: Sequence[int]) -> Batch:
        """The examples of these rows as a batch.

        Raises:
            PlanError: ``collate`` gives something other than a dict of tensors.
        """
        found = self.collate(fetch(self.data, rows))
        batch = dict(found) if isinstance(found, Mapping) else None
        if not batch or not all(isinstance(value, Tensor) for value in batch.values()):
            raise PlanError(f"collate= must give a dict of tensors, but gave {_shape_of(found)}")
        return batch

    def parts(self, size: int) -> Iterator[Batch]:
        """All examples in order, ``size`` at a time."""
        for low in range(0, len(self), size):
            yield self.take(range(low, min(low + size, len(self))))

    def __call__(self) -> Batch:
        """All examples in one batch."""
        return self.take(range(len(self)))

    def fingerprint(self) -> str:
        """Hash of the content and of ``collate``, worked out once.

        Raises:
            Unkeyed: one of them cannot be told.
        """
        return self._fingerprint_once

    @cached_property
    def _fingerprint_once(self) -> str:
        return content_hash(data_hash(self.data), self.collate)


def _shape_of(found: Any) -> str:
    if not isinstance(found, Mapping):
        return type(found).__name__
    return "{" + ", ".join(f"{name!r}: {type(value).__name__}" for name, value in found.items()) + "}"


def fetch(data: Any, rows: Sequence[int]) -> list[Any]:
    """The examples of these rows, in one call where the data set has one for it."""
    if hasattr(data, "__getitems__"):
        return list(data.__getitems__(list(rows)))
    return [data[i] for i in rows]


def check_map_style(data: Any, what: str) -> None:
    """Refuse what is no data set of examples read by index.

    Raises:
        PlanError: no length, no index, several splits, or empty.
    """
    if isinstance(data, Mapping):
        raise PlanError(
            f"{what} is a {type(data).__name__} of {', '.join(map(repr, data))}: give one set of examples, such as "
            "one of the splits, or a list of dicts"
        )
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise PlanError(
            f"{what} is a {type(data).__name__}, which has no length or no [i]: give a datasets.Dataset, a map-style "
            "torch Dataset or a list of dicts"
        )
    if len(data) == 0:
        raise PlanError(f"{what} is an empty data set: there is no example to learn from or to measure on")


class TableStream:
    """An endless stream of equal batches of a table, in the order of ``EpochOrder``; it has no state."""

    def __init__(self, table: Table, batch: int, ctx: Ctx):
        self.table, self.order = table, EpochOrder(len(table), batch, ctx)

    def __next__(self) -> Batch:
        """The batch of the step that the run stands at."""
        return self.table.take(self.order.rows().tolist())

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the step says where the stream stands."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to put back."""


@dataclass(frozen=True)
class Batches:
    """Data slot: batches of a table, every example once an epoch.

    Args:
        table: the examples.
        batch: examples in a batch.
    """

    table: Table
    batch: int

    def __call__(self, ctx: Ctx) -> TableStream:
        """The stream of one stage."""
        return TableStream(self.table, self.batch, ctx)
