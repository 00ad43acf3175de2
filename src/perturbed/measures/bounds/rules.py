"""Rules: what each operator of an exported graph is in primitives, where it has a perturbed input.

A rule takes the model's values as ``Placed`` (perturbed) or ``Node`` (fixed), and the operator's other arguments as
they are. Most are written for nodes, which have the batch in front; ``same``, ``broadcast``, ``last`` and ``front``
make rules for the model's values of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from perturbed.measures.bounds import relax
from perturbed.measures.bounds.layout import Place, Placed
from perturbed.measures.bounds.operators import (
    Conv,
    Fixed,
    Increasing,
    Linear,
    Matmul,
    MaxPool,
    Node,
    Permute,
    Product,
    Reshape,
    Scale,
    Softmax,
    Sum,
    Times,
    Unary,
)

if TYPE_CHECKING:
    from perturbed.measures.bounds.graph import Builder

Rule = Callable[..., Any]
R = TypeVar("R", bound=Rule)
RULES: dict[str, Rule] = {}
FILLED = {"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"}  # by shape and type alone
SHAPED = {"view_as", "reshape_as", "expand_as", "to", "type_as"}  # their first argument, by that of the second


def rule(*names: str, by: Callable[[Rule], Rule] | None = None) -> Callable[[R], R]:
    """Register a rule under the names that ATen gives the operator; ``by`` makes it of one that is for nodes."""

    def keep(fn: R) -> R:
        for name in names:
            RULES[name] = fn if by is None else by(fn)
        return fn

    return keep


def replaced(thing: Any, by: Callable[[Any], Any]) -> Any:
    """Arguments with ``by`` of each value of the graph in them."""
    if isinstance(thing, Node | Placed):
        return by(thing)
    if isinstance(thing, list | tuple):
        return type(thing)(replaced(item, by) for item in thing)
    if isinstance(thing, dict):
        return {k: replaced(v, by) for k, v in thing.items()}
    return thing


def among(thing: Any) -> Iterator[Node | Placed]:
    """The values of the graph in arguments."""
    if isinstance(thing, Node | Placed):
        yield thing
    elif isinstance(thing, list | tuple):
        for item in thing:
            yield from among(item)
    elif isinstance(thing, dict):
        yield from among(list(thing.values()))


def unplaced(thing: Any) -> Any:
    """Arguments with the node of each perturbed value."""
    return replaced(thing, lambda v: v.node if isinstance(v, Placed) else v)


def same(fn: Rule) -> Rule:
    """For what maps each entry of its first argument alone."""

    def placed(b: Builder, x: Any, *args: Any, **kwargs: Any) -> Placed:
        if not isinstance(x, Placed):
            raise b.refusal("there is no rule where another argument than the first depends on what is perturbed")
        return Placed(fn(b, x.node, *unplaced(args), **kwargs), x.place)

    return placed


def broadcast(fn: Rule) -> Rule:
    """For what maps pairs of entries of two arguments, broadcast to each other."""

    def placed(b: Builder, x: Any, z: Any, *args: Any, **kwargs: Any) -> Placed:
        (x, z), place = aligned(b, [x, z])
        return Placed(fn(b, x, z, *args, **kwargs), place)

    return placed


def last(count: Callable[..., int]) -> Callable[[Rule], Rule]:
    """For what acts on the last axes of its first argument, ``count`` of the others many."""

    def by(fn: Rule) -> Rule:
        def placed(b: Builder, x: Any, *args: Any, **kwargs: Any) -> Placed:
            place = x.place if isinstance(x, Placed) else b.presumed(x)
            if place.axis is not None and place.axis >= len(x.shape) - count(*args):
                raise b.mixing(place.axis)
            return Placed(fn(b, *unplaced((x, *args)), **unplaced(kwargs)), place)

        return placed

    return by


def front(fn: Rule) -> Rule:
    """For what has the batch as axis 0 of its input and of its result by its definition."""

    def placed(b: Builder, x: Any, *args: Any, **kwargs: Any) -> Placed:
        args = (fronted(b, x) if isinstance(x, Placed) else x, *args)
        for v in among((args, kwargs)):
            if isinstance(v, Placed) and v.place != Place() and (v is args[0] or v.place.axis is not None):
                how = "" if v.place.alone else ", together with other entries"
                where = "has none" if v.place.axis is None else f"has it in axis {v.place.axis}{how}"
                raise b.refusal(f"it wants the batch as axis 0 of its input, which {where}")
        return Placed(fn(b, *unplaced(args), **unplaced(kwargs)), Place())

    return placed


def freed(b: Builder, x: Placed) -> Placed:
    """A batch of one as a value without a batch, none of whose axes anything can mix."""
    return Placed(_reshaped(b, x.node, x.shape), Place(None))


def fronted(b: Builder, x: Placed) -> Placed:
    """A batch of one with its first axis of one entry as the batch; others, and what has no such axis, as they are."""
    if b.batch > 1 or x.place.axis is not None or 1 not in x.shape:
        return x
    place = Place(x.shape.index(1))
    return Placed(_reshaped(b, x.node, place.own(x.shape)), place)


def aligned(b: Builder, values: Sequence[Any], ends: int = 0) -> tuple[list[Any], Place]:
    """Nodes that broadcast to each other as the model's ``values`` do, and the place of the batch in the result.

    Args:
        b: the builder.
        values: nodes, placed nodes and numbers.
        ends: so many last axes are not broadcast, and must not be the batch.
    """
    rank = max(len(v.shape) for v in values if isinstance(v, Node | Placed))
    shifted = [v.place.shifted(rank - len(v.shape)) for v in values if isinstance(v, Placed)]
    places = list(dict.fromkeys(p for p in shifted if p.axis is not None))
    if len(places) > 1:
        raise b.refusal(
            f"it mixes the examples of the batch, which is in axis {places[0].axis} of one input and in axis "
            f"{places[1].axis} of another"
        )
    place = places[0] if places else Place(None)
    if place.axis is not None and place.axis >= rank - ends:
        raise b.mixing(place.axis)
    return [_arranged(b, v, place, rank) for v in values], place


def _arranged(b: Builder, v: Any, place: Place, rank: int) -> Any:
    """One of the values that ``aligned`` aligns, whose result has so many axes."""
    if not isinstance(v, Node | Placed):
        return v
    padded = (*[1] * (rank - len(v.shape)), *v.shape)
    if isinstance(v, Node):
        if place.axis is None or place == Place() or place.axis < rank - len(v.shape):
            return v  # it broadcasts to nodes as it does to the model's values
        return b.add(Fixed(lambda value: place.apart(value.reshape(padded))), v)
    if v.place.axis is None and place.axis is not None and padded[place.axis] != 1:
        raise b.mixing(place.axis)
    return v.node if v.place == place and len(v.shape) == rank else _reshaped(b, v.node, place.own(padded))


def _reshaped(b: Builder, x: Node, own: Sequence[int]) -> Node:
    """The node as [B, *own]."""
    shape = (b.batch, *own)
    return x if x.shape == shape else b.add(Reshape(functools.partial(torch.reshape, shape=shape)), x)


def _permuted(b: Builder, x: Node, order: Sequence[int]) -> Node:
    return x if list(order) == sorted(order) else b.add(Permute(tuple(order)), x)


def _turned(b: Builder, x: Node) -> Node:
    """The node with its last two axes exchanged."""
    *others, one, two = range(len(x.shape))
    return _permuted(b, x, [*others, two, one])


@rule("clone", "contiguous", "dropout", "feature_dropout", "alias", "detach", "lift_fresh_copy", by=same)
def _same(b: Builder, x: Node, *args: Any, **kwargs: Any) -> Node:
    return x  # dropout is off: the graph is made in eval mode


@rule("to", "_to_copy", by=same)
def _to(b: Builder, x: Node, *args: Any, **kwargs: Any) -> Node:
    wanted = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]
    if any(dtype != b.values[x].dtype for dtype in wanted):
        raise b.refusal(f"it changes the number type to {wanted[0]}; give the model and input one type")
    return x


@rule("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "_unsafe_view", "view_as", "reshape_as")
def _reshape(b: Builder, x: Placed, *args: Any, **kwargs: Any) -> Placed:
    shape = b.shape_of(x, *args, **kwargs)
    place = x.place.reshaped(x.shape, shape, b.batch)
    if place is None:
        raise b.refusal(f"it divides axis {x.place.axis}, which holds the batch, so that no axis holds all of it")
    return Placed(_reshaped(b, x.node, place.own(shape)), place)


@rule("permute", "transpose", "swapaxes", "movedim", "t", "mT")
def _permute(b: Builder, x: Placed, *args: Any) -> Placed:
    numbered = torch.empty(tuple(range(len(x.shape))), device="meta")  # its sizes tell which axis went where
    order, place = x.place.permuted(b.operator(numbered, *args).shape)
    return Placed(_permuted(b, x.node, order), place)


@rule("expand", "expand_as")
def _expand(b: Builder, x: Placed, *args: Any, **kwargs: Any) -> Placed:
    shape = b.shape_of(x, *args, **kwargs)
    place, padded = x.place.shifted(len(shape) - len(x.shape)), (*[1] * (len(shape) - len(x.shape)), *x.shape)
    if place.axis is not None and shape[place.axis] != padded[place.axis]:
        raise b.mixing(place.axis)
    node = _reshaped(b, x.node, place.own(padded))
    return Placed(_expanded(b, node, (b.batch, *place.own(shape))), place)


@rule("slice")
def _slice(b: Builder, x: Placed, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Placed:
    size = x.shape[dim]
    if len(range(*slice(start, end, step).indices(size))) == size:
        return x
    axis = b.axis(x, dim)
    return b.on(x, lambda v: torch.ops.aten.slice.Tensor(v, axis, start, end, step))


@rule("select")
def _select(b: Builder, x: Placed, dim: int, index: int) -> Placed:
    axis = b.axis(x, dim)
    return b.on(x, lambda v: v.select(axis, index), x.place.without([dim % len(x.shape)]))


@rule("unbind")
def _unbind(b: Builder, x: Placed, dim: int = 0) -> list[Placed]:
    return [_select(b, x, dim, index) for index in range(x.shape[dim])]


@rule("chunk", "split", "split_with_sizes")
def _split(b: Builder, x: Placed, sizes: Any, dim: int = 0) -> list[Placed]:
    axis = b.axis(x, dim)
    found, at = [], 0
    for part in b.operator(torch.empty(x.shape, device="meta"), sizes, dim):
        length = part.shape[dim]
        found.append(b.on(x, functools.partial(torch.narrow, dim=axis, start=at, length=length)))
        at += length
    return found


def _joined(b: Builder, xs: list[Any]) -> tuple[list[Node], Place]:
    """Values of equal shapes as nodes [B, ...], and their place; each is repeated that has no batch."""
    nodes, place = aligned(b, xs)
    if place.axis is None:
        nodes = [n if n.perturbed else b.add(Fixed(lambda v: v.expand(b.batch, *v.shape)), n) for n in nodes]
    return nodes, place


@rule("cat", "concat")
def _cat(b: Builder, xs: list[Any], dim: int = 0) -> Placed:
    nodes, place = _joined(b, xs)
    axis = b.beside(place, dim % len(xs[0].shape))
    return Placed(b.add(Increasing(lambda *v: torch.cat(v, axis)), *nodes), place)


@rule("stack")
def _stack(b: Builder, xs: list[Any], dim: int = 0) -> Placed:
    nodes, place = _joined(b, xs)
    dim = dim % (len(xs[0].shape) + 1)
    place = place.shifted(1) if place.axis is not None and dim <= place.axis else place
    axis = b.beside(place, dim)
    return Placed(b.add(Increasing(lambda *v: torch.stack(v, axis)), *nodes), place)


@rule("mean", "sum")
def _reduce(b: Builder, x: Placed, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Placed:
    if dim is None:
        raise b.refusal("it sums over all axes, the batch among them")
    dims = [d % len(x.shape) for d in ([dim] if isinstance(dim, int) else dim)]
    axes = tuple(b.axis(x, d) for d in dims)
    call = torch.sum if b.operator is torch.ops.aten.sum.dim_IntList else torch.mean
    return b.on(x, lambda v: call(v, axes, keepdim), x.place if keepdim else x.place.without(dims))


@rule("constant_pad_nd", by=last(lambda widths, *_: len(widths) // 2))
def _constant_pad(b: Builder, x: Node, widths: list[int], value: float | None = 0) -> Node:
    if value:
        raise b.refusal("padding with another number than 0 has no rule")
    return b.add(Increasing(lambda v: F.pad(v, widths)), x)


@rule("pad", by=last(lambda widths, *_: len(widths) // 2))
def _pad(b: Builder, x: Node, widths: list[int], mode: str = "constant", value: float | None = None) -> Node:
    if mode != "constant":
        raise b.refusal(f"padding by {mode} has no rule")
    return _constant_pad(b, x, widths, value)


@rule("avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "im2col",
      "upsample_nearest2d", by=front)  # fmt: skip
def _pooled(b: Builder, x: Node, *args: Any, **kwargs: Any) -> Node:
    call = b.operator
    return b.add(Increasing(lambda v: call(v, *args, **kwargs)), x)


def _line_up(b: Builder, x: Node, z: Node) -> None:
    """Refuse a broadcast that would put another axis in place of a perturbed input's batch."""
    ranks = {len(n.shape) for n in (x, z) if n.perturbed}
    others = [len(n.shape) for n in (x, z) if not n.perturbed]
    if len(ranks) != 1 or any(rank > min(ranks) for rank in others):
        raise b.refusal("it broadcasts over axes in front of the batch")


