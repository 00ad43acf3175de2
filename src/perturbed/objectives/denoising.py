"""Denoising: hidden spans of a text are predicted from what is left of it (T5, 1910.10683; UL2, 2205.05131).

A decoder reads the whole input both ways and writes the target from left to right, in one sequence: mode token, input,
target (a prefix language model). Prefix language modelling is the case of one span that is the end of the text.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from perturbed.core.context import Ctx
from perturbed.core.plan import Batch, LossFn, Plan, Site
from perturbed.errors import PlanError, nearest
from perturbed.objectives.language import causal_logits

Span = tuple[int, int]
MODES = ("R", "S", "X")
NO_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))


@dataclass(frozen=True)
class Denoiser:
    """How spans of a text are chosen.

    Args:
        mode: ``R`` (short spans, few), ``S`` (the end of the text) or ``X`` (long spans, or many).
        mean: length of a span in tokens, in expectation; not used by ``S``.
        rate: share of the text that is hidden; of ``S``, in expectation.
    """

    mode: Literal["R", "S", "X"]
    mean: float
    rate: float

    def count(self, length: int) -> int:
        """How many spans a text of ``length`` tokens gets."""
        hidden = hidden_count(length, self.rate)
        return 1 if self.mode == "S" else min(max(1, round(hidden / self.mean)), hidden, length - hidden + 1)

    def spans(self, length: int, generator: torch.Generator) -> list[Span]:
        """Spans [start, end) of a text of ``length`` tokens, in order.

        ``S`` hides the last 1 … 2 m - 1 tokens, equally likely, where m = ``hidden_count``.
        """
        if self.mode == "S":
            most = min(2 * hidden_count(length, self.rate), length)
            return [(length - int(torch.randint(1, most, (), generator=generator)), length)]
        return random_spans(length, hidden_count(length, self.rate), self.count(length), generator)


# table 1 of the paper
DENOISERS = (
    Denoiser("R", 3, 0.15), Denoiser("R", 8, 0.15), Denoiser("S", math.inf, 0.25),
    Denoiser("X", 3, 0.5), Denoiser("X", 8, 0.5), Denoiser("X", 64, 0.15), Denoiser("X", 64, 0.5),
)  # fmt: skip


def hidden_count(length: int, rate: float) -> int:
    """Tokens that are hidden of a text of ``length`` >= 2: round(length * rate), at least 1 and not all of them."""
    return min(max(round(length * rate), 1), length - 1)


def composition(total: int, parts: int, generator: torch.Generator) -> list[int]:
    """``parts`` sizes of at least 1 that add up to ``total``, every such list being equally likely."""
    cuts = sorted((torch.randperm(total - 1, generator=generator)[: parts - 1] + 1).tolist())
    return [after - before for before, after in zip([0, *cuts], [*cuts, total], strict=True)]


def random_spans(length: int, hidden: int, count: int, generator: torch.Generator) -> list[Span]:
    """``count`` spans [start, end) of ``hidden`` tokens together, no two of which touch.

    Every arrangement is equally likely. T5's code begins with kept text and ends with a span; then a single span, which
    is what short texts get, would always be the end of the text.
    """
    sizes = composition(hidden, count, generator)
    gaps = composition(length - hidden + 2, count + 1, generator)  # the outer two may be empty
    spans, at = [], -1
    for gap, size in zip(gaps, sizes, strict=False):
        spans.append((at + gap, at + gap + size))
        at += gap + size
    return spans


def corrupt(tokens: Sequence[int], spans: Sequence[Span], sentinels: Sequence[int], end: int) -> tuple[list[int], ...]:
    """Input and target of one text (T5, section 3.1.4).

    Where there are more spans than ``sentinels``, these come again from the first.

    Args:
        tokens: the text.
        spans: what is hidden, [start, end) in order.
        sentinels: what stands for each span in the input, and before it in the target.
        end: closes the target.

    Returns:
        Input and target, and the places in the text that their tokens come from; that of a sentinel is the first of its
        span, that of ``end`` is the last hidden one.
    """
    source, target, from_source, from_target, at = [], [], [], [], 0
    for i, (first, last) in enumerate(spans):
        sentinel = sentinels[i % len(sentinels)]
        source += [*tokens[at:first], sentinel]
        from_source += [*range(at, first), first]
        target += [sentinel, *tokens[first:last]]
        from_target += [first, *range(first, last)]
        at = last
    source += tokens[at:]
    from_source += range(at, len(tokens))
    return source, [*target, end], from_source, [*from_target, from_target[-1]]


@functools.lru_cache(maxsize=256)
def text_length(denoiser: Denoiser, room: int) -> int:
    """Tokens of the longest text whose input and target have ``room`` tokens at most: itself, two a span, and the end.

    Raises:
        PlanError: not even two tokens fit.
    """
    for length in range(room - 3, 1, -1):
        if length + 2 * denoiser.count(length) + 1 <= room:
            return length
    raise PlanError(f"denoising: {room} tokens hold no input and target: lengthen the windows")


@dataclass(frozen=True)
class Example:
    """One text made ready: mode token (if any), input, target.

    Args:
        ids: tokens.
        segments: part of the text that each belongs to; -1 for the mode token, which all of them see.
        inputs: how many belong to mode token and input.
        places: place in the text that each comes from, -1 for what is no token of the text.
        said: what a model that predicts each of them should say: ``ids``, unless the text was altered.
    """

    ids: list[int]
    segments: list[int]
    inputs: int
    places: list[int]
    said: list[int]


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that stand for no text.

    Args:
        modes: of ``MODES``, in order.
        end: closes a target.
        sentinels: of the spans.
    """

    modes: tuple[int, ...]
    end: int
    sentinels: tuple[int, ...]

    @classmethod
    def of(cls, tokens: Sequence[int]) -> Vocabulary:
        """Three modes, the end, and sentinels from a list of free tokens.

        Raises:
            PlanError: there are fewer than five, or one comes twice.
        """
        if len(tokens) < 5 or len(set(tokens)) != len(tokens):
            raise PlanError(
                f"denoising wants at least 5 different tokens that no text uses (3 modes, an end, sentinels), not "
                f"{list(tokens)}: name them by tokens=, after adding special tokens to tokenizer and model if need be"
            )
        return cls(tuple(tokens[:3]), tokens[3], tuple(tokens[4:]))

    def example(
        self,
        text: Sequence[int],
        segments: Sequence[int],
        spans: Sequence[Span],
        mode: str | None,
        labels: Sequence[int] | None = None,
    ) -> Example:
        """``text`` with ``spans`` hidden, announced by the token of ``mode``.

        ``labels`` are the tokens to be said where others stand in the text (below 0: those of the text).
        """
        source, target, from_source, from_target = corrupt(text, spans, self.sentinels, self.end)
        first = [] if mode is None else [self.modes[MODES.index(mode)]]
        special = {self.end, *self.sentinels}
        ids = [*first, *source, *target]
        marks = [*([-1] * len(first)), *(segments[i] for i in (*from_source, *from_target))]
        origin = [*([-1] * len(first)), *from_source, *from_target]
        places = [-1 if t in special else i for t, i in zip(ids, origin, strict=True)]
        known = text if labels is None else [new if new >= 0 else old for new, old in zip(labels, text, strict=True)]
        said = [t if i < 0 else known[i] for t, i in zip(ids, places, strict=True)]
        return Example(ids, marks, len(first) + len(source), places, said)


