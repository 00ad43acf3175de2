"""A network as a graph of primitive operators, by ``torch.export``.

Composite operators (attention, layer norm, batch norm in eval mode, GELU's relatives …) are written out in the
primitives of ``operators``. Parameters stay those of the model, so that gradients reach them and later updates count.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from perturbed.errors import PerturbedError
from perturbed.measures.bounds.layout import Place, Placed
from perturbed.measures.bounds.operators import Constant, Fixed, Increasing, Leaf, Node, Operator, Unary
from perturbed.measures.bounds.rules import FILLED, RULES, SHAPED, among, freed, fronted, replaced

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
        axis: of the input that holds them.
        place: where they are in the model's output.
    """

    nodes: list[Node]
    leaves: dict[str, Node]
    output: Node
    batch: int
    axis: int
    place: Place
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


@contextmanager
def in_operators() -> Iterator[None]:
    """Torch's attention and transformer layers in operators that there are rules for, not in one of their own."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def trace(
    model: Module, x: Tensor, *, weights: tuple[str, ...] = (), inputs: bool = True, rest: dict[str, Any] | None = None,
    axis: int = 0,
) -> Graph:  # fmt: skip
    """The graph of ``model(x, **rest)`` in eval mode.

    Args:
        model: any network that ``torch.export`` takes; of several outputs, ``logits`` or the first counts.
        x: an example of the input [B, ...], or with the batch in another ``axis``; the graph serves batches of B.
        weights: names of parameters that are perturbed too, of linear or convolutional layers.
        inputs: whether the input is perturbed.
        rest: further keyword inputs, which are held at these values.
        axis: of the input that holds the batch: 1 of sequences [T, B, D].

    Raises:
        ValueError: no such axis of the input.
        UnsupportedOperator: the name and place of an operator without a rule, or of one that mixes the examples of a
            batch or reads what was written over in place; or the graph does not compute what the model does (its
            output depends on random draws or on what changes at each call).
    """
    if not -x.dim() <= axis < x.dim():
        raise ValueError(f"axis={axis}, but the input has {x.dim()} axes: it must be the one that holds the batch")
    unknown = [name for name in weights if name not in dict(model.named_parameters())]
    if unknown:
        raise UnsupportedOperator(f"no parameter is called {unknown[0]!r} that was to be perturbed")
    wrapped = _First(model)
    # a counter of operations would stop the export
    with evaluated(wrapped), in_operators(), torch.no_grad(), _disable_current_modes():
        program = torch.export.export(wrapped, (x.detach(),), rest or {})
        builder = Builder(model, x, weights, inputs, rest or {}, axis)
        graph = builder.build(program)
        expected = wrapped(x, **(rest or {}))
    found = graph.place.together(builder.values[graph.output])
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * (1 + float(expected.abs().max()))):
        raise UnsupportedOperator(
            "the exported graph does not compute what the model does: a hook that draws random numbers, an in-place "
            "operator on a value that is used again, or a branch on values; bounds of it would not hold"
        )
    return graph


class Builder:
    """Writes an exported graph in primitives; what the rules are given."""

    def __init__(
        self, model: Module, x: Tensor, weights: tuple[str, ...], inputs: bool, rest: dict[str, Any], axis: int
    ):
        self.model, self.x, self.weights, self.perturb_input, self.rest = model, x, weights, inputs, rest
        self.input_axis = range(x.dim())[axis]
        self.nodes: list[Node] = []
        self.leaves: dict[str, Node] = {}
        self.values: dict[Node, Tensor] = {}  # at the example, to know shapes and to compare with the model
        self.place = ""
        self.operator: Any = None  # of the exported graph, that is being written out

    @property
    def batch(self) -> int:
        """Examples in the input."""
        return self.x.shape[self.input_axis]

    def build(self, program: Any) -> Graph:
        """The graph of a program that ``torch.export`` gave."""
        stale = reads_stale(program)
        if stale is not None:
            self.place = stale.name
            raise self.refusal("it reads what an in-place operator has written over since, through a view of it say")
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
                    env[node] = self._parameter(parameters[node.name].removeprefix("model."))
                elif node.name in buffers:
                    env[node] = self._buffer(program, buffers[node.name])
                elif node.name in tensors:
                    env[node] = self.constant(program.constants[tensors[node.name]])
                else:
                    env[node] = self._given(next(given), first)
                    first = False
            elif node.op == "call_function":
                args = torch.fx.node.map_arg(node.args, env.__getitem__)
                kwargs = torch.fx.node.map_arg(node.kwargs, env.__getitem__)
                env[node] = self.call(node.target, args, kwargs)
                if isinstance(env[node], Placed) and env[node].shape != tuple(node.meta["val"].shape):
                    raise self.refusal(f"its result is not of shape {list(node.meta['val'].shape)} by its rule")
            elif node.op == "output":
                result = env[next(a for a in node.args[0] if a is not None)]
        if not isinstance(result, Placed):
            raise UnsupportedOperator("the output does not depend on what is perturbed")
        read = {result.node, *(used for node in self.nodes for used in node.inputs)}
        unread = next((name for name in self.weights if self.leaves.get(name, result.node) not in read), None)
        if unread is not None:
            raise UnsupportedOperator(f"no operator of the graph reads {unread!r}: no bound would count that it moves")
        result = fronted(self, result)
        if result.place.axis is None and self.batch > 1:
            raise UnsupportedOperator("the output has no batch: it does not depend on the input")
        return Graph(self.nodes, self.leaves, result.node, self.batch, self.input_axis, result.place)

    def _given(self, value: Any, first: bool) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not first:
            return self.constant(value)
        if not self.perturb_input:
            return self.add(Leaf(), name=INPUT, value=value)
        place = Place(self.input_axis)
        return self._leaf(INPUT, place.apart(value), place)

    def _leaf(self, name: str, value: Tensor, place: Place, fetch: Callable[[], Tensor] | None = None) -> Placed:
        node = self.add(Leaf(fetch), name=name, value=value, perturbed=True)
        self.leaves[name] = node
        return Placed(node, place)

    def _parameter(self, name: str) -> Node | Placed:
        own = _lookup(self.model, name)
        moved = next((w for w in self.weights if _lookup(self.model, w) is own), None)  # a shared one has more names
        if moved in self.leaves:
            return Placed(self.leaves[moved], Place(None))
        if moved is not None:
            fetch = functools.partial(_lookup_expanded, self.model, moved, self.batch)
            return self._leaf(moved, fetch(), Place(None), fetch)
        return self.add(Constant(functools.partial(_lookup, self.model, name)))

    def _buffer(self, program: Any, name: str) -> Node:
        own = name.removeprefix("model.")
        if own in dict(self.model.named_buffers()):
            return self.add(Constant(functools.partial(_lookup, self.model, own)))
        return self.constant(program.constants[name])

    def constant(self, value: Tensor) -> Node:
        """A node of a value that stays."""
        return self.add(Constant(lambda: value))

    def add(
        self, op: Operator, *inputs: Node, name: str = "", value: Tensor | None = None, perturbed: bool | None = None
    ) -> Node:
        """A new node; where its inputs are perturbed, its axis 0 must be the batch."""
        if value is None:
            value = op.value(*(self.values[n] for n in inputs))
        moved = any(n.perturbed for n in inputs) if perturbed is None else perturbed
        if moved and (value.dim() == 0 or value.shape[0] != self.batch):
            raise self.refusal(f"its result {list(value.shape)} does not have the batch of {self.batch} as axis 0")
        node = Node(name or self.place, op, inputs, value.shape, moved)
        self.values[node] = value
        self.nodes.append(node)
        return node

    def on(self, x: Placed, fn: Callable[[Tensor], Tensor], place: Place | None = None) -> Placed:
        """An affine function without negative weights, of a node; the place of the batch in its result."""
        return Placed(self.add(Increasing(fn), x.node), place or x.place)

    def refusal(self, why: str) -> UnsupportedOperator:
        """The error for an operator, with its place."""
        return UnsupportedOperator(f"bounds cannot be propagated through {self.place!r} in the exported graph: {why}")

    def call(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The node of one exported operator."""
        if target is torch.ops.aten._assert_tensor_metadata.default:
            return None
        moving = any(isinstance(v, Placed) for v in among((args, kwargs)))
        if target is operator.getitem and isinstance(args[0], list | tuple):
            return args[0][args[1]]
        if not moving:
            return self._fixed(target, args, kwargs)
        if not hasattr(target, "_schema"):
            raise self.refusal(f"no rule for {target}")
        name = target._schema.name.removeprefix("aten::").removesuffix("_")
        if name in FILLED or (name in SHAPED and isinstance(args[0], Node)):
            return self._fixed(target, *replaced((args, kwargs), self._blank))
        rule = RULES.get(name)
        if rule is None:
            raise self.refusal(f"no rule for operator {target}; there are rules for {', '.join(sorted(RULES))}")
        self.operator = target
        try:
            return self._ruled(rule, args, kwargs)
        except TypeError as e:
            raise self.refusal(f"{target} is used in a way that has no rule ({e})") from e

    def _blank(self, v: Node | Placed) -> Node:
        """A fixed value of the same shape and type, for what reads no more of it."""
        return v if isinstance(v, Node) else self.constant(self.values[v.node].new_zeros(v.shape))

    def _ruled(self, rule: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        before = len(self.nodes)
        try:
            return rule(self, *args, **kwargs)
        except UnsupportedOperator:
            if self.batch > 1:
                raise
        del self.nodes[before:]
        args, kwargs = replaced((args, kwargs), lambda v: freed(self, v) if isinstance(v, Placed) else v)
        return rule(self, *args, **kwargs)  # one example alone: which axis is its batch does not matter

    def _fixed(self, target: Any, args: Any, kwargs: Any) -> Any:
        inputs = tuple(dict.fromkeys(cast(Iterator[Node], among((args, kwargs)))))

        def fn(*values: Tensor) -> Any:
            held = dict(zip(inputs, values, strict=True))
            mapped, named = replaced((args, kwargs), held.__getitem__)
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

    def mixing(self, axis: int) -> UnsupportedOperator:
        """The error for an operator along the batch."""
        return self.refusal(f"it acts along axis {axis}, the batch, of which bounds are made one example at a time")

    def axis(self, x: Placed, axis: int) -> int:
        """The node's axis that is the model's ``axis``; that of the batch is refused."""
        return self.beside(x.place, axis % len(x.shape))

    def beside(self, place: Place, axis: int) -> int:
        """As ``axis``, of a value with the batch at ``place``."""
        found = place.along(axis)
        if found is None:
            raise self.mixing(axis)
        return found

    def presumed(self, x: Node) -> Place:
        """The place of the batch in a fixed value that meets a perturbed weight: axis 0."""
        if not x.shape or x.shape[0] != self.batch:
            raise self.refusal(
                f"a perturbed weight meets {list(x.shape)}, which does not have the batch of {self.batch} as axis 0; "
                "perturb the input too, in a ball of radius 0"
            )
        return Place()

    def shape_of(self, x: Placed, *args: Any, **kwargs: Any) -> tuple[int, ...]:
        """The shape of what the exported operator makes of the model's ``x``."""
        blank, *others = (replaced(v, lambda n: torch.empty(n.shape, device="meta")) for v in (x, *args))
        return tuple(self.operator(blank, *others, **kwargs).shape)


def reads_stale(program: Any) -> Any:
    """The first node of an exported program that reads what another node has since written over; None if none does."""
    stale: set[Any] = set()
    sharing: dict[int, set[Any]] = {}
    for node in program.graph.nodes:
        if stale & set(node.all_input_nodes):
            return node
        writes = hasattr(node.target, "_schema") and node.target._schema.is_mutable
        for value in tree_leaves(node.meta.get("val")):
            if isinstance(value, Tensor):
                others = sharing.setdefault(value.untyped_storage()._cdata, set())
                stale |= others if writes else set()
                others.add(node)
    return None


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
