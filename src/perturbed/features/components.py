"""Principal directions of a text's own token states, and what is left without them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Generator, Tensor

from perturbed.core.context import Ctx
from perturbed.core.plan import Feature, Plan, Site
from perturbed.errors import PlanError, nearest

Which = Literal["first", "last", "random"]


def zero_padding(states: Tensor, real: Tensor, *, center: bool = False) -> Tensor:
    """``states`` [B, T, D] with the rows of padding at zero, which then change no singular vector of the others.

    Args:
        states: token states.
        real: which tokens are not padding [B, T].
        center: take the mean of each text's real tokens from each of them first.
    """
    mask = real.unsqueeze(-1).to(states.dtype)
    if center:
        states = states - (states * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return states * mask


def _spectrum(states: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [B, T], ascending, and eigenvectors [B, T, T] (columns) of the Gram matrix of each text's tokens.

    With T tokens of D > T numbers this holds the same singular vectors as the matrix itself, at a fraction of an SVD.
    """
    rows = states.float()
    values, vectors = torch.linalg.eigh(rows @ rows.mT)
    return values.clamp(min=0), vectors


def _right(states: Tensor, left: Tensor) -> Tensor:
    """Right singular vectors [B, k, D] of left ones [B, T, k]; zero where the singular value is nought."""
    sides = left.mT @ states.float()
    return torch.nn.functional.normalize(sides, dim=-1, eps=1e-6).to(states.dtype)


def principal_directions(
    states: Tensor, real: Tensor, components: int, *, which: Literal["first", "last"] = "first", center: bool = False
) -> Tensor:
    """The leading (or trailing) right singular vectors of each text's own matrix of token states.

    Args:
        states: token states [B, T, D].
        real: which tokens are not padding [B, T].
        components: how many, k.
        which: those of the largest singular values, or of the smallest among the text's real tokens.
        center: of the states less their mean.

    Returns:
        Directions [B, k, D] of length 1, orthogonal to each other; zeros for texts of no more than k real tokens, of
        which nothing would be left without them, and for directions in which a text does not extend.
    """
    rows = zero_padding(states, real, center=center)
    _, vectors = _spectrum(rows)
    number, length = real.sum(1), states.shape[1]
    if which == "first":
        left = vectors.flip(-1)[..., :components]
    else:  # padding holds the lowest T - number places
        at = (length - number).unsqueeze(-1) + torch.arange(components, device=states.device)
        left = vectors.gather(-1, at.clamp(max=length - 1).unsqueeze(1).expand(-1, length, -1))
    enough = (number > components).to(states.dtype).view(-1, 1, 1)
    return _right(rows, left) * enough


def without_directions(states: Tensor, directions: Tensor) -> Tensor:
    """``states`` [B, T, D] less their parts along orthonormal ``directions`` [B or 1, k, D]: X - X V^T V."""
    return states - states @ directions.mT @ directions


def without_components(
    states: Tensor, real: Tensor, components: int = 1, *, center: bool = False, differentiate: bool = False
) -> Tensor:
    """Token states less each text's own leading directions (2507.21750): X - X v v^T, with v of this X.

    With ``differentiate`` the gradient also goes through v. Writing the same as (I - U U^T) X with the left singular
    vectors u of the Gram matrix G = X X^T, whose differential off the removed space is, exactly,
    du_i = sum over j > k of u_j u_j^T dG u_i / (l_i - l_j), only gaps between removed and kept eigenvalues are divided
    by, so that padding, whose eigenvalues are all zero, does no harm.

    Args:
        states: [B, T, D].
        real: which tokens are not padding [B, T].
        components: k; 0 gives ``states`` back bit for bit.
        center: find the directions on the states less their mean; what is removed from is ``states`` all the same.
        differentiate: let the gradient through the directions; else they count as constants.

    Raises:
        ValueError: ``center`` with ``differentiate``, which have no common formula here.
    """
    if not differentiate:
        with torch.no_grad():
            directions = principal_directions(states, real, components, center=center)
        return without_directions(states, directions)
    if center:
        raise ValueError("without_components: center and differentiate cannot both be set")
    rows = zero_padding(states, real)
    with torch.no_grad():
        values, vectors = _spectrum(rows)
        enough = (real.sum(1) > components).view(-1, 1, 1)
        cut = values.shape[1] - components
        kept, removed = vectors[..., :cut], vectors[..., cut:]
        gaps = (values[:, None, cut:] - values[:, :cut, None]).clamp(min=torch.finfo(torch.float32).tiny)
    gram = rows.float() @ rows.float().mT
    moved = kept @ ((kept.mT @ gram @ removed) / gaps)
    left = removed + moved - moved.detach()  # the value of the eigenvectors, with their gradient
    return states - torch.where(enough, left @ (left.mT @ rows.float()), 0.0).to(states.dtype)


def random_directions(width: int, number: int, rng: Generator) -> Tensor:
    """``number`` orthonormal directions [k, width], uniform over all such."""
    return torch.linalg.qr(torch.randn(width, number, generator=rng)).Q.mT.contiguous()


def _real(states: Tensor, ctx: Ctx, what: str) -> Tensor:
    """Which tokens are not padding, as the batch's ``attention_mask`` [B, T] tells; all of them where it has none."""
    if states.dim() != 3:
        shape = list(states.shape)
        raise PlanError(f"{what} acts on token states [B, T, D], not {shape}: set where to a module that gives those")
    mask = ctx.batch.get("attention_mask")
    if mask is None or mask.shape != states.shape[:2]:
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    return mask != 0


def _everywhere(plan: Plan, stage: str, feature: Feature) -> Plan:
    """``feature`` held while training the stages and while predicting."""
    return plan.add_feature(stage, feature).replace(features=(*plan.features, feature))


