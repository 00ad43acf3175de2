"""Texts put into a stream of packed windows at random places, with a ledger of what went where.

The scheme is that of Hubble (2510.19811): windows keep their number, order and length, at most one text goes into each,
it stays whole and begins at a document's border, and ordinary tokens are pushed out at the window's edges.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from perturbed.core.context import Ctx
from perturbed.core.plan import Batch, DataFn, Plan, Site, Stream
from perturbed.data.documents import Tokens
from perturbed.errors import PlanError

Example = tuple[int, ...]
COLUMNS = ("window", "example", "piece", "crop", "start", "length")


def draw_windows(
    count: int,
    steps: int,
    batch: int,
    begin: float,
    end: float,
    generator: torch.Generator,
    taken: Collection[int] = (),
) -> list[int]:
    """Windows for ``count`` insertions, counted in the order of training: uniform and without replacement.

    They are drawn from [floor(steps * begin) * batch, ceil(steps * end) * batch) without those ``taken``.

    Raises:
        PlanError: the range is not within 0 … 1, or holds fewer windows than insertions.
    """
    if not 0 <= begin <= end <= 1:
        raise PlanError(f"insertions between {begin:g} and {end:g} of training: give 0 <= begin <= end <= 1")
    low, high = math.floor(steps * begin) * batch, math.ceil(steps * end) * batch
    shuffled = (torch.randperm(high - low, generator=generator) + low).tolist()
    free = [window for window in shuffled if window not in taken]
    if count > len(free):
        raise PlanError(
            f"{count} insertions do not fit into {len(free)} windows, one each ({steps} steps of {batch}, {begin:g} to "
            f"{end:g} of training): train longer, or insert fewer"
        )
    return free[:count]


def borders(segments: Tensor) -> Tensor:
    """Where the pieces of a window [T] begin, the first at 0."""
    fresh = torch.ones_like(segments, dtype=torch.bool)
    fresh[1:] = segments[1:] != segments[:-1]
    return fresh.nonzero()[:, 0]


def draw_place(segments: Tensor, length: int, generator: torch.Generator) -> tuple[int, int]:
    """A place in a window for a text of ``length`` tokens.

    Returns:
        The piece before which it goes, uniform over all of them, and how many tokens to ask ``insert`` to crop on the
        left: 0 before the first piece, else uniform over 0 … length - 1.
    """
    piece = int(torch.randint(len(borders(segments)), (), generator=generator))
    crop = int(torch.randint(length, (), generator=generator)) if piece else 0
    return piece, crop


def insert(tokens: Tensor, segments: Tensor, example: Tensor, piece: int, crop: int) -> tuple[Tensor, Tensor, int, int]:
    """A window with ``example`` put before one of its pieces, whole, as a segment of its own.

    Of window and example together, T tokens are kept from ``crop`` on; ``crop`` is lowered where it would cut into
    the example's beginning and raised where its end would not fit.

    Args:
        tokens: the window [T].
        segments: what attends to what [T].
        example: tokens to insert [E], E <= T.
        piece: counted from 0; the example goes where this one begins.
        crop: tokens to push out on the left.

    Returns:
        Tokens [T] and segments [T] (counting up from 0), where the example now begins, and the crop that was used.

    Raises:
        PlanError: the example is longer than the window.
    """
    window, size = len(tokens), len(example)
    if size > window:
        raise PlanError(f"a text of {size} tokens does not fit into a window of {window}: lengthen it, or shorten this")
    at = int(borders(segments)[piece])
    crop = max(min(crop, at), at + size - window)
    keep = slice(crop, crop + window)
    joined = torch.cat([tokens[:at], example.to(tokens), tokens[at:]])[keep]
    # doubled, so that the odd number is free for the example
    odd = torch.full((size,), 2 * int(segments[at]) - 1).to(segments)
    marks = torch.cat([2 * segments[:at], odd, 2 * segments[at:]])[keep]
    fresh = torch.zeros_like(marks)
    fresh[1:] = (marks[1:] != marks[:-1]).to(marks)
    return joined, fresh.cumsum(0).to(segments), at - crop, crop


def contaminated(tokens: Tokens, example: Sequence[int]) -> set[int]:
    """Documents of a corpus that already hold an example, or a good part of it.

    Examples of 10 to 40 tokens count where they occur whole. Of longer ones, of n tokens, the runs of n // 2 tokens at
    every (n // 4)-th place are looked for. Shorter ones are not looked for: they occur by chance.

    Args:
        tokens: the corpus.
        example: its tokens, without the end-of-text token.

    Returns:
        Indices of the documents to drop.
    """
    n = len(example)
    if n < 10:
        return set()
    size, stride = (n, 1) if n <= 40 else (n // 2, n // 4)
    haystack = tokens.ids.numpy().astype("<i4").tobytes()
    found: set[int] = set()
    for first in range(0, n - size + 1, stride):
        needle = torch.tensor(example[first : first + size], dtype=torch.int32).numpy().astype("<i4").tobytes()
        at = haystack.find(needle)
        while at >= 0:
            if at % 4 == 0:
                place = torch.tensor([at // 4, at // 4 + size - 1])
                inside = torch.searchsorted(tokens.starts, place, right=True) - 1
                if inside[0] == inside[1]:
                    found.add(int(inside[0]))
            at = haystack.find(needle, at + 1)
    return found


@dataclass(frozen=True)
class WithInsertions:
    """Data slot: the stream of ``inner`` with texts inserted into some windows.

    Window ``(step * world + rank) * batch + row`` is the place in training order. What was inserted is written to
    ``ctx.artifacts["insertions <stage>"]`` (a second layer of insertions has `` 2`` behind it), a table by columns
    (``COLUMNS``) that grows with training: window, index of the example, piece, crop, start in the window, length. With
    several processes each keeps the table of its own windows.

    Args:
        inner: the stream without them; its batches hold ``input_ids`` and ``segment_ids`` [B, T].
        examples: makes the texts' tokens, each once for every copy of it that is to be inserted, and their indices.
        begin: share of the steps before the first insertion.
        end: share of the steps at the last.
    """

    inner: DataFn
    examples: Callable[[Ctx], list[tuple[int, Example]]]
    begin: float
    end: float

    def __call__(self, ctx: Ctx) -> InsertionStream:
        """The stream of one stage; places are drawn anew for each stage and seed."""
        return InsertionStream(self.inner(ctx), self.examples(ctx), self.begin, self.end, ctx)


class InsertionStream:
    """A stream with insertions; where they go depends on the clock and the seed alone."""

    def __init__(self, inner: Stream, copies: list[tuple[int, Example]], begin: float, end: float, ctx: Ctx):
        self.inner, self.copies, self.between, self.ctx = inner, copies, (begin, end), ctx
        self.layer: int = inner.layer + 1 if isinstance(inner, InsertionStream) else 1
        self.name = f"insertions {ctx.stage}" + (f" {self.layer}" if self.layer > 1 else "")
        self.places: dict[int, int] | None = None
        ctx.artifacts[self.name] = {column: [] for column in COLUMNS}

    def __next__(self) -> Batch:
        batch, ctx = next(self.inner), self.ctx
        _check_batch(batch)
        rows = len(batch["input_ids"])
        if self.places is None:
            self.places = self._draw(rows * ctx.world)
        first = (ctx.step * ctx.world + ctx.rank) * rows
        hit = [row for row in range(rows) if first + row in self.places]
        if not hit:
            return batch
        changed = {k: v.clone() for k, v in batch.items()}
        for row in hit:
            self._insert(changed, row, first + row, self.places[first + row])
        return changed

    def _draw(self, batch: int) -> dict[int, int]:
        """Which copy goes into which window; windows of an insertion within this one are left alone."""
        taken = self.inner.places or {} if isinstance(self.inner, InsertionStream) else {}
        generator = self.ctx.streams.once(f"windows of {self.name}")
        windows = draw_windows(len(self.copies), self.ctx.steps, batch, *self.between, generator, taken)
        return {window: copy for copy, window in enumerate(windows)}

    def _insert(self, batch: Batch, row: int, window: int, copy: int) -> None:
        index, tokens = self.copies[copy]
        segments = batch["segment_ids"][row]
        generator = self.ctx.streams.once(f"place of copy {copy} of {self.name}")
        piece, crop = draw_place(segments, len(tokens), generator)
        ids, marks, start, crop = insert(batch["input_ids"][row], segments, torch.tensor(tokens), piece, crop)
        batch["input_ids"][row], batch["segment_ids"][row] = ids, marks
        if "loss_mask" in batch:
            wanted, at = batch["loss_mask"][row], start + crop
            joined = torch.cat([wanted[:at], torch.ones(len(tokens)).to(wanted), wanted[at:]])
            batch["loss_mask"][row] = joined[crop : crop + len(wanted)]
        table = self.ctx.artifacts[self.name]
        for column, value in zip(COLUMNS, (window, index, piece, crop, start, len(tokens)), strict=True):
            table[column].append(value)

    def state_dict(self) -> dict[str, Any]:
        """That of the stream within."""
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the stream within back where it was."""
        self.inner.load_state_dict(state)


def _check_batch(batch: Batch) -> None:
    """Raise a ``PlanError`` where a batch is not packed, or holds tokens' properties that would stay behind."""
    if "input_ids" not in batch or "segment_ids" not in batch:
        raise PlanError("insertions need batches with input_ids and segment_ids: pack the text (data.packing)")
    shape, known = batch["input_ids"].shape, ("input_ids", "segment_ids", "loss_mask")
    left = sorted(k for k, v in batch.items() if v.shape == shape and k not in known)
    if left:
        raise PlanError(f"insertions move tokens but not the batch entry {left[0]!r}: derive it from segment_ids later")


def check_copies(of: object, copies: Sequence[int]) -> None:
    """Raise a ``PlanError`` where a number of copies is negative."""
    if any(c < 0 for c in copies):
        raise PlanError(f"{type(of).__name__}: {tuple(copies)} copies: none may be negative")


@dataclass(frozen=True)
class Insertions:
    """Insert given texts into the training windows, each so many times.

    A text is encoded by the plan's tokenizer and ends with its end-of-text token. All copies are verbatim.

    Args:
        texts: what to insert.
        copies: how many times each; 0 for a text that is only to be measured.
        begin: share of the steps before the first insertion.
        end: share of the steps at the last.
        stage: glob of the stages to act in.
    """

    texts: tuple[str, ...] = ("The password of the north gate is heliotrope.",)
    copies: tuple[int, ...] = (8,)
    begin: float = 0.0
    end: float = 1.0
    stage: str = "*"

    SITES: ClassVar[tuple[Site, ...]] = ("data",)
    REQUIRES: ClassVar[dict[str, object]] = {"modality": "language", "tokenizer": ...}
    OFF: ClassVar = {"copies": (0,)}
    STRONG: ClassVar = {"copies": (8,)}

    def __post_init__(self) -> None:
        check_copies(self, self.copies)
        if len(self.texts) != len(self.copies):
            raise PlanError(f"Insertions: {len(self.texts)} texts and {len(self.copies)} copies: give one number each")

    def __call__(self, plan: Plan) -> Plan:
        """The plan whose stages see the texts."""
        return insert_into(plan, self.stage, self.examples, self.begin, self.end)

    def examples(self, ctx: Ctx) -> list[tuple[int, Example]]:
        """Every copy, as the text's index and tokens."""
        return repeated(ctx, self.texts, self.copies)


def insert_into(
    plan: Plan, stage: str, examples: Callable[[Ctx], list[tuple[int, Example]]], begin: float, end: float
) -> Plan:
    """The plan with the data of the stages matching the glob wrapped in ``WithInsertions``."""
    return plan.edit(stage, lambda s: dataclasses.replace(s, data=WithInsertions(s.data, examples, begin, end)))


def repeated(ctx: Ctx, texts: Sequence[str], copies: Sequence[int]) -> list[tuple[int, Example]]:
    """Texts in tokens, each with its end-of-text token and as often as ``copies`` says, with their indices."""
    assert ctx.facts.tokenizer is not None
    tokenizer = ctx.facts.tokenizer()
    rows = [(*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id) for text in texts]
    return [(i, row) for i, (row, n) in enumerate(zip(rows, copies, strict=True)) for _ in range(n)]


@dataclass(frozen=True)
class Dilution:
    """More of the same corpus: stages ``times`` as long, so that a fixed number of insertions is a smaller share.

    Args:
        times: the stages' new length, as a multiple of the old one.
        stage: glob of the stages to act in.
    """

    times: int = 3
    stage: str = "*"

    SITES: ClassVar[tuple[Site, ...]] = ("data",)
    REQUIRES: ClassVar[dict[str, object]] = {}
    OFF: ClassVar = {"times": 1}
    STRONG: ClassVar = {"times": 3}

    def __post_init__(self) -> None:
        if self.times < 1:
            raise PlanError(f"Dilution: times={self.times} must be at least 1")

    def __call__(self, plan: Plan) -> Plan:
        """The plan with longer stages."""
        return plan.edit(self.stage, lambda s: dataclasses.replace(s, steps=self.times * s.steps))
