"""Certified bounds beside those of auto_LiRPA: how far apart they are, and how long each takes.

Of ours alone where ``auto_LiRPA`` cannot be imported; ``PYTHONPATH=CHECKOUT python bench/bounds.py`` lets it.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from perturbed.core.streams import Streams
from perturbed.measures.bounds import Ball, bounds, trace

BATCH, EPS = 64, 0.1
METHODS = {"IBP": 20, "CROWN-IBP": 20, "CROWN": 1}  # repeats, of which the quickest counts


def networks() -> Iterator[tuple[str, nn.Module, int]]:
    """Name, network and side of its images."""

    def mlp(act: type[nn.Module]) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), act(), nn.Linear(64, 64), act(), nn.Linear(64, 10)
        )  # fmt: skip

    yield "MLP, ReLU", mlp(nn.ReLU), 8
    yield "MLP, tanh", mlp(nn.Tanh), 8
    yield "MLP, sigmoid", mlp(nn.Sigmoid), 8
    for kernel, stride, side in ((3, 1, 8), (4, 2, 28)):
        width = 32 * (side // stride // 2) ** 2
        convolutions = [nn.Conv2d(1, 16, kernel, stride, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()]
        head = [nn.Flatten(), nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 10)]
        yield f"two convolutions, {side}x{side}", nn.Sequential(*convolutions, *head), side


def reference(net: nn.Module, x: Tensor) -> Callable[[str], tuple[Tensor, Tensor]] | None:
    """auto_LiRPA's bounds by method, or None without it."""
    try:
        theirs: Any = importlib.import_module("auto_LiRPA")
    except ImportError:
        return None
    bounded = theirs.BoundedModule(net, x)
    ball = theirs.PerturbationLpNorm(norm=float("inf"), eps=EPS)
    return lambda method: bounded.compute_bounds(x=(theirs.BoundedTensor(x, ball),), method=method)


def quickest(call: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of the quickest of some calls, after a first one that does not count."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return min(times)


def compare(net: nn.Module, side: int, rng: torch.Generator) -> dict[str, dict[str, float | None]]:
    """By method: our milliseconds, theirs, the largest difference of a bound, and by how much one of ours is looser."""
    x, found = torch.rand(BATCH, 1, side, side, generator=rng), {}
    graph, theirs = trace(net.eval(), x), reference(net, x)
    for method, repeats in METHODS.items():
        ours = bounds(graph, x, Ball(EPS), method.lower())  # type: ignore[arg-type]
        row = {"ours_ms": quickest(lambda m=method: bounds(graph, x, Ball(EPS), m.lower()), repeats)}
        if theirs is not None:
            (low, high), (their_low, their_high) = ours, theirs(method)
            wider = torch.stack([their_low - low, high - their_high])
            row |= {"difference": float(wider.abs().max()), "looser": float(wider.max().clamp(min=0))}
            row["theirs_ms"] = quickest(lambda m=method: theirs(m), repeats)
        found[method] = row
    return found


@torch.no_grad()
def main() -> dict[str, Any]:
    """Print a line for each network and method."""
    torch.set_num_threads(1)
    streams, found = Streams(0), {}
    streams.tick("bench", 0)
    with streams.scope("build", shared=True):
        every = list(networks())
    for name, net, side in every:
        found[name] = compare(net, side, streams.rng(f"images {name}"))
        for method, row in found[name].items():
            told = "  ".join(f"{key} {value:.3g}" for key, value in row.items())
            print(f"bounds of {name}, {method}: {told}", flush=True)
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
