"""A page of daily or trending papers as a reader saved it: plain text without any mark-up.

Each card ends with a foot (``8 authors`` or an organisation, ``·``, a day, perhaps a count of comments), so cards are
found by their feet and read backwards; what has no foot is told from its neighbours by what looks like a title and
what like an abstract. Blank lines help where there are any, and nothing relies on them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import date

from perturbed.feed.importers.reading import FormatError, Read, Unread, web_address
from perturbed.feed.papers import Paper, arxiv_id, clean, title_key

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = "(?P<month>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?"
_MONTH += "|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)"
_COUNT = r"(?:\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?k|\d+)"
_DATE = rf"(?:published\s+on\s+)?{_MONTH}\.?\s+(?P<digits>\d+)(?:,\s*(?P<year>\d{{4}})(?P<glued>\d*))?"
_DATE += r"(?:\s+(?P<comments>\d+))?"
_DOT = "[·•∙]"

_KINDS = {
    "submitted": re.compile(r"submitted\s+by\b:?\s*(?P<name>.*)", re.I),
    "upvote": re.compile(rf"upvotes?\s*(?P<count>{_COUNT}|-)?", re.I),
    "number": re.compile(rf"(?P<count>{_COUNT}|[-–])", re.I),
    "byline": re.compile(rf"(?:{_DOT}\s*)?(?P<authors>\d{{1,5}})\s+authors?", re.I),
    "dot": re.compile(_DOT),
    "date": re.compile(_DATE, re.I),
    "github": re.compile(rf"github(?:\s+{_COUNT})?(?:\s+(?P<link>https?://\S+))?", re.I),
    "arxiv": re.compile(r"arxiv(?:\s+page)?(?:\s*[:(]?\s*(?P<link>https?://\S+?)\)?)?", re.I),
    "link": re.compile(r"(?P<link>https?://\S+)"),
}
_FRONT = re.compile(r"(?:daily|weekly|monthly|trending)\s+papers", re.I)
_BY = re.compile(r"by\s*\S+\s+and\s+the\s+research\s+community", re.I)
_TABS = re.compile(r"(?:daily|weekly|monthly|trending|today)(?:\s+(?:daily|weekly|monthly|trending))*", re.I)
_SPAN = re.compile(rf"(?:week\s*\d+(?:,?\s*\d{{4}})?|\d{{4}}-w\d+|{_MONTH},?\s+(?:19|20)\d\d|\d{{4}}-\d\d)", re.I)
_FRAME = re.compile(
    r"(?:previous|next|view all|load more|company|tos|privacy|about|careers|system theme|website|models|datasets|"
    r"spaces|pricing|docs|©.*|←.*|.*→)",
    re.I,
)
_PAPER = re.compile(r"https?://(?:[\w.]+\.)?(?:arxiv\.org|huggingface\.co/papers)/")
_REPOSITORY = re.compile(r"https?://(?:www\.)?(?:github|gitlab|huggingface)\.")
_NARROWEST, _WIDEST = 40, 130  # characters to which editors wrap: a page with a longer line was not wrapped
_TITLE = 250  # characters that a title has at most


@dataclass(frozen=True)
class _Line:
    number: int
    text: str
    kind: str
    gap: bool  # a blank line, or the start, is before it


@dataclass
class _Card:
    """A card as it is put together; ``marked`` says that a sign stood before its title."""

    line: int
    title: str = ""
    abstract: list[str] = field(default_factory=list)
    marked: bool = False
    foot: bool = False
    authors: int | None = None
    organisation: str | None = None
    published: date | None = None
    upvotes: int | None = None
    comments: int | None = None
    arxiv: str | None = None
    code: str | None = None


@dataclass(frozen=True)
class _Foot:
    """Where the end of a card lies among the lines, [start, end), and what it says."""

    start: int
    end: int
    authors: int | None = None
    organisation: str | None = None
    date: _Line | None = None


def read(text: str, saved_on: date) -> Read:
    """The papers of a saved page.

    A day without a year is of the year of the save, or of the last year before in which it is not in the future.
    A card shown twice is one paper: the same by arXiv identifier where its links tell it, else by title.

    Args:
        text: The page.
        saved_on: Day on which it was saved.

    Raises:
        FormatError: It has no heading of a page of papers and no card, or no paper could be read.
    """
    page = _Page(text, saved_on)
    if not page.lines or not (page.headed or page.feet):
        raise FormatError(
            'not a saved page of papers: looked for the heading "Daily Papers" or "Trending Papers" and for cards that '
            'end in "N authors", "·" and a day such as "Nov 17"; save the page as plain text'
        )
    page.read_cards()
    papers = page.papers()
    if not papers:
        raise FormatError('a page of papers without a card: looked for "N authors", "·" and a day such as "Nov 17"')
    return Read(
        tuple(papers), tuple(sorted(page.unread, key=lambda u: u.line)), skipped=page.doubles, notes=tuple(page.notes)
    )


class _Page:
    def __init__(self, text: str, saved_on: date):
        self.saved_on = saved_on
        self.unread: list[Unread] = []
        self.notes: list[str] = []
        self.cards: list[_Card] = []
        self.listed: date | None = None
        self.doubles = 0
        self.lines = list(_lines(text))
        self.headed = False
        self._skip_front()
        self.feet = list(self._find_feet())
        words = [line for line in self.lines if line.kind == "text"]
        self.parted = any(a.number + 1 < b.number for a, b in self._neighbours() if a.kind == b.kind == "text")
        longest = max((len(line.text) for line in words), default=0)
        self.width = longest if _NARROWEST <= longest <= _WIDEST else None
        if not self._wrapped():
            self.width = None

    def _wrapped(self) -> bool:
        """Whether a full line goes on in the next one, which then is neither an abstract nor an organisation."""
        following = [line.kind for line in self.lines[2:]] + ["", ""]
        return any(
            a.kind == b.kind == "text"
            and self._full(a, b)
            and (b.text[0].islower() or not (_ends(b.text) or kind == "dot"))
            for (a, b), kind in zip(self._neighbours(), following, strict=False)
        )

    def _neighbours(self) -> Iterable[tuple[_Line, _Line]]:
        return zip(self.lines, self.lines[1:], strict=False)

    # The front of the page

    def _skip_front(self) -> None:
        """Drop what stands before the first card of a page with a heading, and take the day that it lists."""
        card = next((f.start for f in self._find_feet() if self.lines[f.start].kind != "date"), len(self.lines))
        heading = next((i for i, line in enumerate(self.lines[:card]) if _FRONT.fullmatch(line.text)), None)
        if heading is None:
            return
        self.headed = True
        at = heading + 1
        for line in self.lines[at:]:
            if line.kind == "date" and self.listed is None:
                self.listed = self._day(line)[0]
            elif not (_BY.fullmatch(line.text) or _TABS.fullmatch(line.text) or _SPAN.fullmatch(line.text)):
                break
            at += 1
        self.lines = self.lines[at:]

    # The feet of the cards

    def _find_feet(self) -> Iterator[_Foot]:
        at = 0
        while at < len(self.lines):
            foot = self._foot_at(at)
            if foot is not None:
                yield foot
            at = foot.end if foot is not None else at + 1

    def _kind(self, at: int) -> str | None:
        return self.lines[at].kind if 0 <= at < len(self.lines) else None

    def _foot_at(self, at: int) -> _Foot | None:
        """The foot that begins here, or whose ``·`` is here: an organisation before it is taken in."""
        kind = self._kind(at)
        if kind == "byline":
            end = at + 1 + (self._kind(at + 1) == "dot")
            day = self.lines[end] if self._kind(end) == "date" else None
            authors = int(_match(self.lines[at])["authors"])
            return _Foot(at, end + (day is not None), authors, None, day)
        if kind == "dot" and self._kind(at + 1) == "date":
            organisation = self._organisation(at - 1)
            return _Foot(at - (organisation is not None), at + 2, None, organisation, self.lines[at + 1])
        alone = kind == "date" and self.lines[at].gap and self._kind(at - 1) == "text"
        if alone or (kind == "date" and self.lines[at].text.lower().startswith("published")):
            return _Foot(at, at + 1, None, None, self.lines[at])
        return None

    def _organisation(self, at: int) -> str | None:
        """The line before a ``·`` where it names an organisation rather than ends an abstract or is the title."""
        if self._kind(at) != "text" or self._kind(at - 1) != "text":
            return None
        line, before = self.lines[at], self.lines[at - 1]
        if line.text[0] in "•∙":
            return clean(line.text[1:]) or None
        prose = len(line.text) > 80 or (_ends(line.text) and len(line.text.split()) > 5)
        parted = line.gap or _ends(before.text) or self._kind(at - 2) != "text"  # else it may end a wrapped sentence
        return line.text if parted and not prose else None

    # Between the feet

    def read_cards(self) -> None:
        """Read all cards, and keep what was not understood."""
        first = self.feet[0].start if self.feet else len(self.lines)
        opening = [line for line in self.lines[:first] if line.kind != "submitted"]
        self.before = bool(opening) and opening[0].kind in ("number", "upvote")
        if any(line.kind == "submitted" for line in self.lines[:first]):
            self.before = self.before or any(line.kind in ("number", "upvote") for line in opening[:3])
        at = 0
        for foot in [*self.feet, None]:
            end = foot.start if foot is not None else len(self.lines)
            self._read_between(self.lines[at:end], foot)
            at = foot.end if foot is not None else end

    def _read_between(self, lines: list[_Line], foot: _Foot | None) -> None:
        lines = self._close(lines)
        cards: list[_Card] = []
        words: list[_Line] = []
        opened: _Card | None = None

        def flush() -> None:
            nonlocal opened
            if words:
                cards.extend(self._cards(words, opened, last=False))
                words.clear()
            elif opened is not None and opened.upvotes is not None:
                self._leave(opened.line, str(opened.upvotes), "upvotes without a title")
            opened = None

        at = 0
        while at < len(lines):
            line = lines[at]
            after = lines[at + 1].kind if at + 1 < len(lines) else None
            if line.kind == "submitted":
                flush()
                opened = _Card(line.number, marked=True)
                at += 1 + (not _match(line)["name"])  # the name may be anything, even a number
                continue
            ended = not words or (self.before and (line.gap or _ends(words[-1].text)))
            if line.kind in ("number", "upvote") and (opened is not None or ended or line.kind == "upvote"):
                if words:
                    flush()
                opened = opened or _Card(line.number, marked=True)
                counts = [line]
                if line.kind == "upvote" and not _match(line)["count"] and after == "number":
                    at += 1
                    counts.append(lines[at])
                opened.upvotes = _count(counts[-1])
            elif line.kind in ("github", "arxiv", "link") and words and (line.gap or line.kind != "link"):
                flush()
                self._take_link(cards[-1] if cards else None, line)
            elif line.kind in ("text", "number", "link", "date", "github", "arxiv") and not (
                (line.gap or not words) and _FRAME.fullmatch(line.text)
            ):
                words.append(line)
            elif line.kind != "text":
                self._leave(line.number, line.text, "a sign that belongs to no card")
            at += 1
        if foot is None:
            flush()
            self._keep(cards)
            return
        if words:
            cards.extend(self._cards(words, opened, last=True))
        elif not cards:
            line = self.lines[foot.start]
            self._leave(line.number, line.text, "a byline without a title")
            cards.append(_Card(line.number))
        self._put_foot(cards[-1], foot)
        self._keep(cards)

    def _close(self, lines: list[_Line]) -> list[_Line]:
        """Give the card before what follows its foot: comments, upvotes, links. Return the rest."""
        card = self.cards[-1] if self.cards and self.cards[-1].foot else None
        run = 0
        while run < len(lines) and lines[run].kind in ("number", "upvote", "github", "arxiv", "link"):
            run += 1
        following = lines[run].kind if run < len(lines) else None
        if following == "text" and (self.before or card is None):  # the last count is of the card that begins
            while run and lines[run - 1].kind in ("number", "upvote"):
                run -= 1
                if lines[run].kind == "upvote" or (run and lines[run - 1].kind != "upvote"):
                    break
        pending: _Line | None = None
        for line in lines[:run]:
            if card is None:
                self._leave(line.number, line.text, "belongs to no card")
            elif line.kind == "upvote":
                pending = line if not _match(line)["count"] else None
                card.upvotes = _count(line) if pending is None else card.upvotes
            elif line.kind == "number" and pending is not None:
                card.upvotes, pending = _count(line), None
            elif line.kind == "number" and card.comments is None:
                card.comments = _count(line)
            elif line.kind == "number":
                self._leave(line.number, line.text, "a number after the count of comments")
            else:
                self._take_link(card, line)
        return lines[run:]

    def _take_link(self, card: _Card | None, line: _Line) -> None:
        link = web_address(_match(line)["link"])
        if link is None:
            return
        found = arxiv_id(link) if _PAPER.match(link) else None
        if card is None:
            self._leave(line.number, line.text, "a link that belongs to no card")
        elif found:
            card.arxiv = found[0]
        elif _REPOSITORY.match(link):
            card.code = card.code or link
        else:
            self._leave(line.number, line.text, "a link to neither arXiv nor a repository")

    # From words to cards

    def _cards(self, words: list[_Line], opened: _Card | None, *, last: bool) -> list[_Card]:
        """The cards in a run of words; only the last one can be the one whose foot follows."""
        parts = self._paragraphs(words)
        cards: list[_Card] = []
        first = opened or _Card(words[0].number)
        for number, part in parts:
            card = cards[-1] if cards else None
            if card is None:
                first.line, first.title = number, part
                cards.append(first)
            elif _prose(part) or (card.abstract and part[0].islower() and not _ends(card.abstract[-1])):
                card.abstract.append(part)
            else:
                cards.append(_Card(number, part))
        return self._sift(cards, last=last)

    def _sift(self, cards: list[_Card], *, last: bool) -> list[_Card]:
        """Keep what is a card: a title, with a foot to come, a mark before it or an abstract after it."""
        if last and len(cards) > 1 and not cards[-1].abstract and not cards[-2].abstract:
            title, tail = cards[-2], cards[-1]
            if title.marked or len(tail.title) > len(title.title):
                title.abstract.append(tail.title)
                self.notes.append(
                    f"line {tail.line}: taken as the abstract of {title.title[:60]!r}: it ends no sentence"
                )
                cards = cards[:-1]
        kept = []
        for card in cards:
            if len(card.title) > _TITLE and not card.marked:
                self._leave(card.line, card.title, "an abstract without a title")
                if last and card is cards[-1]:
                    kept.append(card)
            elif card.abstract or card.marked or (last and card is cards[-1]):
                kept.append(card)
            else:
                self._leave(card.line, card.title, "neither a title with an abstract nor a part of a card")
        return kept

    def _paragraphs(self, words: list[_Line]) -> list[tuple[int, str]]:
        """Runs of lines as wrapped text, each with the number of its first line."""
        groups: list[list[_Line]] = []
        for i, line in enumerate(words):
            joined = i > 0 and (not line.gap if self.parted else self._full(words[i - 1], line))
            if joined:
                groups[-1].append(line)
            else:
                groups.append([line])
        if self.parted and len(groups[0]) > 1:  # no blank line between title and abstract
            end = 1
            while end < len(groups[0]) and self._full(groups[0][end - 1], groups[0][end]):
                end += 1
            if end == len(groups[0]) and len(_joined(groups[0])) > _TITLE:
                end = 1
            groups[:1] = [g for g in (groups[0][:end], groups[0][end:]) if g]
        return [(group[0].number, _joined(group)) for group in groups]

    def _full(self, line: _Line, following: _Line) -> bool:
        """Whether the line was broken for want of room: the next word would not have fitted."""
        return self.width is not None and len(line.text) + 1 + len(following.text.split()[0]) > self.width

    # What a card says

    def _put_foot(self, card: _Card, foot: _Foot) -> None:
        card.foot = True
        card.authors, card.organisation = foot.authors, foot.organisation
        if foot.date is None:
            self.notes.append(f"line {card.line}: {_short(card.title)} has a byline but no day")
        else:
            card.published, card.comments = self._day(foot.date)

    def _keep(self, cards: list[_Card]) -> None:
        for card in cards:
            if not card.foot:
                self.notes.append(f"line {card.line}: {_short(card.title)} has neither byline nor day: both left empty")
            if card.title and not title_key(card.title):
                self._leave(card.line, card.title, "a title without a letter or digit")
            self.cards.append(card)

    def _leave(self, line: int, text: str, why: str) -> None:
        self.unread.append(Unread(line, text, why))

    def _day(self, line: _Line) -> tuple[date | None, int | None]:
        """The day of a date line, and the comments that may stand behind it, even glued to it."""
        found = _match(line)
        month = _MONTHS.index(found["month"][:3].lower()) + 1
        digits, year, comments = found["digits"], found["year"], found["comments"]
        readings = []
        for size in (2, 1):  # two digits first: "May 296" is the 29th with 6 comments, not the 2nd with 96
            rest = digits[size:]
            if size > len(digits) or (rest and (year or comments or re.fullmatch(r"0\d+", rest))):
                continue
            day = _valid(int(year), month, int(digits[:size])) if year else self._last(month, int(digits[:size]))
            if day is not None:
                readings.append((day, int(rest) if rest else None))
        if year and found["glued"]:
            comments = found["glued"] if comments is None else comments
        if not readings:
            self._leave(line.number, line.text, "no day of any year")
            return None, None
        if len(readings) > 1 and len(digits) > 2:
            (day, count), (other, more) = readings
            self.notes.append(
                f"line {line.number}: {line.text!r} was read as day {day.day} with {count} comments; it could be day "
                f"{other.day} with {more}"
            )
        day, count = readings[0]
        return day, int(comments) if comments else count

    def _last(self, month: int, day: int) -> date | None:
        """The last day of that name that is not after the save."""
        years = range(self.saved_on.year, self.saved_on.year - 9, -1)  # nine: 29 February can be eight years back
        days = (_valid(year, month, day) for year in years)
        return next((d for d in days if d is not None and d <= self.saved_on), None)

    def papers(self) -> list[Paper]:
        """Each paper once, in the order of the page."""
        papers: list[Paper] = []
        at: dict[str, int] = {}
        for card in self.cards:
            if not title_key(card.title) or (len(card.title) > _TITLE and not card.marked):
                continue  # reported: its foot has no title
            paper = Paper(
                title=card.title,
                source="page",
                arxiv=card.arxiv,
                abstract=" ".join(card.abstract) or None,
                author_count=card.authors,
                organisation=card.organisation,
                published=card.published,
                listed=self.listed,
                code_url=card.code,
                upvotes=card.upvotes,
                comments=card.comments,
            )
            names = [name for name in (card.arxiv, title_key(card.title)) if name]
            place = next((at[n] for n in names if n in at and not _differ(papers[at[n]], paper)), len(papers))
            if place == len(papers):
                papers.append(paper)
            else:
                papers[place] = _both(papers[place], paper)
                self.doubles += 1
            at.update(dict.fromkeys(names, place))
        return papers


def _differ(one: Paper, other: Paper) -> bool:
    return bool(one.arxiv and other.arxiv and one.arxiv != other.arxiv)


def _both(one: Paper, other: Paper) -> Paper:
    """The first showing, with what only the second tells."""
    names = ("arxiv", "abstract", "author_count", "organisation", "published", "code_url", "upvotes", "comments")
    return replace(one, **{n: getattr(other, n) for n in names if getattr(one, n) is None})


def _lines(text: str) -> Iterator[_Line]:
    """The lines that are not blank; a foot in one line is taken apart at its ``·``."""
    gap = True
    for number, raw in enumerate(text.splitlines(), 1):
        line = clean(raw)
        if not line:
            gap = True
            continue
        for piece in _pieces(line):
            kind = next((k for k, pattern in _KINDS.items() if pattern.fullmatch(piece)), "text")
            if re.search(r"\d{10}", piece) and kind not in ("github", "arxiv", "link"):
                kind = "text"  # no count and no day
            yield _Line(number, piece, kind, gap)
            gap = False


def _pieces(line: str) -> list[str]:
    found = re.fullmatch(rf"(?P<byline>.*?)\s*(?P<dot>·)\s*(?P<date>{_DATE})?", line, re.I)
    if found is None or not (found["date"] or _KINDS["byline"].fullmatch(found["byline"])):
        return [line]
    return [piece for piece in (found["byline"], found["dot"], found["date"]) if piece]


def _match(line: _Line) -> re.Match[str]:
    found = _KINDS[line.kind].fullmatch(line.text)
    assert found is not None
    return found


def _count(line: _Line) -> int | None:
    """A count as pages write it; a dash is none told."""
    text = (_match(line)["count"] or "-").lower().replace(",", "")
    if text in "-–":
        return None
    return round(float(text[:-1]) * 1000) if text.endswith("k") else int(text)


def _valid(year: int, month: int, day: int) -> date | None:
    try:
        return date(year, month, day)
    except ValueError:
        return None


def _joined(lines: list[_Line]) -> str:
    return " ".join(line.text for line in lines)


def _ends(text: str) -> bool:
    return text.rstrip("\"'”’)]").endswith((".", "!", "?", "…"))


def _prose(text: str) -> bool:
    """Whether a paragraph reads as an abstract rather than as a title."""
    return len(text) > _TITLE or text.rstrip("\"'”’)]").endswith((".", "…")) or (_ends(text) and len(text) > 150)


def _short(title: str) -> str:
    return repr(title if len(title) <= 60 else f"{title[:59]}…")
