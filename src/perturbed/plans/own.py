"""One's own model and data as a plan: what ``Plan.from_model`` does."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from perturbed.core.context import Ctx
from perturbed.core.plan import Batch, BuildFn, Facts, LossFn, Measure, OptimFn, Plan, PredictFn, Stage
from perturbed.core.run import Run, accelerator
from perturbed.core.store import to_device
from perturbed.core.streams import Streams
from perturbed.data.content import content_hash
from perturbed.data.examples import LABELS, Batches, Collate, Stack, Table, check_map_style, columns, fetch, named
from perturbed.errors import PlanError
from perturbed.optim.optimisers import AdamW

FINE_TUNING = AdamW(5e-5, betas=(0.9, 0.999), weight_decay=0.0, clip=1.0)
IGNORED = -100
MODALITY = {
    "input_ids": "language", "pixel_values": "vision", "pixels": "vision", "images": "vision",
    "input_features": "speech", "input_values": "speech", "observations": "control",
}  # fmt: skip


def from_model(
    model: Module | Callable[..., Module],
    *,
    data: Any,
    steps: int,
    batch: int,
    loss: LossFn | None,
    optim: OptimFn | None,
    held_out: Any,
    measures: Sequence[Measure],
    predict: PredictFn | None,
    facts: Mapping[str, Any] | None,
    collate: Collate | None,
    stage: str,
) -> Plan:
    """``Plan.from_model``, where the arguments are told."""
    build, sample = _source(model)
    forward = Forward.of(sample)
    table = _table(data, collate, forward, "data")
    if not 1 <= batch <= len(table):
        raise PlanError(f"data has {len(table)} examples for batch={batch}: choose a batch between 1 and {len(table)}")
    first = table.take(range(min(2, len(table))))
    for one in measures:
        if not isinstance(one, Measure):
            raise PlanError(
                f"measures: {one!r} is no Measure: pt.Measure('name', function), which maps a run to scores"
            )
    known = {**guessed_facts(sample, forward, first), **(facts or {})}
    loss = loss or default_loss(sample, forward, first)
    if held_out is not None:
        test = _table(held_out, collate or table.collate, forward, "held_out")
        known.setdefault("held_out", test)
        measures = measures or _default_measures(test, batch, loss, known)
    return Plan(
        name=type(_inner(sample)).__name__,
        build=build,
        stages=(Stage(name=stage, steps=steps, data=Batches(table, batch), loss=loss, optim=optim or FINE_TUNING),),
        predict=predict or Predict(forward, known["input"]),
        measures=tuple(measures),
        facts=_facts(known),
    )


def _facts(known: Mapping[str, Any]) -> Facts:
    own = {f.name for f in dataclasses.fields(Facts)} - {"more"}
    more = {name: value for name, value in known.items() if name not in own}
    if hasattr(known.get("tokenizer"), "encode"):
        raise PlanError("facts: tokenizer is a tokenizer; give a function that returns it: lambda: tokenizer")
    return Facts(**{k: v for k, v in known.items() if k in own}, more=more)


def _table(data: Any, collate: Collate | None, forward: Forward, what: str) -> Table:
    check_map_style(data, what)
    data = list(data) if isinstance(data, list) else data
    if collate is None:
        example = named(fetch(data, [0])[0], forward.main)
        collate = Stack(columns(example, forward.names), forward.main)
    return Table(data, collate)


def _default_measures(test: Table, batch: int, loss: LossFn, facts: Mapping[str, Any]) -> tuple[Measure, ...]:
    found = [Measure("loss", HeldOutLoss(test, loss, batch), better="lower")]
    if facts["target"] == "class":
        found.append(Measure("accuracy", HeldOutAccuracy(test, batch)))
    return tuple(found)


# --- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Given:
    """Build slot: every run begins from a copy of one model.

    Args:
        model: never trained itself.
    """

    model: Module = field(repr=False)

    def __call__(self, ctx: Ctx) -> Module:
        """The copy."""
        return copy.deepcopy(self.model)

    def fingerprint(self) -> str:
        """Hash of the model's content, worked out once.

        Raises:
            Unkeyed: some of it cannot be told.
        """
        return self._fingerprint_once

    @cached_property
    def _fingerprint_once(self) -> str:
        return content_hash(self.model)


@dataclass(frozen=True)
class Made:
    """Build slot: every run makes its model anew, its random weights decided by the seed.

    Args:
        make: gives the model, from nothing or from the run's ``ctx``.
    """

    make: Callable[..., Module]

    def __call__(self, ctx: Ctx) -> Module:
        """A new model.

        Raises:
            PlanError: ``make`` gives something else.
        """
        model = self.make(ctx) if _required(self.make) else self.make()
        if not isinstance(model, Module):
            raise PlanError(f"model={self.make!r} gave a {type(model).__name__}, not a torch.nn.Module")
        return model


def _source(model: Module | Callable[..., Module]) -> tuple[BuildFn, Module]:
    """The build slot, and a model to look at (made without moving any global generator)."""
    if isinstance(model, Module):
        kept = copy.deepcopy(model)  # what is done to the caller's model later changes no run
        kept.zero_grad(set_to_none=True)
        return Given(kept), kept
    if not callable(model):
        raise PlanError(f"model is a {type(model).__name__}: give a torch.nn.Module, or a function that makes one")
    build, streams = Made(model), Streams(0)
    with streams.scope("build", shared=True):
        return build, build(Ctx(streams, accelerator(), Facts(modality="other", target="other")))


def _required(fn: Callable[..., Any]) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(fn).parameters.values()
    except ValueError:  # some builtins have no signature
        return []
    return [p.name for p in parameters if p.kind in kinds and p.default is p.empty]


@dataclass(frozen=True)
class Forward:
    """How a model is called: with the batch's entries that its ``forward`` names.

    Args:
        names: parameters of ``forward``.
        required: those without a default.
        labels: those that hold targets, left out when predicting.
        main: the one that holds the input.
    """

    names: tuple[str, ...]
    required: tuple[str, ...]
    labels: tuple[str, ...]
    main: str

    @classmethod
    def of(cls, model: Module) -> Forward:
        """As a model's signature tells it (that of the model inside, of one wrapped by PEFT)."""
        inner = _inner(model)
        parameters = inspect.signature(inner.forward).parameters
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names = tuple(name for name, p in parameters.items() if p.kind not in kinds)
        labels = (LABELS,)
        if _is("transformers", "PreTrainedModel", inner):
            from transformers.utils import find_labels

            labels = tuple(dict.fromkeys((*find_labels(type(inner)), LABELS)))
        main = getattr(inner, "main_input_name", None) or next(iter(names), "input")
        return cls(names, tuple(n for n in _required(inner.forward) if n in names), labels, main)

    def __call__(self, model: Module, batch: Batch, input: str, *, with_labels: bool = False) -> Any:
        """The output on the entries that have a parameter's name; else on the entry ``input`` alone.

        Raises:
            PlanError: ``forward`` needs what the batch lacks.
        """
        given = {n: batch[n] for n in self.names if n in batch and (with_labels or n not in self.labels)}
        if not given and len(self.required) <= 1 and input in batch:
            return model(batch[input])
        missing = [n for n in self.required if n not in given]
        if missing:
            raise PlanError(
                f"{type(model).__name__} needs {missing[0]!r}, but the batches have {', '.join(batch)}: rename a "
                "column, or give predict= (and loss=), functions of (model, batch, ctx)"
            )
        return model(**given)


