"""How much worse a classifier becomes when its weights move a little: on average over draws, and at worst by proof.

What moves is each linear or convolutional layer's weight and bias together, [D, d] with ||[D, d]|| <= eps (Frobenius
norm). The radius is absolute, in the units of the weights, as in Xu et al. (2020, 2002.12920): it is not indifferent to
a rescaling of layers that leaves the function as it is, so compare networks of like scale.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.nn import Module, Parameter

from perturbed.core.run import Run
from perturbed.errors import PlanError
from perturbed.measures.bounds.graph import INPUT, Graph, UnsupportedOperator, trace
from perturbed.measures.bounds.operators import (
    Coefficients,
    Constant,
    Conv,
    Interval,
    Known,
    Leaf,
    Linear,
    Node,
    Operator,
    Step,
    dense,
)
from perturbed.measures.bounds.propagate import Ball, Propagation, margins_of
from perturbed.measures.vision import correct, examples
from perturbed.optim.sharpness import ascent

LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


@dataclass(eq=False)
class Drift(Operator):
    """What moving weights add to a layer's output: z + n u, for its output z, its input h and a vector u.

    At each place of the output (D h + d) is at most ||[D, d]|| n long, with n^2 = ||h||^2 + 1 of the part of the input
    that the place sees, and over all places it is at most ||[D, d]|| times the root of the sum of n^2. So it is n u
    for some u in an l2 ball of radius eps, where n is that root. Unlike planes on each product of a weight and an
    entry of h, this costs no factor of the root of the width.

    Args:
        squares: gives n^2 at each place [B, ...] from the squared entries of h.
    """

    squares: Callable[[Tensor], Tensor]

    def value(self, *args: Tensor) -> Tensor:
        """The output of the layer with moved weights."""
        z, h, u = args
        return z + self._whole(h).view(-1, *[1] * (z.dim() - 1)) * u

    def interval(self, node: Node, *args: Interval) -> Interval:
        """That of the layer, wider at each place by what the weights can do there."""
        (low, high), h, (_, most) = args
        reach = self._norms(_largest(h)) * most
        return low - reach, high + reach

    def wants(self, node: Node) -> tuple[Node, ...]:
        """The layer's input."""
        return (node.inputs[1],)

    def side(self, a: Coefficients, upper: bool, node: Node, known: Known) -> Step:
        """The coefficients themselves on z, and times the largest n on u: its ball is symmetric, so both ends hold."""
        rows = dense(a)
        whole = self._whole(_largest(known.bounds(node.inputs[1])))
        return [a, None, rows * whole.view(-1, *[1] * (rows.dim() - 1))], None

    def _norms(self, h: Tensor) -> Tensor:
        return self.squares(h.square()).clamp(min=1e-12).sqrt()  # at 0 the root has no slope

    def _whole(self, h: Tensor) -> Tensor:
        whole: Tensor = torch.linalg.vector_norm(self._norms(h).flatten(1), dim=1)
        return whole


def _largest(bounds: Interval) -> Tensor:
    return torch.maximum(bounds[0].abs(), bounds[1].abs())


def _seen_by_linear(h: Tensor, bias: int) -> Tensor:
    return h.sum(-1, keepdim=True) + bias


def _seen_by_conv(h: Tensor, bias: int, op: Conv, window: tuple[int, ...]) -> Tensor:
    return op.apply(h, h.new_ones(op.groups, *window)).sum(1, keepdim=True) + bias


def _drift_of(node: Node) -> Drift | None:
    bias = int(len(node.inputs) > 2)
    if isinstance(node.op, Linear):
        return Drift(functools.partial(_seen_by_linear, bias=bias))
    if isinstance(node.op, Conv):
        return Drift(functools.partial(_seen_by_conv, bias=bias, op=node.op, window=tuple(node.inputs[1].shape[1:])))
    return None


