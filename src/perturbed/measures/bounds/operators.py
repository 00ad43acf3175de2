"""What bound propagation must know of each primitive operator: its value, its interval, its backward step.

``interval`` maps bounds of the inputs to bounds of the output. ``side`` takes coefficients A [B or 1, S, ...] of S
linear functions on the output, and gives coefficients on each input, and a bias [B or 1, S], such that the function on
the inputs bounds that on the output from below (``upper`` false) or above. An affine operator's step is exact, its
vector-Jacobian product; the others draw lines or planes, of which the sign of each coefficient chooses the sound one.
"""

# ruff: noqa: D102 (what the methods of an operator do is said once, at Operator)
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from perturbed.measures.bounds.relax import Activation, Lines
from perturbed.measures.bounds.windows import Windows

Interval = tuple[Tensor, Tensor]
Coefficients = Tensor | Windows
Step = tuple[list[Coefficients | None], Tensor | None]


@dataclass(eq=False)
class Node:
    """A place in a graph: an operator on earlier nodes.

    Args:
        name: of the place, as the exported graph calls it.
        op: the operator.
        inputs: earlier nodes.
        shape: of the value; axis 0 of a perturbed node is the batch.
        perturbed: whether it depends on what is perturbed.
    """

    name: str
    op: Operator
    inputs: tuple[Node, ...]
    shape: torch.Size
    perturbed: bool


class Known(Protocol):
    """What a backward step may ask for."""

    def value(self, node: Node) -> Tensor:
        """The value of an unperturbed node."""

    def bounds(self, node: Node) -> Interval:
        """Bounds of a perturbed node."""

    def kept(self, node: Node, make: Callable[[], Any]) -> Any:
        """What ``make`` gave at its first call for this node."""


class Operator:
    """A primitive operator.

    Attributes:
        sided: whether the backward step for a lower bound differs from that for an upper one.
        affine: whether it is affine in its perturbed inputs.
        weighs: whether it mixes entries with weights of either sign, so that intervals lose what a norm would keep.
    """

    sided = False
    affine = True
    weighs = False

    def value(self, *args: Tensor) -> Tensor:
        """The output."""
        raise NotImplementedError

    def interval(self, node: Node, *args: Interval) -> Interval:
        """Bounds of the output from bounds of the inputs; the default is right for operators that increase in each."""
        return self.value(*(low for low, _ in args)), self.value(*(high for _, high in args))

    def side(self, a: Coefficients, upper: bool, node: Node, known: Known) -> Step:
        """Coefficients on each input (None where it is not perturbed) and the bias."""
        raise NotImplementedError

    def wants(self, node: Node) -> tuple[Node, ...]:
        """The inputs whose bounds the backward step asks for."""
        return ()


def dense(a: Coefficients) -> Tensor:
    """Coefficients [B, S, ...] as one tensor."""
    return a.dense() if isinstance(a, Windows) else a


def flat(a: Tensor) -> Tensor:
    """Coefficients [B, S, ...], or [B, S] on one number an example, as [B, S, N]."""
    return a.reshape(*a.shape[:2], -1)


def dot(a: Coefficients, v: Tensor) -> Tensor:
    """Each row of coefficients times ``v`` [B or 1, ...]: [B, S]."""
    if isinstance(a, Windows):
        return a.dot(v)
    v, a = v.reshape(len(v), -1), flat(a)
    return v @ a[0].mT if len(a) == 1 else (a @ v.unsqueeze(-1)).squeeze(-1)


def scaled(a: Coefficients, by: Tensor) -> Coefficients:
    """Coefficients times ``by`` [B or 1, ...]."""
    return a.replaced(a.rows * a.under(by)) if isinstance(a, Windows) else a * by.unsqueeze(1)


def times(a: Coefficients, positive: Tensor, negative: Tensor) -> Coefficients:
    """Coefficients times ``positive`` [B or 1, ...] where they are positive, times ``negative`` elsewhere."""
    over, under = parts(a)
    return added(scaled(over, positive), scaled(under, negative))