def _inner(model: Module) -> Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _is(package: str, kind: str, model: Module) -> bool:
    """Whether a model is of a package's class, without importing a package that nobody has."""
    return package in sys.modules and isinstance(model, getattr(sys.modules[package], kind))


# --- loss, prediction, measures --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelLoss:
    """Loss slot: the loss that a Transformers model works out itself from the labels of the batch.

    Args:
        forward: how the model is called.
        next_token: a batch without labels is its own, with what ``attention_mask`` hides ignored.
    """

    forward: Forward
    next_token: bool = False

    def __call__(self, model: Module, batch: Batch, ctx: Ctx) -> Tensor:
        """The scalar.

        Raises:
            PlanError: the model gives none.
        """
        if self.next_token and LABELS not in batch:
            batch = {**batch, LABELS: next_token_labels(batch)}
        value = self.forward(model, batch, self.forward.main, with_labels=True).loss
        if value is None:
            raise PlanError(f"{type(model).__name__} gives no loss on {', '.join(batch)}: {_ASK}")
        return value  # type: ignore[no-any-return]


def next_token_labels(batch: Batch) -> Tensor:
    """``input_ids`` [B, T] with -100 where ``attention_mask`` [B, T] is 0; the model shifts them itself."""
    ids = batch["input_ids"]
    return ids.masked_fill(batch["attention_mask"] == 0, IGNORED) if "attention_mask" in batch else ids


_ASK = "give loss=, a function of (model, batch, ctx) that returns a scalar"


