"""Methods found by scanning a folder; their cards are read without importing anything."""

from __future__ import annotations

import ast
import functools
import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perturbed.errors import PerturbedError, nearest

FOLDER = Path(__file__).parent.parent / "methods"


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a method's file says of its paper.

    Args:
        slug: name on the command line; the file is ``methods/<slug with underscores>.py``.
        title: of the paper.
        arxiv: identifier, or None.
        year: of the paper.
        authors: how many.
        sites: where its interventions act.
        modality: of its study.
        kind: ``intervention``, ``measure`` or ``study``.
        summary: in our own words.
        claim: ``text`` (what the paper says happens) and ``paper`` (its figure and setting).
        requires: facts that a plan must state.
        tags: for search.
        knobs: fields that the web page may set, with their bounds.
    """

    slug: str
    title: str
    arxiv: str | None
    year: int
    authors: int
    sites: list[str]
    modality: str
    kind: str
    summary: str
    claim: dict[str, str]
    requires: dict[str, Any] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    knobs: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A card with its study."""

    card: Card
    study: Any


@functools.cache
def cards() -> dict[str, Card]:
    """Every method's card by slug.

    Raises:
        PerturbedError: a file has no literal ``CARD``, or one whose slug is not the file's name.
    """
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        if not path.stem.startswith("_"):
            card = read_card(path)
            found[card.slug] = card
    return found


def read_card(path: Path) -> Card:
    """The ``CARD`` literal of a method file, without running it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == ["CARD"]:
            try:
                card = Card(**ast.literal_eval(node.value))
            except (ValueError, TypeError) as e:
                raise PerturbedError(f"{path}: CARD must be a literal with a Card's fields: {e}") from e
            if card.slug.replace("-", "_") != path.stem:
                raise PerturbedError(f"{path}: CARD says slug {card.slug!r}; name the file or the slug after the other")
            return card
    raise PerturbedError(f"{path}: no CARD = {{…}} at top level; every method file has one")


def card(slug: str) -> Card:
    """The card of one method.

    Raises:
        PerturbedError: there is none of that name; the message names the nearest.
    """
    if slug not in cards():
        raise PerturbedError(f"no method is called {slug!r}: {nearest(slug, cards())} (`perturbed list` shows all)")
    return cards()[slug]


def load(slug: str) -> Method:
    """A method by its slug, with its study imported."""
    found = card(slug)
    module = importlib.import_module(f"perturbed.methods.{slug.replace('-', '_')}")
    return Method(found, module.STUDY)
