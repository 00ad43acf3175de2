"""Certified bounds beside those of auto_LiRPA: how far apart they are, and how long each takes.

Of ours alone where ``auto_LiRPA`` cannot be imported; ``PYTHONPATH=CHECKOUT python bench/bounds.py`` lets it, and gives
every figure of the tables in ``docs/bounds.md``.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perturbed.core.streams import Streams
from perturbed.measures.bounds import Ball, bounds, trace

BATCH = 64
METHODS = {"IBP": 20, "CROWN-IBP": 20, "CROWN": 1}  # repeats, of which the quickest counts
LINF, L2, L1 = Ball(0.1), Ball(0.5, "l2"), Ball(1.0, "l1")
NORMS = {"linf": math.inf, "l2": 2.0, "l1": 1.0}


@dataclass(frozen=True)
class Case:
    """A network whose bounds are compared: the balls, and whether the first of them is timed."""

    name: str
    net: nn.Module
    balls: tuple[Ball, ...] = (LINF,)
    side: int = 8
    timed: bool = False


class Residual(nn.Module):
    """A sum of two paths, a mean over the image, one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.out = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images [B, 1, 8, 8]."""
        h = self.stem(x).relu()
        return self.out((h + self.inner(h)).relu().flatten(1))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Softmax attention with one head over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, n) for n in (8, 8, 8, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images [B, 1, 8, 8]."""
        x = x.squeeze(1)
        shares = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2) / 8**0.5, -1)
        return self.out((shares @ self.v(x)).mean(1))  # type: ignore[no-any-return]


def mlp(act: type[nn.Module]) -> nn.Module:
    """Three linear layers on images of 8x8."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), act(), nn.Linear(64, 64), act(), nn.Linear(64, 10)
    )  # fmt: skip


def convolutions(kernel: int, stride: int, side: int) -> nn.Module:
    """Two convolutions and two linear layers."""
    width = 32 * (side // stride // 2) ** 2
    first = [nn.Conv2d(1, 16, kernel, stride, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 10))


def pooled(pool: nn.Module) -> nn.Module:
    """A convolution with batch normalisation, pooling, another convolution and a linear layer."""
    norm = nn.BatchNorm2d(8)
    nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
    nn.init.uniform_(norm.running_var, 0.5, 2)  # type: ignore[arg-type]
    first = [nn.Conv2d(1, 8, 3, 1, 1), norm, nn.ReLU(), pool, nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU()]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(128, 10))


def cases() -> Iterator[Case]:
    """What is compared."""
    every = (LINF, L2, L1)
    yield Case("MLP, ReLU", mlp(nn.ReLU), every, timed=True)
    yield Case("MLP, tanh", mlp(nn.Tanh), timed=True)
    yield Case("MLP, sigmoid", mlp(nn.Sigmoid))
    yield Case("two convolutions, 8x8", convolutions(3, 1, 8), every, timed=True)
    yield Case("two convolutions, 28x28", convolutions(4, 2, 28), side=28, timed=True)
    yield Case("batch normalisation and mean pooling", pooled(nn.AvgPool2d(2)), every)
    yield Case("batch normalisation and max pooling", pooled(nn.MaxPool2d(2)), every)
    yield Case("residual sum", Residual(), every)
    yield Case("softmax attention", Attention())


def reference(net: nn.Module, x: Tensor) -> Callable[[Ball, str], tuple[Tensor, Tensor]] | None:
    """auto_LiRPA's bounds by ball and method, or None without it."""
    try:
        theirs: Any = importlib.import_module("auto_LiRPA")
    except ImportError:
        return None
    bounded = theirs.BoundedModule(net, x)

    def found(ball: Ball, method: str) -> tuple[Tensor, Tensor]:
        near = theirs.PerturbationLpNorm(norm=NORMS[ball.norm], eps=ball.eps)
        return bounded.compute_bounds(x=(theirs.BoundedTensor(x, near),), method=method)  # type: ignore[no-any-return]

    return found


def quickest(call: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of the quickest of some calls, after a first one that does not count."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return min(times)


def apart(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> dict[str, float]:
    """How far two pairs of bounds are from each other.

    The largest difference of one bound, by how much one of ours is looser at most, the share of ours that are looser by
    more than 1e-5, and how many times wider theirs are on average.
    """
    (low, high), (their_low, their_high) = ours, theirs
    wider = torch.stack([their_low - low, high - their_high])
    return {
        "difference": float(wider.abs().max()), "looser": float(wider.max().clamp(min=0)),
        "share_looser": float((wider > 1e-5).double().mean()),
        "times_wider": float((their_high - their_low).mean() / (high - low).mean()),
    }  # fmt: skip


def compare(case: Case, rng: torch.Generator) -> dict[str, dict[str, float]]:
    """By ball and method: how far our bounds are from theirs, and of what is timed our and their milliseconds."""
    x, found = torch.rand(BATCH, 1, case.side, case.side, generator=rng), {}
    graph, theirs = trace(case.net.eval(), x), reference(case.net, x)
    for ball in case.balls:
        for method, repeats in METHODS.items():
            row: dict[str, float] = {}
            calls = {"ours": lambda b=ball, m=method: bounds(graph, x, b, m.lower())}
            if theirs is not None:
                calls["theirs"] = lambda b=ball, m=method: theirs(b, m)
                row |= apart(calls["ours"](), calls["theirs"]())
            if case.timed and ball == case.balls[0]:
                row |= {f"{who}_ms": quickest(call, repeats) for who, call in calls.items()}
            if row:
                found[f"{ball.norm} {method}"] = row
    return found


@torch.no_grad()
def main() -> dict[str, Any]:
    """Print a line for each network, ball and method."""
    torch.set_num_threads(1)
    streams, found = Streams(0), {}
    streams.tick("bench", 0)
    with streams.scope("build", shared=True):
        every = list(cases())
    for case in every:
        found[case.name] = compare(case, streams.rng(f"images {case.name}"))
        for which, row in found[case.name].items():
            told = "  ".join(f"{key} {value:.3g}" for key, value in row.items())
            print(f"bounds of {case.name}, {which}: {told}", flush=True)
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