def added(one: Coefficients, two: Coefficients) -> Coefficients:
    """The sum of two sets of as many rows."""
    if isinstance(one, Windows) and isinstance(two, Windows):
        return one.plus(two)
    return dense(one) + dense(two)


def magnitude(a: Coefficients) -> Coefficients:
    """The size of each coefficient."""
    return a.replaced(a.rows.abs()) if isinstance(a, Windows) else a.abs()


def parts(a: Coefficients) -> tuple[Coefficients, Coefficients]:
    """The positive and the negative part."""
    if isinstance(a, Windows):
        return a.replaced(a.rows.clamp(min=0)), a.replaced(a.rows.clamp(max=0))
    return a.clamp(min=0), a.clamp(max=0)


def batched(v: Tensor, shape: torch.Size) -> Tensor:
    """A constant that is broadcast to ``shape`` [B, ...], as [B, ...], or [1, ...] where it is the same for all."""
    own = v.dim() == len(shape) and v.shape[0] != 1
    return v.expand(shape if own else (1, *shape[1:]))


def gathered(a: Tensor, shape: torch.Size) -> Tensor:
    """Coefficients [B, S, ...] on a broadcast result, summed to those on an input of ``shape`` [B, ...]."""
    for axis in range(1, len(shape)):
        if shape[axis] == 1 and a.shape[axis + 1] != 1:
            a = a.sum(axis + 1, keepdim=True)
    return a


@dataclass(eq=False)
class Leaf(Operator):
    """What is perturbed: a parameter, looked up afresh at each use, or the input, which each propagation is given."""

    fetch: Callable[[], Tensor] | None = None

    def value(self, *args: Tensor) -> Tensor:
        assert self.fetch is not None
        return self.fetch()


@dataclass(eq=False)
class Constant(Operator):
    """A parameter, buffer or literal, looked up afresh at each use so that gradients reach it."""

    fetch: Callable[[], Tensor]

    def value(self, *args: Tensor) -> Tensor:
        return self.fetch()


@dataclass(eq=False)
class Fixed(Operator):
    """Any operator on unperturbed inputs."""

    fn: Callable[..., Tensor]

    def value(self, *args: Tensor) -> Tensor:
        return self.fn(*args)


@dataclass(eq=False)
class Reshape(Operator):
    """Entries in another shape, in the same order."""

    fn: Callable[[Tensor], Tensor]

    def value(self, *args: Tensor) -> Tensor:
        return self.fn(*args)

    def side(self, a: Coefficients, upper: bool, node: Node, known: Known) -> Step:
        return [dense(a).reshape(*dense(a).shape[:2], *node.inputs[0].shape[1:])], None


@dataclass(eq=False)
class Permute(Operator):
    """Axes in another order; the batch stays first."""

    order: tuple[int, ...]

    def value(self, *args: Tensor) -> Tensor:
        return args[0].permute(self.order)

    def side(self, a: Coefficients, upper: bool, node: Node, known: Known) -> Step:
        back = [self.order.index(axis) for axis in range(len(self.order))]
        return [dense(a).permute(0, *(axis + 1 for axis in back))], None


@dataclass(eq=False)
class Increasing(Operator):
    """Any affine operator with weights of no negative sign: means, sums, slices, padding, joins, average pooling."""

    fn: Callable[..., Tensor]

    def value(self, *args: Tensor) -> Tensor:
        return self.fn(*args)

    def side(self, a: Coefficients, upper: bool, node: Node, known: Known) -> Step:
        a = dense(a)
        a = a.expand(node.shape[0], *a.shape[1:])
        moving = [n for n in node.inputs if n.perturbed]
        fixed = {n: known.value(n) for n in node.inputs if not n.perturbed}

        def call(*args: Tensor) -> Tensor:
            held = iter(args)
            return self.fn(*(fixed[n] if n in fixed else next(held) for n in node.inputs))

        found_at_zero = torch.func.vjp(call, *(a.new_zeros(n.shape) for n in moving))
        offset, pull = found_at_zero[0], found_at_zero[1]
        found = iter(torch.func.vmap(pull, in_dims=1, out_dims=1)(a))
        bias = dot(a, offset) if fixed else None
        return [next(found) if n.perturbed else None for n in node.inputs], bias