def free_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Tokens that no text has: of a byte-level tokenizer, those of the 13 bytes that UTF-8 never uses."""
    known = tokenizer.get_vocab()
    names = [(chr(byte), f"<0x{byte:02X}>") for byte in NO_UTF8]  # byte-level alphabets, and bytes as a fallback
    # bytes fall back only in vocabularies that have them all: elsewhere such a letter is a letter
    form = 1 if "<0x00>" in known else 0
    return tuple(known[name[form]] for name in names if name[form] in known) if form or "Ġ" in known else ()


def prefix_mask(inputs: Tensor, segments: Tensor) -> Tensor:
    """Which token sees which [B, 1, T, T], bool.

    A token sees itself, the tokens before it, and all of the input, as far as they are of its segment or of segment -1.

    Args:
        inputs: how many tokens of each row are its input [B].
        segments: [B, T].
    """
    length = segments.shape[1]
    place = torch.arange(length, device=segments.device)
    known = (place[None, :] <= place[:, None])[None] | (place[None, :] < inputs[:, None])[:, None, :]
    same = (segments[:, :, None] == segments[:, None, :]) | (segments == -1)[:, None, :]
    return (known & same)[:, None]


def collate(examples: Sequence[Example], length: int, device: torch.device | None = None) -> Batch:
    """Examples as one batch of rows of ``length`` tokens, for ``causal_logits`` and ``denoising_losses``.

    Returns:
        ``input_ids``, ``said``, ``position_ids`` [B, T], ``attention_mask`` [B, 1, T, T] and ``wanted`` [B, T], bool:
        the tokens of the target after its first sentinel whose predecessor is of their segment. Rows are filled up with
        their last token, which nothing before it sees.
    """
    ids, said, segments, wanted = [], [], [], []
    for example in examples:
        size, left = len(example.ids), length - len(example.ids)
        ids.append(example.ids + example.ids[-1:] * left)
        said.append(example.said + example.said[-1:] * left)
        segments.append(example.segments + example.segments[-1:] * left)
        wanted.append(
            [i > example.inputs and example.segments[i] == example.segments[i - 1] for i in range(size)]
            + [False] * left
        )
    marks = torch.tensor(segments, device=device)
    inputs = torch.tensor([e.inputs for e in examples], device=device)
    return {
        "input_ids": torch.tensor(ids, device=device),
        "said": torch.tensor(said, device=device),
        "position_ids": torch.arange(length, device=device).expand(len(ids), -1),
        "attention_mask": prefix_mask(inputs, marks),
        "wanted": torch.tensor(wanted, device=device),
    }


def denoising_losses(model: Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of each token [B, T - 1], and which of them are wanted, of a batch made by ``collate``."""
    shown = {
        "input_ids": batch["input_ids"][:, :-1], "position_ids": batch["position_ids"][:, :-1],
        "attention_mask": batch["attention_mask"][:, :, :-1, :-1],
    }  # fmt: skip
    following = batch["said"][:, 1:]
    logits = causal_logits(model, shown)
    losses = F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none")
    return losses.view_as(following), batch["wanted"][:, 1:]


