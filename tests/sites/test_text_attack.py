from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from perturbed.inputs.text_attack import Attacked, Words, neighbours, substitute_words, swaps

TEXT = ("a", "b", "c", "d")


class Additive:
    """A score that is a sum over words, of which the greedy search finds the maximum; it counts what it is asked."""

    def __init__(self, worth: dict[str, float], offset: float):
        self.worth, self.offset, self.asked = worth, offset, 0

    def __call__(self, texts: Sequence[Words]) -> Tensor:
        self.asked += len(texts)
        return torch.tensor([self.offset + sum(self.worth[w] for w in text) for text in texts])


# leaving out "b" gains most, then "d"; "a" is best kept, and "c" has no substitute
WORTH = {"a": 2.0, "b": -3.0, "c": 0.0, "d": -1.0, "a1": 1.0, "b1": -2.5, "b2": -1.0, "d1": 0.5, "d2": -0.5}
OTHERS = {"a": ("a1",), "b": ("b1", "b2"), "c": (), "d": ("d1", "d2")}


def run(offset: float, most: int) -> tuple[Attacked, int]:
    score = Additive(WORTH, offset)
    return substitute_words(TEXT, score, OTHERS.__getitem__, most=most), score.asked


def brute(offset: float, most: int) -> float:
    """The largest score with at most so many words replaced."""
    score = Additive(WORTH, offset)
    ways = [(word, *OTHERS[word]) for word in TEXT]
    legal = [t for t in itertools.product(*ways) if sum(a != b for a, b in zip(t, TEXT, strict=True)) <= most]
    return float(score(legal).max())


@pytest.mark.parametrize("most", [0, 1, 2, 4])
def test_finds_the_best_text_of_an_additive_score_and_stops_at_the_budget(most: int) -> None:
    found, asked = run(offset=-100.0, most=most)
    assert not found.success
    assert float(Additive(WORTH, -100.0)([found.words])[0]) == pytest.approx(brute(-100.0, most))
    assert found.changed == min(most, 2) == sum(a != b for a, b in zip(found.words, TEXT, strict=True))
    assert found.queries == asked


def test_stops_at_the_first_text_that_succeeds_with_the_most_important_word_replaced_first() -> None:
    found, asked = run(offset=1.0, most=4)  # the text scores -1; b2 in place of b brings it to 1
    assert found == Attacked(("a", "b2", "c", "d"), success=True, queries=1 + 3 + 2, changed=1)
    assert asked == found.queries


def test_a_text_that_is_wrong_already_costs_one_query() -> None:
    assert run(offset=3.0, most=4)[0] == Attacked(TEXT, success=True, queries=1, changed=0)


def test_words_without_substitutes_are_never_touched_nor_asked_about() -> None:
    score = Additive(WORTH, -100.0)
    found = substitute_words(("c", "c"), score, OTHERS.__getitem__, most=2)
    assert found == Attacked(("c", "c"), success=False, queries=1, changed=0)


def test_a_word_whose_substitutes_do_not_help_costs_nothing_of_the_budget() -> None:
    worth = {"x": -5.0, "x1": -6.0, "y": -1.0, "y1": 3.0}
    others = {"x": ("x1",), "y": ("y1",)}
    found = substitute_words(("x", "y"), Additive(worth, 0.0), others.__getitem__, most=1)
    assert found.words == ("x", "y1")  # x is the more important; asked first, kept, and y still had its turn


def test_order_of_importance_differs_from_that_of_the_text() -> None:
    """With a budget of one word, taking words as they come would end elsewhere."""
    worth = {"x": -1.0, "x1": -0.5, "y": -4.0, "y1": 0.0}
    others = {"x": ("x1",), "y": ("y1",)}
    assert substitute_words(("x", "y"), Additive(worth, -9.0), others.__getitem__, most=1).words == ("x", "y1")


def test_neighbours_are_the_nearest_by_cosine_and_never_the_word_itself() -> None:
    names = ("east", "north", "northeast", "south", "southeast")
    angles = torch.tensor([0.0, math.pi / 2, math.pi / 4, -math.pi / 2, -math.pi / 4 + 0.01])
    vectors = torch.stack([angles.cos(), angles.sin()], 1)
    assert neighbours("east", names, vectors, number=2) == ("southeast", "northeast")
    assert neighbours("north", names, vectors, number=9) == ("northeast",)  # the rest lie at 90 degrees and beyond
    assert neighbours("north", names, vectors, number=9, similarity=0.9) == ()
    assert neighbours("west", names, vectors, number=2) == ()
    assert neighbours("zenith", names, vectors, number=2) == ()


def test_swaps_exchange_inner_letters_only() -> None:
    assert swaps("words") == ("wrods", "wodrs")
    assert swaps("book") == ()  # the inner letters are equal
    assert swaps("abc") == swaps("a") == swaps("") == ()
    for other in swaps("principal"):
        assert sorted(other) == sorted("principal")
        assert (other[0], other[-1]) == ("p", "l")