@dataclass(eq=False)
class Sum(Operator):
    """x + z, or x - z."""

    sign: float = 1.0

    def value(self, *args: Tensor) -> Tensor:
        return args[0] + args[1] if self.sign > 0 else args[0] - args[1]

    def interval(self, node: Node, *args: Interval) -> Interval:
        (low, high), other = args
        first, second = other if self.sign > 0 else other[::-1]
        return self.value(low, first), self.value(high, second)

    def side(self, a: Coefficients, upper: bool, node: Node, known: Known) -> Step:
        found: list[Coefficients | None] = []
        bias = None
        for n, sign in zip(node.inputs, (1.0, self.sign), strict=True):
            if not n.perturbed:
                bias = dot(a, batched(sign * known.value(n), node.shape))
                found.append(None)
                continue
            mine = a if n.shape == node.shape else gathered(dense(a), n.shape)
            found.append(mine if sign > 0 else _negated(mine))
        return found, bias


def _negated(a: Coefficients) -> Coefficients:
    return a.replaced(-a.rows) if isinstance(a, Windows) else -a


class Scale(Operator):
    """A perturbed input times a constant."""

    def value(self, *args: Tensor) -> Tensor:
        return args[0] * args[1]

    def interval(self, node: Node, *args: Interval) -> Interval:
        (low, high), (by, _) = args
        one, two = low * by, high * by
        return torch.minimum(one, two), torch.maximum(one, two)

    def side(self, a: Coefficients, upper: bool, node: Node, known: Known) -> Step:
        by = batched(known.value(node.inputs[1]), node.shape)
        found = scaled(a, by)
        return [
            found if node.inputs[0].shape == node.shape else gathered(dense(found), node.inputs[0].shape),
            None,
        ], None


class _Weighed(Operator):
    """An affine operator with weights of either sign: |weights| times the radius round the centre."""

    weighs = True

    def interval(self, node: Node, *args: Interval) -> Interval:
        (low, high), (weight, _), *bias = args
        radius = self.apply((high - low) / 2, weight.abs())
        centre = self.apply((high + low) / 2, weight)
        if bias:
            centre = self.shifted(centre, bias[0][0])
        return centre - radius, centre + radius

    def value(self, *args: Tensor) -> Tensor:
        out = self.apply(args[0], args[1])
        return self.shifted(out, args[2]) if len(args) > 2 else out

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def shifted(self, out: Tensor, bias: Tensor) -> Tensor:
        return out + bias

    def side(self, a: Coefficients, upper: bool, node: Node, known: Known) -> Step:
        bias = None
        if len(node.inputs) > 2:
            by = self.shifted(known.value(node.inputs[2]).new_zeros((1, *node.shape[1:])), known.value(node.inputs[2]))
            bias = dot(a, by)
        none: list[Coefficients | None] = [None] * (len(node.inputs) - 1)
        return [self.pulled(a, known.value(node.inputs[1]), node.inputs[0]), *none], bias

    def pulled(self, a: Coefficients, weight: Tensor, into: Node) -> Coefficients:
        raise NotImplementedError


class Linear(_Weighed):
    """x W' + b on the last axis."""

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def pulled(self, a: Coefficients, weight: Tensor, into: Node) -> Coefficients:
        return dense(a) @ weight