@rule("add", by=broadcast)
def _add(b: Builder, x: Any, z: Any, *, alpha: float = 1) -> Node:
    x, z = b.node(x), b.node(z)
    _line_up(b, x, z)
    return b.add(Sum(), x, z if alpha == 1 else _mul(b, z, alpha))


@rule("sub", by=broadcast)
def _sub(b: Builder, x: Any, z: Any, *, alpha: float = 1) -> Node:
    x, z = b.node(x), b.node(z)
    _line_up(b, x, z)
    return b.add(Sum(-1.0), x, z if alpha == 1 else _mul(b, z, alpha))


@rule("rsub", by=broadcast)
def _rsub(b: Builder, x: Any, z: Any, alpha: float = 1) -> Node:
    return _sub(b, z, x if alpha == 1 else _mul(b, x, alpha))


@rule("neg", by=same)
def _neg(b: Builder, x: Node) -> Node:
    return _mul(b, x, -1.0)


@rule("mul", by=broadcast)
def _mul(b: Builder, x: Any, z: Any) -> Node:
    if x is z:
        return _unary(b, "square", x)
    x, z = b.node(x), b.node(z)
    if not (x.perturbed or z.perturbed):
        return b.add(Fixed(torch.mul), x, z)
    _line_up(b, x, z)
    if x.perturbed and z.perturbed:
        return b.add(Product(), x, z)
    return b.add(Scale(), x, z) if x.perturbed else b.add(Scale(), z, x)


