"""A small image classifier with batch normalisation and dropout, and the digits plan around it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn

from perturbed.core.context import Ctx
from perturbed.core.plan import Facts, Plan
from perturbed.core.run import Engine, Result
from perturbed.core.store import Store
from perturbed.core.streams import Streams
from perturbed.plans.digits import Digits

FACTS = Facts(modality="vision", target="class", input="pixels", input_range=(0.0, 1.0))


def restless_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(256, 10)
    )


def build_restless(ctx: Ctx) -> nn.Module:
    return restless_net()


def restless_plan(steps: int = 4) -> Plan:
    return Digits(batch=32, pretrain_steps=2, finetune_steps=steps, held_out=60)().replace(build=build_restless)


def ctx_of(seed: int = 0, stage: str = "finetune", rank: int = 0, world: int = 1, facts: Facts = FACTS) -> Ctx:
    handle: Any = SimpleNamespace(
        process_index=rank, num_processes=world, device="cpu", unwrap_model=lambda m: m,
        scaler=None, distributed_type="NO",
    )  # fmt: skip
    ctx = Ctx(Streams(seed, rank), handle, facts, stage)
    move(ctx, 0)
    return ctx


def move(ctx: Ctx, step: int) -> Ctx:
    ctx.step = step
    ctx.streams.tick(ctx.stage, step)
    return ctx


def run(plan: Plan, seed: int = 0) -> Result:
    return Engine(plan, seed, Store(None)).run()