@dataclass(eq=False)
class Conv(_Weighed):
    """A convolution of 1, 2 or 3 dimensions."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        conv = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
        return conv(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def shifted(self, out: Tensor, bias: Tensor) -> Tensor:
        return out + bias.view(-1, *[1] * (out.dim() - 2))

    def pulled(self, a: Coefficients, weight: Tensor, into: Node) -> Coefficients:
        if isinstance(a, Windows):
            image = (into.shape[2], into.shape[3])
            return a.before_conv(weight, self.stride, self.padding, self.dilation, self.groups, image)
        rows, size = a.flatten(0, 1), into.shape[2:]
        spare = [
            n - ((m - 1) * s - 2 * p + d * (k - 1) + 1)
            for n, m, s, p, d, k in zip(
                size, rows.shape[2:], self.stride, self.padding, self.dilation, weight.shape[2:], strict=True
            )
        ]
        if weight.dim() == 4 and weight.shape[1] == self.groups == 1:  # of one channel, oneDNN's is 2.5 times slower
            columns = weight.flatten(1).mT @ rows.flatten(2)
            how = (tuple(v) for v in (self.dilation, self.padding, self.stride))
            found = F.fold(columns, size, weight.shape[2:], *how)
        else:
            turned = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.dim() - 3]
            found = turned(rows, weight, None, self.stride, self.padding, spare, self.groups, self.dilation)
        return found.view(*a.shape[:2], *into.shape[1:])


@dataclass(eq=False)
class Times(_Weighed):
    """A perturbed matrix times a constant one, from the right or from the left."""

    right: bool = True

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight if self.right else weight @ x

    def pulled(self, a: Coefficients, weight: Tensor, into: Node) -> Coefficients:
        a = dense(a)
        turned = weight.transpose(-1, -2)
        if turned.dim() == len(into.shape) > 2:  # one for each example
            turned = turned.unsqueeze(1)
        return gathered(a @ turned if self.right else turned @ a, into.shape)


@dataclass(eq=False)
class Unary(Operator):
    """An elementwise function."""

    activation: Activation
    sided: bool = field(default=True, init=False)
    affine: bool = field(default=False, init=False)

    def value(self, *args: Tensor) -> Tensor:
        return self.activation.f(*args)

    def interval(self, node: Node, *args: Interval) -> Interval:
        return self.activation.interval(*args[0])

    def wants(self, node: Node) -> tuple[Node, ...]:
        return node.inputs

    def side(self, a: Coefficients, upper: bool, node: Node, known: Known) -> Step:
        lines: Lines = known.kept(node, lambda: self.activation.lines(*known.bounds(node.inputs[0])))
        over, under = parts(a)
        below, above = (under, over) if upper else (over, under)
        bias = dot(above, lines.upper)
        if lines.lower is not None:
            bias = bias + dot(below, lines.lower)
        return [added(scaled(below, lines.lower_slope), scaled(above, lines.upper_slope))], bias


class Product(Operator):
    """x times z, both perturbed: McCormick's planes through one corner each of the box of both."""

    sided, affine = True, False

    def value(self, *args: Tensor) -> Tensor:
        return args[0] * args[1]

    def interval(self, node: Node, *args: Interval) -> Interval:
        corners = torch.stack([x * z for x in args[0] for z in args[1]])
        return corners.amin(0), corners.amax(0)

    def wants(self, node: Node) -> tuple[Node, ...]:
        return node.inputs

    def side(self, a: Coefficients, upper: bool, node: Node, known: Known) -> Step:
        x, z = node.inputs
        (x_low, _), (z_low, z_high) = known.bounds(x), known.bounds(z)
        corner = batched(x_low, node.shape)
        ends = batched(z_low, node.shape), batched(z_high, node.shape)
        positive, negative = ends[::-1] if upper else ends
        on_x, on_z = times(dense(a), positive, negative), scaled(dense(a), corner)
        return [gathered(dense(on_x), x.shape), gathered(dense(on_z), z.shape)], -dot(on_x, corner)