@rule("div", by=broadcast)
def _div(b: Builder, x: Any, z: Any) -> Node:
    z = b.node(z)
    return _mul(b, x, _unary(b, "reciprocal", z) if z.perturbed else b.add(Fixed(torch.reciprocal), z))


def _unary(b: Builder, name: str, x: Node) -> Node:
    return b.add(Unary(relax.ACTIVATIONS[name]), x)


def _elementwise(name: str) -> Rule:
    return lambda b, x: _unary(b, name, x)


for _function in ("relu", "tanh", "sigmoid", "exp", "log", "sqrt", "reciprocal", "square"):
    RULES[_function] = same(_elementwise(_function))


@rule("rsqrt", by=same)
def _rsqrt(b: Builder, x: Node) -> Node:
    return _unary(b, "reciprocal", _unary(b, "sqrt", x))


@rule("pow", by=same)
def _pow(b: Builder, x: Node, exponent: float) -> Node:
    if exponent == 2:
        return _unary(b, "square", x)
    if exponent == 0.5:
        return _unary(b, "sqrt", x)
    if exponent == -0.5:
        return _rsqrt(b, x)
    raise b.refusal(f"there is no rule for the power {exponent}")


@rule("gelu", by=same)
def _gelu(b: Builder, x: Node, *, approximate: str = "none") -> Node:
    if approximate == "none":
        return _unary(b, "gelu", x)
    inner = _add(b, x, _mul(b, _mul(b, _unary(b, "square", x), x), 0.044715))
    gate = _unary(b, "sigmoid", _mul(b, inner, 2 * math.sqrt(2 / math.pi)))  # (1 + tanh(t)) / 2 = sigmoid(2 t)
    return _mul(b, x, gate)


