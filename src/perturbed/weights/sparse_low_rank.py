"""Linear layers whose weight is a low-rank product plus a sparse matrix on a fixed random support."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import Module, Parameter

from perturbed.core.context import Ctx
from perturbed.core.plan import Plan, Site
from perturbed.errors import PlanError, nearest
from perturbed.weights.replace import replace_modules


def dense_weight(
    shape: tuple[int, int],
    up: Tensor | None,
    down: Tensor | None,
    scale: float,
    values: Tensor | None,
    support: Tensor | None,
) -> Tensor:
    """``scale * up @ down + S`` [out, in], S being ``values`` at the places ``support`` and 0 elsewhere.

    Args:
        shape: (out, in).
        up: [out, rank], or None for no product.
        down: [rank, in], or None.
        scale: of the product alone.
        values: k of them, in any shape, or None for no S; not both this and ``up`` may be None.
        support: [k] distinct places in the weight laid out row after row.
    """
    if up is not None and down is not None:
        weight = (up @ down).mul(scale)
    else:
        assert values is not None
        weight = values.new_zeros(shape)
    if values is None or support is None:
        return weight
    return weight.flatten().index_add(0, support, values.flatten()).view(shape)


class _Product(torch.autograd.Function):
    """``x W^T + b`` that keeps the parts of W for the backward pass, and builds W a second time there."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        up: Tensor | None,
        down: Tensor | None,
        values: Tensor | None,
        support: Tensor,
        bias: Tensor | None,
        scale: float,
        shape: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(x, up, down, values, support)
        ctx.scale, ctx.shape = scale, shape
        with torch.autocast(x.device.type, enabled=False):
            weight = dense_weight(shape, up, down, scale, values, support).to(x.dtype)
            return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable  # type: ignore[no-untyped-call, untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, values, support = ctx.saved_tensors
        rows, columns = ctx.shape
        grad, wanted = grad.reshape(-1, rows), ctx.needs_input_grad
        to_x = to_up = to_down = to_values = None
        if wanted[0]:
            weight = dense_weight(ctx.shape, up, down, ctx.scale, values, support).to(grad.dtype)
            to_x = (grad @ weight).view(x.shape)
        if any(wanted[1:4]):
            like = values if values is not None else up
            to_weight = (grad.t() @ x.reshape(-1, columns)).to(like.dtype)
            if wanted[1]:
                to_up = to_weight @ down.t() * ctx.scale
            if wanted[2]:
                to_down = up.t() @ to_weight * ctx.scale
            if wanted[3]:
                to_values = to_weight.flatten().index_select(0, support).view_as(values)
        return to_x, to_up, to_down, to_values, None, grad.sum(0) if wanted[5] else None, None, None


class SparseLowRankLinear(Module):
    """A linear layer with weight ``scale * up @ down + S`` (SLTrain, 2406.02214).

    S has ``floor(density * out * in)`` entries that train; their places are drawn once, uniformly without replacement,
    and kept as the buffer ``support``. The dense weight is built anew for each product, forward and backward, and kept
    in neither the checkpoint nor the graph.

    Initial draws, with U(a) uniform on [-a, a]: ``down`` U(1/sqrt(in)), ``up`` 0, entries of S U(1/sqrt(in)), bias
    U(1/sqrt(out)). Without S, ``up`` is U(1/sqrt(rank)), as in two linear layers: were it 0 too, the layers of a block
    would keep each other there (of a product of two zeros, as of a gate or of values and output, no gradient comes).

    Args:
        in_features: size of the input.
        out_features: size of the output.
        rank: of the product; 0 leaves it out.
        density: share of S that may be other than 0, in [0, 1]; 0 leaves S out.
        scale: factor of the product alone (the paper's alpha / r).
        bias: whether there is one.
        rng: of the draws; None is torch's default generator.

    Raises:
        PlanError: a number is out of its range, or both parts are left out.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        density: float,
        scale: float = 0.25,
        bias: bool = False,
        rng: torch.Generator | None = None,
    ):
        super().__init__()
        places = _check(rank, density, out_features * in_features)

        def uniform(*shape: int, fan: int) -> Parameter:
            return Parameter(torch.rand(shape, generator=rng).mul_(2).sub_(1).div_(math.sqrt(fan)))

        self.in_features, self.out_features = in_features, out_features
        self.rank, self.scale = rank, scale
        support = torch.randperm(out_features * in_features, generator=rng)[:places]
        # of a whole support there is nothing to remember
        self.register_buffer("support", support.sort().values, persistent=places < out_features * in_features)
        # a row and not a vector: optimisers that spare vectors from weight decay would spare this part of a matrix
        self.register_parameter("values", uniform(1, places, fan=in_features) if places else None)
        self.register_parameter("down", uniform(rank, in_features, fan=in_features) if rank else None)
        self.register_parameter("up", None)
        if rank:
            self.up = Parameter(torch.zeros(out_features, rank)) if places else uniform(out_features, rank, fan=rank)
        self.register_parameter("bias", uniform(out_features, fan=out_features) if bias else None)

    support: Tensor
    values: Parameter | None
    down: Parameter | None
    up: Parameter | None
    bias: Parameter | None

    @property
    def weight(self) -> Tensor:
        """The dense weight [out, in], built now; gradients flow through it."""
        shape = (self.out_features, self.in_features)
        return dense_weight(shape, self.up, self.down, self.scale, self.values, self.support)

    def forward(self, x: Tensor) -> Tensor:
        """The product [..., out] of ``x`` [..., in] with the weight, and the bias."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        shape = (self.out_features, self.in_features)
        args = (x, self.up, self.down, self.values, self.support, self.bias, self.scale, shape)
        return cast(Tensor, _Product.apply(*args))  # type: ignore[no-untyped-call]

    def merge(self) -> nn.Linear:
        """A dense layer that gives the same outputs bit for bit."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = Parameter(self.weight.detach())
        if self.bias is not None:
            dense.bias = Parameter(self.bias.detach().clone())
        return dense

    def extra_repr(self) -> str:
        """Sizes, as printed within a model."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"entries={len(self.support)}, scale={self.scale}, bias={self.bias is not None}"
        )