class Matmul(Operator):
    """A product of two perturbed matrices: McCormick's planes on each product of entries."""

    sided, affine = True, False

    def value(self, *args: Tensor) -> Tensor:
        return args[0] @ args[1]

    def interval(self, node: Node, *args: Interval) -> Interval:
        (x_low, x_high), (z_low, z_high) = ((low, high) for low, high in args)
        x_low, x_high = x_low.unsqueeze(-1), x_high.unsqueeze(-1)
        z_low, z_high = z_low.unsqueeze(-3), z_high.unsqueeze(-3)
        corners = torch.stack([x * z for x in (x_low, x_high) for z in (z_low, z_high)])
        return corners.amin(0).sum(-2), corners.amax(0).sum(-2)

    def wants(self, node: Node) -> tuple[Node, ...]:
        return node.inputs

    def side(self, a: Coefficients, upper: bool, node: Node, known: Known) -> Step:
        x, z = node.inputs
        (x_low, _), (z_low, z_high) = known.bounds(x), known.bounds(z)
        over, under = (dense(part) for part in parts(dense(a)))
        positive, negative = (z_high, z_low) if upper else (z_low, z_high)
        on_x = over @ positive.mT.unsqueeze(1) + under @ negative.mT.unsqueeze(1)
        on_z = x_low.mT.unsqueeze(1) @ dense(a)
        return [on_x, on_z], -dot(on_x, x_low)


