"""Adversarial inputs: the worst perturbation of bounded size, sought with or without gradients.

Plain functions of a loss and inputs, and ``PGDTraining``, which trains on what they find. All attacks act on inputs in
their legal range, before any normalisation that the model does, and project after each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Generator, Tensor
from torch.nn import Module

from perturbed.core.context import Ctx
from perturbed.core.plan import Batch, Plan, Site
from perturbed.errors import PlanError, nearest
from perturbed.inputs.noise import continuous_input, uniform

Norm = Literal["linf", "l2"]
Score = Callable[[Tensor], Tensor]


def _lengths(delta: Tensor) -> Tensor:
    """Euclidean length of each example's perturbation, shaped to divide it."""
    lengths: Tensor = delta.flatten(1).norm(dim=1)
    return lengths.view(-1, *[1] * (delta.dim() - 1))


def project(delta: Tensor, eps: float, norm: Norm = "linf") -> Tensor:
    """The nearest point to each ``delta`` [B, ...] of the ball of radius ``eps`` round zero."""
    if norm == "linf":
        return delta.clamp(-eps, eps)
    return delta * (eps / _lengths(delta).clamp(min=torch.finfo(delta.dtype).tiny)).clamp(max=1)


def legal(z: Tensor, x: Tensor, eps: float, norm: Norm, bounds: tuple[float, float]) -> Tensor:
    """``z`` brought into the ball of radius ``eps`` round ``x`` and into ``bounds``.

    First the ball, then the range; as ``x`` is in the range, the second projection does not leave the ball.
    """
    return (x + project(z - x, eps, norm)).clamp(*bounds)


def start(x: Tensor, eps: float, norm: Norm, rng: Generator) -> Tensor:
    """A perturbation uniform in the ball of radius ``eps``, shaped like ``x`` [B, ...]."""
    if norm == "linf":
        return eps * uniform(x, rng)
    direction = torch.randn(x.shape, generator=rng, dtype=x.dtype).to(x.device)
    radius = torch.rand(len(x), generator=rng, dtype=x.dtype).to(x.device) ** (1 / x[0].numel())
    return direction / _lengths(direction) * (eps * radius).view(-1, *[1] * (x.dim() - 1))


def ascent(gradient: Tensor, norm: Norm = "linf") -> Tensor:
    """The unit step that raises a linear function most: the sign, or the gradient at Euclidean length 1."""
    if norm == "linf":
        return gradient.sign()
    return gradient / _lengths(gradient).clamp(min=torch.finfo(gradient.dtype).tiny)


def pgd(
    loss: Score,
    x: Tensor,
    *,
    eps: float,
    alpha: float,
    steps: int,
    rng: Generator | None,
    norm: Norm = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    restarts: int = 1,
    keep: Score | None = None,
) -> Tensor:
    """Inputs near ``x`` at which ``loss`` is large, by projected gradient ascent (Madry et al. 2018, 1706.06083).

    From a point uniform in the ball, ``steps`` times: a step of ``alpha`` along the sign of the gradient (its direction
    for ``l2``), projected into the ball and the legal range. Each costs one gradient evaluation of the batch. Nothing
    but the input is differentiated, so the gradients kept on parameters stay as they are.

    Args:
        loss: what to raise, of the inputs: a scalar (a mean or sum over examples), or one value an example [B].
        x: inputs [B, ...] within ``bounds``.
        eps: radius of the ball, in the inputs' units.
        alpha: length of a step, in the inputs' units.
        steps: gradient steps.
        rng: CPU generator of the starting points; None starts at ``x`` itself.
        norm: ``linf`` or ``l2``.
        bounds: lowest and highest legal value.
        restarts: independent starts; of each example the best of them by ``keep`` is returned.
        keep: value an example [B] by which restarts are compared; needed where there are several.

    Returns:
        Inputs shaped like ``x``, detached.

    Raises:
        ValueError: several restarts without ``keep``, or without a generator that would tell them apart.
    """
    if restarts > 1 and (keep is None or rng is None):
        raise ValueError("pgd: several restarts need keep=, to choose among them, and rng=, to begin them apart")
    best = _climb(loss, x, eps, alpha, steps, rng, norm, bounds)
    if restarts > 1 and keep is not None:
        value = _valued(keep, best)
        for _ in range(restarts - 1):
            other = _climb(loss, x, eps, alpha, steps, rng, norm, bounds)
            best, value = _better(best, value, other, _valued(keep, other))
    return best


def _climb(
    loss: Score,
    x: Tensor,
    eps: float,
    alpha: float,
    steps: int,
    rng: Generator | None,
    norm: Norm,
    bounds: tuple[float, float],
) -> Tensor:
    x = x.detach()
    z = x if rng is None else legal(x + start(x, eps, norm, rng), x, eps, norm, bounds)
    for _ in range(steps):
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            # a view, for torch's FLOP counter hooks the model's input and refuses a leaf in autograd.grad
            (gradient,) = torch.autograd.grad(loss(z.view_as(z)).sum(), z)
        z = legal(z.detach() + alpha * ascent(gradient, norm), x, eps, norm, bounds)
    return z


@torch.no_grad()
def _valued(keep: Score, z: Tensor) -> Tensor:
    return keep(z)