def trace_moving(model: Module, x: Tensor) -> Graph:
    """The graph of a model whose linear and convolutional layers move, each in a ball of its own, while x does not.

    A layer that is used twice moves independently at each use, and each example has its own worst weights: bounds hold
    for weights that are shared, and are looser. Weights of other layers stay.

    Args:
        model: as for ``trace``.
        x: an example of the input [B, ...].

    Returns:
        A graph with a leaf for each layer; ``weight_balls`` gives their balls.

    Raises:
        UnsupportedOperator: as ``trace`` does; or there is no such layer, or one whose input does not depend on x,
            whose weights are used otherwise too, or which shares some of them, and not all, with another layer.
    """
    still = trace(model, x)
    _check_all_move(model, still)
    now: dict[Node, Node] = {}
    nodes: list[Node] = []
    leaves: dict[str, Node] = {}
    for old in still.nodes:
        node = Node(old.name, old.op, tuple(now[n] for n in old.inputs), old.shape, old.perturbed)
        now[old] = node
        nodes.append(node)
        drift = _drift_of(node) if node.perturbed else None
        if drift:
            leaf = Node(
                f"weights of {node.name}", Leaf(functools.partial(x.new_zeros, node.shape)), (), node.shape, True
            )
            leaves[leaf.name] = leaf
            now[old] = Node(f"{node.name}, moved", drift, (node, node.inputs[0], leaf), node.shape, True)
            nodes += [leaf, now[old]]
    if not leaves:
        raise UnsupportedOperator("the model has no linear or convolutional layer whose weights could move")
    leaves |= {name: now[leaf] for name, leaf in still.leaves.items()}
    return dataclasses.replace(still, nodes=nodes, leaves=leaves, output=now[still.output], _before={})


def _check_all_move(model: Module, graph: Graph) -> None:
    """Refuse weights of layers in operators that would not move, and layers that would move by more than ``eps``."""
    names: dict[Tensor, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, LAYERS):
            own: dict[Tensor, str] = {p: f"{path}.{name}" for name, p in module.named_parameters(recurse=False)}
            if 0 < len(own.keys() & names.keys()) < len(own):
                raise UnsupportedOperator(
                    f"{path!r} shares a weight with another layer but not all: it could move by both balls together"
                )
            names |= own
    for node in graph.nodes:
        for held in (n.op.fetch() for n in node.inputs if isinstance(n.op, Constant)):
            if held in names and not (node.perturbed and isinstance(node.op, Linear | Conv)):
                raise UnsupportedOperator(
                    f"{names[held]!r} is used in {node.name!r}, which is no layer on what depends on the input: its "
                    "bounds would not count that these weights move"
                )


def weight_balls(graph: Graph, eps: float) -> dict[str, Ball]:
    """The balls of a graph of ``trace_moving``: radius ``eps`` for each layer, none for the input."""
    return {name: Ball(0.0) if name == INPUT else Ball(eps, "l2") for name in graph.leaves}


def loss_bound(graph: Graph, x: Tensor, labels: Tensor, eps: float) -> Tensor:
    """Upper bound [B] of each example's cross-entropy, in nats, for all weights within ``eps`` of their own.

    Of the bounds of each margin by CROWN and by CROWN-IBP the tighter one counts.

    Args:
        graph: from ``trace_moving``.
        x: inputs [B, ...].
        labels: classes [B].
        eps: radius, in the units of the weights.
    """
    rows, balls = margins_of(labels, graph.output.shape[-1]).to(x), weight_balls(graph, eps)
    found = [Propagation(graph, x, balls, method).rows(rows, upper=False)[0] for method in ("crown", "crown-ibp")]
    least = torch.stack([low for low in found if low is not None]).amax(0)
    return F.pad(-least, (1, 0)).logsumexp(1)


def layers_of(model: Module) -> list[list[Parameter]]:
    """Weight and bias of each linear or convolutional layer; what layers share belongs to the first.

    Raises:
        PlanError: there is none.
    """
    found: list[list[Parameter]] = []
    held: set[Parameter] = set()
    for module in model.modules():
        if isinstance(module, LAYERS):
            found.append([p for p in module.parameters(recurse=False) if p not in held])
            held.update(found[-1])
    if not held:
        raise PlanError("the model has no torch.nn.Linear or convolution whose weights could be moved")
    return found