@dataclass(eq=False)
class Softmax(Operator):
    """Softmax along an axis, between tangents of a convex and a concave bound (Wei et al. 2023, 2303.01713).

    With chord_j the chord of exp over the bounds of x_j, exp(x_k) / sum_j chord_j(x_j) is convex and below; with the
    least and largest share p of x_k, the chord over [log p_least, log p_most] of exp, at x_k - logsumexp(x), is concave
    and above. Each is replaced by its tangent at the middle of the bounds.
    """

    axis: int
    sided: bool = field(default=True, init=False)
    affine: bool = field(default=False, init=False)

    def value(self, *args: Tensor) -> Tensor:
        return args[0].softmax(self.axis)

    def interval(self, node: Node, *args: Interval) -> Interval:
        least, most = self._log_shares(*args[0])
        return least.exp(), most.exp()

    def _log_shares(self, low: Tensor, high: Tensor) -> Interval:
        """Logarithms of each entry's least and largest share; a sum less the entry itself would lose the others."""

        def before(scores: Tensor) -> Tensor:
            whole = scores.logcumsumexp(self.axis).narrow(self.axis, 0, scores.shape[self.axis] - 1)
            return torch.cat([torch.full_like(scores.narrow(self.axis, 0, 1), -torch.inf), whole], self.axis)

        def share(of: Tensor, others: Tensor) -> Tensor:
            after = before(others.flip(self.axis)).flip(self.axis)
            return -F.softplus(torch.logaddexp(before(others), after) - of)

        return share(low, high), share(high, low)

    def wants(self, node: Node) -> tuple[Node, ...]:
        return node.inputs

    def side(self, a: Coefficients, upper: bool, node: Node, known: Known) -> Step:
        lower, higher = known.kept(node, lambda: self._tangents(*known.bounds(node.inputs[0])))
        over, under = (dense(part) for part in parts(dense(a)))
        chosen = (higher, lower) if upper else (lower, higher)
        found, bias = [], []
        for part, (diagonal, column, row, offset) in zip((over, under), chosen, strict=True):
            across = (part * column.unsqueeze(1)).sum(self.axis + 1, keepdim=True)
            found.append(part * diagonal.unsqueeze(1) - across * row.unsqueeze(1))
            bias.append(dot(part, offset))
        return [found[0] + found[1]], bias[0] + bias[1]

    def _tangents(self, low: Tensor, high: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Per bound (d, u, v, b): the slopes are diag(d) - u v', the intercept b."""
        middle, axis = (low + high) / 2, self.axis
        shift = high.amax(axis, keepdim=True)
        first, last, m = low - shift, high - shift, middle - shift
        wide = last - first > 1e-5
        slope = torch.where(wide, (last.exp() - first.exp()) / (last - first).clamp(min=1e-5), last.exp())
        intercept = torch.where(wide, first.exp() - slope * first, last.exp() * (1 - last))
        total = (slope * m + intercept).sum(axis, keepdim=True)
        share = m.exp() / total
        lower = (share, share / total, slope)
        log_least, log_most = self._log_shares(low, high)
        least, most = log_least.exp(), log_most.exp()
        apart = log_most - log_least > 1e-5
        rate = torch.where(apart, (most - least) / (log_most - log_least).clamp(min=1e-12), most)
        base = torch.where(apart, most - rate * log_most, most * (1 - log_most))
        at = middle.log_softmax(axis)
        upper = (rate, rate, at.exp())

        def offset(line: tuple[Tensor, Tensor, Tensor], value: Tensor) -> Tensor:
            diagonal, column, row = line
            return value - diagonal * middle + column * (row * middle).sum(axis, keepdim=True)

        return (*lower, offset(lower, share)), (*upper, offset(upper, base + rate * at))


@dataclass(eq=False)
class MaxPool(Operator):
    """Largest entry of each window of an image.

    Below: the entry whose lower bound is largest. Above: that entry too if its lower bound is not below any other's
    upper bound, else the largest upper bound as a constant.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    sided: bool = field(default=True, init=False)
    affine: bool = field(default=False, init=False)

    def value(self, *args: Tensor) -> Tensor:
        return F.max_pool2d(args[0], self.kernel, self.stride, self.padding)

    def wants(self, node: Node) -> tuple[Node, ...]:
        return node.inputs

    def _windows(self, image: Tensor) -> Tensor:
        """[B, C, PH, PW, k * k], minus infinity beyond the edge."""
        (down, across), (a, b) = self.kernel, self.padding
        padded = F.pad(image, (b, b, a, a), value=-torch.inf)
        return padded.unfold(2, down, self.stride[0]).unfold(3, across, self.stride[1]).flatten(4)

    def _choice(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = self._windows(low), self._windows(high)
        best, at = low.max(-1, keepdim=True)
        chosen = torch.zeros_like(low).scatter(-1, at, 1.0)
        sure = best >= high.scatter(-1, at, -torch.inf).amax(-1, keepdim=True)
        return chosen, chosen * sure, torch.where(sure, 0, high.amax(-1, keepdim=True)).squeeze(-1)

    def side(self, a: Coefficients, upper: bool, node: Node, known: Known) -> Step:
        chosen, certain, most = known.kept(node, lambda: self._choice(*known.bounds(node.inputs[0])))
        positive, negative = (certain, chosen) if upper else (chosen, certain)
        bias = dot(parts(a)[0 if upper else 1], most)
        (down, across), (s, t), (p, q) = self.kernel, self.stride, self.padding
        size = node.inputs[0].shape[2:]
        grid = a.rows if isinstance(a, Windows) else a
        height, width = (grid.shape[-2] - 1) * s + down, (grid.shape[-1] - 1) * t + across
        spread: Tensor | None = None
        for place in range(down * across):
            picked = times(a, positive[..., place], negative[..., place])
            values = picked.rows if isinstance(picked, Windows) else picked
            if spread is None:
                spread = values.new_zeros(*values.shape[:-2], height, width)
            i, j = divmod(place, across)
            spread[..., i : i + (values.shape[-2] - 1) * s + 1 : s, j : j + (values.shape[-1] - 1) * t + 1 : t] += (
                values
            )
        assert spread is not None
        if isinstance(a, Windows):
            found = Windows(spread, a.top * s - p, a.left * t - q, (size[0], size[1]))
            return [found.settled()], bias
        spread = F.pad(spread, (0, max(0, size[1] + q - width), 0, max(0, size[0] + p - height)))
        return [spread[..., p : p + size[0], q : q + size[1]]], bias