def _check(rank: int, density: float, entries: int) -> int:
    """The number of entries of S."""
    if rank < 0 or not 0 <= density <= 1:
        raise PlanError(f"sparse plus low rank: rank={rank} must not be negative, density={density} must be in [0, 1]")
    places = int(density * entries)
    if rank == 0 and places == 0:
        raise PlanError(
            f"sparse plus low rank: rank=0 and density={density} leave nothing of a weight of {entries} entries: "
            f"raise one of them"
        )
    return places


def merged(model: Module) -> Module:
    """A copy of ``model`` whose sparse plus low-rank layers are dense ones, with the same outputs bit for bit."""
    return replace_modules(
        copy.deepcopy(model), "*", lambda _, layer: cast(SparseLowRankLinear, layer).merge(), SparseLowRankLinear
    )


@dataclass(frozen=True)
class SparseLowRank:
    """Train every linear layer that matches as a low-rank product plus a sparse matrix, from the first step on.

    What the layers had learnt is dropped, unless ``start="layer"``. A layer that an earlier stage has rewritten stays
    as it is.

    Args:
        rank: of the product; 0 for a sparse matrix alone.
        density: share of the sparse matrix that is trained; 0 for a product alone, both of whose factors are then
            random at the start.
        scale: factor of the product, alpha / r in the paper.
        where: glob of the linear layers.
        stage: glob of the stages to act in.
        start: draws of the ``paper``, or entries and bias of the ``layer`` that is replaced.
        train_sparse: whether the sparse entries are trained, or stay as they were drawn.
    """

    rank: int = 12
    density: float = 0.03
    scale: float = 0.25
    where: str = "*layer*"
    stage: str = "*"
    start: Literal["paper", "layer"] = "paper"
    train_sparse: bool = True

    SITES: ClassVar[tuple[Site, ...]] = ("weights",)
    REQUIRES: ClassVar[dict[str, object]] = {}
    OFF: ClassVar = {"rank": 0, "density": 1.0, "start": "layer", "train_sparse": True}
    TINY: ClassVar = {"rank": 0, "density": 0.999, "start": "layer", "train_sparse": True}
    STRONG: ClassVar = {"rank": 2, "density": 0.03, "start": "paper", "train_sparse": True}

    def __post_init__(self) -> None:
        starts = ("paper", "layer")
        if self.start not in starts:
            raise PlanError(f"SparseLowRank: no start {self.start!r}: {nearest(self.start, starts)}")
        if self.rank < 0 or not 0 <= self.density <= 1 or self.rank == self.density == 0:
            raise PlanError(f"{self!r}: rank must not be negative, density in [0, 1], and not both of them 0")

    def __call__(self, plan: Plan) -> Plan:
        """The plan with the layers rewritten at the start of its stages."""
        return plan.add_weights(self.stage, self.rewrite)

    def rewrite(self, model: Module, ctx: Ctx) -> Module:
        """Weights slot: the model with its layers replaced."""

        def make(name: str, layer: Module) -> Module:
            if isinstance(layer, SparseLowRankLinear):
                return layer
            return self.layer(cast(nn.Linear, layer), ctx.once(f"sparse low rank {name}", every="run"))

        return replace_modules(model, self.where, make, (nn.Linear, SparseLowRankLinear))

    def layer(self, old: nn.Linear, rng: torch.Generator) -> SparseLowRankLinear:
        """What takes the place of a linear layer, on its device and in its precision."""
        bias = old.bias is not None
        sizes = (old.in_features, old.out_features)
        new = SparseLowRankLinear(*sizes, self.rank, self.density, self.scale, bias, rng).to(old.weight)
        with torch.no_grad():
            if self.start == "layer" and new.values is not None:
                new.values.copy_(old.weight.flatten()[new.support].view_as(new.values))
            if self.start == "layer" and new.bias is not None:
                new.bias.copy_(old.bias)
        if new.values is not None:
            new.values.requires_grad_(self.train_sparse)
        return new
