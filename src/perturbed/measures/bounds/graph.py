"""A network as a graph of primitive operators, by ``torch.export``.

Composite operators (attention, layer norm, batch norm in eval mode, GELU's relatives …) are written out in the
primitives of ``operators``. Parameters stay those of the model, so that gradients reach them and later updates count.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module
from torch.utils._python_dispatch import _disable_current_modes

from perturbed.errors import PerturbedError
from perturbed.measures.bounds import relax
from perturbed.measures.bounds.operators import (
    Constant,
    Conv,
    Fixed,
    Increasing,
    Leaf,
    Linear,
    Matmul,
    MaxPool,
    Node,
    Operator,
    Permute,
    Product,
    Reshape,
    Scale,
    Softmax,
    Sum,
    Times,
    Unary,
)

INPUT = "input"


class UnsupportedOperator(PerturbedError):
    """An operator, or a use of one, through which bounds cannot be propagated."""


@dataclasses.dataclass(eq=False)
class Graph:
    """A network in primitives.

    Args:
        nodes: in an order in which inputs come first.
        leaves: what is perturbed: ``input`` and parameters by name.
        output: the node of the logits.
        batch: examples that it was made for.
    """

    nodes: list[Node]
    leaves: dict[str, Node]
    output: Node
    batch: int
    _before: dict[Node, tuple[Node, ...]] = dataclasses.field(default_factory=dict, repr=False)

    @functools.cached_property
    def positive(self) -> set[Node]:
        """The nodes of which a function is taken that is defined on positive numbers only."""
        return {n.inputs[0] for n in self.nodes if isinstance(n.op, Unary) and n.op.activation.positive}

    def before(self, node: Node) -> tuple[Node, ...]:
        """The perturbed nodes that ``node`` depends on, in order."""
        if node not in self._before:
            found = {n for n in node.inputs if n.perturbed}
            for earlier in reversed(self.nodes):
                if earlier in found:
                    found |= {n for n in earlier.inputs if n.perturbed}
            self._before[node] = tuple(n for n in self.nodes if n in found)
        return self._before[node]


class _First(Module):
    """A model's logits, or the first tensor that it returns."""

    def __init__(self, model: Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, **rest: Any) -> Tensor:
        out = self.model(x, **rest)
        if not isinstance(out, Tensor):
            out = out.logits if hasattr(out, "logits") else out[0]
        return cast(Tensor, out)