@dataclass(frozen=True)
class ComponentRemoval:
    """Take from each text's token states its own leading direction, while training and predicting (2507.21750).

    Padding takes no part; special tokens do. Texts of no more than ``components`` tokens are left as they are.

    Args:
        components: how many directions; 0 is off. The paper removes 1.
        which: the ``first`` directions, the ``last`` ones, or ``random`` ones, drawn once a run and the same for all.
        center: find directions on the states less their mean.
        differentiate: let gradients through the directions.
        where: glob of the module whose output is the token states [B, T, D] that are pooled.
        stage: glob of the stages to act in; predictions are always made with it.
    """

    components: int = 1
    which: Which = "first"
    center: bool = False
    differentiate: bool = False
    where: str = "*encoder"
    stage: str = "*"

    SITES: ClassVar[tuple[Site, ...]] = ("features",)
    REQUIRES: ClassVar = {}
    OFF: ClassVar = {"components": 0}
    STRONG: ClassVar = {"components": 4}

    def __post_init__(self) -> None:
        if self.components < 0:
            raise PlanError(f"ComponentRemoval: components={self.components} must not be negative")
        if self.which not in get_args(Which):
            raise PlanError(f"ComponentRemoval: no which={self.which!r}: {nearest(self.which, get_args(Which))}")
        if self.differentiate and (self.center or self.which != "first"):
            raise PlanError("ComponentRemoval: differentiate goes with which='first' and center=False only")

    def __call__(self, plan: Plan) -> Plan:
        """The plan with directions removed in its stages and predictions."""
        return _everywhere(plan, self.stage, Feature(self.where, self.remove))

    def remove(self, states: Tensor, ctx: Ctx) -> Tensor:
        """``states`` [B, T, D] without the directions."""
        real = _real(states, ctx, "ComponentRemoval")
        if self.which == "random":
            rng = ctx.once(f"random directions {self.where}", every="run")
            directions = random_directions(states.shape[-1], self.components, rng).to(states)
            return without_directions(states, directions.unsqueeze(0))
        if self.which == "last":
            with torch.no_grad():
                last = principal_directions(states, real, self.components, which="last", center=self.center)
            return without_directions(states, last)
        return without_components(
            states, real, self.components, center=self.center, differentiate=self.differentiate
        )


@dataclass(frozen=True)
class CorpusComponentRemoval:
    """Take from all token states the leading directions of the corpus: the other side of ``ComponentRemoval``.

    Directions are those of a second-moment matrix [D, D] that training keeps as a running mean of its batches', and
    that predictions find as training left it (the idea of all-but-the-top, Mu and Viswanath 2018, 1702.01417, on
    states that still change; the mean is not taken off, as it is not for single texts).

    Args:
        components: how many directions; 0 is off.
        decay: share of the running mean that each pass over a batch keeps.
        where: glob of the module whose output is the token states [B, T, D] that are pooled.
        stage: glob of the stages to act in; predictions are always made with it.
    """

    components: int = 1
    decay: float = 0.9
    where: str = "*encoder"
    stage: str = "*"

    SITES: ClassVar[tuple[Site, ...]] = ("features",)
    REQUIRES: ClassVar = {}
    OFF: ClassVar = {"components": 0}
    STRONG: ClassVar = {"components": 4}

    def __post_init__(self) -> None:
        if self.components < 0 or not 0 <= self.decay < 1:
            raise PlanError(f"{self!r}: components must not be negative, and decay in [0, 1)")

    def __call__(self, plan: Plan) -> Plan:
        """The plan with directions removed in its stages and predictions."""
        return _everywhere(plan, self.stage, Feature(self.where, self.remove))

    @torch.no_grad()
    def directions(self, states: Tensor, ctx: Ctx) -> Tensor:
        """The leading directions [k, D] of the states so far, these included while training."""
        name = f"second moment {self.where}"
        kept = ctx.state.get(name)
        if ctx.bare.training or kept is None:
            rows = states[_real(states, ctx, "CorpusComponentRemoval")].float()
            moment = rows.mT @ rows / len(rows)
            kept = moment if kept is None else self.decay * kept.to(moment) + (1 - self.decay) * moment
            if ctx.bare.training:
                ctx.state[name] = kept
        return torch.linalg.eigh(kept.to(states.device)).eigenvectors.mT.flip(0)[: self.components].to(states.dtype)

    def remove(self, states: Tensor, ctx: Ctx) -> Tensor:
        """``states`` [B, T, D] without the directions."""
        return without_directions(states, self.directions(states, ctx).unsqueeze(0))


@dataclass(frozen=True)
class FirstTokenOnly:
    """Put the first token's state in the place of every token's: whatever the pooling, it gives that token's state.

    Args:
        mix: share of the first token's state in each; 0 is off.
        where: glob of the module whose output is the token states [B, T, D] that are pooled.
        stage: glob of the stages to act in; predictions are always made with it.
    """

    mix: float = 1.0
    where: str = "*encoder"
    stage: str = "*"

    SITES: ClassVar[tuple[Site, ...]] = ("features",)
    REQUIRES: ClassVar = {}
    OFF: ClassVar = {"mix": 0.0}
    TINY: ClassVar = {"mix": 1e-4}
    STRONG: ClassVar = {"mix": 1.0}

    def __call__(self, plan: Plan) -> Plan:
        """The plan with first tokens only, in its stages and predictions."""
        return _everywhere(plan, self.stage, Feature(self.where, self.first))

    def first(self, states: Tensor, ctx: Ctx) -> Tensor:
        """``states`` [B, T, D], each moved to the first of its row."""
        return torch.lerp(states, states[:, :1].expand_as(states), self.mix)
