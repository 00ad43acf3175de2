"""A run as a value: plans, their stages and slots, and how interventions rewrite them."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

from torch import Tensor
from torch.nn import Module

from perturbed.errors import PlanError, nearest

if TYPE_CHECKING:
    from perturbed.core.context import Ctx
    from perturbed.core.optimiser import Optim
    from perturbed.core.run import Run

Batch = dict[str, Tensor]
Site = Literal["data", "inputs", "features", "weights", "objectives", "optim", "inference", "measures"]
SITES: tuple[Site, ...] = ("data", "inputs", "features", "weights", "objectives", "optim", "inference", "measures")
T = TypeVar("T")


class Stream(Protocol):
    """An endless iterator of batches that can be put back where it was (its state is JSON or tensors)."""

    def __next__(self) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102
    def load_state_dict(self, state: dict[str, Any]) -> None: ...  # noqa: D102


BuildFn = Callable[["Ctx"], Module]
DataFn = Callable[["Ctx"], Stream]
LossFn = Callable[[Module, Batch, "Ctx"], Tensor]
OptimFn = Callable[[Module, "Ctx"], "Optim"]
InputsFn = Callable[[Batch, "Ctx"], Batch]
WeightsFn = Callable[[Module, "Ctx"], Module]
UpdateFn = Callable[[Module, Batch, LossFn, "Optim", "Ctx"], Tensor]
PredictFn = Callable[[Module, Batch, "Ctx"], Tensor]
FeatureFn = Callable[[Tensor, "Ctx"], Tensor]


def same_batch(batch: Batch, ctx: Ctx) -> Batch:
    """The identity: inputs as the data slot made them."""
    return batch


def same_model(model: Module, ctx: Ctx) -> Module:
    """The identity: the model as it begins the stage."""
    return model


def one_step(model: Module, batch: Batch, loss: LossFn, optim: Optim, ctx: Ctx) -> Tensor:
    """One optimiser update by back-propagation; ``ctx.accumulate`` > 1 splits the batch into micro-batches.

    Micro-batches count by their share of examples, which is the gradient of the whole batch for a loss that is a
    mean over examples. Returns the loss value (detached scalar).
    """
    total: Tensor | None = None
    for micro, share in ctx.micro_batches(batch):
        value = loss(model, micro, ctx)
        part = value if share == 1 else value * share
        ctx.backward(part)
        total = part.detach() if total is None else total + part.detach()
    optim.step()
    optim.zero_grad()
    assert total is not None
    return total


def no_data(ctx: Ctx) -> Stream:
    """The data of a stage that is not trained."""
    raise PlanError(f"stage {ctx.stage!r} has {ctx.steps} steps but no data")


def no_loss(model: Module, batch: Batch, ctx: Ctx) -> Tensor:
    """The loss of a stage that is not trained, and of none."""
    raise PlanError(f"there is no loss in stage {ctx.stage!r}; ctx.loss is that of a training stage")


def no_optim(model: Module, ctx: Ctx) -> Optim:
    """The optimiser of a stage that is not trained."""
    raise PlanError(f"stage {ctx.stage!r} has {ctx.steps} steps but no optimiser")


@dataclass(frozen=True)
class Feature:
    """A function on the output of modules (first tensor of a tuple output).

    Args:
        where: glob of dotted names, or a function that finds the one module of a model.
        fn: gives the new output.
    """

    where: str | Callable[[Module], Module]
    fn: FeatureFn


@dataclass(frozen=True)
class Measure:
    """Named numbers read off a run.

    Args:
        name: of the measure, and of its main number where it gives several.
        fn: reads the numbers.
        when: at the ``"end"``, after each ``"stage"``, or every so many training steps.
        better: which way the main number improves.
        stages: glob of the stages in or after which it is taken, unless at the end.
    """

    name: str
    fn: Callable[[Run], dict[str, float]]
    when: Literal["end", "stage"] | int = "end"
    better: Literal["higher", "lower"] = "higher"
    stages: str = "*"

    def __post_init__(self) -> None:
        if isinstance(self.when, int) and self.when < 1:
            raise PlanError(f"measure {self.name!r}: when={self.when} must be at least 1 step")

    def of(self, stage: str) -> bool:
        """Whether it is taken in or after a stage."""
        return fnmatch.fnmatchcase(stage, self.stages)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What interventions may require of a plan.

    Args:
        modality: ``language``, ``vision``, ``diffusion``, ``speech`` or ``control``.
        target: what a batch's label is: ``next-token``, ``class``, ``noise``, ``action`` …
        output: what ``predict`` returns: ``logits``, ``noise``, ``action`` …
        classes: number of classes or of tokens.
        tokenizer: gives the tokenizer when called, so that a plan costs nothing until it runs.
        input: the batch entry that holds the model's input.
        input_range: lowest and highest legal input value, for attacks.
        more: further facts by name.
    """

    modality: str
    target: str
    output: str = "logits"
    classes: int | None = None
    tokenizer: Callable[[], Any] | None = None
    input: str | None = None
    input_range: tuple[float, float] | None = None
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def get(self, name: str) -> Any:
        """The fact called ``name``, or None."""
        return getattr(self, name) if name in self.__dataclass_fields__ else self.more.get(name)