@contextmanager
def evaluated(model: Module) -> Iterator[None]:
    """``model`` in eval mode inside; afterwards each module in the mode it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def trace(
    model: Module, x: Tensor, *, weights: tuple[str, ...] = (), inputs: bool = True, rest: dict[str, Any] | None = None
) -> Graph:
    """The graph of ``model(x, **rest)`` in eval mode.

    Args:
        model: any network that ``torch.export`` takes; of several outputs, ``logits`` or the first counts.
        x: an example of the input [B, ...]; the graph serves batches of B.
        weights: names of parameters that are perturbed too, of linear or convolutional layers.
        inputs: whether the input is perturbed.
        rest: further keyword inputs, which are held at these values.

    Raises:
        UnsupportedOperator: the name of an operator without a rule and its place in the graph; or the graph does not
            compute what the model does (its output depends on random draws or on what changes at each call).
    """
    unknown = [name for name in weights if name not in dict(model.named_parameters())]
    if unknown:
        raise UnsupportedOperator(f"no parameter is called {unknown[0]!r} that was to be perturbed")
    wrapped = _First(model)
    with evaluated(wrapped), torch.no_grad(), _disable_current_modes():  # a counter of operations would stop the export
        program = torch.export.export(wrapped, (x.detach(),), rest or {})
        builder = _Builder(model, x, weights, inputs, rest or {})
        graph = builder.build(program)
        expected = wrapped(x, **(rest or {}))
    found = builder.values[graph.output]
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * (1 + float(expected.abs().max()))):
        raise UnsupportedOperator(
            "the exported graph does not compute what the model does: a hook that draws random numbers, an in-place "
            "operator on a value that is used again, or a branch on values; bounds of it would not hold"
        )
    return graph


class _Builder:
    def __init__(self, model: Module, x: Tensor, weights: tuple[str, ...], inputs: bool, rest: dict[str, Any]):
        self.model, self.x, self.weights, self.perturb_input, self.rest = model, x, weights, inputs, rest
        self.nodes: list[Node] = []
        self.leaves: dict[str, Node] = {}
        self.values: dict[Node, Tensor] = {}  # at the example, to know shapes and to compare with the model
        self.place = ""
        self.operator: Any = None  # of the exported graph, that is being written out

    @property
    def batch(self) -> int:
        return len(self.x)

    def build(self, program: Any) -> Graph:
        env: dict[Any, Any] = {}
        signature = program.graph_signature
        parameters = {**signature.inputs_to_parameters}
        buffers = {**signature.inputs_to_buffers}
        tensors = {**signature.inputs_to_lifted_tensor_constants}
        given = iter([self.x, *self.rest.values()])
        first = True
        for node in program.graph.nodes:
            self.place = node.name
            if node.op == "placeholder":
                if node.name in parameters:
                    env[node] = self.parameter(parameters[node.name].removeprefix("model."))
                elif node.name in buffers:
                    env[node] = self.buffer(program, buffers[node.name])
                elif node.name in tensors:
                    env[node] = self.constant(program.constants[tensors[node.name]])
                else:
                    env[node] = self.given(next(given), first)
                    first = False
            elif node.op == "call_function":
                args = torch.fx.node.map_arg(node.args, env.__getitem__)
                kwargs = torch.fx.node.map_arg(node.kwargs, env.__getitem__)
                env[node] = self.call(node.target, args, kwargs)
            elif node.op == "output":
                result = env[next(a for a in node.args[0] if a is not None)]
        if not result.perturbed:
            raise UnsupportedOperator("the output does not depend on what is perturbed")
        return Graph(self.nodes, self.leaves, result, self.batch)

    def given(self, value: Any, first: bool) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not first:
            return self.constant(value)
        return self.leaf(INPUT, value) if self.perturb_input else self.add(Leaf(), name=INPUT, value=value)

    def leaf(self, name: str, value: Tensor, fetch: Callable[[], Tensor] | None = None) -> Node:
        node = self.add(Leaf(fetch), name=name, value=value, perturbed=True)
        self.leaves[name] = node
        return node

    def parameter(self, name: str) -> Node:
        if name in self.weights:
            fetch = functools.partial(_lookup_expanded, self.model, name, self.batch)
            return self.leaf(name, fetch(), fetch)
        return self.add(Constant(functools.partial(_lookup, self.model, name)))

    def buffer(self, program: Any, name: str) -> Node:
        own = name.removeprefix("model.")
        if own in dict(self.model.named_buffers()):
            return self.add(Constant(functools.partial(_lookup, self.model, own)))
        return self.constant(program.constants[name])

    def constant(self, value: Tensor) -> Node:
        return self.add(Constant(lambda: value))

    def add(
        self, op: Operator, *inputs: Node, name: str = "", value: Tensor | None = None, perturbed: bool | None = None
    ) -> Node:
        """A new node; where its inputs are perturbed, axis 0 must stay the batch."""
        if value is None:
            value = op.value(*(self.values[n] for n in inputs))
        moved = any(n.perturbed for n in inputs) if perturbed is None else perturbed
        if moved and (value.dim() == 0 or value.shape[0] != self.batch):
            raise self.refusal(f"its result {list(value.shape)} does not have the batch of {self.batch} as axis 0")
        node = Node(name or self.place, op, inputs, value.shape, moved)
        self.values[node] = value
        self.nodes.append(node)
        return node

    def refusal(self, why: str) -> UnsupportedOperator:
        return UnsupportedOperator(f"bounds cannot be propagated through {self.place!r} in the exported graph: {why}")

    def call(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The node of one exported operator."""
        if target is torch.ops.aten._assert_tensor_metadata.default:
            return None
        moving = any(n.perturbed for n in _nodes((args, kwargs)))
        if target is operator.getitem and isinstance(args[0], list | tuple):
            return args[0][args[1]]
        if not moving:
            return self.fixed(target, args, kwargs)
        if not hasattr(target, "_schema"):
            raise self.refusal(f"no rule for {target}")
        name = target._schema.name.removeprefix("aten::").removesuffix("_")
        rule = RULES.get(name)
        if rule is None:
            raise self.refusal(f"no rule for operator {target}; there are rules for {', '.join(sorted(RULES))}")
        self.operator = target
        try:
            return rule(self, *args, **kwargs)
        except TypeError as e:
            raise self.refusal(f"{target} is used in a way that has no rule ({e})") from e

    def fixed(self, target: Any, args: Any, kwargs: Any) -> Any:
        inputs = tuple(dict.fromkeys(_nodes((args, kwargs))))

        def fn(*values: Tensor) -> Any:
            held = dict(zip(inputs, values, strict=True))
            mapped, named = _replaced((args, kwargs), held)
            return target(*mapped, **named)

        value = fn(*(self.values[n] for n in inputs))
        if isinstance(value, Tensor):
            return self.add(Fixed(fn), *inputs, value=value)
        if isinstance(value, list | tuple):
            return [
                self.add(Fixed(functools.partial(_item, fn, i)), *inputs, value=part) for i, part in enumerate(value)
            ]
        return value

    def node(self, thing: Node | float | int | Tensor) -> Node:
        """A literal as a node."""
        if isinstance(thing, Node):
            return thing
        return self.constant(torch.as_tensor(thing, dtype=self.x.dtype, device=self.x.device))

    def axis(self, axis: int, x: Node) -> int:
        """An axis counted from the front; that of the batch is refused."""
        axis = axis % len(x.shape)
        if axis == 0:
            raise self.refusal("it acts along axis 0, the batch, of which bounds are made one example at a time")
        return axis


