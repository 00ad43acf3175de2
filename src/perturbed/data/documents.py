"""The document: the one record that language methods read and write, and its tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Document:
    """A text with what is known of it, and its tokens once it has been encoded.

    Args:
        text: as it was found.
        metadata: where it comes from, for example ``package``, ``module`` and ``object``.
        tokens: ids, with the end-of-text token last; empty before encoding.
        segments: for each token the part of the document that it belongs to, from 0; a token attends within its part.
            Empty means one part.
        loss_mask: for each token whether it is learnt as a target. Empty means all are.
    """

    text: str
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    tokens: tuple[int, ...] = ()
    segments: tuple[int, ...] = ()
    loss_mask: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        for name in ("segments", "loss_mask"):
            given = len(getattr(self, name))
            if given not in (0, len(self.tokens)):
                raise ValueError(f"{name} has {given} entries for {len(self.tokens)} tokens: give one each, or none")


def held_out(text: str, share: float) -> bool:
    """Whether a text belongs to the held-out ``share`` of any corpus that contains it; told by its hash alone."""
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return number < share * 2**64


@dataclass(frozen=True)
class Tokens:
    """Encoded documents end to end.

    Args:
        ids: token ids [N], int32.
        segments: part of its document that each token belongs to [N], int16.
        loss_mask: whether it is a target [N], bool.
        starts: where each document begins, and the end [D + 1], int64.
    """

    ids: Tensor
    segments: Tensor
    loss_mask: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens of each document [D]."""
        return self.starts.diff()

    def take(self, documents: Tensor) -> Tokens:
        """The documents of these indices [K], in this order; an index may come twice."""
        lengths = self.lengths[documents]
        starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        within = torch.arange(int(starts[-1])) - starts[:-1].repeat_interleave(lengths)
        source = self.starts[documents].repeat_interleave(lengths) + within
        return Tokens(self.ids[source], self.segments[source], self.loss_mask[source], starts)

    def tree(self) -> dict[str, Any]:
        """As a tree of tensors for a store."""
        return dict(self.__dict__)


def concatenate(documents: Iterable[Document]) -> Tokens:
    """Encoded documents as one record of tensors.

    Raises:
        ValueError: a document has no tokens.
    """
    found = list(documents)
    for document in found:
        if not document.tokens:
            raise ValueError(f"document {document.text[:40]!r} has no tokens: encode it first")
    starts = torch.tensor([0, *(len(d.tokens) for d in found)]).cumsum(0)
    ids = torch.tensor([*chain.from_iterable(d.tokens for d in found)], dtype=torch.int32)
    segments, loss_mask = torch.zeros(len(ids), dtype=torch.int16), torch.ones(len(ids), dtype=torch.bool)
    for document, start, end in zip(found, starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        if document.segments:
            segments[start:end] = torch.tensor(document.segments, dtype=torch.int16)
        if document.loss_mask:
            loss_mask[start:end] = torch.tensor(document.loss_mask)
    return Tokens(ids, segments, loss_mask, starts)


def encode(documents: Iterable[Document], tokenizer: Any) -> Iterator[Document]:
    """Each document with its tokens: those of its text, then the tokenizer's end-of-text token.

    Args:
        documents: texts; what they say of segments and loss is dropped, because it counts other tokens.
        tokenizer: a Transformers tokenizer with an end-of-text token.
    """
    found = list(documents)
    rows = tokenizer([d.text for d in found], add_special_tokens=False, return_attention_mask=False)["input_ids"]
    for document, row in zip(found, rows, strict=True):
        yield Document(document.text, document.metadata, (*row, tokenizer.eos_token_id))
