"""Guidance: a prediction pushed away from that of a worse predictor; what both passes share is computed once.

Guidance without a classifier follows what labels change, so whether a plan tells them is said here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import Module

from perturbed.core.context import Ctx
from perturbed.core.plan import Batch, Plan, PredictFn, Site
from perturbed.errors import PlanError, nearest
from perturbed.features.attention import KINDS, Disturb, Edit, Kind, edited_attention, identity_map, matching
from perturbed.objectives.diffusion import LABELS, unlabelled


def combine(base: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``base + scale * (a - b)``; at scale 0 ``base`` itself, bit for bit, where a and b are finite."""
    return base + scale * (a - b)


# --- what comes before the first changed layer, computed once ---------------------------------------------------------


class Prefix:
    """The outputs of all modules that finish before the first of ``stops`` starts, for a second pass to take.

    A second pass on the same input gives the same up to there, whatever the architecture: a module that finished
    earlier is replaced by its output, so only what lies between modules is computed again. Outputs are held by the
    largest module that has finished; one that was written over since is computed anew. Needs a model without randomness
    (eval mode) and holds those activations.

    Args:
        model: the model, put back as it was when a block is left.
        stops: modules that the second pass will change.
    """

    def __init__(self, model: Module, stops: Iterable[Module]):
        self.model, self.stops = model, set(stops)
        self._kept: list[tuple[Module, Any, list[int]]] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """The pass inside is the first; its outputs are kept."""
        # inference mode does not tell what is written over, so that nothing may be kept
        self._kept, over = [], torch.is_inference_mode_enabled()

        def record(module: Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal over
                over = over or module in self.stops
                before = len(self._kept)
                output = forward(*args, **kwargs)
                if not over:
                    self._kept[before:] = [(module, output, _versions(output))]
                return output

            return run

        with _forwards(self.model.modules(), record):
            yield

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """The pass inside takes what was kept, in the order in which it was computed."""
        outputs: dict[Module, list[tuple[Any, list[int]]]] = {}
        for module, output, versions in self._kept:
            outputs.setdefault(module, []).append((output, versions))
        anew = False

        def replay(module: Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            left = outputs[module].copy()

            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal anew
                if anew or not left:
                    return forward(*args, **kwargs)
                output, versions = left.pop(0)
                if _versions(output) == versions:
                    return output
                anew = True
                try:
                    return forward(*args, **kwargs)
                finally:
                    anew = False

            return run

        with _forwards(outputs, replay):
            yield


def _versions(output: Any) -> list[int]:
    """How often each tensor in an output was written to in place (torch's own count)."""
    if isinstance(output, Tensor):
        return [output._version]
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return [version for item in items for version in _versions(item)]


@contextmanager
def _forwards(modules: Iterable[Module], wrap: Callable[[Module, Callable[..., Any]], Any]) -> Iterator[None]:
    """Each module's own ``forward`` wrapped inside (its hooks run as ever), and as it was afterwards."""
    with ExitStack() as undo:
        for module in modules:
            own = vars(module).get("forward")
            wrapped = wrap(module, module.forward)
            if own is None:
                undo.callback(vars(module).pop, "forward")
            else:
                undo.callback(vars(module).__setitem__, "forward", own)
            vars(module)["forward"] = wrapped
        yield


# --- for any model, without a plan ------------------------------------------------------------------------------------


@contextmanager
def perturbed_attention(
    model: Module, scale: float = 1.0, where: str = "mid_block.attentions.*", edit: Edit = identity_map
) -> Iterator[None]:
    """Inside, a call of the model gives its output guided away from that with spoiled self-attention maps (PAG).

    For the denoiser of a Diffusers pipeline, whatever its sampler. output + scale * (output - spoiled output) is the
    same guidance of noise, velocity and clean image, for each is linear in the others at one x_t. Channels beyond those
    of the input (a learned variance) are left as they are. Where a pipeline puts labelled and unlabelled copies into
    one batch, each is guided by itself before the pipeline combines them.

    Args:
        model: in eval mode; as it was once the block is left.
        scale: s; 0 gives the model's own output.
        where: glob of the layers to spoil, such as ``transformer_blocks.5.attn1``.
        edit: what is done to their attention; by default every token attends to itself alone.

    Raises:
        PlanError: the glob matches nothing, no attention is computed there, or the model is in training mode.
    """
    modules = matching(model, where)
    prefix = Prefix(model, modules)

    def guided(module: Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            _check_eval(model)
            with prefix.recorded():
                good = forward(*args, **kwargs)
            with prefix.replayed(), edited_attention(model, modules, edit):
                bad = _first(forward(*args, **kwargs))
            whole = _first(good).clone()
            channels = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)).shape[1]
            whole[:, :channels] = combine(whole[:, :channels], whole[:, :channels], bad[:, :channels], scale)
            return _with_first(good, whole)

        return run

    with _forwards([model], guided):
        yield


def _check_eval(model: Module) -> None:
    if model.training:
        raise PlanError("guidance compares two passes of one model: put it in eval mode first (model.eval())")


def _first(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def _with_first(output: Any, first: Tensor) -> Any:
    if isinstance(output, Tensor):
        return first
    if isinstance(output, tuple):
        return (first, *output[1:])
    return replace(output, **{fields(output)[0].name: first})


# --- guidance of a plan's prediction ----------------------------------------------------------------------------------


class Worse(Protocol):
    """A worse predictor to be guided away from, and how far: a frozen dataclass."""

    @property
    def scale(self) -> float:
        """The s of prediction + s * (prediction - worse)."""
        ...

    def changed(self, model: Module) -> list[Module]:
        """The modules that it changes, up to which both passes are the same; none if its input is another."""
        ...

    def batch(self, batch: Batch, ctx: Ctx) -> Batch:
        """The batch that it reads."""
        ...

    def held(self, model: Module, ctx: Ctx) -> AbstractContextManager[None]:
        """Inside, the model is the worse one."""
        ...

    def pair(self, good: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
        """The a and b whose difference is followed."""
        ...


@dataclass(frozen=True)
class Guided:
    """Predict slot: ``inner`` plus, for each worse predictor i, s_i times (inner - worse_i).

    Each is evaluated apart (batches put together round otherwise), and what precedes the first changed layer once.

    Args:
        inner: the prediction that is guided.
        away: the worse predictors; their order does not matter but for rounding.
    """

    inner: PredictFn
    away: tuple[Worse, ...]

    def __call__(self, model: Module, batch: Batch, ctx: Ctx) -> Tensor:
        """The guided prediction, shaped like that of ``inner``.

        Raises:
            PlanError: the model is in training mode, so that its passes may differ by chance.
        """
        _check_eval(model)
        bare = ctx.accelerator.unwrap_model(model)
        changed = [worse.changed(bare) for worse in self.away]
        prefix = Prefix(bare, [m for modules in changed for m in modules])
        with prefix.recorded() if prefix.stops else nullcontext():
            good = self.inner(model, batch, ctx)
        found = good
        for worse, modules in zip(self.away, changed, strict=True):
            with prefix.replayed() if modules else nullcontext(), worse.held(bare, ctx):
                bad = self.inner(model, worse.batch(batch, ctx), ctx)
            found = combine(found, *worse.pair(good, bad), worse.scale)
        return found


def guide(plan: Plan, worse: Worse) -> Plan:
    """The plan with its prediction guided away from ``worse``, beside the guidance it has."""
    held = plan.predict
    if isinstance(held, Guided):
        return plan.replace(predict=replace(held, away=(*held.away, worse)))
    return plan.replace(predict=Guided(held, (worse,)))


@dataclass(frozen=True)
class PerturbedAttention:
    """Guide away from the model whose chosen self-attention maps are spoiled (PAG, Ahn et al. 2024, section 4).

    predict + scale * (predict - predict with spoiled maps); the released code's g is scale + 1. The rest of the layer
    (values, output projection, residual) stays. With ``ClassifierFree`` both differences are taken from the labelled
    prediction and added.

    Args:
        scale: s, how far beyond plain sampling it goes; 0 is plain sampling.
        where: glob of the layers, such as ``mid_block.*`` of a UNet or ``transformer_blocks.2.attn1`` of a DiT; of
            nested matches the outermost counts, and all self-attention in it.
        kind: what a map is spoiled by (``features.attention.Disturb``); the paper's is the ``identity``.
        strength: how much of a map is spoiled, in [0, 1]; at 0 nothing.
        follow: each sample's ``own`` difference, or that of its ``neighbour`` in the batch (a sham: the same
            differences, given to others).
    """

    scale: float = 1.0
    where: str = "mid_block.attentions.*"
    kind: Kind = "identity"
    strength: float = 1.0
    follow: Literal["own", "neighbour"] = "own"

    SITES: ClassVar[tuple[Site, ...]] = ("inference",)
    REQUIRES: ClassVar = {"modality": "diffusion", "output": "noise"}
    OFF: ClassVar = {"scale": 0.0}
    TINY: ClassVar = {"scale": 1e-3}
    STRONG: ClassVar = {"scale": 5.0}

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PlanError(f"PerturbedAttention: no kind {self.kind!r}: {nearest(self.kind, KINDS)}")
        if not 0 <= self.strength <= 1:
            raise PlanError(f"PerturbedAttention: strength={self.strength} must be in [0, 1]")
        if self.follow not in ("own", "neighbour"):
            raise PlanError(f"PerturbedAttention: follow={self.follow!r} must be 'own' or 'neighbour'")

    def __call__(self, plan: Plan) -> Plan:
        """The plan with a guided prediction."""
        return guide(plan, self)

    def changed(self, model: Module) -> list[Module]:
        """The layers whose maps are spoiled."""
        return matching(model, self.where)

    def batch(self, batch: Batch, ctx: Ctx) -> Batch:
        """The same: both passes see one x_t."""
        return batch

    def held(self, model: Module, ctx: Ctx) -> AbstractContextManager[None]:
        """The model with its maps spoiled."""
        spoil = Disturb(self.kind, self.strength, ctx.rng(f"perturbed attention {self.where}"))
        return edited_attention(model, self.changed(model), spoil)

    def pair(self, good: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
        """The two predictions, of each sample or of its neighbour."""
        return (good, bad) if self.follow == "own" else (good.roll(1, 0), bad.roll(1, 0))


@dataclass(frozen=True)
class ClassifierFree:
    """Guide away from the prediction without a label (Ho and Salimans 2022).

    In the usual form e_u + weight * (e_c - e_u), that is e_c + (weight - 1) * (e_c - e_u). With ``PerturbedAttention``
    of scale s, in either order, e_u + weight * (e_c - e_u) + s * (e_c - spoiled e_c), three passes (Ahn et al. 2024).
    Where no label is told, e_c is e_u and it does nothing: ``Labels`` tells them.

    Args:
        weight: w; 1 is off.
    """

    weight: float = 2.0

    SITES: ClassVar[tuple[Site, ...]] = ("inference",)
    REQUIRES: ClassVar = {"modality": "diffusion", "output": "noise", "classes": ...}
    OFF: ClassVar = {"weight": 1.0}
    TINY: ClassVar = {"weight": 1.001}
    STRONG: ClassVar = {"weight": 6.0}
    EXEMPT: ClassVar = {
        "strong": "it does nothing in a plan that tells no label; tests/sites/test_guidance.py tells it"
    }

    def __call__(self, plan: Plan) -> Plan:
        """The plan with a guided prediction."""
        return guide(plan, self)

    @property
    def scale(self) -> float:
        """How far away from the unlabelled prediction, counted from the labelled one."""
        return self.weight - 1

    def changed(self, model: Module) -> list[Module]:
        """None: the label goes in at the start."""
        return []

    def batch(self, batch: Batch, ctx: Ctx) -> Batch:
        """The batch without labels."""
        return without_labels(batch, ctx)

    def held(self, model: Module, ctx: Ctx) -> AbstractContextManager[None]:
        """The model as it is."""
        return nullcontext()

    def pair(self, good: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
        """The two predictions."""
        return good, bad


# --- whether the class is told ----------------------------------------------------------------------------------------


def without_labels(batch: Batch, ctx: Ctx) -> Batch:
    """The batch with labels that stand for no label."""
    like = next(iter(batch.values()))
    return {**batch, LABELS: unlabelled(like, ctx.facts)}


@dataclass(frozen=True)
class Unlabelled:
    """Predict slot: ``inner``, not told the labels of a batch.

    Args:
        inner: the prediction.
    """

    inner: PredictFn

    def __call__(self, model: Module, batch: Batch, ctx: Ctx) -> Tensor:
        """The prediction of ``inner`` without labels."""
        return self.inner(model, without_labels(batch, ctx), ctx)


@dataclass(frozen=True)
class Labels:
    """Tell the predictor the class that each sample is to be, or keep it from it.

    It acts beneath the plan's guidance, whichever was applied first: ``ClassifierFree`` needs the labels.

    Args:
        told: whether. A plan that samples without labels (``Unlabelled``) is left as it is by False, any other by True.
    """

    told: bool = True

    SITES: ClassVar[tuple[Site, ...]] = ("inference",)
    REQUIRES: ClassVar = {"modality": "diffusion", "output": "noise", "classes": ...}
    OFF: ClassVar = {"told": False}
    STRONG: ClassVar = {"told": True}

    def __call__(self, plan: Plan) -> Plan:
        """The plan with a prediction that reads labels, or does not."""
        held = plan.predict
        if isinstance(held, Guided):
            return plan.replace(predict=replace(held, inner=self._of(held.inner)))
        return plan.replace(predict=self._of(held))

    def _of(self, predict: PredictFn) -> PredictFn:
        bare = predict.inner if isinstance(predict, Unlabelled) else predict
        return bare if self.told else Unlabelled(bare)