def _better(one: Tensor, value: Tensor, two: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Of each example the one of larger value, and the values."""
    rose = other > value
    return torch.where(rose.view(-1, *[1] * (one.dim() - 1)), two, one), torch.where(rose, other, value)


def fgsm(
    loss: Score, x: Tensor, *, eps: float, norm: Norm = "linf", bounds: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """One step of full length from ``x`` itself (the fast gradient sign method, Goodfellow et al. 2015, 1412.6572)."""
    return pgd(loss, x, eps=eps, alpha=eps, steps=1, rng=None, norm=norm, bounds=bounds)


@torch.no_grad()
def square_search(
    score: Score,
    x: Tensor,
    *,
    eps: float,
    queries: int,
    rng: Generator,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Inputs near ``x`` at which ``score`` is large, without gradients (after Square Attack, 1912.00049, l-infinity).

    From vertical stripes of plus or minus ``eps``, each query sets one random square window of each image to one random
    sign a channel and keeps the change where the score rose. The windows shrink from half the image's side to one pixel
    as the square root of what is left of the budget. An attack that gradients cannot mislead: where it succeeds and PGD
    fails, gradients are masked.

    Args:
        score: one value an example [B] of the inputs.
        x: images [B, C, H, W] within ``bounds``.
        eps: radius of the l-infinity ball.
        queries: evaluations of ``score``, beside that of the beginning.
        rng: CPU generator.
        bounds: lowest and highest legal value.
    """
    count, channels, height, width = x.shape
    signs = torch.rand((count, channels, 1, width), generator=rng).sub_(0.5).sign_().to(x)
    best = (x + eps * signs).clamp(*bounds)
    best_score = score(best)
    rows, columns = torch.arange(height).view(1, -1, 1), torch.arange(width).view(1, 1, -1)
    for query in range(queries):
        side = max(1, round(min(height, width) / 2 * (1 - query / queries) ** 0.5))
        top = torch.randint(height - side + 1, (count, 1, 1), generator=rng)
        left = torch.randint(width - side + 1, (count, 1, 1), generator=rng)
        window = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
        sign = torch.rand((count, channels, 1, 1), generator=rng).sub_(0.5).sign_().to(x)
        tried = torch.where(window.unsqueeze(1).to(x.device), (x + eps * sign).clamp(*bounds), best)
        best, best_score = _better(best, best_score, tried, score(tried))
    return best


@contextmanager
def attacked(model: Module, mode: Literal["eval", "train"] = "eval") -> Iterator[None]:
    """``model`` in ``mode`` inside; afterwards each module's mode and every buffer as they were.

    In ``eval`` batch normalisation uses its running statistics and dropout is off. In ``train`` the forward passes of
    an attack also move the running statistics: that is undone.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    model.train(mode == "train")
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer, kept in buffers:
            setattr(module, name, buffer.copy_(kept))


@dataclass(frozen=True)
class PGDTraining:
    """Train on adversarial examples of the stage's own loss in place of the batches (Madry et al. 2018, 1706.06083).

    One update costs ``steps`` gradient passes for the attack and one for the update. All passes of a step see the same
    dropout and feature noise; the attack leaves gradients, modes and buffers as they were.

    Args:
        eps: radius of the ball, in units of the input; 0 is off.
        alpha: length of a step of the attack, in the same units.
        steps: steps of the attack.
        norm: ``linf`` or ``l2``.
        mode: the model's mode while it is attacked: ``eval`` (running batch statistics, no dropout: the network that
            will be used) or ``train`` (the statistics of the attacked batch, the dropout of the update).
        stage: glob of the stages to act in.
    """

    eps: float = 0.1
    alpha: float = 0.025
    steps: int = 10
    norm: Norm = "linf"
    mode: Literal["eval", "train"] = "eval"
    stage: str = "*"

    SITES: ClassVar[tuple[Site, ...]] = ("inputs",)
    REQUIRES: ClassVar = {"input": ..., "input_range": ...}
    OFF: ClassVar = {"eps": 0.0}
    TINY: ClassVar = {"eps": 1e-4}
    STRONG: ClassVar = {"eps": 0.5, "alpha": 0.125}

    def __post_init__(self) -> None:
        if self.eps < 0 or self.alpha < 0 or self.steps < 1:
            raise PlanError(f"{self!r}: eps and alpha must not be negative, and steps at least 1")
        for field, options in (("norm", get_args(Norm)), ("mode", ("eval", "train"))):
            if getattr(self, field) not in options:
                value = getattr(self, field)
                raise PlanError(f"PGDTraining: no {field} {value!r}: {nearest(str(value), options)}")

    def __call__(self, plan: Plan) -> Plan:
        """The plan with an attack on each batch of its stages."""
        return plan.add_inputs(self.stage, self.perturb)

    def perturb(self, batch: Batch, ctx: Ctx) -> Batch:
        """The batch with its input entry replaced by adversarial examples of it."""
        name, values, bounds = continuous_input(batch, ctx)
        model = ctx.accelerator.unwrap_model(ctx.model)  # data-parallel wrappers allow a full backward pass only
        rng = ctx.rng(f"pgd start {self.stage}")

        def loss(z: Tensor) -> Tensor:
            return ctx.loss(model, {**batch, name: z}, ctx)

        with attacked(model, self.mode):
            found = pgd(
                loss, values, eps=self.eps, alpha=self.alpha, steps=self.steps, rng=rng,
                norm=self.norm, bounds=bounds,
            )  # fmt: skip
        return {**batch, name: found}
