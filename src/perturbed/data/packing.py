"""Documents packed into windows of equal length, none of which lets one document see another."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perturbed.core.context import Ctx
from perturbed.core.keys import digest
from perturbed.core.plan import Batch
from perturbed.data.documents import Tokens
from perturbed.data.vocabulary import Text
from perturbed.errors import PlanError


@dataclass(frozen=True)
class Windows:
    """Packed windows in the order in which they are trained on.

    Args:
        ids: token ids [S, T], int32.
        segments: what attends to what [S, T], int16: counts up from 0 in each window, at each new document or part.
        loss_mask: whether a token is a target [S, T], bool.
    """

    ids: Tensor
    segments: Tensor
    loss_mask: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Tensor) -> Batch:
        """These windows as ``input_ids``, ``segment_ids`` and, where some token is no target, ``loss_mask``."""
        batch = {"input_ids": self.ids[rows].long(), "segment_ids": self.segments[rows].long()}
        return batch if bool(self.loss_mask.all()) else {**batch, "loss_mask": self.loss_mask[rows]}


def pack(tokens: Tokens, length: int) -> Windows:
    """Documents end to end, cut every ``length`` tokens; the remainder that fills no window is left out.

    Each token is in at most one window. A document cut by a window's edge goes on in the next window as a segment of
    its own.
    """
    lengths = tokens.lengths
    document = torch.arange(len(tokens)).repeat_interleave(lengths)
    fresh = torch.ones(len(tokens.ids), dtype=torch.bool)
    fresh[1:] = (document[1:] != document[:-1]) | (tokens.segments[1:] != tokens.segments[:-1])
    full = len(tokens.ids) // length * length
    ids, loss_mask, fresh = (x[:full].view(-1, length) for x in (tokens.ids, tokens.loss_mask, fresh))
    segments = fresh.cumsum(1)
    return Windows(ids, (segments - segments[:, :1]).to(torch.int16), loss_mask)


def lay_out(tokens: Tokens, length: int, windows: int, generator: Callable[[int], torch.Generator]) -> Windows:
    """The first ``windows`` windows of training, in their final order.

    In each epoch the documents are shuffled and packed, and then the windows are shuffled, so that neighbours in a
    document do not meet in a batch. Where the budget ends within an epoch only the documents that fill it are packed.

    Args:
        tokens: the documents to train on.
        length: tokens in a window.
        windows: how many.
        generator: gives the random generator of each epoch, counted from 0.

    Raises:
        PlanError: the documents do not fill one window.
    """
    if len(tokens.ids) < length:
        raise PlanError(f"data: {len(tokens.ids)} training tokens do not fill a window of {length}: give more text")
    parts: list[Windows] = []
    missing, epoch = windows, 0
    while missing > 0 or not parts:
        rng = generator(epoch)
        order = torch.randperm(len(tokens), generator=rng)
        filled = tokens.lengths[order].cumsum(0)
        enough = int((filled < missing * length).sum()) + 1
        packed = pack(tokens.take(order[:enough]), length)
        shuffled = torch.randperm(len(packed), generator=rng)[:missing]
        parts.append(Windows(packed.ids[shuffled], packed.segments[shuffled], packed.loss_mask[shuffled]))
        missing, epoch = missing - len(shuffled), epoch + 1
    columns = zip(*((p.ids, p.segments, p.loss_mask) for p in parts), strict=True)
    return Windows(*(torch.cat(column) for column in columns))


def position_ids(segment_ids: Tensor) -> Tensor:
    """Place of each token in its segment [B, T], from 0; positions start again wherever the segment changes."""
    place = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    fresh = torch.ones_like(segment_ids, dtype=torch.bool)
    fresh[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return place - (place * fresh).cummax(1).values


def attention_mask(segment_ids: Tensor) -> Tensor:
    """Which token sees which [B, 1, T, T], bool: itself and earlier ones of its own segment."""
    length = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    return (same & causal)[:, None]


def segments_of(batch: Batch) -> Tensor:
    """The batch's ``segment_ids`` [B, T].

    Raises:
        PlanError: it has none.
    """
    if "segment_ids" not in batch:
        raise PlanError(
            f"the batch has {', '.join(batch)} but no segment_ids [B, T], which tell the texts of a row apart: pack "
            "the text (data.packing), or give zeros where each row is one text"
        )
    return batch["segment_ids"]


def targets(batch: Batch) -> Tensor:
    """Which of the tokens 1 … T-1 are to be predicted [B, T-1], bool: those whose predecessor is of their segment.

    Raises:
        PlanError: the batch has no ``segment_ids``.
    """
    segments = segments_of(batch)
    within = segments[:, 1:] == segments[:, :-1]
    return within & batch["loss_mask"][:, 1:] if "loss_mask" in batch else within


@dataclass(frozen=True)
class PackedText:
    """The data slot of language plans: row ``r`` of step ``t`` is window ``t * batch + r`` of ``lay_out``.

    Leaves in ``ctx.artifacts["corpus <stage>"]`` the size and hash of the corpus, and ``epochs``, how often the budget
    of this stage reads it; more than once is said on stderr too.

    Args:
        text: the corpus, its tokenizer and split.
        length: targets in a window, which holds ``length + 1`` tokens.
        batch: windows in a step and process.
    """

    text: Text
    length: int
    batch: int

    def __call__(self, ctx: Ctx) -> WindowStream:
        """The stream of a stage; its order is drawn anew for each stage and seed."""
        tokens, needed = self.text.train(), ctx.steps * self.batch * ctx.world
        windows = lay_out(
            tokens, self.length + 1, needed, lambda epoch: ctx.streams.once(f"documents of epoch {epoch}")
        )
        epochs = needed * (self.length + 1) / len(tokens.ids)
        ctx.artifacts[f"corpus {ctx.stage}"] = {
            "documents": len(tokens), "tokens": len(tokens.ids), "epochs": epochs, "hash": self.text.fingerprint(),
        }  # fmt: skip
        if epochs > 1:
            print(f"perturbed: note: stage {ctx.stage!r} reads its {len(tokens.ids):,} tokens {epochs:.2g} times",
                  file=sys.stderr)  # fmt: skip
        return WindowStream(windows, self.batch, ctx)

    def fingerprint(self) -> str:
        """Hash of the corpus and the sizes."""
        return digest([self.text.fingerprint(), self.length, self.batch])


class WindowStream:
    """Windows by the clock: it has no state of its own, so a resumed run finds its place by ``ctx.step``.

    Beyond the stage's last step the windows come again from the first.
    """

    def __init__(self, windows: Windows, batch: int, ctx: Ctx):
        self.windows, self.size, self.ctx = windows, batch, ctx

    def __next__(self) -> Batch:
        first = (self.ctx.step * self.ctx.world + self.ctx.rank) * self.size
        return self.windows.batch(torch.arange(first, first + self.size) % len(self.windows))

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take."""
