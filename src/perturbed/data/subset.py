"""Training on a part of the examples: few labels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.data import Subset

from perturbed.core.context import Ctx
from perturbed.core.plan import DataFn, Plan, Site, Stage, Stream, no_data
from perturbed.data.arrays import Epochs, EpochStream
from perturbed.data.examples import Batches, Table, TableStream
from perturbed.errors import PlanError


def some_rows(examples: int, share: float, ctx: Ctx) -> Tensor:
    """Indices, in order, of a random ``share`` of so many examples, the same in every stage and arm of a seed.

    They are drawn without regard to classes, whose shares therefore vary as in any sample. Smaller shares are parts of
    larger ones.

    Args:
        examples: how many there are.
        share: in (0, 1]; at least one example is kept.
        ctx: gives the random stream.
    """
    count = max(1, round(share * examples))
    return torch.randperm(examples, generator=ctx.once("some examples", every="run"))[:count].sort().values


@dataclass(frozen=True)
class SomeExamples:
    """Data slot: the epochs of ``inner``, over a random part of its examples.

    Args:
        inner: whose examples, and in what batches.
        share: of the examples, in (0, 1].
    """

    inner: Epochs | Batches
    share: float

    def __call__(self, ctx: Ctx) -> Stream:
        """The stream of one stage."""
        if isinstance(self.inner, Batches):
            table = self.inner.table
            rows = some_rows(len(table), self.share, ctx)
            return TableStream(Table(Subset(table.data, rows.tolist()), table.collate), self.inner.batch, ctx)
        arrays = self.inner.source()
        rows = some_rows(len(next(iter(arrays.values()))), self.share, ctx)
        return EpochStream({name: values[rows] for name, values in arrays.items()}, self.inner.batch, ctx)


@dataclass(frozen=True)
class FewExamples:
    """Train on a random share of the examples, drawn once a seed, for as many steps.

    Stages with the same examples get the same part of them. Knows stages whose examples are held in memory or in a
    table read by index (``data.arrays.Epochs``, ``data.examples.Batches``). What measures read stays whole.

    Args:
        share: of the examples, in (0, 1].
        stage: glob of the stages.
    """

    share: float = 0.1
    stage: str = "*"

    SITES: ClassVar[tuple[Site, ...]] = ("data",)
    REQUIRES: ClassVar[dict[str, object]] = {}
    OFF: ClassVar = {"share": 1.0}
    STRONG: ClassVar = {"share": 0.1}

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise PlanError(f"FewExamples: share={self.share} must be above 0 and at most 1")

    def __call__(self, plan: Plan) -> Plan:
        """The plan with fewer examples in its stages."""
        return plan.edit(self.stage, self._fewer)

    def _fewer(self, stage: Stage) -> Stage:
        if stage.data is no_data:
            return stage
        return dataclasses.replace(stage, data=SomeExamples(_known(stage), self.share))


def _known(stage: Stage) -> Epochs | Batches:
    data: DataFn = stage.data
    if isinstance(data, Epochs | Batches):
        return data
    raise PlanError(
        f"FewExamples: the data of stage {stage.name!r} are {type(data).__name__}, of which no part can be taken: "
        "apply it before other changes of the data, to a stage whose data are Epochs or Batches"
    )
