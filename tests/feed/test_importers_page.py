"""A saved page in plain text: invented papers through every shape that such pages have, and the given page's counts."""

import textwrap
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from perturbed.feed.importers import page
from perturbed.feed.importers.reading import FormatError
from perturbed.feed.papers import Paper

SAVED = date(2025, 11, 17)
GIVEN = Path("/work/shared/seed/daily-papers-page.txt")
FRONT = "new\n\nSubscribe\n\nDaily Papers\n\nbyAK and the research community\n\nNov 17\n\n"


def read(body, saved_on=SAVED, front=FRONT):
    return page.read(front + body, saved_on)


def one(body, **more):
    found = read(body, **more)
    assert len(found.papers) == 1, found.papers
    return found.papers[0]


def card(title="Kettles Dream of Steam", abstract="We boil a kettle. It sings.", foot="8 authors\n·\nJun 8, 2024"):
    return f"{title}\n\n{abstract}\n\n  • {foot}\n\n"


def test_a_card_is_read_whole():
    assert one(card()) == Paper(
        title="Kettles Dream of Steam",
        abstract="We boil a kettle. It sings.",
        source="page",
        author_count=8,
        published=date(2024, 6, 8),
        listed=SAVED,
    )


@pytest.mark.parametrize(
    ("foot", "day", "comments", "notes"),
    [
        ("Sep 27", date(2025, 9, 27), None, 0),  # the year of the save
        ("Nov 17", date(2025, 11, 17), None, 0),  # the day of the save is not in the future
        ("Nov 18", date(2024, 11, 18), None, 0),  # the day after it is: a year back
        ("Dec 25", date(2024, 12, 25), None, 0),
        ("Feb 29", date(2024, 2, 29), None, 0),  # the last year that has it
        ("Published on Nov 12, 2025", date(2025, 11, 12), None, 0),
        ("May 29 6", date(2025, 5, 29), 6, 0),
        ("May 29, 2024 6", date(2024, 5, 29), 6, 0),
        ("May 29, 20246", date(2024, 5, 29), 6, 0),
        ("May 296", date(2025, 5, 29), 6, 1),  # or the 2nd with 96: said in the notes
        ("May 411", date(2025, 5, 4), 11, 0),  # there is no 41st
        ("May 205", date(2025, 5, 20), 5, 0),  # 05 is no count
        ("May 290", date(2025, 5, 29), 0, 1),
        ("Jun 3112", date(2025, 6, 3), 112, 0),
    ],
)
def test_days_and_comments(foot, day, comments, notes):
    found = read(card(foot=f"8 authors\n·\n{foot}"))
    assert [(p.published, p.comments) for p in found.papers] == [(day, comments)]
    assert len(found.notes) == notes
    assert not found.unread


def test_the_year_is_that_of_the_save_and_not_of_the_import():
    body = card(foot="8 authors\n·\nSep 27")
    assert one(body, saved_on=date(2025, 11, 17)).published == date(2025, 9, 27)
    assert one(body, saved_on=date(2026, 11, 23)).published == date(2026, 9, 27)
    assert one(body, saved_on=date(2026, 1, 2)).published == date(2025, 9, 27)


def test_a_card_without_byline_between_others_keeps_its_neighbours_whole():
    body = card("Ants Count Sheep") + "Bees Vote Twice\n\nBees dance. They vote.\n\n" + card("Cats Sit on Maps")
    found = read(body)
    assert [(p.title, p.author_count) for p in found.papers] == [
        ("Ants Count Sheep", 8),
        ("Bees Vote Twice", None),
        ("Cats Sit on Maps", 8),
    ]
    assert found.papers[1].published is None
    assert found.papers[1].abstract == "Bees dance. They vote."
    assert any("Bees Vote Twice" in note for note in found.notes)


def test_a_card_without_byline_at_the_end():
    found = read(card() + "Bees Vote Twice\n\nBees dance. They vote.\n\nView all\n")
    assert [p.title for p in found.papers] == ["Kettles Dream of Steam", "Bees Vote Twice"]
    assert not found.unread


