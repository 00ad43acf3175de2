"""What every request can reach: the database and the parts that work on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.requests import Request

from perturbed.feed.database import Database
from perturbed.feed.web.settings import Settings

if TYPE_CHECKING:
    from perturbed.feed.meaning import Meaning
    from perturbed.feed.runs import Runs


@dataclass(frozen=True, kw_only=True)
class Feed:
    """The parts of one running feed.

    Args:
        database: The papers and everything else that is kept.
        meaning: Search by meaning.
        runs: The queue of studies.
        settings: Of the server.
        clock: Seconds since 1970.
    """

    database: Database
    meaning: Meaning
    runs: Runs
    settings: Settings
    clock: Callable[[], float]


def feed_of(request: Request) -> Feed:
    """The feed that a request is about."""
    found: Feed = request.app.state.feed
    return found