@rule("silu", by=same)
def _silu(b: Builder, x: Node) -> Node:
    return _mul(b, x, _unary(b, "sigmoid", x))


@rule("leaky_relu", by=same)
def _leaky_relu(b: Builder, x: Node, slope: float = 0.01) -> Node:
    if not 0 <= slope < 1:
        raise b.refusal(f"a slope of {slope} has no rule; it must be in [0, 1)")
    return b.add(
        Unary(
            relax.Activation(
                functools.partial(F.leaky_relu, negative_slope=slope), functools.partial(relax.leaky_relu, slope=slope)
            )
        ),
        x,
    )


@rule("linear", by=last(lambda *_: 1))
def _linear(b: Builder, x: Node, weight: Node, bias: Node | None = None) -> Node:
    if not weight.perturbed:
        if bias is not None and bias.perturbed:
            return _shift(b, b.add(Linear(), x, weight), bias)
        return b.add(Linear(), x, weight, *(() if bias is None else (bias,)))
    rows = x if len(x.shape) > 2 else _reshaped(b, x, (1, x.shape[-1]))
    turned = _turned(b, weight)
    for _ in range(len(rows.shape) - 3):
        turned = _reshaped(b, turned, (1, *turned.shape[1:]))
    out = _matmul(b, rows, turned)
    out = out if len(x.shape) > 2 else _reshaped(b, out, (out.shape[-1],))
    return out if bias is None else _shift(b, out, bias)