def test_a_word_of_the_frame_ends_a_wrapped_title_without_loss():
    found = read(
        "Kettles Dream of Steam and of Many Entirely Other\nModels\n\nWe boil a kettle.\n\n"
        "3 authors\n·\nNov 3\n\nModels\nDocs\n"
    )
    assert found.papers[0].title == "Kettles Dream of Steam and of Many Entirely Other Models"
    assert not found.unread


def test_organisation_in_place_of_the_count():
    for line in ("Teapot Labs", "  • Teapot Labs", "Teapot Labs Inc."):
        found = one(f"Kettles Dream\n\nWe boil a kettle.\n\n{line}\n·\nNov 12\n")
        assert (found.organisation, found.author_count) == (line.strip(" •"), None)
        assert found.abstract == "We boil a kettle."


def test_neither_byline_nor_organisation_before_the_day():
    found = one("Kettles Dream\n\nWe boil a kettle and listen to it sing for a long while.\n\n·\nNov 12\n")
    assert (found.organisation, found.published) == (None, date(2025, 11, 12))
    assert found.abstract is not None


def test_marks_of_a_daily_page():
    body = (
        "Submitted by\n\n  ferdinand\n\n112\n\nKettles Dream\n\nWe boil.\n\n • 3 authors\n·\nNov 14\n4\n\n"
        "Submitted by 77\n-\nCats Sit on Maps\n\n • 2 authors\n·\nNov 13\n\n"
        "Submitted by\n\n  42\n\nUpvote 1.2k\nDogs Dig\n\nThey do.\n\nBone Institute\n·\nNov 13\n"
    )
    found = read(body)
    told = [(p.title, p.upvotes, p.comments, p.author_count, p.organisation) for p in found.papers]
    assert told == [
        ("Kettles Dream", 112, 4, 3, None),
        ("Cats Sit on Maps", None, None, 2, None),
        ("Dogs Dig", 1200, None, None, "Bone Institute"),
    ]
    assert found.papers[1].abstract is None
    assert not found.unread


def test_upvotes_without_submitter_stand_before_the_title():
    body = (
        "12\nKettles Dream\n\nWe boil.\n\n3 authors\n·\nNov 14\n4\n"
        "7\nCats Sit\n\nThey sit.\n\n2 authors\n·\nNov 13\n"
        "5\nDogs Dig\n\nThey dig.\n\n2 authors\n·\nNov 12\n"
    )
    found = read(body)
    assert [(p.title, p.upvotes, p.comments) for p in found.papers] == [
        ("Kettles Dream", 12, 4),
        ("Cats Sit", 7, None),
        ("Dogs Dig", 5, None),
    ]


def test_trending_page_with_its_cards_twice():
    once = (
        "Submitted by\n\n ferdinand\n\nKettles Dream\n\nA kettle that sings.\n\nTeapot Labs\n·\n"
        "Published on Oct 16, 2025\n\nUpvote\n69\n\nGitHub 3.29k\narXiv Page\n\n"
    )
    linked = (
        "Cats Sit\n\nCats that sit.\n\n3 authors\n·\nPublished on Oct 17, 2025\nUpvote 12\n"
        "GitHub 11 https://github.com/invented/cats\narXiv Page https://arxiv.org/abs/2510.99999v2\n\n"
    )
    other = linked.replace("Cats Sit\n", "CATS SIT!\n")
    found = read(
        once + once + linked + other, front="Trending Papers\n\nby AK and the research community\n\nDaily\nWeekly\n\n"
    )
    assert [(p.title, p.upvotes, p.organisation, p.arxiv) for p in found.papers] == [
        ("Kettles Dream", 69, "Teapot Labs", None),
        ("Cats Sit", 12, None, "2510.99999"),
    ]
    assert found.papers[1].code_url == "https://github.com/invented/cats"
    assert found.papers[0].listed is None
    assert found.skipped == 2
    assert not found.unread


def test_two_papers_of_one_title_stay_two_if_their_links_differ():
    body = "".join(card("Ants") + f"https://arxiv.org/abs/2510.0000{i}\n\n" for i in (1, 2))
    assert [p.arxiv for p in read(body).papers] == ["2510.00001", "2510.00002"]


def test_only_http_links_are_taken():
    found = read(card() + "GitHub https://github.com/a/b\n\n").papers[0]
    assert found.code_url == "https://github.com/a/b"
    found = read(card() + "GitHub javascript:alert(1)\n\n")
    assert found.papers[0].code_url is None


