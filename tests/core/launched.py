"""Trains a linear model under ``accelerate launch``; the main process writes weights and a few facts of the run."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import toy
from torch import nn

from perturbed.core.plan import Measure
from perturbed.core.run import Engine, accelerator
from perturbed.core.store import Store


class ShareStream(toy.PointStream):
    """Rank r's part of a batch that does not depend on how many ranks there are."""

    def __init__(self, ctx, batch):
        super().__init__(ctx, batch)
        self.step = 0

    def __next__(self):
        x = torch.randn(self.batch, 6, generator=self.ctx.streams.once(f"batch {self.step}"))
        self.step += 1
        share = {"x": x, "labels": (x[:, :3].sum(1) > 0).long()}
        return {k: v[self.ctx.rank :: self.ctx.world] for k, v in share.items()}

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


@dataclass(frozen=True)
class Shares:
    batch: int = 16

    def __call__(self, ctx):
        return ShareStream(ctx, self.batch)


class LateStore(Store):
    """The other process reads late, so that what the first one writes meanwhile would be noticed."""

    def get(self, key):
        time.sleep(0.1 * (accelerator().process_index > 0))
        return super().get(key)


def build(ctx):
    return nn.Linear(6, 2)


def bad_on_one_rank(model, batch, ctx):
    return toy.loss(model, batch, ctx) * (float("nan") if ctx.step == 3 and ctx.rank == ctx.world - 1 else 1.0)


def plan(loss=toy.loss):
    made = toy.one_stage(steps=12, data=Shares(), snapshots=(5,), loss=loss).replace(build=build)
    return made.add_measures(Measure("curve", toy.accuracy, when=4))


def main(root: str, kind: str) -> None:
    store = LateStore(Path(root) / "store")
    engine = Engine(plan(bad_on_one_rank if kind == "diverging" else toy.loss), 0, store, checkpoint_s=0.005)
    result = engine.run()
    if accelerator().is_main_process:
        told = {"world": accelerator().num_processes, "scores": result.scores, "diverged": result.diverged}
        (Path(root) / "told.json").write_text(json.dumps(told))
        if result.diverged is None:
            torch.save(engine.snapshot("train")["model"], Path(root) / "weights.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
