"""What a study of arms with a shared pre-training costs, beside the sum of its distinct stages.

The sum is of the CPU seconds that each distinct stage took to train, measured by the meter within the same run; the
rest (keys, reading and writing checkpoints, rebuilding models, taking locks) is what sharing costs.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from overhead import Ring, llama, llama_loss, optim, token_batches

from perturbed.core.context import Ctx
from perturbed.core.plan import Batch, Facts, Plan, Stage, apply
from perturbed.core.run import Engine
from perturbed.core.store import Store

TARGET = 1.05


@dataclass(frozen=True)
class Keep:
    """Keeps the first ``length`` tokens of each window."""

    length: int

    def __call__(self, batch: Batch, ctx: Ctx) -> Batch:
        return {k: v[:, : self.length] for k, v in batch.items()}


@dataclass(frozen=True)
class Shorten:
    """An arm: fine-tuning on shorter windows."""

    length: int
    SITES: ClassVar = ("inputs",)

    def __call__(self, plan: Plan) -> Plan:
        return plan.add_inputs("tune", Keep(self.length))


def plan(pretrain: int, tune: int) -> Plan:
    """A language model trained at length, then for a while."""
    stage = Stage(name="pretrain", steps=pretrain, data=Ring(token_batches()), loss=llama_loss, optim=optim)
    stages = (stage, dataclasses.replace(stage, name="tune", steps=tune))
    facts = Facts(modality="language", target="next-token")
    return Plan(build=llama, stages=stages, predict=llama_loss, measures=(), facts=facts)


def measure(arms: int, pretrain: int, tune: int) -> dict[str, float]:
    """CPU seconds of the study, of its distinct stages, of the same without sharing, and their ratios."""
    control = plan(pretrain, tune)
    plans = [control, *(apply(control, [Shorten(120 - 8 * i)]) for i in range(arms - 1))]
    Engine(plan(1, 1), 1, Store(None)).run()  # imports and sources, which every process pays once
    with tempfile.TemporaryDirectory() as folder:
        store, began = Store(Path(folder)), time.process_time()
        for arm in plans:
            Engine(arm, 0, store).run()
        study = time.process_time() - began
        engines = [Engine(arm, 0, store) for arm in plans]
        stages = {e.key(s.name): e.snapshot(s.name)["cost"]["cpu_s"] for e in engines for s in e.plan.stages}
        unshared = sum(stages[e.key(s.name)] for e in engines for s in e.plan.stages)
    assert len(stages) == arms + 1, "the arms must share their pre-training and nothing else"
    distinct = sum(stages.values())
    return {
        "arms": arms, "study_s": study, "stages_s": distinct, "unshared_s": unshared, "ratio": study / distinct,
        "saved": 1 - study / unshared,
    }  # fmt: skip


def main(arms: int = 4, pretrain: int = 60, tune: int = 20) -> dict[str, Any]:
    """Measure, print a table and tell whether the target is met."""
    found: dict[str, Any] = measure(arms, pretrain, tune)
    found |= {"target": TARGET, "met": found["ratio"] <= TARGET}
    print(
        f"{arms} arms: study {found['study_s']:.1f} s, distinct stages {found['stages_s']:.1f} s, "
        f"ratio {found['ratio']:.3f} (≤ {TARGET}); without sharing {found['unshared_s']:.1f} s",
        file=sys.stderr,
    )
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
