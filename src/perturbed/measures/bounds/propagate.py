"""Bounds of a graph's output over balls of inputs and weights: intervals forwards, linear functions backwards.

Methods: ``ibp`` carries intervals from the leaves to the output (Gowal et al. 2018, 1810.12715). ``crown`` carries
linear functions of the output back to the leaves, through lines that bound each nonlinear operator on an interval found
in the same way (Zhang et al. 2018, 1811.00866; on graphs Xu et al. 2020, 2002.12920). ``crown-ibp`` goes back once, on
intervals that went forwards (Zhang et al. 2020, 1906.06316).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from perturbed.errors import nearest
from perturbed.measures.bounds.graph import INPUT, Graph
from perturbed.measures.bounds.operators import (
    Coefficients,
    Conv,
    Interval,
    Leaf,
    Linear,
    Node,
    Permute,
    Reshape,
    Scale,
    Step,
    Sum,
    Unary,
    added,
    dot,
    flat,
    magnitude,
)
from perturbed.measures.bounds.windows import Windows

Norm = Literal["linf", "l2", "l1"]
Method = Literal["ibp", "crown-ibp", "crown"]
DUAL: dict[Norm, float] = {"linf": 1.0, "l2": 2.0, "l1": math.inf}
Pair = tuple[Coefficients | None, Coefficients | None]
NOTHING: Step = ([], None)
NUMBERS = 2**25  # coefficients of one operator that are held at a time


@dataclass(frozen=True)
class Ball:
    """What a tensor may become: all within ``eps`` of it.

    Args:
        eps: radius, in the tensor's units.
        norm: ``linf``, ``l2`` or ``l1``, over all entries of an example.
        legal: lowest and highest legal value. An l-infinity ball is cut to it; of the others only the intervals are.
    """

    eps: float
    norm: Norm = "linf"
    legal: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.norm not in DUAL:
            raise ValueError(f"no norm {self.norm!r}: {nearest(self.norm, DUAL)}")
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"eps={self.eps} must be finite and not negative")

    def box(self, centre: Tensor) -> Interval:
        """Least and largest value of each entry."""
        low, high = centre - self.eps, centre + self.eps
        return (low, high) if self.legal is None else (low.clamp(*self.legal), high.clamp(*self.legal))

    def extremes(self, a: Coefficients, centre: Tensor, lower: bool) -> Tensor:
        """The least (or largest) value of each linear function ``a`` in the ball: [B, S]."""
        if self.norm == "linf":
            return extremes(a, self.box(centre), lower)
        reach = self.eps * (a.norm(DUAL[self.norm]) if isinstance(a, Windows) else flat(a).norm(DUAL[self.norm], -1))
        return dot(a, centre) - reach if lower else dot(a, centre) + reach


def extremes(a: Coefficients, box: Interval, lower: bool) -> Tensor:
    """The least (or largest) value [B, S] of each linear function ``a`` in a box."""
    low, high = box
    reach = dot(magnitude(a), (high - low) / 2)
    middle = dot(a, (high + low) / 2)
    return middle - reach if lower else middle + reach


class Propagation:
    """Bounds of one batch's nodes, found when asked for and kept.

    Args:
        graph: from ``trace``.
        x: inputs [B, ...] of the batch size that the graph was made for, with the batch in the axis that it has there.
        balls: of the input, or of each leaf by its name (``input`` or that of a parameter).
        method: ``ibp``, ``crown-ibp`` or ``crown``.

    Raises:
        ValueError: another batch size, an unknown method, or a leaf without a ball.
    """

    def __init__(self, graph: Graph, x: Tensor, balls: Ball | Mapping[str, Ball], method: Method = "crown"):
        if method not in get_args(Method):
            raise ValueError(f"no method {method!r}: {nearest(method, get_args(Method))}")
        if x.shape[graph.axis] != graph.batch:
            raise ValueError(
                f"the graph was made for batches of {graph.batch}, not of {x.shape[graph.axis]}: trace it anew"
            )
        self.balls = {INPUT: balls} if isinstance(balls, Ball) else dict(balls)
        if self.balls.keys() != graph.leaves.keys():
            wanted, given = sorted(graph.leaves), sorted(self.balls)
            raise ValueError(f"want a ball for each of {', '.join(wanted)}, got them for {', '.join(given)}")
        self.graph, self.x, self.method = graph, x, method
        self._values: dict[Node, Tensor] = {}
        self._bounds: dict[Node, Interval] = {}
        self._kept: dict[Node, Any] = {}
        self._plain: Propagation | None = None  # intervals keep a variance positive where lines may not

    def value(self, node: Node) -> Tensor:
        """The value of an unperturbed node, or the centre of a leaf."""
        if node not in self._values:
            if isinstance(node.op, Leaf) and node.name == INPUT:
                return self.x.movedim(self.graph.axis, 0) if node.perturbed else self.x
            self._values[node] = node.op.value(*(self.value(n) for n in node.inputs))
        return self._values[node]

    def kept(self, node: Node, make: Callable[[], Any]) -> Any:
        """What ``make`` gave at its first call for this node."""
        if node not in self._kept:
            self._kept[node] = make()
        return self._kept[node]

    def bounds(self, node: Node) -> Interval:
        """Least and largest value of each entry of a node [B, ...]."""
        if node not in self._bounds:
            self._prepare(node)
            self._bounds[node] = self._find(node)
        return self._bounds[node]

    def _prepare(self, node: Node) -> None:
        """Bounds of what comes before, in order, so that nothing recurses deeply."""
        for earlier in self.graph.before(node):
            for wanted in earlier.op.wants(earlier) if self.method == "crown" else (earlier,):
                if wanted not in self._bounds:
                    self._bounds[wanted] = self._find(wanted)

    def _find(self, node: Node) -> Interval:
        if not node.perturbed:
            return self.value(node), self.value(node)
        if isinstance(node.op, Leaf):
            return self.balls[node.name].box(self.value(node))
        if self._by_interval(node):
            low, high = node.op.interval(node, *(self.bounds(n) for n in node.inputs))
            return _known(low, -math.inf), _known(high, math.inf)
        found = [self._ends(node, a) for a in self._each(node)]
        low, high = (torch.cat(ends, 1).view(node.shape) for ends in zip(*found, strict=True))
        if node not in self.graph.positive:
            return low, high
        if self._plain is None:
            self._plain = Propagation(self.graph, self.x, self.balls, "ibp")
        return torch.fmax(low, self._plain.bounds(node)[0]), high

    def _ends(self, node: Node, a: Coefficients) -> Interval:
        low, high = self._backward(node, a, (True, True))
        assert low is not None
        assert high is not None
        return low, high

    def _by_interval(self, node: Node) -> bool:
        """Whether a node's bounds are taken from those of its inputs: they are as tight, or the method says so."""
        root = _root(node)
        if node.op.weighs and isinstance(root.op, Leaf):
            return self.balls[root.name].norm == "linf"
        unary = isinstance(node.op, Unary) and node.op.activation.cheap
        return self.method != "crown" or unary or isinstance(node.op, Reshape | Permute)

    def _each(self, node: Node) -> Iterator[Coefficients]:
        """Each entry of a node as a row of coefficients, some of them at a time."""
        before = self.graph.before(node)
        widest = max(math.prod(n.shape[1:]) for n in before)
        if _is_image(node):
            places = math.prod(node.shape[2:])
            some = max(1, NUMBERS // (self.graph.batch * places * min(widest, _window((*before, node)))))
            for channels in torch.split(torch.arange(node.shape[1], device=self.x.device), some):
                yield Windows.identity(channels, node.shape, self.x)
            return
        size = math.prod(node.shape[1:])
        eye = torch.eye(size, dtype=self.x.dtype, device=self.x.device)
        for rows in torch.split(eye, max(1, NUMBERS // (self.graph.batch * widest))):
            yield rows.view(1, len(rows), *node.shape[1:])

    def rows(self, rows: Tensor, *, lower: bool = True, upper: bool = True) -> tuple[Tensor | None, Tensor | None]:
        """Bounds [B, S] of linear functions of the output; None for an end that is not wanted.

        Args:
            rows: coefficients [B or 1, S, K] (further axes as the output of one example has).
            lower: whether the lower bounds are wanted.
            upper: whether the upper bounds are.
        """
        if self.method == "ibp":
            return self.rows_by_interval(rows, lower=lower, upper=upper)
        self._prepare(self.graph.output)
        return self._backward(self.graph.output, rows, (lower, upper))

    def rows_by_interval(
        self, rows: Tensor, *, lower: bool = True, upper: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """As ``rows``, from the bounds of the nodes alone, without going further back."""
        output, bias = self.graph.output, None
        a: Coefficients = rows
        if isinstance(output.op, Linear):  # functions of the last layer are that layer with other weights
            (first, *_), bias = output.op.side(rows, False, output, self)
            assert first is not None
            a, output = first, output.inputs[0]
        box = self.bounds(output)
        low = _plus(extremes(a, box, True), bias) if lower else None
        return low, _plus(extremes(a, box, False), bias) if upper else None

    def _backward(self, node: Node, a: Coefficients, sides: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
        """Bounds [B, S] of the functions ``a`` of a node: a lower and an upper one, where ``sides`` wants them."""
        held: dict[Node, list[Pair]] = {node: [(a if sides[0] else None, a if sides[1] else None)]}
        low_end: Tensor | None = None
        high_end: Tensor | None = None
        for at in (node, *reversed(self.graph.before(node))):
            pairs = held.pop(at, [])
            if not pairs:
                continue
            shared = all(low is high for low, high in pairs)
            low = _sum(low for low, _ in pairs)
            high = low if shared else _sum(high for _, high in pairs)
            if isinstance(at.op, Leaf):
                ball, centre = self.balls[at.name], self.value(at)
                low_end = _plus(low_end, None if low is None else ball.extremes(low, centre, True))
                high_end = _plus(high_end, None if high is None else ball.extremes(high, centre, False))
                continue
            down: Step = at.op.side(low, False, at, self) if low is not None else NOTHING
            up = (
                down
                if shared and not at.op.sided
                else at.op.side(high, True, at, self)
                if high is not None
                else NOTHING
            )
            low_end, high_end = _plus(low_end, down[1]), _plus(high_end, up[1])
            for i, n in enumerate(at.inputs):
                pair = (down[0][i] if down[0] else None, up[0][i] if up[0] else None)
                if pair != (None, None):
                    held.setdefault(n, []).append(pair)
        return (
            None if low_end is None else _known(low_end, -math.inf),
            None if high_end is None else _known(high_end, math.inf),
        )


def _known(end: Tensor, worst: float) -> Tensor:
    """Ends with ``worst`` where infinite intervals, which deep networks soon have, gave inf - inf or 0 * inf."""
    return end.masked_fill(end.isnan(), worst)


def _plus(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    return two if one is None else one if two is None else one + two


def _sum(found: Iterable[Coefficients | None]) -> Coefficients | None:
    whole: Coefficients | None = None
    for a in found:
        whole = a if whole is None else whole if a is None else added(whole, a)
    return whole


def _root(node: Node) -> Node:
    """Where a node's first input comes from, but for its shape."""
    root = node.inputs[0]
    while isinstance(root.op, Reshape | Permute):
        root = root.inputs[0]
    return root


def _is_image(node: Node) -> bool:
    """Whether a node is a convolution of images, or elementwise of one."""
    if len(node.shape) != 4 or not node.perturbed:
        return False
    return isinstance(node.op, Conv) or (isinstance(node.op, Sum | Scale) and any(map(_is_image, node.inputs)))


def _window(nodes: tuple[Node, ...]) -> int:
    """At most so many coefficients has a row on an image before the last of ``nodes``."""
    across, most = 1, 1
    for node in reversed(nodes):
        if isinstance(node.op, Conv):
            kernel = max(node.inputs[1].shape[2:])
            across = (across - 1) * max(node.op.stride) + (kernel - 1) * max(node.op.dilation) + 1
            most = max(most, node.inputs[0].shape[1] * across**2)
    return most


def bounds(
    graph: Graph, x: Tensor, balls: Ball | Mapping[str, Ball], method: Method = "crown", rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds of a network's output, or of linear functions of it, for everything in the balls.

    Args:
        graph: from ``trace``.
        x: inputs [B, ...] of the batch size that the graph was made for, with the batch in the axis that it has there.
        balls: of the input, or of each leaf by its name.
        method: ``ibp``, ``crown-ibp`` or ``crown``: from fast and loose to slow and tight.
        rows: coefficients [B or 1, S, K] of functions of the output [B, K]; the default is the output itself.

    Returns:
        Two tensors [B, S], or shaped as the output; they hold up to rounding in the tensors' precision.

    Raises:
        ValueError: another batch size than the graph's, an unknown method, or a leaf without a ball.
    """
    found = Propagation(graph, x, balls, method)
    if rows is None and method == "ibp":
        box = found.bounds(graph.output)
        return graph.place.together(box[0]), graph.place.together(box[1])
    shape = graph.output.shape
    each = torch.eye(math.prod(shape[1:]), dtype=x.dtype, device=x.device).view(1, -1, *shape[1:])
    low, high = found.rows(each if rows is None else rows)
    assert low is not None
    assert high is not None
    if rows is not None:
        return low, high
    return graph.place.together(low.view(shape)), graph.place.together(high.view(shape))


def margins_of(labels: Tensor, classes: int) -> Tensor:
    """Rows [B, K - 1, K] of each label's logit minus every other one, for ``labels`` [B] among K ``classes``."""
    eye = torch.eye(classes, device=labels.device)
    others = eye.bool().logical_not()[labels].nonzero()[:, 1].view(len(labels), classes - 1)
    return eye[labels].unsqueeze(1) - eye[others]


def lower_margins(graph: Graph, x: Tensor, labels: Tensor, ball: Ball, method: Method = "crown") -> Tensor:
    """By how much at least the label's logit exceeds every other one [B, K - 1]; above 0, the class is certain."""
    rows = margins_of(labels, graph.output.shape[-1]).to(x.dtype)
    low, _ = Propagation(graph, x, ball, method).rows(rows, upper=False)
    assert low is not None
    return low
