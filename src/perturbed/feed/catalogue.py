"""The papers that perturbed knows by itself, in our own words, and how they come into the database.

``catalogue.json`` has one entry a paper. Where a method is built, its card (read without running it) tells title,
sites, summary and claim, and the entry adds only what a card lacks: the day of publication and how many authors.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from perturbed.core import registry
from perturbed.errors import PerturbedError
from perturbed.feed import store
from perturbed.feed.database import Database, put_setting, setting
from perturbed.feed.papers import Paper

FILE = Path(__file__).with_name("catalogue.json")

_STAMP = "catalogue"  # the setting that says from which files the database was last seeded


@dataclass(frozen=True, kw_only=True)
class Item:
    """One paper of the catalogue; facts that are not known are None.

    Attributes:
        slug: Its name on the command line and in the ledger.
        title: Of the paper.
        arxiv: Identifier without version.
        year: Of the paper.
        author_count: How many authors.
        published: Day of the first version.
        sites: Where it acts, of `papers.SITES`.
        modality: ``language``, ``vision``, ``vision-language``, ``diffusion``, ``speech``, ``control``, ``synthetic``
            or ``several``.
        kind: ``intervention``, ``measure`` or ``study``.
        summary: One or two sentences of our own.
        claim_text: What the paper says happens.
        claim_paper: Its figures and their setting; says where they were not checked.
        tags: For search.
        requires: Facts that a plan must state; empty while the method is still to come.
        knobs: Fields that the web page may set, with their bounds; likewise.
        has_method: Whether the method is built, so that it can be run.
    """

    slug: str
    title: str
    arxiv: str | None
    year: int | None
    author_count: int | None
    published: date | None
    sites: tuple[str, ...]
    modality: str
    kind: str
    summary: str
    claim_text: str
    claim_paper: str
    tags: tuple[str, ...]
    requires: Mapping[str, Any] = field(default_factory=dict)
    knobs: Mapping[str, list[float]] = field(default_factory=dict)
    has_method: bool = False


@functools.cache
def catalogue() -> tuple[Item, ...]:
    """Every paper of the catalogue, in its order.

    Raises:
        PerturbedError: An entry without words of its own has no card to take them from.
    """
    cards = registry.cards()
    return tuple(_item(entry, cards.get(entry["slug"])) for entry in json.loads(FILE.read_text(encoding="utf-8")))


def item(slug: str) -> Item | None:
    """The paper of that slug, or None."""
    return _by_slug().get(slug)


def seed(database: Database, now: float) -> int:
    """Put the catalogue into the database; what imports have told of a paper stays.

    Nothing is written, and no card read, if neither ``catalogue.json`` nor a method's file has changed since.

    Args:
        database: Of the feed.
        now: Seconds since 1970.

    Returns:
        How many papers are new or were changed.
    """
    stamp = _stamp()
    if setting(database.read(), _STAMP) == stamp:
        return 0
    moved = 0
    with database.write() as connection:
        for known in catalogue():
            change = store.upsert(connection, _paper(known), now)
            enrolled = store.enrol(
                connection,
                change.paper,
                slug=known.slug,
                summary=known.summary,
                year=known.year,
                sites=known.sites,
                tags=known.tags,
                has_method=known.has_method,
                now=now,
            )
            moved += enrolled or change.kind != "same"
        put_setting(connection, _STAMP, stamp)
    return moved


@functools.cache
def _by_slug() -> dict[str, Item]:
    return {known.slug: known for known in catalogue()}


def _item(entry: Mapping[str, Any], card: registry.Card | None) -> Item:
    published = date.fromisoformat(entry["published"]) if entry["published"] else None
    words: Mapping[str, Any] = vars(card) if card else entry
    if "summary" not in words:
        raise PerturbedError(
            f"{FILE}: {entry['slug']!r} has no summary and no methods/{entry['slug'].replace('-', '_')}.py to take it "
            "from; give it words of its own"
        )
    return Item(
        slug=entry["slug"],
        author_count=entry["author_count"],
        published=published,
        **{name: words[name] for name in ("title", "arxiv", "year", "modality", "kind", "summary")},
        sites=tuple(words["sites"]),
        tags=tuple(words["tags"]),
        claim_text=words["claim"]["text"],
        claim_paper=words["claim"]["paper"],
        requires=card.requires if card else {},
        knobs=card.knobs if card else {},
        has_method=card is not None,
    )


def _paper(known: Item) -> Paper:
    return Paper(
        title=known.title,
        source="catalogue",
        arxiv=known.arxiv,
        author_count=known.author_count,
        published=known.published,
    )


def _stamp() -> str:
    """What tells one state of the catalogue's files from another, without reading them."""
    parts = []
    for path in (FILE, *sorted(registry.FOLDER.glob("*.py"))):
        state = path.stat()
        parts.append(f"{path.name} {state.st_size} {state.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
