"""Certified training: the loss of the worst inputs, or weights, that bounds allow, in place of the loss as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import Module

from perturbed.core.context import Ctx
from perturbed.core.plan import Batch, LossFn, Plan, Site
from perturbed.errors import PlanError, nearest
from perturbed.measures.bounds.graph import Graph, trace
from perturbed.measures.bounds.propagate import Ball, Propagation
from perturbed.measures.bounds.relax import chord
from perturbed.measures.sharpness import trace_moving, weight_balls

Ease = Literal["fused", "separate", "clean", "none"]


def growing(done: float, start: float, ramp: float, power: int = 4, middle: float = 0.25) -> float:
    """The part of its largest radius that a ball has when a part ``done`` of the training is.

    0 until ``start``; then, over ``ramp``, first with a power of time, from the part ``middle`` of the ramp on
    linearly, without a jump in slope; then 1.

    Args:
        done: part of the training, in [0, 1].
        start: when it begins to grow.
        ramp: how long it grows; 0 for at once.
        power: of the first part.
        middle: where on the ramp the first part ends.
    """
    if done < start:
        return 0.0
    t = (done - start) / ramp if done < start + ramp else 1.0
    whole = middle + power * (1 - middle)
    if t < middle:
        return middle * (t / middle) ** power / whole
    return (middle + power * (t - middle)) / whole


def excesses_of(labels: Tensor, classes: int) -> Tensor:
    """Rows [B, K, K] of each logit minus the label's (0 for its own), for ``labels`` [B] among K ``classes``."""
    eye = torch.eye(classes, device=labels.device)
    return eye.unsqueeze(0) - eye[labels].unsqueeze(1)


def worst_loss(found: Propagation, labels: Tensor, ease: Ease, part: float) -> Tensor:
    """Upper bound of each example's cross-entropy in its ball [B], in nats.

    The cross-entropy is log S of S = sum over j of exp(m_j), m_j being logit j minus the label's. Intervals give upper
    bounds of every m_j. With weight ``part`` they are mixed with what is tighter:

    - ``separate``: upper bounds of every m_j by lines (CROWN-IBP); the bounds of m_j are mixed;
    - ``fused``: exp is put below its chord between the interval bounds of m_j, so that S is below one linear function
      of the logits, of which lines give an upper bound (loss fusion): one function an example instead of K; the bounds
      of S are mixed;
    - ``clean``: the m_j of the example itself, which are no bounds in its ball; ``none``: nothing is mixed in.

    Args:
        found: of the method ``crown-ibp``.
        labels: classes [B].
        ease: what is mixed in.
        part: its weight in [0, 1].
    """
    rows = excesses_of(labels, found.graph.output.shape[-1]).to(found.x.dtype)
    low, high = found.rows_by_interval(rows)
    assert low is not None
    assert high is not None
    if ease == "separate":
        high = part * _upper(found, rows) + (1 - part) * high
    if ease == "clean":
        point = Propagation(found.graph, found.x, Ball(0.0), "ibp").rows_by_interval(rows, lower=False)[1]
        assert point is not None
        high = part * point + (1 - part) * high
    if ease != "fused":
        return high.logsumexp(1)
    most = high.detach().amax(1, keepdim=True)
    slope, above = chord(torch.exp, low - most, high - most, torch.exp)
    line = (slope.unsqueeze(1) @ rows, (above - slope * most).sum(1))
    fused = _upper(found, line[0]).squeeze(1) + line[1]
    each = (high - most).exp().sum(1)
    return (part * fused + (1 - part) * each).log() + most.squeeze(1)


def _upper(found: Propagation, rows: Tensor) -> Tensor:
    high = found.rows(rows, lower=False)[1]
    assert high is not None
    return high


@functools.lru_cache(maxsize=4)
def _graph(
    make: Callable[[Module, Tensor], Graph], model: Module, stage: str, shape: torch.Size,
    like: tuple[torch.dtype, torch.device],
) -> Graph:  # fmt: skip
    """A stage's model traced by ``make`` at some input: modules may be replaced between stages."""
    dtype, device = like
    return make(model, torch.linspace(0, 1, shape.numel(), dtype=dtype, device=device).view(shape))


def _traced(make: Callable[[Module, Tensor], Graph], model: Module, batch: Batch, ctx: Ctx) -> tuple[Graph, Tensor]:
    """The graph for this batch, and its inputs."""
    assert ctx.facts.input is not None
    x = batch[ctx.facts.input]
    return _graph(make, ctx.accelerator.unwrap_model(model), ctx.stage, x.shape, (x.dtype, x.device)), x


def _check(rule: CertifiedTraining | FlatTraining) -> None:
    if rule.eps < 0 or not 0 <= rule.share <= 1 or rule.start < 0 or rule.ramp < 0 or rule.start + rule.ramp > 1:
        raise PlanError(
            f"{type(rule).__name__}: want eps >= 0, share in [0, 1], start + ramp <= 1 and neither below 0; got {rule}"
        )