def test_every_line_that_is_not_understood_is_reported_with_its_number():
    body = card() + "A stray remark\n\n" + card("Cats Sit on Maps") + "99\nand another remark\n"
    found = read(body)
    lines = (FRONT + body).splitlines()
    assert [p.title for p in found.papers] == ["Kettles Dream of Steam", "Cats Sit on Maps"]
    assert [lines[u.line - 1].strip() for u in found.unread] == ["A stray remark", "and another remark"]
    assert found.papers[1].comments == 99


def test_a_byline_without_title_is_reported_and_gives_its_comments_to_nobody():
    found = read(card() + "4 authors\n·\nNov 3\n17\n\n" + card("Cats Sit on Maps"))
    assert [(p.title, p.comments) for p in found.papers] == [
        ("Kettles Dream of Steam", None),
        ("Cats Sit on Maps", None),
    ]
    assert ["byline without a title" in u.why for u in found.unread] == [True]


def test_an_abstract_without_title_is_reported():
    found = read(card() + card("word " * 80 + "end.", "More of it."))
    assert len(found.papers) == 1
    assert any("without a title" in u.why for u in found.unread)


@pytest.mark.parametrize(
    "text", ["", "\n\n", "Dear diary,\n\ntoday I saw no paper.\n", "Daily Papers\n\nNov 17\n\n", "Daily Papers"]
)
def test_a_file_that_is_no_such_page_says_what_was_looked_for(text):
    with pytest.raises(FormatError, match="looked for"):
        page.read(text, SAVED)


def test_control_characters_do_not_get_in():
    found = one(card("Kettles\x01 Dream\x1b of\ufeff Steam".replace("\ufeff", "")))
    assert found.title == "Kettles Dream of Steam"


# Random cards, written as pages write them, come back as they were

WORDS = "kettle steam drift gauze lantern orbit pebble quiver ripple sonnet tundra velvet walnut yonder zephyr".split()  # noqa: SIM905
word = st.sampled_from(WORDS)
titles = st.lists(word, min_size=2, max_size=14, unique=True).map(lambda w: " ".join(x.capitalize() for x in w))
sentence = st.lists(word, min_size=3, max_size=20).map(lambda w: " ".join(w).capitalize() + ".")
abstracts = st.lists(sentence, min_size=1, max_size=5).map(" ".join)
days = st.dates(date(2010, 1, 1), SAVED)
counts = st.integers(0, 5000)


@dataclass(frozen=True)
class Card:
    paper: Paper
    spelled: bool  # with its year


@st.composite
def cards(draw, titled):
    upvotes, comments = draw(st.none() | counts), draw(st.none() | counts)
    day = draw(days)
    institute = draw(st.none() | word.map(lambda w: f"{w.capitalize()} Institute"))
    paper = Paper(
        title=titled,
        source="page",
        abstract=draw(st.none() | abstracts),
        author_count=None if institute else draw(st.integers(1, 99)),
        organisation=institute,
        published=day,
        listed=SAVED,
        upvotes=upvotes,
        comments=comments,
    )
    return Card(paper, draw(st.booleans()) or (SAVED - day).days >= 365)


@st.composite
def pages(draw):
    listed = draw(st.lists(titles, min_size=1, max_size=6, unique=True))
    return [draw(cards(title)) for title in listed]


def written(cards, *, width, inline, parted, spaces):
    """The page that shows these cards; ``parted``: with blank lines; ``spaces``: with a space before the comments."""
    lines = ["Daily Papers", "by AK and the research community", "Daily", "Weekly", "Monthly", "Nov 17"]
    gap = [""] if parted else []
    for shown in cards:
        p = shown.paper
        day = f"{p.published:%b} {p.published.day}" + (f", {p.published.year}" if shown.spelled else "")
        if p.comments is not None:
            day += f"{' ' if spaces else ''}{p.comments}"
        byline = p.organisation or f"• {p.author_count} authors"
        foot = [f"{byline} · {day}"] if inline else [f"  {byline}", "·", day]
        lines += ["Submitted by", "somebody", "-" if p.upvotes is None else str(p.upvotes)]
        for text in (p.title, p.abstract):
            lines += [*(textwrap.wrap(text, width) if width else [text]), *gap] if text else []
        lines += [*foot, *gap]
    return "\n".join(lines)


