"""What a study would do and cost, told without running it."""

from __future__ import annotations

import dataclasses
from typing import Any

from perturbed.core.plan import Plan
from perturbed.evidence.ledger import latest
from perturbed.evidence.runner import Setting


def price(asked: Setting) -> dict[str, Any]:
    """Runs, steps and distinct stages of a study; its last measured time here, or the paper's bill.

    At ``paper`` scale the bill is 6 operations per parameter, token and pass, and GPU-hours of an H100 at 40 % of its
    dense bf16 peak.
    """
    plans = asked.study.plans()
    found: dict[str, Any] = {
        "slug": asked.card.slug if asked.card else None,
        "scale": asked.scale,
        "seeds": list(asked.seeds),
        "arms": {arm: _stages(plan) for arm, plan in plans.items()},
        "runs": len(plans) * len(asked.seeds),
        "steps": sum(s.steps for plan in plans.values() for s in plan.stages) * len(asked.seeds),
        "cpu_s": None,
        "paper": None,
    }
    record = latest(asked.card.slug, asked.scale) if asked.card else None
    if record is not None:
        found["cpu_s"] = sum(cost["cpu_s"] for cost in record["cost"].values()) * len(record["seeds"])
    paper = asked.study.paper
    if asked.scale == "paper" and paper is not None:
        found["paper"] = dataclasses.asdict(paper) | {"flops": paper.flops(), "gpu_hours": paper.gpu_hours()}
    return found


def _stages(plan: Plan) -> dict[str, int]:
    return {stage.name: stage.steps for stage in plan.stages}


def describe(found: dict[str, Any]) -> str:
    """The price in a few lines."""
    lines = [f"{found['slug']} at {found['scale']} scale: {len(found['arms'])} arms x {len(found['seeds'])} seeds"]
    for arm, stages in found["arms"].items():
        lines.append(f"  {arm}: " + ", ".join(f"{name} {steps:,} steps" for name, steps in stages.items()))
    lines.append(f"{found['runs']} runs, {found['steps']:,} steps at most (arms share equal stages)")
    if found["cpu_s"] is not None:
        lines.append(f"the committed record took {found['cpu_s'] / 60:.1f} CPU minutes of training")
    if paper := found["paper"]:
        lines.append(f"paper: {paper['model']} on {paper['data']}")
        lines.append(f"  {paper['runs']} runs of {paper['tokens']:.3g} tokens or examples")
        lines.append(f"  {paper['flops']:.3g} FLOPs in {paper['precision']}, {_hours(paper['gpu_hours'])} H100-hours")
    return "\n".join(lines)


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"
