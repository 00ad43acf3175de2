"""Points of a ball round inputs, at random and at worst: what the tests of bounds hold them against."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Generator, Tensor, nn

from perturbed.measures.bounds.propagate import Norm


def generator(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def on_the_boundary(x: Tensor, eps: float, norm: Norm, count: int, axis: int = 0) -> Iterator[Tensor]:
    """Perturbed inputs, each example (they are along ``axis``) at distance ``eps``: corners, entries, directions."""
    rng = generator(2)
    for _ in range(count):
        drawn = torch.randn(x.shape, generator=rng).movedim(axis, 0)
        step = drawn.flatten(1)
        if norm == "linf":
            step = step.sign()
        elif norm == "l2":
            step = step / step.norm(dim=1, keepdim=True)
        else:
            step = torch.zeros_like(step).scatter(1, step.abs().argmax(1, keepdim=True), 1.0) * step.sign()
        yield x + eps * step.view_as(drawn).movedim(0, axis)


def worst(net: nn.Module, x: Tensor, eps: float, at: int) -> Tensor:
    """Inputs in the l-infinity ball that raise logit ``at`` most, by gradient ascent."""
    z = x.clone()
    for _ in range(10):
        z = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(net(z)[..., at].sum(), z)
        z = x + (z.detach() + eps / 3 * gradient.sign() - x).clamp(-eps, eps)
    return z.detach()