@dataclass(frozen=True)
class Then:
    """Two slots one after the other; the second sees what the first returned."""

    first: Callable[[Any, Ctx], Any]
    second: Callable[[Any, Ctx], Any]

    def __call__(self, value: Any, ctx: Ctx) -> Any:
        """Apply both in order."""
        return self.second(self.first(value, ctx), ctx)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One span of training: its data, loss, optimiser and length, and the slots that act on it.

    Args:
        name: unique in the plan; random streams are named after it.
        steps: optimiser updates; one batch feeds one update of one rank. A stage of 0 steps only rewrites weights and
            needs no data, loss or optimiser.
        data: makes the stream of batches.
        loss: scalar loss of a model on a batch.
        optim: optimiser and schedule; ``ctx.optim`` then holds the optimiser state of the snapshot begun from.
        build: a model of its own, with its own initialisation stream.
        start: the snapshot it begins from: ``init``, ``stage`` or ``stage@step``; None is the stage before.
        snapshots: steps that are kept for ``past["stage@step"]``.
        facts: overrides the plan's.
        reads: other snapshots that it may take from ``ctx.past``.
        inputs: rewrites each batch while training.
        features: functions on hidden states, held while training.
        weights: rewrites the model once, at the start.
        update: how one step is taken.
    """

    name: str
    steps: int = 0
    data: DataFn = no_data
    loss: LossFn = no_loss
    optim: OptimFn = no_optim
    build: BuildFn | None = None
    start: str | None = None
    snapshots: tuple[int, ...] = ()
    facts: Facts | None = None
    reads: tuple[str, ...] = ()
    inputs: InputsFn = same_batch
    features: tuple[Feature, ...] = ()
    weights: WeightsFn = same_model
    update: UpdateFn = one_step

    def __post_init__(self) -> None:
        if not self.name or any(c in self.name for c in "@*?[]/ "):
            raise PlanError(f"stage name {self.name!r} must be non-empty, without spaces and any of @ * ? [ ] /")
        if not isinstance(self.steps, int) or self.steps < 0:
            raise PlanError(f"stage {self.name!r}: steps={self.steps!r} must be a whole number that is not negative")
        for step in self.snapshots:
            if not 0 <= step <= self.steps:
                raise PlanError(f"stage {self.name!r}: snapshot at step {step} is outside 0…{self.steps}")


STAGE_SITES: dict[str, Site] = {
    "data": "data", "inputs": "inputs", "features": "features", "weights": "weights", "build": "weights",
    "facts": "weights", "loss": "objectives", "optim": "optim", "update": "optim",
}  # fmt: skip
PLAN_SITES: dict[str, Site] = {
    "build": "weights", "facts": "weights", "predict": "inference", "features": "features", "measures": "measures",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole run: how to build the model, its stages, how it predicts and what is measured.

    Args:
        build: makes the model (initialisation draws come from a stream of its own).
        stages: in order; later ones may begin from any earlier snapshot.
        predict: the model's prediction on a batch.
        measures: what is read off the run.
        facts: what interventions may require.
        features: functions on hidden states, held while predicting.
        threads: CPU threads of a run; 1 keeps results equal whatever else the machine does.
        name: for display.
        applied: interventions applied so far, for display.
    """

    build: BuildFn
    stages: tuple[Stage, ...]
    predict: PredictFn
    measures: tuple[Measure, ...]
    facts: Facts
    features: tuple[Feature, ...] = ()
    threads: int = 1
    name: str = "plan"
    applied: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.stages:
            raise PlanError(f"plan {self.name!r} has no stage")
        names = [s.name for s in self.stages]
        doubles = sorted({n for n in names if names.count(n) > 1})
        if doubles:
            raise PlanError(f"plan {self.name!r} has two stages called {doubles[0]!r}: stage names are unique")
        for measure in self.measures:
            if measure.when != "end" and not any(measure.of(name) for name in names):
                known = nearest(measure.stages, names)
                raise PlanError(f"measure {measure.name!r} is of stages {measure.stages!r}, which match none: {known}")
        for i, stage in enumerate(self.stages):
            for ref in (*((stage.start,) if stage.start else ()), *stage.reads):
                self._check_reference(stage, ref, self.stages[:i])

    @classmethod
    def from_model(
        cls,
        model: Module | Callable[..., Module],
        *,
        data: Any,
        steps: int,
        batch: int = 16,
        loss: LossFn | None = None,
        optim: OptimFn | None = None,
        held_out: Any = None,
        measures: Sequence[Measure] = (),
        predict: PredictFn | None = None,
        facts: Mapping[str, Any] | None = None,
        collate: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        stage: str = "finetune",
    ) -> Plan:
        """A plan of one stage from one's own model and data.

        Args:
            model: a module (Transformers, Diffusers or any), copied now and for each run, never touched; or a function
                of nothing, or of ``ctx``, that makes one, with random weights of its own for each seed.
            data: a ``datasets.Dataset``, a map-style torch data set or a list; examples are dicts, or pairs (input,
                label). A column ``label`` is read as ``labels``.
            steps: optimiser updates.
            batch: examples in an update; each comes once an epoch, in an order that the seed decides.
            loss: of (model, batch, ctx). Default: that of a Transformers model, on the ``labels`` in the data or, for a
                causal language model without them, of the next token where ``attention_mask`` is not 0.
            optim: of (model, ctx). Default: AdamW at a constant 5e-5, gradients clipped at norm 1.
            held_out: data to measure on.
            measures: default, given ``held_out``: its ``loss``, and ``accuracy`` where labels are classes.
            predict: of (model, batch, ctx). Default: the logits, or the first tensor that the model returns.
            facts: what is to differ from the guessed ones, by name, such as ``{"input_range": (0, 1)}``.
            collate: of a list of examples, gives a dict of tensors. Default: tensor columns are stacked, others left
                out, which one line says.
            stage: its name.

        Raises:
            PlanError: the data are empty or make no batch, or there is no loss to be had.
        """
        own = importlib.import_module("perturbed.plans.own")
        plan: Plan = own.from_model(
            model, data=data, steps=steps, batch=batch, loss=loss, optim=optim, held_out=held_out, measures=measures,
            predict=predict, facts=facts, collate=collate, stage=stage,
        )  # fmt: skip
        return plan

    def _check_reference(self, stage: Stage, ref: str, earlier: tuple[Stage, ...]) -> None:
        if ref == "init":
            return
        name, _, step = ref.partition("@")
        found = next((s for s in earlier if s.name == name), None)
        if found is None:
            known = nearest(name, [*(s.name for s in earlier), "init"])
            raise PlanError(f"stage {stage.name!r} begins from or reads {ref!r}, which is no earlier stage: {known}")
        if step and (not step.isdigit() or int(step) not in (*found.snapshots, found.steps)):
            raise PlanError(f"stage {stage.name!r} wants {ref!r}: add that step to snapshots of stage {name!r}")

    def stage(self, name: str) -> Stage:
        """The stage called ``name``.

        Raises:
            PlanError: there is none; the message names the nearest.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        known = nearest(name, [s.name for s in self.stages])
        raise PlanError(f"plan {self.name!r} has no stage {name!r}: {known}")

    def matching(self, pattern: str) -> tuple[Stage, ...]:
        """The stages whose names match a glob.

        Raises:
            PlanError: none does.
        """
        found = tuple(s for s in self.stages if fnmatch.fnmatchcase(s.name, pattern))
        return found or (self.stage(pattern),)

    def edit(self, pattern: str, change: Callable[[Stage], Stage]) -> Plan:
        """Every stage matching the glob rewritten by ``change``."""
        hit = {s.name for s in self.matching(pattern)}
        return self.replace(stages=tuple(change(s) if s.name in hit else s for s in self.stages))

    def replace(self, **fields: Any) -> Plan:
        """A copy with other fields."""
        return dataclasses.replace(self, **fields)

    def add_inputs(self, pattern: str, fn: InputsFn) -> Plan:
        """``fn`` on each batch of the stages matching the glob, after what is there."""
        return self.edit(pattern, lambda s: dataclasses.replace(s, inputs=_after(s.inputs, fn, same_batch)))

    def add_weights(self, pattern: str, fn: WeightsFn) -> Plan:
        """``fn`` on the model at the start of the stages matching the glob, after what is there."""
        return self.edit(pattern, lambda s: dataclasses.replace(s, weights=_after(s.weights, fn, same_model)))

    def add_feature(self, pattern: str, feature: Feature) -> Plan:
        """``feature`` held while training the stages matching the glob."""
        return self.edit(pattern, lambda s: dataclasses.replace(s, features=(*s.features, feature)))

    def add_measures(self, *measures: Measure) -> Plan:
        """Further measures, or others in place of those of the same name."""
        names = {m.name for m in measures}
        return self.replace(measures=(*(m for m in self.measures if m.name not in names), *measures))

    def insert(self, stage: Stage, *, before: str | None = None, after: str | None = None) -> Plan:
        """``stage`` put ``before`` or ``after`` the named one (exactly one of them).

        The stage that now follows begins from it, unless it has a ``build`` or ``start`` of its own: then the follower
        begins where it did.
        """
        if (before is None) == (after is None):
            raise PlanError("insert wants exactly one of before= and after=")
        at = self.stages.index(self.stage(before or after or "")) + (after is not None)
        rest = self.stages[at:]
        if rest and (stage.build or stage.start):
            rest = (dataclasses.replace(rest[0], start=self.previous(rest[0])), *rest[1:])
        return self.replace(stages=(*self.stages[:at], stage, *rest))

    def previous(self, stage: Stage) -> str:
        """The reference of the snapshot that ``stage`` begins from."""
        if stage.start:
            return stage.start
        at = self.stages.index(stage)
        return "init" if at == 0 or stage.build else self.stages[at - 1].name


def _after(first: T, second: Any, identity: Any) -> T:
    return second if first is identity else Then(first, second)  # type: ignore[arg-type, return-value]


@runtime_checkable
class Intervention(Protocol):
    """A frozen dataclass that turns a plan into a plan.

    ``SITES`` declares where it acts, ``REQUIRES`` the facts it needs (a value, a tuple of allowed values, or ``...``
    for any), ``OFF`` the field values at which it is the identity (None where a method has no off).
    """

    SITES: ClassVar[tuple[Site, ...]]

    def __call__(self, plan: Plan) -> Plan:
        """The plan with some of its slots wrapped."""
        ...


def apply(plan: Plan, interventions: Iterable[Intervention]) -> Plan:
    """Apply interventions in order; the last is the outermost.

    Raises:
        PlanError: a required fact is missing, or an intervention changes a site that it does not declare.
    """
    for intervention in interventions:
        _check_facts(plan, intervention)
        changed = intervention(plan)
        if not isinstance(changed, Plan):
            raise PlanError(f"{intervention!r} returned {type(changed).__name__}, not a Plan")
        undeclared = sorted(changed_sites(plan, changed) - set(intervention.SITES))
        if undeclared:
            kind = type(intervention).__name__
            raise PlanError(f"{kind} changes {', '.join(undeclared)} but declares only {', '.join(intervention.SITES)}")
        plan = changed.replace(applied=(*plan.applied, repr(intervention)))
    return plan


def _check_facts(plan: Plan, intervention: Intervention) -> None:
    for name, wanted in getattr(intervention, "REQUIRES", {}).items():
        value = plan.facts.get(name)
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        if value is None or (wanted is not ... and value not in allowed):
            wants = "any" if wanted is ... else " or ".join(map(repr, allowed))
            raise PlanError(
                f"{type(intervention).__name__} requires the fact {name} ({wants}); plan {plan.name!r} has {value!r}: "
                f"choose another plan (`perturbed plans`) or set {name} in its facts"
            )


def changed_sites(before: Plan, after: Plan) -> set[Site]:
    """The sites whose slots differ by identity between two plans.

    New stages, and changes of ``steps``, ``start``, ``snapshots`` or ``reads``, count as whatever is declared.
    """
    touched: set[Site] = {site for slot, site in PLAN_SITES.items() if _differs(before, after, slot)}
    old = {s.name: s for s in before.stages}
    for stage in after.stages:
        if stage.name in old:
            touched |= {site for slot, site in STAGE_SITES.items() if _differs(old[stage.name], stage, slot)}
    return touched


def _differs(before: object, after: object, slot: str) -> bool:
    one, two = getattr(before, slot), getattr(after, slot)
    if isinstance(one, tuple) and isinstance(two, tuple):
        return len(one) != len(two) or any(a is not b for a, b in zip(one, two, strict=True))
    return one is not two


def check_sizes(name: str, sizes: Any, whole: tuple[str, ...], rates: tuple[str, ...] = ()) -> None:
    """Check fields of a recipe: ``whole`` must be at least 1, ``rates`` finite and above 0.

    Raises:
        PlanError: one is not.
    """
    for field_name in whole:
        if getattr(sizes, field_name) < 1:
            raise PlanError(f"{name}: {field_name}={getattr(sizes, field_name)} must be at least 1")
    for field_name in rates:
        if not 0 < getattr(sizes, field_name) < math.inf:
            raise PlanError(f"{name}: {field_name}={getattr(sizes, field_name)} must be above 0")
