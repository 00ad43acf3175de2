"""Measures of image classifiers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from perturbed.core.plan import Batch
from perturbed.core.run import Run
from perturbed.errors import PlanError

CHUNK = 512


def examples(run: Run, fact: str) -> Iterator[Batch]:
    """The examples that the plan's facts hold under ``fact``, in parts of at most 512, on the run's device.

    Raises:
        PlanError: the plan states no such fact.
    """
    source: Callable[[], Batch] | None = run.ctx.facts.get(fact)
    if source is None:
        raise PlanError(f"a measure wants the fact {fact!r}: give the plan's facts a function that returns a batch")
    batch = source()
    for low in range(0, len(batch["labels"]), CHUNK):
        yield {name: values[low : low + CHUNK].to(run.ctx.device) for name, values in batch.items()}


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the largest logit [B, K] is that of the label [B]."""
    return logits.argmax(-1) == labels


def accuracy(run: Run) -> dict[str, float]:
    """Measure: the share of the plan's ``held_out`` examples that are classified rightly, in [0, 1]."""
    with torch.no_grad():
        hits = [correct(run.predict(batch), batch["labels"]) for batch in examples(run, "held_out")]
    return {"accuracy": torch.cat(hits).float().mean().item()}