@dataclass(frozen=True)
class CertifiedTraining:
    """Train on an upper bound of the loss in a growing ball round each input (Xu et al. 2020, 2002.12920).

    The bound is that of ``worst_loss``; what is mixed in fades out as the radius grows, and at the full radius the
    bound is that of intervals alone. While the radius is 0 the plan's own loss is used, and after that with weight
    1 - share. The model must take the input alone, and all its operators need a rule (``measures.bounds``); it is
    bounded in eval mode: without dropout, and with the running statistics of batch normalisation.

    Args:
        eps: largest radius of the l-infinity ball, in units of the input.
        ease: what is mixed in while the radius grows: ``fused``, ``separate``, ``clean`` or ``none``.
        start: part of the stage after which the radius grows.
        ramp: part of the stage over which the radius grows.
        share: weight of the bound against the plan's own loss, in [0, 1].
        stage: glob of the stages.
    """

    eps: float = 0.1
    ease: Ease = "fused"
    start: float = 0.0
    ramp: float = 0.7
    share: float = 1.0
    stage: str = "*"

    SITES: ClassVar[tuple[Site, ...]] = ("objectives",)
    REQUIRES: ClassVar = {"target": "class", "classes": ..., "input": ..., "input_range": ...}
    OFF: ClassVar = {"share": 0.0}
    TINY: ClassVar = {"share": 1e-4, "ramp": 0.0}
    STRONG: ClassVar = {"eps": 0.3, "ramp": 0.0}

    def __post_init__(self) -> None:
        if self.ease not in get_args(Ease):
            raise PlanError(f"CertifiedTraining: no ease {self.ease!r}: {nearest(self.ease, get_args(Ease))}")
        _check(self)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with a bound in place of the loss of the stages."""
        return plan.edit(self.stage, lambda stage: replace(stage, loss=CertifiedLoss(stage.loss, self)))

    def worst(self, model: Module, batch: Batch, ctx: Ctx, grown: float) -> Tensor:
        """Upper bounds [B] of the loss where the ball has the part ``grown`` of its radius."""
        graph, x = _traced(trace, model, batch, ctx)
        ball = Ball(self.eps * grown, legal=ctx.facts.input_range)
        return worst_loss(Propagation(graph, x, ball, "crown-ibp"), batch["labels"], self.ease, 1 - grown)


@dataclass(frozen=True)
class FlatTraining:
    """Train on an upper bound of the loss while each layer's weights move in a growing ball (Xu et al. 2020).

    What moves is weight and bias together of each linear or convolutional layer, by ``eps`` in Frobenius norm at most
    (``measures.sharpness``); the radius is absolute, as in the paper (2002.12920). Margins are bounded by lines on
    intervals (CROWN-IBP) at every radius: intervals alone grow by a norm with each layer, however small the balls. The
    bound is that of each example's own worst weights, and so above the loss of any weights that all share. While the
    radius is 0 the plan's own loss is used, and after that with weight 1 - share. The model is bounded as by
    ``CertifiedTraining``.

    Args:
        eps: largest radius, in the units of the weights.
        start: part of the stage after which the radius grows.
        ramp: part of the stage over which the radius grows.
        share: weight of the bound against the plan's own loss, in [0, 1].
        stage: glob of the stages.
    """

    eps: float = 0.1
    start: float = 0.0
    ramp: float = 0.7
    share: float = 1.0
    stage: str = "*"

    SITES: ClassVar[tuple[Site, ...]] = ("objectives",)
    REQUIRES: ClassVar = {"target": "class", "classes": ..., "input": ...}
    OFF: ClassVar = {"share": 0.0}
    TINY: ClassVar = {"share": 1e-4, "ramp": 0.0}
    STRONG: ClassVar = {"eps": 0.3, "ramp": 0.0}

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with a bound in place of the loss of the stages."""
        return plan.edit(self.stage, lambda stage: replace(stage, loss=CertifiedLoss(stage.loss, self)))

    def worst(self, model: Module, batch: Batch, ctx: Ctx, grown: float) -> Tensor:
        """Upper bounds [B] of the loss where the balls have the part ``grown`` of their radius."""
        graph, x = _traced(trace_moving, model, batch, ctx)
        rows = excesses_of(batch["labels"], graph.output.shape[-1]).to(x.dtype)
        return _upper(Propagation(graph, x, weight_balls(graph, self.eps * grown), "crown-ibp"), rows).logsumexp(1)


@dataclass(frozen=True)
class CertifiedLoss:
    """Loss slot: ``inner``, then an upper bound of the cross-entropy in a growing ball.

    Args:
        inner: the plan's own loss.
        rule: how the ball grows and what is bounded.
    """

    inner: LossFn
    rule: CertifiedTraining | FlatTraining

    def __call__(self, model: Module, batch: Batch, ctx: Ctx) -> Tensor:
        """The mixture, a mean over the batch in nats."""
        own, rule = self.inner(model, batch, ctx), self.rule
        grown = growing(ctx.step / ctx.steps, rule.start, rule.ramp)
        if grown == 0:
            return own
        return (1 - rule.share) * own + rule.share * rule.worst(model, batch, ctx, grown).mean()