def _shift(b: Builder, x: Node, bias: Node) -> Node:
    """The sum with a bias of its last axis, which is [B, n] where it is perturbed."""
    if bias.perturbed:
        bias = _reshaped(b, bias, (*[1] * (len(x.shape) - 2), bias.shape[-1]))
    return _add(b, x, bias)


@rule("addmm", "baddbmm")
def _addmm(b: Builder, bias: Any, x: Any, z: Any, **kwargs: Any) -> Placed:
    if kwargs:
        raise b.refusal(f"{', '.join(kwargs)} has no rule")
    added: Placed = RULES["add"](b, _product(b, x, z), bias)
    return added


@rule("matmul", "bmm", "mm")
def _product(b: Builder, x: Any, z: Any) -> Placed:
    if len(x.shape) < 2 or len(z.shape) < 2:
        raise b.refusal(f"a product of {list(x.shape)} and {list(z.shape)} has no rule")
    if isinstance(z, Node) and len(z.shape) == 2:  # of rows, wherever they are
        placed: Placed = last(lambda *_: 1)(_matmul)(b, x, z)
        return placed
    (x, z), place = aligned(b, [x, z], 2)
    return Placed(_matmul(b, x, z), place)


def _matmul(b: Builder, x: Node, z: Node) -> Node:
    if x.perturbed and z.perturbed:
        if len(x.shape) != len(z.shape) or len(x.shape) < 3:
            raise b.refusal(f"a product of perturbed {list(x.shape)} and {list(z.shape)} has no rule")
        x, z = _spread(b, x, z), _spread(b, z, x)
        return b.add(Matmul(), x, z)
    fixed, moving = (z, x) if x.perturbed else (x, z)
    if len(fixed.shape) > len(moving.shape):
        raise b.refusal(f"a product of {list(x.shape)} and {list(z.shape)} has no rule")
    return b.add(Times(right=x.perturbed), moving, fixed)