def _item(fn: Callable[..., Any], i: int, *values: Tensor) -> Tensor:
    part: Tensor = fn(*values)[i]
    return part


def _lookup(model: Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(path), leaf)
    return found


def _lookup_expanded(model: Module, name: str, batch: int) -> Tensor:
    value = _lookup(model, name)
    return value.expand(batch, *value.shape)


def _nodes(thing: Any) -> Iterator[Node]:
    if isinstance(thing, Node):
        yield thing
    elif isinstance(thing, list | tuple):
        for item in thing:
            yield from _nodes(item)
    elif isinstance(thing, dict):
        yield from _nodes(list(thing.values()))


def _replaced(thing: Any, by: dict[Node, Tensor]) -> Any:
    if isinstance(thing, Node):
        return by[thing]
    if isinstance(thing, list | tuple):
        return type(thing)(_replaced(item, by) for item in thing)
    if isinstance(thing, dict):
        return {k: _replaced(v, by) for k, v in thing.items()}
    return thing


# Rules: what each exported operator is in primitives, where it has a perturbed input.

Rule = Callable[..., Any]
R = TypeVar("R", bound=Rule)
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[R], R]:
    """Register a rule under the names that ATen gives the operator."""

    def keep(fn: R) -> R:
        for name in names:
            RULES[name] = fn
        return fn

    return keep


@rule("clone", "contiguous", "dropout", "feature_dropout", "alias", "detach", "lift_fresh_copy")
def _same(b: _Builder, x: Node, *args: Any, **kwargs: Any) -> Node:
    return x  # dropout is off: the graph is made in eval mode


@rule("to", "_to_copy")
def _to(b: _Builder, x: Node, *args: Any, **kwargs: Any) -> Node:
    wanted = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]
    if any(dtype != b.values[x].dtype for dtype in wanted):
        raise b.refusal(f"it changes the number type to {wanted[0]}; give the model and input one type")
    return x