def default_loss(model: Module, forward: Forward, batch: Batch) -> LossFn:
    """The loss that a Transformers model has of itself: on labels, or of the next token.

    Raises:
        PlanError: there is none.
    """
    inner = _inner(model)
    if _is("transformers", "PreTrainedModel", inner):
        takes = [name for name in forward.labels if name in forward.names]
        if any(name in batch for name in takes):
            return ModelLoss(forward)
        if _causal(inner) and "input_ids" in batch:
            return ModelLoss(forward, next_token=True)
        wants = f"it wants {' or '.join(takes)} in the data" if takes else "its class has none"
        raise PlanError(f"{type(inner).__name__} has no loss on {', '.join(batch)} ({wants}): {_ASK}")
    raise PlanError(
        f"{type(inner).__name__} has no loss of its own: {_ASK}, such as "
        "lambda model, batch, ctx: F.cross_entropy(model(batch['x']), batch['labels'])"
    )


def _causal(model: Module) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = type(model).__name__
    return name.endswith("ForCausalLM") or name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


@dataclass(frozen=True)
class Predict:
    """Predict slot: the model's logits, or the first tensor that it returns.

    Args:
        forward: how the model is called.
        input: the entry that it is called on where no entry has a parameter's name.
    """

    forward: Forward
    input: str

    def __call__(self, model: Module, batch: Batch, ctx: Ctx) -> Tensor:
        """Logits, or what takes their place, of the batch without its labels."""
        output = self.forward(model, batch, self.input)
        if isinstance(output, Tensor):
            return output
        found = getattr(output, "logits", None)
        values = output.values() if isinstance(output, Mapping) else output
        return found if found is not None else next(v for v in values if isinstance(v, Tensor))


@dataclass(frozen=True)
class HeldOutLoss:
    """Measure: a loss on held-out examples, the mean over examples of the batches' means.

    Args:
        test: the examples.
        loss: the plan's own, whatever an arm trains on.
        batch: examples at a time.
    """

    test: Table
    loss: LossFn
    batch: int

    @torch.no_grad()
    def __call__(self, run: Run) -> dict[str, float]:
        """``loss``, in nats where it is a cross-entropy."""
        total = 0.0
        for part in self.test.parts(self.batch):
            run.ctx.batch = to_device(part, run.ctx.device)
            size = len(next(iter(part.values())))
            total += size * float(self.loss(run.model, run.ctx.batch, run.ctx))
        return {"loss": total / len(self.test)}


@dataclass(frozen=True)
class HeldOutAccuracy:
    """Measure: the share of held-out examples whose largest logit [B, K] is that of the label [B].

    Args:
        test: the examples.
        batch: examples at a time.
    """

    test: Table
    batch: int

    @torch.no_grad()
    def __call__(self, run: Run) -> dict[str, float]:
        """``accuracy`` in [0, 1]."""
        hits = 0
        for part in self.test.parts(self.batch):
            labels = part.pop(LABELS)
            hits += int((run.predict(part).argmax(-1).cpu() == labels).sum())
        return {"accuracy": hits / len(self.test)}


# --- facts -----------------------------------------------------------------------------------------------------------


def guessed_facts(model: Module, forward: Forward, batch: Batch) -> dict[str, Any]:
    """``modality``, ``target``, ``output``, ``classes`` and ``input``, from the model's class and configuration.

    What a plain torch model does not tell is guessed from the batch: images are floating [B, C, H, W], whole-number
    labels [B] are classes.
    """
    inner = _inner(model)
    name = _input_name(forward, batch)
    if _is("diffusers", "ModelMixin", inner):
        return {"modality": "diffusion", "target": "noise", "output": "noise", "input": name}
    found = {"modality": MODALITY.get(name) or _modality(batch[name]), "input": name}
    labels, causal = batch.get(LABELS), _is("transformers", "PreTrainedModel", inner) and _causal(inner)
    config = getattr(inner, "config", None)
    if causal and (labels is None or labels.dim() > 1):
        return {**found, "target": "next-token", "output": "logits", "classes": getattr(config, "vocab_size", None)}
    if labels is None:
        return {**found, "target": "other", "output": "other"}
    if labels.is_floating_point():
        return {**found, "target": "value", "output": "value"}
    if labels.dim() > 1:
        return {**found, "target": "token", "output": "logits"}
    return {**found, "target": "class", "output": "logits", "classes": getattr(config, "num_labels", None)}


def _input_name(forward: Forward, batch: Batch) -> str:
    inputs = [n for n in batch if n not in forward.labels]
    if not inputs:
        raise PlanError(
            f"the data have only {', '.join(batch)}, and nothing to put in: add the model's input as a column"
        )
    named_inputs = [n for n in (forward.main, *forward.names) if n in inputs]
    return (named_inputs or inputs)[0]


def _modality(values: Tensor) -> str:
    if values.is_floating_point():
        return "vision" if values.dim() == 4 else "other"
    return "language" if values.dim() == 2 else "other"
