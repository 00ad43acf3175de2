"""Principal directions of a text's own token states, and what is left without them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Generator, Tensor

from perturbed.core.context import Ctx
from perturbed.core.plan import Feature, Plan, Site
from perturbed.errors import PlanError, nearest

End = Literal["first", "last"]
Which = Literal["first", "last", "random"]
FAINT = 1e-6  # eigenvalues of a Gram matrix below this share of the largest are rounding, in single precision


def zero_padding(states: Tensor, real: Tensor, *, center: bool = False) -> Tensor:
    """``states`` [B, T, D] with the rows of padding at zero, which then change no singular vector of the others.

    Args:
        states: token states.
        real: which tokens are not padding [B, T].
        center: take the mean of each text's real tokens from each of them first.
    """
    mask = real.unsqueeze(-1)
    states = states.masked_fill(~mask, 0)
    if center:
        states = states - mask * states.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return states


def _wide(states: Tensor) -> Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _spectrum(rows: Tensor, real: Tensor, components: int, which: End) -> tuple[Tensor, Tensor]:
    """Eigenvalues [B, T] and eigenvectors [B, T, T] (columns) of each text's Gram matrix, the chosen ones at the end.

    With T tokens of D > T numbers this holds the same singular vectors as the matrix itself, at a fraction of an SVD.
    """
    values, vectors = torch.linalg.eigh(rows @ rows.mT)  # ascending; those of padding, all zero, come first
    if which == "last":
        length = rows.shape[1]
        behind = (length - real.sum(1) + components).unsqueeze(-1)
        order = (torch.arange(length, device=rows.device) + behind) % length
        values, vectors = values.gather(-1, order), vectors.gather(-1, order.unsqueeze(1).expand_as(vectors))
    return values.clamp(min=0), vectors


def _enough(real: Tensor, components: int) -> Tensor:
    """Which texts have more real tokens than ``components`` [B, 1, 1]; of others nothing would be left."""
    return (real.sum(1) > components).view(-1, 1, 1)


@torch.no_grad()
def principal_directions(
    states: Tensor, real: Tensor, components: int, *, which: End = "first", center: bool = False
) -> Tensor:
    """The leading (or trailing) right singular vectors of each text's own matrix of token states, as constants.

    Args:
        states: token states [B, T, D].
        real: which tokens are not padding [B, T].
        components: how many, k.
        which: those of the largest singular values, or of the smallest among the text's real tokens.
        center: of the states less their mean.

    Returns:
        Directions [B, k, D] of length 1, orthogonal to each other, the larger singular value first; zeros for texts of
        no more than k real tokens, and for directions in which a text does not extend.
    """
    with torch.autocast(states.device.type, enabled=False):
        rows = zero_padding(_wide(states), real, center=center)
        values, vectors = _spectrum(rows, real, components, which)
        cut = max(values.shape[1] - components, 0)
        extends = values[:, cut:] > FAINT * values.amax(1, keepdim=True)
        sides = torch.nn.functional.normalize(vectors[..., cut:].mT @ rows, dim=-1)
        return (sides * (extends.unsqueeze(-1) & _enough(real, components))).flip(1).to(states.dtype)


def without_directions(states: Tensor, directions: Tensor) -> Tensor:
    """``states`` [B, T, D] less their parts along orthonormal ``directions`` [B or 1, k, D]: X - X V^T V."""
    return states - states @ directions.mT @ directions


def without_components(
    states: Tensor,
    real: Tensor,
    components: int = 1,
    *,
    which: End = "first",
    center: bool = False,
    differentiate: bool = True,
) -> Tensor:
    """Token states less each text's own leading directions (2507.21750): X - X v v^T, with v of this X.

    With ``differentiate`` the gradient also goes through v, exactly. Let C be the (centred) states, G = C C^T with
    eigenvalues l and eigenvectors u, U and L those removed: X v v^T = X C^T U L^-1 U^T C. A change of G turns U by

        du_i = sum over j that are kept of u_j u_j^T dG u_i / (l_i - l_j)

    up to a turn within what is removed, of which the product is independent when L stands for U^T G U. So only gaps
    between removed and kept eigenvalues are divided by, and padding, whose eigenvalues are all zero, does no harm.

    Args:
        states: [B, T, D].
        real: which tokens are not padding [B, T].
        components: k; 0 gives ``states`` back bit for bit, as does a text of no more than k real tokens.
        which: the directions of the largest singular values, or of the smallest.
        center: find the directions on the states less their mean; what is removed from is ``states`` all the same.
        differentiate: let the gradient through the directions; else they count as constants.
    """
    if not differentiate:
        return without_directions(states, principal_directions(states, real, components, which=which, center=center))
    with torch.autocast(states.device.type, enabled=False):
        wide = _wide(states)
        rows = zero_padding(wide, real, center=center)
        with torch.no_grad():
            values, vectors = _spectrum(rows, real, components, which)
            cut = max(values.shape[1] - components, 0)
            kept, removed, size = vectors[..., :cut], vectors[..., cut:], values[:, None, cut:]
            faint = FAINT * values.amax(1)[:, None, None]
            inverse = torch.where((size > faint) & _enough(real, components), 1 / size, 0.0)
            gaps = size - values[:, :cut, None]
            turn = torch.where(gaps.abs() > faint, 1 / gaps, 0.0)
        gram = rows @ rows.mT
        moved = kept @ (turn * (kept.mT @ gram @ removed))
        left = removed + moved - moved.detach()  # the value of the eigenvectors, with their gradient
        shift = left.mT @ gram @ left
        middle = torch.diag_embed(2 * inverse.squeeze(1)) - inverse.mT * shift * inverse  # of shift^-1, likewise
        return states - (wide @ (rows.mT @ left) @ middle @ (left.mT @ rows)).to(states.dtype)


def random_directions(width: int, number: int, rng: Generator) -> Tensor:
    """``number`` orthonormal directions [k, width], uniform over all such."""
    found: Tensor = torch.linalg.qr(torch.randn(width, number, generator=rng)).Q.mT.contiguous()
    return found


def _real(states: Tensor, ctx: Ctx, what: str) -> Tensor:
    """Which tokens are not padding, as the batch's ``attention_mask`` [B, T] tells; all of them where it has none."""
    if states.dim() != 3:
        shape = list(states.shape)
        raise PlanError(f"{what} acts on token states [B, T, D], not {shape}: set where to a module that gives those")
    mask = ctx.batch.get("attention_mask")
    if mask is None:
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    if mask.shape != states.shape[:2]:
        raise PlanError(
            f"{what}: attention_mask {list(mask.shape)} does not tell which of the states {list(states.shape)} are "
            "padding: set where to a module that gives one state for each token"
        )
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
        differentiate: let gradients through the directions. Without, and with mean pooling, little is learnt: an
            update moves all tokens of a text alike, which is about the direction that the next pass removes.
        where: glob of the module whose output is the token states [B, T, D] that are pooled.
        stage: glob of the stages to act in; predictions are always made with it.
    """

    components: int = 1
    which: Which = "first"
    center: bool = False
    differentiate: bool = True
    where: str = "*encoder"
    stage: str = "*"

    SITES: ClassVar[tuple[Site, ...]] = ("features",)
    REQUIRES: ClassVar[dict[str, Any]] = {}
    OFF: ClassVar = {"components": 0}
    STRONG: ClassVar = {"components": 4}

    def __post_init__(self) -> None:
        if self.components < 0:
            raise PlanError(f"ComponentRemoval: components={self.components} must not be negative")
        if self.which not in get_args(Which):
            raise PlanError(f"ComponentRemoval: no which={self.which!r}: {nearest(self.which, get_args(Which))}")

    def __call__(self, plan: Plan) -> Plan:
        """The plan with directions removed in its stages and predictions."""
        return _everywhere(plan, self.stage, Feature(self.where, self.remove))

    def remove(self, states: Tensor, ctx: Ctx) -> Tensor:
        """``states`` [B, T, D] without the directions.

        Raises:
            PlanError: they are no token states, or the batch's ``attention_mask`` is not of their shape.
        """
        real = _real(states, ctx, "ComponentRemoval")
        if self.which == "random":
            rng = ctx.once(f"random directions {self.where}", every="run")
            directions = random_directions(states.shape[-1], self.components, rng).to(states)
            return without_directions(states, directions.unsqueeze(0))
        return without_components(
            states, real, self.components, which=self.which, center=self.center, differentiate=self.differentiate
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
    REQUIRES: ClassVar[dict[str, Any]] = {}
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
        leading: Tensor = torch.linalg.eigh(kept.to(states.device)).eigenvectors.mT.flip(0)[: self.components]
        return leading.to(states.dtype)

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
    REQUIRES: ClassVar[dict[str, Any]] = {}
    OFF: ClassVar = {"mix": 0.0}
    TINY: ClassVar = {"mix": 1e-4}
    STRONG: ClassVar = {"mix": 1.0}

    def __call__(self, plan: Plan) -> Plan:
        """The plan with first tokens only, in its stages and predictions."""
        return _everywhere(plan, self.stage, Feature(self.where, self.first))

    def first(self, states: Tensor, ctx: Ctx) -> Tensor:
        """``states`` [B, T, D], each moved to the first of its row."""
        return torch.lerp(states, states[:, :1].expand_as(states), self.mix)
