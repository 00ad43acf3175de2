"""The hub's daily papers as JSON, and a single paper of it in the flat form.

``GET https://huggingface.co/api/daily_papers?date=YYYY-MM-DD`` answers an array whose items hold the paper under
``paper`` and the count of comments beside it; ``GET /api/papers/{id}`` answers the paper alone.
"""

from __future__ import annotations

import json
from typing import Any

from perturbed.feed.importers.reading import FormatError, Read, day_of, each, title_in, web_address
from perturbed.feed.papers import Paper, arxiv_id, clean

_MOST = 2**31 - 1


def read(data: str | bytes) -> Read:
    """The papers of an answer of the hub.

    The day of the listing is ``submittedOnDailyAt`` of the paper: the outer ``publishedAt`` can be days earlier.

    Raises:
        FormatError: It is not JSON, or neither an array of items nor one paper.
    """
    try:
        items = json.loads(data)
    except UnicodeDecodeError as e:
        raise FormatError(f"not JSON of the hub: byte {e.start} is not UTF-8; save the answer again") from e
    except json.JSONDecodeError as e:
        raise FormatError(
            f"not whole JSON: line {e.lineno}, column {e.colno}: {e.msg}; nothing was taken, save or fetch it again"
        ) from e
    except (RecursionError, ValueError) as e:  # nested too deeply, or a number of thousands of digits
        raise FormatError(f"JSON that no hub writes ({type(e).__name__}); nothing was taken") from e
    if isinstance(items, dict) and isinstance(items.get("error"), str):
        raise FormatError(f"the hub answered with an error: {clean(items['error'])[:200]}")
    if isinstance(items, dict) and {"id", "title"} <= items.keys():
        items = [items]
    if not isinstance(items, list):
        raise FormatError("not the hub's daily papers: looked for an array of items with `paper`, or one paper")
    return each(items, _paper, lambda item: json.dumps(item)[:500])


def _paper(item: Any) -> Paper:
    if not isinstance(item, dict):
        raise ValueError("not an object")
    inner = item.get("paper", item)
    if not isinstance(inner, dict):
        raise ValueError("`paper` is not an object")
    title = title_in(_text(inner.get("title")) or item.get("title"))
    found = arxiv_id(_text(inner.get("id")) or "")
    authors = inner.get("authors")
    people = tuple(name for a in authors if (name := _name(a))) if isinstance(authors, list) else ()
    return Paper(
        title=title,
        source="hub",
        arxiv=found[0] if found else None,
        abstract=_text(inner.get("summary")) or _text(item.get("summary")),
        authors=people,
        organisation=_organisation(inner.get("organization")) or _organisation(item.get("organization")),
        published=day_of(_text(inner.get("publishedAt"))),
        listed=day_of(_text(inner.get("submittedOnDailyAt"))),
        code_url=web_address(inner.get("githubRepo")),
        project_url=web_address(inner.get("projectPage")),
        upvotes=_count(inner.get("upvotes")),
        comments=_count(item.get("numComments")),
    )


def _text(value: object) -> str | None:
    return (clean(value) or None) if isinstance(value, str) else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST else None


def _name(author: object) -> str | None:
    return _text(author.get("name")) if isinstance(author, dict) else None


def _organisation(value: object) -> str | None:
    return (_text(value.get("fullname")) or _text(value.get("name"))) if isinstance(value, dict) else None
