"""Tokens of the input replaced while the targets stay as they were (Masked Thought, 2403.02178)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Generator, Tensor
from torch.nn import Module

from perturbed.core.context import Ctx
from perturbed.core.plan import Batch, Facts, Plan, Site
from perturbed.errors import PlanError, nearest

IGNORED = -100
Hidden = Literal["solution", "question", "everywhere"]
Replacement = Literal["mask", "random"]


def warmed(rate: float, step: int, steps: int, warmup: float) -> float:
    """The masking rate at ``step`` of ``steps``: a linear rise over the share ``warmup`` of them, then ``rate``.

    min(rate, rate * (step + 1) / (warmup * steps + 1)); the released code has step in place of step + 1, which leaves
    the first step without masks.
    """
    return min(rate, rate * (step + 1) / (warmup * steps + 1))


def replaced(ids: Tensor, eligible: Tensor, rate: float, fill: Tensor | int, rng: Generator) -> Tensor:
    """``ids`` [B, T] with each ``eligible`` one [B, T], bool, replaced by ``fill`` with probability ``rate``.

    Args:
        ids: tokens.
        eligible: which may be replaced.
        rate: probability, of each alone.
        fill: a token, or one for each place [B, T].
        rng: CPU generator.
    """
    hit = (torch.rand(ids.shape, generator=rng) < rate).to(ids.device) & eligible
    return torch.where(hit, torch.as_tensor(fill, device=ids.device), ids)


def targets_of(batch: Batch) -> Tensor:
    """The token that is the target at each place [B, T]: ``labels`` if there are any, else the input itself.

    Filling, which ``attention_mask`` [B, T] hides, is -100.
    """
    ids = batch["input_ids"]
    if "labels" in batch:
        return batch["labels"]
    return ids.masked_fill(batch["attention_mask"] == 0, IGNORED) if "attention_mask" in batch else ids


def in_solution(batch: Batch) -> Tensor:
    """Which tokens a model learns to write [B, T], bool: those of ``loss_mask``, else those that have a target."""
    return batch["loss_mask"] if "loss_mask" in batch else targets_of(batch) != IGNORED


@dataclass(frozen=True)
class MaskedInputs:
    """Replace random tokens of the worked solution in the input, and learn to write the solution all the same.

    Every token of the solution stays a target, those included that are hidden as inputs. Which ones are hidden is drawn
    anew at each step. What is a target tells solution from question: ``loss_mask`` or ``labels`` of the batch.

    Args:
        rate: probability of each token at the end of the warm-up; 0 is off. The paper takes 0.4 for solutions in words
            and 0.1 to 0.2 where formulas are dense.
        by: put a ``mask`` token in their place, or a ``random`` token of the vocabulary.
        hide: tokens of the ``solution``, of the ``question`` (all others, what rows are filled up with among them), or
            ``everywhere``.
        warmup: share of the stage over which the rate rises from 0.
        token: the mask token; None for that of the plan's tokenizer. It begins the stage as the mean of the other
            embeddings, where input and output embeddings are not the same tensor.
        stage: glob of the stages to act in.
    """

    rate: float = 0.4
    by: Replacement = "mask"
    hide: Hidden = "solution"
    warmup: float = 2 / 3
    token: int | None = None
    stage: str = "*"

    SITES: ClassVar[tuple[Site, ...]] = ("inputs", "weights")
    REQUIRES: ClassVar[dict[str, object]] = {"modality": "language", "target": "next-token", "classes": ...}
    OFF: ClassVar = {"rate": 0.0}
    TINY: ClassVar = {"rate": 0.01, "warmup": 0.0}
    STRONG: ClassVar = {"rate": 1.0, "warmup": 0.0}

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1 or not 0 <= self.warmup <= 1:
            raise PlanError(f"{self!r}: rate and warmup must be in 0 … 1")
        for name, kind in (("by", Replacement), ("hide", Hidden)):
            if getattr(self, name) not in get_args(kind):
                raise PlanError(
                    f"MaskedInputs: no {name} {getattr(self, name)!r}: {nearest(getattr(self, name), get_args(kind))}"
                )

    def __call__(self, plan: Plan) -> Plan:
        """The plan whose stages read masked solutions."""
        if self.by == "random":
            return plan.add_inputs(self.stage, self.perturb)
        for stage in plan.matching(self.stage):
            self._check(stage.facts or plan.facts)
        return plan.add_inputs(self.stage, self.perturb).add_weights(self.stage, self.mean_embedding)

    def _check(self, facts: Facts) -> None:
        if self.token is None and facts.tokenizer is None:
            raise PlanError(
                "MaskedInputs needs the plan's fact tokenizer to find the mask token: give it, name the token by "
                "token=, or take by='random', which needs none"
            )

    def mask_token(self, facts: Facts) -> int:
        """The token that stands for what is hidden.

        Raises:
            PlanError: the tokenizer has none, or the vocabulary of the model is smaller.
        """
        token: Any = self.token
        if token is None:
            assert facts.tokenizer is not None
            token = facts.tokenizer().mask_token_id
        if token is None:
            raise PlanError(
                "MaskedInputs: the tokenizer has no mask token: add one to it and to the model "
                "(add_special_tokens, resize_token_embeddings), name a spare one by token=, or take by='random'"
            )
        if facts.classes is not None and not 0 <= token < facts.classes:
            raise PlanError(f"MaskedInputs: token={token} is not in the model's vocabulary of {facts.classes}")
        return int(token)

    @torch.no_grad()
    def mean_embedding(self, model: Module, ctx: Ctx) -> Module:
        """The model with the mask token's input embedding set to the mean of the others.

        Raises:
            PlanError: the model names no embeddings.
        """
        try:
            weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
            head = model.get_output_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            raise PlanError(
                f"MaskedInputs: {type(model).__name__} does not name its embeddings: give it methods "
                "get_input_embeddings() and get_output_embeddings(), as Transformers models have, or take by='random'"
            ) from None
        token = self.mask_token(ctx.facts)
        if head is None or head.weight is not weight:
            weight[token] = (weight.sum(0) - weight[token]) / (len(weight) - 1)
        return model

    def perturb(self, batch: Batch, ctx: Ctx) -> Batch:
        """The batch with tokens replaced in ``input_ids``, and ``labels`` as they were before."""
        ids, solution = batch["input_ids"], in_solution(batch)
        eligible = {"solution": solution, "question": ~solution, "everywhere": torch.ones_like(solution)}[self.hide]
        hidden = replaced(
            ids, eligible, warmed(self.rate, ctx.step, ctx.steps, self.warmup), self._fill(ids, ctx),
            ctx.rng(f"hidden tokens {self.stage}"),
        )  # fmt: skip
        return {**batch, "input_ids": hidden, "labels": targets_of(batch)}

    def _fill(self, ids: Tensor, ctx: Ctx) -> Tensor | int:
        if self.by == "mask":
            return self.mask_token(ctx.facts)
        assert ctx.facts.classes is not None
        return torch.randint(ctx.facts.classes, ids.shape, generator=ctx.rng(f"random tokens {self.stage}"))