@dataclass(frozen=True)
class MixtureOfDenoisers:
    """Train on denoising tasks of several kinds, each announced by a token for its mode.

    Each window of text draws one of the seven denoisers (``DENOISERS``) and is cut so that mode token, input and target
    fill it: a step reads as many tokens as without. Loss: mean over the target tokens of all rows.

    Args:
        weights: how often each of the denoisers is drawn, in proportion: two R, one S, four X. The paper's Table 1 with
            40 % R, 20 % S and 40 % X by default.
        mode: token put before the input: of the ``own`` mode, ``none``, or of a ``random`` one.
        share: of the windows that are denoised; the others keep the stage's own loss, so 0 is off.
        tokens: ids that no text uses, for three modes, the end of a target, and sentinels; empty: those of the bytes
            that UTF-8 never has (``free_tokens``).
        stage: glob of the stages to act in.
    """

    weights: tuple[float, ...] = (0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1)
    mode: Literal["own", "none", "random"] = "own"
    share: float = 1.0
    tokens: tuple[int, ...] = ()
    stage: str = "*"

    SITES: ClassVar[tuple[Site, ...]] = ("objectives",)
    REQUIRES: ClassVar[dict[str, object]] = {"modality": "language", "tokenizer": ...}
    OFF: ClassVar = {"share": 0.0}
    TINY: ClassVar = {"share": 0.01}
    STRONG: ClassVar = {"share": 1.0}

    def __post_init__(self) -> None:
        if len(self.weights) != len(DENOISERS) or min(self.weights) < 0 or sum(self.weights) <= 0:
            raise PlanError(
                f"MixtureOfDenoisers: weights={self.weights} must be {len(DENOISERS)} numbers, none below 0, not all 0"
            )
        if self.mode not in ("own", "none", "random"):
            known = nearest(self.mode, ("own", "none", "random"))
            raise PlanError(f"MixtureOfDenoisers: no mode {self.mode!r}: {known}")
        if not 0 <= self.share <= 1:
            raise PlanError(f"MixtureOfDenoisers: share={self.share} must be in 0 … 1")

    def __call__(self, plan: Plan) -> Plan:
        """The plan with the loss of its stages so mixed."""
        return plan.edit(self.stage, lambda s: dataclasses.replace(s, loss=Denoised(s.loss, self)))

    def vocabulary(self, ctx: Ctx) -> Vocabulary:
        """The tokens for modes, end and spans.

        Raises:
            PlanError: there are too few, or one is not in the vocabulary of the model.
        """
        facts = ctx.facts
        assert facts.tokenizer is not None
        tokens = self.tokens or free_tokens(facts.tokenizer())
        size = facts.classes if facts.target == "next-token" else None
        unknown = [token for token in tokens if token < 0 or (size is not None and token >= size)]
        if unknown:
            raise PlanError(
                f"MixtureOfDenoisers: tokens={list(tokens)}: {unknown[0]} is not in the model's vocabulary"
                + ("" if size is None else f" of {size}")
            )
        return Vocabulary.of(tokens)

    def batch(self, windows: Batch, ctx: Ctx) -> Batch:
        """Windows as denoising examples of the same length.

        Args:
            windows: ``input_ids`` [B, T], with ``segment_ids`` [B, T] where packed, or ``attention_mask`` [B, T] where
                filled up on the right, and ``labels`` [B, T] where another intervention altered the inputs.
            ctx: for tokenizer and draws.
        """
        vocabulary, ids = self.vocabulary(ctx), windows["input_ids"]
        segments = windows.get("segment_ids", torch.zeros_like(ids)).tolist()
        labels = windows.get("labels", ids).tolist()
        lengths = windows.get("attention_mask", torch.ones_like(ids)).sum(1).tolist()
        rng = ctx.rng("spans")
        chosen = torch.multinomial(torch.tensor(self.weights), len(ids), replacement=True, generator=rng).tolist()
        others = torch.randint(len(MODES), (len(ids),), generator=rng).tolist()
        examples = []
        for row, (text, marks) in enumerate(zip(ids.tolist(), segments, strict=True)):
            denoiser = DENOISERS[chosen[row]]
            mode = {"own": denoiser.mode, "none": None, "random": MODES[others[row]]}[self.mode]
            size = text_length(denoiser, lengths[row] - 1)
            spans = denoiser.spans(size, rng)
            examples.append(vocabulary.example(text[:size], marks[:size], spans, mode, labels[row][:size]))
        return collate(examples, ids.shape[1], ids.device)


@dataclass(frozen=True)
class Denoised:
    """Loss slot: ``inner`` on some windows of the batch, denoising on the others, weighed by their numbers."""

    inner: LossFn
    mixture: MixtureOfDenoisers

    def __call__(self, model: Module, batch: Batch, ctx: Ctx) -> Tensor:
        """Loss in nats per target token."""
        ids = batch["input_ids"]
        hidden = torch.rand(len(ids), generator=ctx.rng("denoised windows")) < self.mixture.share
        total = torch.zeros((), device=ids.device)
        for chosen, loss in ((~hidden, self.inner), (hidden, self.denoise)):
            rows = chosen.nonzero()[:, 0].to(ids.device)
            if len(rows):
                total = total + len(rows) / len(ids) * loss(model, {k: v[rows] for k, v in batch.items()}, ctx)
        return total

    def denoise(self, model: Module, batch: Batch, ctx: Ctx) -> Tensor:
        """Mean cross-entropy of the target tokens of ``batch``, its windows denoised."""
        losses, wanted = denoising_losses(model, self.mixture.batch(batch, ctx))
        return (losses * wanted).sum() / wanted.sum().clamp(min=1)