def _spread(b: Builder, x: Node, like: Node) -> Node:
    """The node with its axes before the last two broadcast to those of ``like``."""
    shape = (*torch.broadcast_shapes(x.shape[:-2], like.shape[:-2]), *x.shape[-2:])  # type: ignore[no-untyped-call]
    return _expanded(b, x, shape)


def _expanded(b: Builder, x: Node, shape: tuple[int, ...]) -> Node:
    return x if x.shape == shape else b.add(Increasing(lambda v: v.expand(shape)), x)


@rule("conv1d", "conv2d", "conv3d", by=front)
def _conv(
    b: Builder, x: Node, weight: Node, bias: Node | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Node:  # fmt: skip
    dims = len(b.values[weight].shape) - 2 - weight.perturbed
    if len(x.shape) != dims + 2:
        raise b.refusal(f"a convolution of {list(x.shape)} has no rule where {dims + 2} axes are a batch of images")
    stride, padding, dilation = (
        [v] * dims if isinstance(v, int) else list(v) * (dims // len(v)) for v in (stride, padding, dilation)
    )
    if any(isinstance(p, str) for p in padding):
        raise b.refusal("padding by name has no rule; give numbers")
    if weight.perturbed:
        return _perturbed_conv(b, x, weight, bias, stride, padding, dilation, groups)
    op = Conv(stride, padding, dilation, groups)
    if bias is not None and bias.perturbed:
        shaped = _reshaped(b, bias, (bias.shape[-1], *[1] * dims))
        return _add(b, b.add(op, x, weight), shaped)
    return b.add(op, x, weight, *(() if bias is None else (bias,)))


def _perturbed_conv(
    b: Builder, x: Node, weight: Node, bias: Node | None, stride: list[int], padding: list[int], dilation: list[int],
    groups: int,
) -> Node:  # fmt: skip
    """A convolution with a perturbed kernel, as a product of matrices."""
    if len(weight.shape) != 5 or groups != 1:
        raise b.refusal("a perturbed kernel is supported in two dimensions without groups")
    kernel = tuple(weight.shape[3:])

    def patches(v: Tensor) -> Tensor:
        return F.unfold(v, kernel, tuple(dilation), tuple(padding), tuple(stride))

    columns = b.add(Increasing(patches) if x.perturbed else Fixed(patches), x)
    flat = _reshaped(b, weight, (weight.shape[1], math.prod(weight.shape[2:])))
    out = _matmul(b, flat, columns)
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
    ]
    out = _reshaped(b, out, (weight.shape[1], *size))
    if bias is None:
        return out
    if bias.perturbed:
        shaped = _reshaped(b, bias, (bias.shape[-1], 1, 1))
    else:
        shaped = b.add(Fixed(lambda v: v.view(-1, 1, 1)), bias)
    return _add(b, out, shaped)


@rule("batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def _batch_norm(
    b: Builder, x: Placed, weight: Any, bias: Any, mean: Node | None, var: Node | None, training: bool,
    momentum: float, eps: float, *args: Any,
) -> Placed:  # fmt: skip
    if training or mean is None or var is None:
        raise b.refusal("batch normalisation has bounds by its running statistics only; it keeps none")
    if isinstance(weight, Placed) or isinstance(bias, Placed):
        raise b.refusal("perturbed weights of batch normalisation have no rule")
    shape = (-1, *[1] * (len(x.shape) - 2))
    rate = b.add(Fixed(lambda v: (v + eps).rsqrt().view(shape)), var)
    if weight is not None:
        rate = b.add(Fixed(lambda r, w: r * w.view(shape)), rate, weight)
    offset = b.add(Fixed(lambda r, m: -r * m.view(shape)), rate, mean)
    if bias is not None:
        offset = b.add(Fixed(lambda o, c: o + c.view(shape)), offset, bias)
    out: Placed = RULES["add"](b, RULES["mul"](b, x, rate), offset)
    return out


@rule("max_pool2d", by=front)
def _max_pool(
    b: Builder, x: Node, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Node:
    def pair(v: Any) -> tuple[int, int]:
        return (v, v) if isinstance(v, int) else (v[0], v[-1])

    if pair(dilation) != (1, 1) or ceil_mode or len(x.shape) != 4:
        raise b.refusal("max pooling with dilation, with ceil_mode or of unbatched images has no rule")
    return b.add(MaxPool(pair(kernel), pair(stride or kernel), pair(padding)), x)


@rule("softmax", "_softmax")
def _softmax(b: Builder, x: Placed, dim: int, *args: Any) -> Placed:
    return Placed(b.add(Softmax(b.axis(x, dim)), _finite(b, x.node)), x.place)


def _finite(b: Builder, scores: Node) -> Node:
    """Scores that a fixed mask was added to, with a finite mask, so that tangents stay finite."""
    if not isinstance(scores.op, Sum) or scores.op.sign < 0 or all(n.perturbed for n in scores.inputs):
        return scores
    return b.add(Sum(), *(n if n.perturbed else b.add(Fixed(_bounded_below), n) for n in scores.inputs))


@rule("layer_norm", by=last(lambda shape, *_: len(shape)))
def _layer_norm(
    b: Builder, x: Node, shape: list[int], weight: Node | None = None, bias: Node | None = None, eps: float = 1e-5,
    *args: Any,
) -> Node:  # fmt: skip
    axes = tuple(range(len(x.shape) - len(shape), len(x.shape)))
    mean = functools.partial(torch.mean, dim=axes, keepdim=True)
    centred = _sub(b, x, b.add(Increasing(mean), x))
    spread = _add(b, b.add(Increasing(mean), _unary(b, "square", centred)), eps)
    out = _mul(b, centred, _rsqrt(b, spread))
    if weight is not None:
        out = _mul(b, out, weight)
    return out if bias is None else _add(b, out, bias)


@rule("scaled_dot_product_attention")
def _attention(
    b: Builder, q: Any, k: Any, v: Any, mask: Any = None, dropout: float = 0.0, causal: bool = False, *,
    scale: float | None = None, enable_gqa: bool = False,
) -> Placed:  # fmt: skip
    if enable_gqa:
        raise b.refusal("grouped queries have no rule; repeat the keys and values")
    if isinstance(mask, Placed):
        raise b.refusal("a perturbed mask has no rule")
    if causal:
        mask = b.constant(torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=b.x.device).tril())
    scale = scale or q.shape[-1] ** -0.5
    (q, k, v, *masks), place = aligned(b, [q, k, v] if mask is None else [q, k, v, mask], 2)
    scores = _mul(b, _matmul(b, q, _turned(b, k)), scale)
    for mask in masks:
        scores = _add(b, scores, b.add(Fixed(functools.partial(_additive, like=b.x.dtype)), mask))
    return Placed(_matmul(b, b.add(Softmax(len(scores.shape) - 1), scores), v), place)


def _additive(mask: Tensor, like: torch.dtype) -> Tensor:
    """A mask of booleans, or of numbers to add, as finite numbers to add."""
    return _bounded_below(mask) if mask.dtype != torch.bool else torch.where(mask, 0.0, -1e4).to(like)


def _bounded_below(mask: Tensor) -> Tensor:
    """Far below any score in place of minus infinity."""
    return mask.masked_fill(mask == -math.inf, -1e4)
