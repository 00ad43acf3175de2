"""What is trending: one formula, published on the page in the words below, computed from the same numbers.

Both terms fade with one half-life, so the order of two papers changes only when something happens to one of them, never
by the passing of time alone.
"""

from __future__ import annotations

import sqlite3
from datetime import UTC, date, datetime

from perturbed.feed.store import Entry, entries

HALF_LIFE = 7  # days
UPVOTE, COMMENT = 1, 2  # points, of the source's readers
OWN_VOTE, OWN_COMMENT = 10, 5
EVIDENCE = 50
WINDOW, AT_LEAST = 56, 500  # days back from the newest, and papers: what is older has faded to 1/256

FORMULA = (
    f"score = (1 + {UPVOTE} × the source's upvotes + {COMMENT} × the source's comments + {OWN_VOTE} × votes here + "
    f"{OWN_COMMENT} × comments here) × ½^(age / {HALF_LIFE} days) + {EVIDENCE} × ½^(age of the newest evidence / "
    f"{HALF_LIFE} days). A paper's age counts from the day on which it was listed, or else published; the last term "
    f"falls away where nothing was measured yet. Considered are the papers of the {WINDOW} days up to the newest one, "
    f"at least the newest {AT_LEAST}, and all with votes, comments or evidence here."
)


def score(
    now: float,
    day: date,
    upvotes: int | None = None,
    comments: int | None = None,
    own_votes: int = 0,
    own_comments: int = 0,
    evidence_at: float | None = None,
) -> float:
    """What `FORMULA` says; times in seconds since 1970, a paper's age from the start of its day in UTC."""
    points = 1 + UPVOTE * (upvotes or 0) + COMMENT * (comments or 0) + OWN_VOTE * own_votes + OWN_COMMENT * own_comments
    fresh = 0.0 if evidence_at is None else EVIDENCE * _faded(now - evidence_at)
    return points * _faded(now - datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) + fresh


def trending(connection: sqlite3.Connection, now: float, limit: int = 20, offset: int = 0) -> list[Entry]:
    """The papers with the highest score, best first; of equals the one that came last."""
    rows = connection.execute(_CONSIDERED, (AT_LEAST - 1, f"-{WINDOW} days")).fetchall()
    days: dict[str, date] = {}
    scored = []
    for paper, day, *counts in rows:
        when = days.get(day) or days.setdefault(day, date.fromisoformat(day))
        scored.append((-score(now, when, *counts), -paper))
    return entries(connection, [-paper for _, paper in sorted(scored)[offset : offset + limit]])


# Papers of the window, and those with a life here; a paper without any day cannot fade and so has no place.
_CONSIDERED = """
WITH since (day) AS (
    SELECT min(date(max(day), ?2), coalesce((SELECT day FROM paper ORDER BY day DESC LIMIT 1 OFFSET ?1), '')) FROM paper
)
SELECT id, day, source_upvotes, source_comments,
    (SELECT count(*) FROM vote WHERE vote.paper = paper.id),
    (SELECT count(*) FROM comment WHERE comment.paper = paper.id),
    (SELECT max(at) FROM finding WHERE finding.paper = paper.id)
FROM paper
WHERE id IN (
    SELECT id FROM paper WHERE day >= (SELECT day FROM since)
    UNION SELECT paper FROM vote UNION SELECT paper FROM comment UNION SELECT paper FROM finding
) AND day IS NOT NULL
"""


def _faded(seconds: float) -> float:
    return float(0.5 ** (max(seconds, 0.0) / 86400 / HALF_LIFE))