QUICK = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


@QUICK
@given(shown=pages(), width=st.sampled_from([None, 60, 72, 100]), inline=st.booleans())
def test_any_page_with_blank_lines_comes_back(shown, width, inline):
    found = page.read(written(shown, width=width, inline=inline, parted=True, spaces=True), SAVED)
    assert list(found.papers) == [s.paper for s in shown]
    assert not found.unread


@QUICK
@given(shown=pages())
def test_any_page_without_a_blank_line_comes_back(shown):
    found = page.read(written(shown, width=None, inline=False, parted=False, spaces=True), SAVED)
    assert list(found.papers) == [s.paper for s in shown]


@settings(QUICK, max_examples=25)
@given(shown=pages(), width=st.sampled_from([60, 72, 100]))
def test_any_wrapped_page_without_a_blank_line_comes_back(shown, width):
    texts = [text for s in shown for text in (s.paper.title, s.paper.abstract) if text]
    wrapped = [textwrap.wrap(text, width) for text in texts]
    longest = max(len(line) for lines in wrapped for line in lines)
    assume(all(len(lines[-1]) < longest - 12 for lines in wrapped))  # a last line that fills up hides the seam
    assume(all(s.paper.organisation is None for s in shown))
    found = page.read(written(shown, width=width, inline=False, parted=False, spaces=True), SAVED)
    assert list(found.papers) == [s.paper for s in shown]


@QUICK
@given(shown=pages())
def test_comments_glued_to_a_day_are_told_apart_or_the_doubt_is_said(shown):
    shown = [replace(s, spelled=False) if (SAVED - s.paper.published).days < 365 else s for s in shown]
    found = page.read(written(shown, width=None, inline=False, parted=True, spaces=False), SAVED)
    assert len(found.papers) == len(shown)
    for mine, theirs in zip(found.papers, (s.paper for s in shown), strict=True):
        sure = (mine.published, mine.comments) == (theirs.published, theirs.comments)
        assert sure or any("could be day" in note for note in found.notes) or theirs.published.day < 10


PIECES = [
    *("·", "3 authors", "Nov 3", "7", "Submitted by", "", "Upvote", "-", "GitHub 2", "arXiv Page", "Kettles Dream"),
    *("We boil. It sings.", "Daily Papers", "• Tea Labs", "https://arxiv.org/abs/2501.00001", "May 296", "· May 1"),
]


@QUICK
@given(text=st.text(max_size=400) | st.lists(st.sampled_from(PIECES), max_size=25).map("\n".join))
def test_no_text_breaks_it(text):
    try:
        found = page.read("Daily Papers\n3 authors\n" + text + "\n\n" + card(), SAVED)
    except FormatError:
        return
    assert found.papers
    assert all(p.title for p in found.papers)


@pytest.mark.skipif(not GIVEN.exists(), reason="the given page is not on this machine")
def test_the_given_page():
    found = page.read(GIVEN.read_text(), SAVED)
    papers = found.papers
    assert len(papers) == 87
    assert sum(p.author_count is not None and p.published is not None for p in papers) == 85
    assert sum(p.author_count is None and p.published is None for p in papers) == 2
    assert {p.listed for p in papers} == {SAVED}
    assert all(p.abstract and len(p.abstract) > 500 and len(p.title) < 200 for p in papers)
    assert not found.unread
    assert len(found.notes) == 2
    assert sorted(p.comments for p in papers if p.comments is not None) == [1, 1, 1, 1, 2, 2, 2, 4, 5, 6, 7]
    years = [p.published.year for p in papers if p.published]
    assert (years.count(2025), years.count(2024), min(years), max(years)) == (17, 20, 2018, 2025)
    assert next(p for p in papers if p.title.startswith("Train Once")).published == date(2025, 9, 27)


@pytest.mark.parametrize("foot", ["Nov 9" + "9" * 5000, "Nov 17 1" + "0" * 5000])
def test_a_number_that_no_page_has_is_no_day(foot):
    found = read(card(foot=f"8 authors\n·\n{foot}") + card("Cats Sit on Maps"))
    assert found.papers[-1].title == "Cats Sit on Maps"
    assert all(paper.comments is None for paper in found.papers)
