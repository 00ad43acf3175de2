"""Word substitution: the smallest change of a few words that turns a text classifier's answer, by queries alone."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Words = tuple[str, ...]
Score = Callable[[Sequence[Words]], Tensor]
Substitutes = Callable[[str], tuple[str, ...]]


@dataclass(frozen=True)
class Attacked:
    """What an attack on one text came to.

    Attributes:
        words: the text that it ended with.
        success: whether its score is above 0.
        queries: texts that were scored, the original included.
        changed: words that differ from the original's.
    """

    words: Words
    success: bool
    queries: int
    changed: int


@torch.no_grad()
def substitute_words(words: Words, score: Score, substitutes: Substitutes, *, most: int) -> Attacked:
    """Replace words one at a time, the most important first, each by the substitute that raises the score most.

    A word's importance is what the score gains when it is left out. At most ``most`` words are replaced; a word whose
    substitutes all fail to raise the score is kept and costs nothing of these. The search ends at a score above 0.
    This is the greedy order of TextFooler (Jin et al. 2020, 1907.11932) without its filters by part of speech and
    sentence similarity: what counts as a substitute is ``substitutes``' to say.

    Args:
        words: the text [T].
        score: of texts, one number each [N], above 0 where the attack has succeeded: for a classifier the largest
            wrong logit less the right one. The texts of one call may be of different lengths.
        substitutes: of a word; empty for words that are not to be touched.
        most: most words to replace.
    """
    best = float(score([words])[0])
    queries, text = 1, list(words)
    options = {place: found for place, word in enumerate(words) if (found := substitutes(word))}
    if best > 0 or not options or most < 1:
        return Attacked(words, best > 0, queries, 0)
    places = list(options)
    without = score([words[:place] + words[place + 1 :] for place in places])
    queries += len(places)
    for rank in torch.argsort(without, descending=True, stable=True).tolist():
        place = places[rank]
        tried = [(*text[:place], other, *text[place + 1 :]) for other in options[place]]
        values = score(tried)
        queries += len(tried)
        if float(values.max()) > best:
            best = float(values.max())
            text = list(tried[int(values.argmax())])
        changed = sum(a != b for a, b in zip(text, words, strict=True))
        if best > 0 or changed == most:
            break
    return Attacked(tuple(text), best > 0, queries, sum(a != b for a, b in zip(text, words, strict=True)))


def neighbours(
    word: str, names: Sequence[str], vectors: Tensor, *, number: int, similarity: float = 0.0
) -> tuple[str, ...]:
    """The words nearest to ``word``, nearest first.

    Args:
        word: whose; one that is not in ``names`` has none.
        names: the vocabulary [N], sorted.
        vectors: of length 1 [N, D].
        number: how many at most.
        similarity: smallest cosine.
    """
    at = bisect.bisect_left(names, word)
    if at == len(names) or names[at] != word:
        return ()
    cosines = vectors @ vectors[at]
    cosines[at] = -torch.inf
    found = cosines.topk(min(number, len(names) - 1))
    return tuple(names[i] for i, c in zip(found.indices.tolist(), found.values.tolist(), strict=True) if c > similarity)


def swaps(word: str) -> tuple[str, ...]:
    """The words made by exchanging two neighbouring letters inside ``word``, its first and last letter staying."""
    found = (word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(1, len(word) - 2))
    return tuple(dict.fromkeys(other for other in found if other != word))