def weight_noise(model: Module, eps: float, rng: Generator) -> list[list[Tensor]]:
    """For each layer a random direction, alike in all its weights, of length ``eps``.

    Args:
        model: the model.
        eps: Frobenius norm of each layer's noise.
        rng: CPU generator.
    """
    found = []
    for layer in layers_of(model):
        drawn = [torch.randn(p.shape, generator=rng, dtype=p.dtype) for p in layer]
        found.append([d.to(p.device) for d, p in zip(ascent(drawn, eps), layer, strict=True)])
    return found


@contextmanager
def moved(model: Module, by: list[list[Tensor]]) -> Iterator[None]:
    """The model with its layers moved inside; afterwards the weights are as they were, bit for bit."""
    layers = layers_of(model)
    kept = [[p.detach().clone() for p in layer] for layer in layers]
    with torch.no_grad():
        for layer, shift in zip(layers, by, strict=True):
            for p, d in zip(layer, shift, strict=True):
                p.add_(d)
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, values in zip(layers, kept, strict=True):
                for p, value in zip(layer, values, strict=True):
                    p.copy_(value)


@dataclass(frozen=True)
class WeightNoise:
    """Measure: accuracy and loss with random noise of a given length on the weights, and a bound of the loss there.

    Gives ``accuracy_noise`` and ``loss_noise`` (mean over draws; cross-entropy in nats), ``loss_rise`` (``loss_noise``
    less the loss without noise: the sharpness), and with ``proven`` also ``loss_proven``: the mean over the first so
    many examples of an upper bound of the loss at any weights in the balls, which the model (it must take the input
    alone, and is bounded without what else the predictor does) must have rules for. Draws are the same for all arms of
    a seed.

    Args:
        eps: radius of each layer's ball, in the units of the weights; noise lies on its surface, where in many
            dimensions nearly all of a ball is.
        draws: of the noise.
        proven: examples of which the loss is bounded, at most 512; 0 leaves it out.
        fact: the plan's fact that gives the examples.
        suffix: put after each name.
    """

    eps: float = 0.1
    draws: int = 10
    proven: int = 0
    fact: str = "held_out"
    suffix: str = ""

    def __post_init__(self) -> None:
        if self.eps < 0 or self.draws < 1 or self.proven < 0:
            raise PlanError(f"WeightNoise: want eps >= 0, draws >= 1 and proven >= 0; got {self}")

    def __call__(self, run: Run) -> dict[str, float]:
        """The shares in [0, 1], and the losses."""
        model = run.ctx.bare
        plain = self._scores(run)[1]
        noisy = []
        for draw in range(self.draws):
            rng = run.ctx.once(f"weight noise {draw}", every="run")
            with moved(model, weight_noise(model, self.eps, rng)):
                noisy.append(self._scores(run))
        accuracy, loss = (math.fsum(values) / self.draws for values in zip(*noisy, strict=True))
        scores = {"accuracy_noise": accuracy, "loss_noise": loss, "loss_rise": loss - plain}
        if self.proven:
            scores["loss_proven"] = self._proven(run)
        return {f"{name}{self.suffix}": value for name, value in scores.items()}

    @torch.no_grad()
    def _scores(self, run: Run) -> tuple[float, float]:
        hits, losses = [], []
        for batch in examples(run, self.fact):
            logits, labels = run.predict(batch), batch["labels"]
            hits.append(correct(logits, labels))
            losses.append(F.cross_entropy(logits, labels, reduction="none"))
        return torch.cat(hits).float().mean().item(), torch.cat(losses).double().mean().item()

    @torch.no_grad()
    def _proven(self, run: Run) -> float:
        name = run.ctx.facts.input
        if name is None:
            raise PlanError("WeightNoise wants the fact input to bound a loss: set it in the plan's facts, or proven=0")
        batch = next(examples(run, self.fact))
        x, labels = batch[name][: self.proven], batch["labels"][: self.proven]
        return loss_bound(trace_moving(run.ctx.bare, x), x, labels, self.eps).double().mean().item()
