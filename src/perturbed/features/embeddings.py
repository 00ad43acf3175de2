"""Noise on the input embeddings of a language model in training, and dropout of them; no prediction sees it.

A Transformers model names its table of input embeddings by ``get_input_embeddings``; what that gives is changed on its
way to the first block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import Module

from perturbed.core.context import Ctx
from perturbed.core.plan import Batch, Feature, Plan, Site
from perturbed.errors import PlanError
from perturbed.inputs.noise import uniform


def input_embedding(model: Module) -> Module:
    """The module that turns token ids into vectors, as a Transformers model names it.

    Raises:
        PlanError: the model names none.
    """
    try:
        found: Any = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        found = None
    if not isinstance(found, Module):
        raise PlanError(
            f"{type(model).__name__} names no input embedding: give it a method get_input_embeddings() that returns "
            "the module, as Transformers models have"
        )
    return found


def text_lengths(batch: Batch, like: Tensor) -> Tensor:
    """How many tokens the text of each token has [B, T], 0 for what ``attention_mask`` hides.

    A text is what has one number in ``segment_ids`` [B, T], as packed rows have (filling is one too), else the tokens
    of a row that ``attention_mask`` [B, T] does not hide, else the whole row. A loss may leave the last tokens out, as
    those of next tokens do: these do not count.

    Args:
        batch: what the loss reads.
        like: embeddings of its tokens [B, T, D].

    Raises:
        PlanError: the batch's entry has other rows than the embeddings, or is shorter.
    """
    size = like.shape[1]
    told = next((n for n in ("segment_ids", "attention_mask") if n in batch and batch[n].dim() == 2), None)
    if told is None:
        return torch.full(like.shape[:2], size, device=like.device)
    entry = batch[told][:, :size]
    if entry.shape != like.shape[:2]:
        raise PlanError(
            f"embeddings {list(like.shape)} are not those of the batch's tokens, whose {told} is "
            f"{list(batch[told].shape)}: the model must embed each row of the batch once"
        )
    if told == "segment_ids":
        return (entry.unsqueeze(2) == entry.unsqueeze(1)).sum(2)
    real = (entry != 0).long()
    return real * real.sum(1, keepdim=True)


def noisy_embeddings(embeddings: Tensor, lengths: Tensor, alpha: float, rng: Generator) -> Tensor:
    """Embeddings with uniform noise as long, in each text, as ``alpha`` says (NEFTune, Jain et al. 2023, 2310.05914).

    Each number of a token gets a draw of its own from U[-1, 1], times alpha / sqrt(L D) with L the tokens of its text.
    The noise of a whole text then has the same expected squared length, alpha^2 / 3, whatever L and D.

    Args:
        embeddings: [B, T, D].
        lengths: L of each token [B, T]; no noise where it is 0.
        alpha: the paper takes 5, 10 and 15.
        rng: CPU generator.
    """
    scale = torch.where(lengths > 0, alpha / (lengths.clamp(min=1) * embeddings.shape[-1]).sqrt(), 0.0)
    return embeddings + scale.unsqueeze(-1).to(embeddings) * uniform(embeddings, rng)


def dropped_embeddings(embeddings: Tensor, rate: float, rng: Generator) -> Tensor:
    """Embeddings with each number, not each token, set to 0 with probability ``rate``, and the others / (1 - rate).

    Args:
        embeddings: of any shape.
        rate: in [0, 1).
        rng: CPU generator.
    """
    kept = (torch.rand(embeddings.shape, generator=rng) >= rate).to(embeddings.device)
    return embeddings * kept / (1 - rate)


@dataclass(frozen=True)
class EmbeddingNoise:
    """Add uniform noise to the input embeddings of all real tokens while training (NEFTune, 2310.05914).

    Drawn anew at each step. Which tokens are one text, and which are padding, is told by ``segment_ids`` or
    ``attention_mask`` of the batch.

    Args:
        alpha: noise is alpha / sqrt(tokens of the text * width) times a draw from U[-1, 1]; 0 is off. The paper takes
            5, 10 and 15.
        stage: glob of the stages to act in.
    """

    alpha: float = 5.0
    stage: str = "*"

    SITES: ClassVar[tuple[Site, ...]] = ("features",)
    REQUIRES: ClassVar[dict[str, object]] = {"modality": "language"}
    OFF: ClassVar = {"alpha": 0.0}
    TINY: ClassVar = {"alpha": 1e-3}
    STRONG: ClassVar = {"alpha": 50.0}

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise PlanError(f"EmbeddingNoise: alpha={self.alpha} must not be negative")

    def __call__(self, plan: Plan) -> Plan:
        """The plan with noise on the embeddings in its stages."""
        return plan.add_feature(self.stage, Feature(input_embedding, self.add))

    def add(self, embeddings: Tensor, ctx: Ctx) -> Tensor:
        """``embeddings`` [B, T, D] with noise."""
        lengths = text_lengths(ctx.batch, embeddings)
        return noisy_embeddings(embeddings, lengths, self.alpha, ctx.rng(f"embedding noise {self.stage}"))


@dataclass(frozen=True)
class EmbeddingDropout:
    """Drop numbers of the input embeddings of all tokens while training: ordinary dropout, of elements, not of tokens.

    Drawn anew at each step.

    Args:
        rate: probability of each number to become 0, in [0, 1); 0 is off.
        stage: glob of the stages to act in.
    """

    rate: float = 0.1
    stage: str = "*"

    SITES: ClassVar[tuple[Site, ...]] = ("features",)
    REQUIRES: ClassVar[dict[str, object]] = {"modality": "language"}
    OFF: ClassVar = {"rate": 0.0}
    TINY: ClassVar = {"rate": 1e-3}
    STRONG: ClassVar = {"rate": 0.5}

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise PlanError(f"EmbeddingDropout: rate={self.rate} must be in [0, 1)")

    def __call__(self, plan: Plan) -> Plan:
        """The plan with embeddings dropped in its stages."""
        return plan.add_feature(self.stage, Feature(input_embedding, self.drop))

    def drop(self, embeddings: Tensor, ctx: Ctx) -> Tensor:
        """``embeddings`` [B, T, D] with numbers dropped."""
        return dropped_embeddings(embeddings, self.rate, ctx.rng(f"embedding dropout {self.stage}"))