@rule("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "_unsafe_view", "view_as", "reshape_as")
def _reshape(b: _Builder, x: Node, *args: Any, **kwargs: Any) -> Node:
    shape = b.operator(b.values[x], *_replaced(args, b.values), **kwargs).shape
    return b.add(Reshape(functools.partial(torch.reshape, shape=tuple(shape))), x)


@rule("permute")
def _permute(b: _Builder, x: Node, dims: list[int]) -> Node:
    order = tuple(d % len(x.shape) for d in dims)
    if order[0] != 0:
        raise b.refusal("it moves axis 0, the batch")
    return b.add(Permute(order), x)


@rule("transpose", "swapaxes")
def _transpose(b: _Builder, x: Node, one: int, two: int) -> Node:
    order = list(range(len(x.shape)))
    one, two = b.axis(one, x), b.axis(two, x)
    order[one], order[two] = two, one
    return b.add(Permute(tuple(order)), x)


@rule("t", "mT")
def _turned(b: _Builder, x: Node) -> Node:
    return _transpose(b, x, -1, -2)


@rule("expand", "expand_as")
def _expand(b: _Builder, x: Node, size: Any, **kwargs: Any) -> Node:
    shape = b.values[size].shape if isinstance(size, Node) else tuple(size)
    if len(shape) != len(x.shape):
        raise b.refusal("it adds axes in front of the batch")
    return b.add(Increasing(lambda v: v.expand(shape)), x)


@rule("slice")
def _slice(b: _Builder, x: Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Node:
    dim = dim % len(x.shape)
    whole = len(range(*slice(start, end, step).indices(x.shape[dim]))) == x.shape[dim]
    if whole:
        return x
    dim = b.axis(dim, x)
    return b.add(Increasing(lambda v: torch.ops.aten.slice.Tensor(v, dim, start, end, step)), x)


@rule("select")
def _select(b: _Builder, x: Node, dim: int, index: int) -> Node:
    dim = b.axis(dim, x)
    return b.add(Increasing(lambda v: v.select(dim, index)), x)


@rule("chunk", "split", "split_with_sizes")
def _split(b: _Builder, x: Node, sizes: Any, dim: int = 0) -> list[Node]:
    dim = b.axis(dim, x)
    parts = b.operator(b.values[x], sizes, dim)
    found, at = [], 0
    for part in parts:
        found.append(b.add(Increasing(functools.partial(torch.narrow, dim=dim, start=at, length=part.shape[dim])), x))
        at += part.shape[dim]
    return found


@rule("cat", "concat")
def _cat(b: _Builder, xs: list[Node], dim: int = 0) -> Node:
    dim = b.axis(dim, xs[0])
    return b.add(Increasing(lambda *v: torch.cat(v, dim)), *xs)


@rule("stack")
def _stack(b: _Builder, xs: list[Node], dim: int = 0) -> Node:
    dim = dim % (len(xs[0].shape) + 1)
    if dim == 0:
        raise b.refusal("it stacks in front of the batch")
    return b.add(Increasing(lambda *v: torch.stack(v, dim)), *xs)


@rule("mean", "sum")
def _reduce(b: _Builder, x: Node, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Node:
    if dim is None:
        raise b.refusal("it sums over all axes, the batch among them")
    axes = tuple(b.axis(d, x) for d in ([dim] if isinstance(dim, int) else dim))
    call = torch.sum if b.operator is torch.ops.aten.sum.dim_IntList else torch.mean
    return b.add(Increasing(lambda v: call(v, axes, keepdim)), x)


@rule("constant_pad_nd")
def _constant_pad(b: _Builder, x: Node, widths: list[int], value: float | None = 0) -> Node:
    if value or len(widths) >= 2 * len(x.shape):
        raise b.refusal("padding with another number than 0, or along the batch, has no rule")
    return b.add(Increasing(lambda v: F.pad(v, widths)), x)


@rule("pad")
def _pad(b: _Builder, x: Node, widths: list[int], mode: str = "constant", value: float | None = None) -> Node:
    if mode != "constant":
        raise b.refusal(f"padding by {mode} has no rule")
    return _constant_pad(b, x, widths, value)


@rule("avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "im2col",
      "upsample_nearest2d")  # fmt: skip
def _pooled(b: _Builder, x: Node, *args: Any, **kwargs: Any) -> Node:
    call = b.operator
    return b.add(Increasing(lambda v: call(v, *args, **kwargs)), x)


def _line_up(b: _Builder, x: Node, z: Node) -> None:
    """Refuse a broadcast that would put another axis in place of a perturbed input's batch."""
    ranks = {len(n.shape) for n in (x, z) if n.perturbed}
    others = [len(n.shape) for n in (x, z) if not n.perturbed]
    if len(ranks) != 1 or any(rank > min(ranks) for rank in others):
        raise b.refusal("it broadcasts over axes in front of the batch")


@rule("add")
def _add(b: _Builder, x: Any, z: Any, *, alpha: float = 1) -> Node:
    x, z = b.node(x), b.node(z)
    _line_up(b, x, z)
    return b.add(Sum(), x, z if alpha == 1 else _mul(b, z, alpha))


@rule("sub")
def _sub(b: _Builder, x: Any, z: Any, *, alpha: float = 1) -> Node:
    x, z = b.node(x), b.node(z)
    _line_up(b, x, z)
    return b.add(Sum(-1.0), x, z if alpha == 1 else _mul(b, z, alpha))


@rule("rsub")
def _rsub(b: _Builder, x: Any, z: Any, alpha: float = 1) -> Node:
    return _sub(b, z, x if alpha == 1 else _mul(b, x, alpha))


@rule("neg")
def _neg(b: _Builder, x: Node) -> Node:
    return _mul(b, x, -1.0)


@rule("mul")
def _mul(b: _Builder, x: Any, z: Any) -> Node:
    if x is z:
        return _unary(b, "square", x)
    x, z = b.node(x), b.node(z)
    if not (x.perturbed or z.perturbed):
        return b.add(Fixed(torch.mul), x, z)
    _line_up(b, x, z)
    if x.perturbed and z.perturbed:
        return b.add(Product(), x, z)
    return b.add(Scale(), x, z) if x.perturbed else b.add(Scale(), z, x)


@rule("div")
def _div(b: _Builder, x: Any, z: Any) -> Node:
    z = b.node(z)
    return _mul(b, x, _unary(b, "reciprocal", z) if z.perturbed else b.add(Fixed(torch.reciprocal), z))


def _unary(b: _Builder, name: str, x: Node) -> Node:
    return b.add(Unary(relax.ACTIVATIONS[name]), x)


def _elementwise(name: str) -> Rule:
    return lambda b, x: _unary(b, name, x)


for _function in ("relu", "tanh", "sigmoid", "exp", "log", "sqrt", "reciprocal", "square"):
    RULES[_function] = _elementwise(_function)


@rule("rsqrt")
def _rsqrt(b: _Builder, x: Node) -> Node:
    return _unary(b, "reciprocal", _unary(b, "sqrt", x))


@rule("pow")
def _pow(b: _Builder, x: Node, exponent: float) -> Node:
    if exponent == 2:
        return _unary(b, "square", x)
    if exponent == 0.5:
        return _unary(b, "sqrt", x)
    if exponent == -0.5:
        return _rsqrt(b, x)
    raise b.refusal(f"there is no rule for the power {exponent}")


@rule("gelu")
def _gelu(b: _Builder, x: Node, *, approximate: str = "none") -> Node:
    if approximate == "none":
        return _unary(b, "gelu", x)
    inner = _add(b, x, _mul(b, _mul(b, _unary(b, "square", x), x), 0.044715))
    gate = _unary(b, "sigmoid", _mul(b, inner, 2 * math.sqrt(2 / math.pi)))  # (1 + tanh(t)) / 2 = sigmoid(2 t)
    return _mul(b, x, gate)


@rule("silu")
def _silu(b: _Builder, x: Node) -> Node:
    return _mul(b, x, _unary(b, "sigmoid", x))


@rule("leaky_relu")
def _leaky_relu(b: _Builder, x: Node, slope: float = 0.01) -> Node:
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


@rule("linear")
def _linear(b: _Builder, x: Node, weight: Node, bias: Node | None = None) -> Node:
    if not weight.perturbed:
        if bias is not None and bias.perturbed:
            return _shift(b, b.add(Linear(), x, weight), bias)
        return b.add(Linear(), x, weight, *(() if bias is None else (bias,)))
    rows = x if len(x.shape) > 2 else _reshaped(b, x, (b.batch, 1, x.shape[-1]))
    turned = _transpose(b, weight, -1, -2)
    for _ in range(len(rows.shape) - 3):
        turned = _reshaped(b, turned, (b.batch, 1, *turned.shape[1:]))
    out = _matmul(b, rows, turned)
    out = out if len(x.shape) > 2 else _reshaped(b, out, (b.batch, out.shape[-1]))
    return out if bias is None else _shift(b, out, bias)


def _reshaped(b: _Builder, x: Node, shape: tuple[int, ...]) -> Node:
    op = Reshape(functools.partial(torch.reshape, shape=shape))
    return b.add(op, x)


def _shift(b: _Builder, x: Node, bias: Node) -> Node:
    """The sum with a bias of its last axis, which is [B, n] where it is perturbed."""
    if bias.perturbed:
        bias = _reshaped(b, bias, (b.batch, *[1] * (len(x.shape) - 2), bias.shape[-1]))
    return _add(b, x, bias)


@rule("addmm")
def _addmm(b: _Builder, bias: Node, x: Node, weight: Node) -> Node:
    return _add(b, _matmul(b, x, weight), bias)


@rule("matmul", "bmm", "mm")
def _matmul(b: _Builder, x: Node, z: Node) -> Node:
    if x.perturbed and z.perturbed:
        if len(x.shape) != len(z.shape) or len(x.shape) < 3:
            raise b.refusal(f"a product of perturbed {list(x.shape)} and {list(z.shape)} has no rule")
        x, z = _spread(b, x, z), _spread(b, z, x)
        return b.add(Matmul(), x, z)
    if len(x.shape) < 2 or len(z.shape) < 2 or (z.perturbed and len(x.shape) > len(z.shape)):
        raise b.refusal(f"a product of {list(x.shape)} and {list(z.shape)} has no rule")
    if x.perturbed:
        if len(z.shape) > len(x.shape):
            raise b.refusal(f"a product of {list(x.shape)} and {list(z.shape)} has no rule")
        return b.add(Times(right=True), x, z)
    if len(z.shape) == 2:
        raise b.refusal("it mixes the examples of the batch")
    return b.add(Times(right=False), z, x)


def _spread(b: _Builder, x: Node, like: Node) -> Node:
    """The node with its axes before the last two broadcast to those of ``like``."""
    shape = (*torch.broadcast_shapes(x.shape[:-2], like.shape[:-2]), *x.shape[-2:])  # type: ignore[no-untyped-call]
    return x if x.shape == shape else b.add(Increasing(lambda v: v.expand(shape)), x)


@rule("conv1d", "conv2d", "conv3d")
def _conv(
    b: _Builder, x: Node, weight: Node, bias: Node | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Node:  # fmt: skip
    dims = len(b.values[weight].shape) - 2 - weight.perturbed
    stride, padding, dilation = (
        [v] * dims if isinstance(v, int) else list(v) * (dims // len(v)) for v in (stride, padding, dilation)
    )
    if any(isinstance(p, str) for p in padding):
        raise b.refusal("padding by name has no rule; give numbers")
    if weight.perturbed:
        return _perturbed_conv(b, x, weight, bias, stride, padding, dilation, groups)
    op = Conv(stride, padding, dilation, groups)
    if bias is not None and bias.perturbed:
        shaped = _reshaped(b, bias, (b.batch, bias.shape[-1], *[1] * dims))
        return _add(b, b.add(op, x, weight), shaped)
    return b.add(op, x, weight, *(() if bias is None else (bias,)))


def _perturbed_conv(
    b: _Builder, x: Node, weight: Node, bias: Node | None, stride: list[int], padding: list[int], dilation: list[int],
    groups: int,
) -> Node:  # fmt: skip
    """A convolution with a perturbed kernel, as a product of matrices."""
    if len(weight.shape) != 5 or groups != 1:
        raise b.refusal("a perturbed kernel is supported in two dimensions without groups")
    kernel = tuple(weight.shape[3:])

    def patches(v: Tensor) -> Tensor:
        return F.unfold(v, kernel, tuple(dilation), tuple(padding), tuple(stride))

    columns = b.add(Increasing(patches) if x.perturbed else Fixed(patches), x)
    flat = _reshaped(b, weight, (b.batch, weight.shape[1], math.prod(weight.shape[2:])))
    out = _matmul(b, flat, columns)
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], padding, dilation, kernel, stride, strict=True)
    ]
    out = _reshaped(b, out, (b.batch, weight.shape[1], *size))
    if bias is None:
        return out
    if bias.perturbed:
        shaped = _reshaped(b, bias, (b.batch, bias.shape[-1], 1, 1))
    else:
        shaped = b.add(Fixed(lambda v: v.view(-1, 1, 1)), bias)
    return _add(b, out, shaped)


@rule("batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def _batch_norm(
    b: _Builder, x: Node, weight: Node | None, bias: Node | None, mean: Node | None, var: Node | None, training: bool,
    momentum: float, eps: float, *args: Any,
) -> Node:  # fmt: skip
    if training or mean is None or var is None:
        raise b.refusal("batch normalisation has bounds by its running statistics only; it keeps none")
    shape = (-1, *[1] * (len(x.shape) - 2))
    rate = b.add(Fixed(lambda v: (v + eps).rsqrt().view(shape)), var)
    if weight is not None:
        rate = b.add(Fixed(lambda r, w: r * w.view(shape)), rate, weight)
    offset = b.add(Fixed(lambda r, m: -r * m.view(shape)), rate, mean)
    if bias is not None:
        offset = b.add(Fixed(lambda o, c: o + c.view(shape)), offset, bias)
    return _add(b, _mul(b, x, rate), offset)


@rule("max_pool2d")
def _max_pool(
    b: _Builder, x: Node, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Node:
    def pair(v: Any) -> tuple[int, int]:
        return (v, v) if isinstance(v, int) else (v[0], v[-1])

    if pair(dilation) != (1, 1) or ceil_mode or len(x.shape) != 4:
        raise b.refusal("max pooling with dilation, with ceil_mode or of unbatched images has no rule")
    return b.add(MaxPool(pair(kernel), pair(stride or kernel), pair(padding)), x)


@rule("softmax", "_softmax")
def _softmax(b: _Builder, x: Node, dim: int, *args: Any) -> Node:
    return b.add(Softmax(b.axis(dim, x)), x)


@rule("layer_norm")
def _layer_norm(
    b: _Builder, x: Node, shape: list[int], weight: Node | None = None, bias: Node | None = None, eps: float = 1e-5,
    *args: Any,
) -> Node:  # fmt: skip
    axes = list(range(-len(shape), 0))
    b.operator = torch.ops.aten.mean.dim
    centred = _sub(b, x, _reduce(b, x, axes, True))
    spread = _add(b, _reduce(b, _unary(b, "square", centred), axes, True), eps)
    out = _mul(b, centred, _rsqrt(b, spread))
    if weight is not None:
        out = _mul(b, out, weight)
    return out if bias is None else _add(b, out, bias)


@rule("scaled_dot_product_attention")
def _attention(
    b: _Builder, q: Node, k: Node, v: Node, mask: Node | None = None, dropout: float = 0.0, causal: bool = False, *,
    scale: float | None = None, enable_gqa: bool = False,
) -> Node:  # fmt: skip
    if enable_gqa:
        raise b.refusal("grouped queries have no rule; repeat the keys and values")
    scores = _mul(b, _matmul(b, q, _transpose(b, k, -1, -2)), scale or q.shape[-1] ** -0.5)
    if causal:
        mask = b.constant(torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=b.x.device).tril())
    if mask is not None:
        if mask.perturbed:
            raise b.refusal("a perturbed mask has no rule")
        scores = _add(b, scores, b.add(Fixed(functools.partial(_additive, like=b.x.dtype)), mask))
    return _matmul(b, b.add(Softmax(len(scores.shape) - 1), scores), v)


def _additive(mask: Tensor, like: torch.dtype) -> Tensor:
    """A mask of booleans as numbers to add: far below any score, yet finite, so that tangents stay finite."""
    return mask if mask.dtype != torch.bool else torch.where(mask, 0.0, -1e4).to(like)
