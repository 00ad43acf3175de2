"""The catalogue: 87 papers in our own words, with the page's facts, put into a database once."""

import ast
import json
import re
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import get_args

import pytest
from waiting import SECONDS

from perturbed.core import registry
from perturbed.errors import PerturbedError
from perturbed.feed import catalogue, store
from perturbed.feed.papers import SITES, Paper, title_key
from perturbed.feed.web.api import Site

SHARED = Path("/work/shared")
PAGE = SHARED / "seed" / "daily-papers-page.txt"
SHEETS = SHARED / "methods" / "README.md"
NOW = 1_763_337_600.0
MODALITIES = {"language", "vision", "vision-language", "diffusion", "speech", "control", "synthetic", "several"}

with_page = pytest.mark.skipif(not PAGE.exists(), reason="the given page is not here")
with_sheets = pytest.mark.skipif(not SHEETS.exists(), reason="the method sheets are not here")


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """Change the catalogue's entries as a new version would: ``edited(change)`` puts a copy in its place."""

    built = registry.cards()

    def put(change):
        # Also once its method is built, "meco" stands for one that is still to come.
        monkeypatch.setattr(registry, "cards", lambda: {slug: card for slug, card in built.items() if slug != "meco"})
        entries = json.loads(catalogue.FILE.read_text(encoding="utf-8"))
        change({entry["slug"]: entry for entry in entries})
        copy = tmp_path / "catalogue.json"
        copy.write_text(json.dumps(entries), encoding="utf-8")
        monkeypatch.setattr(catalogue, "FILE", copy)
        forget()

    def forget():
        catalogue.catalogue.cache_clear()
        catalogue._by_slug.cache_clear()

    yield put
    monkeypatch.undo()
    forget()


def rows(database, query="SELECT * FROM paper ORDER BY id", *values):
    return [dict(row) for row in database.read().execute(query, values)]


def words(text):
    return re.findall(r"[a-z0-9]+(?:['’-][a-z0-9]+)*", text.lower())


def runs(text, length=7):
    found = words(text)
    return {tuple(found[i : i + length]) for i in range(len(found) - length + 1)}


# --- what it says


def test_there_are_87_papers_with_names_of_their_own():
    items = catalogue.catalogue()
    assert len(items) == 87
    assert len({item.slug for item in items}) == len({title_key(item.title) for item in items}) == 87
    known = [item.arxiv for item in items if item.arxiv]
    assert len(known) == len(set(known)) == 86
    assert all(re.fullmatch(r"\d{4}\.\d{4,5}", name) for name in known)


def test_the_sites_are_the_engines():
    """Written down again where the feed must not load the engine, which needs torch."""
    engine = ast.parse((registry.FOLDER.parent / "core" / "plan.py").read_text(encoding="utf-8"))
    told = [ast.literal_eval(n.value) for n in engine.body if isinstance(n, ast.AnnAssign) and n.target.id == "SITES"]
    assert told == [SITES]
    assert get_args(Site) == SITES


@with_sheets
def test_the_papers_are_those_of_the_sheets_in_their_order():
    table = re.findall(r"^\| \d+ \| \[`([^`]+)`\]\([^)]*\) \| (\S+) \| (.*) \|$", SHEETS.read_text(), re.MULTILINE)
    expected = [(slug, None if arxiv == "?" else arxiv, title_key(title)) for slug, arxiv, title in table]
    assert [(item.slug, item.arxiv, title_key(item.title)) for item in catalogue.catalogue()] == expected


@pytest.mark.parametrize("item", catalogue.catalogue(), ids=lambda item: item.slug)
def test_every_entry_keeps_to_the_words_and_lengths_agreed(item):
    assert item.sites
    assert set(item.sites) <= set(SITES)
    assert len(set(item.sites)) == len(item.sites)
    assert item.modality in MODALITIES
    assert item.kind in {"intervention", "measure", "study"}
    assert 3 <= len(item.tags) <= 6
    assert 25 <= len(item.summary.split()) <= 60
    assert item.summary.endswith(".")
    assert len(re.findall(r"[.?] (?=[A-Z])", item.summary)) <= 1  # one sentence or two
    assert item.claim_text
    assert item.claim_paper
    assert not re.search(r"\s\s|\n", item.title + item.summary + item.claim_text + item.claim_paper)


def test_no_two_summaries_begin_alike():
    openings = [tuple(words(item.summary)[:2]) for item in catalogue.catalogue() if not item.has_method]
    assert len(set(openings)) == len(openings)


@with_page
def test_no_seven_words_in_a_row_are_the_pages():
    page = runs(PAGE.read_text(encoding="utf-8"))
    for item in catalogue.catalogue():
        assert not page & runs(item.summary), item.slug
        assert not page & runs(item.claim_text), item.slug
    assert page & runs("We show that Vision-Language Pre-training (VLP) models have exhibited unprecedented capability")


@with_page
def test_dates_and_author_counts_are_the_pages_and_nothing_else():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    place = {title_key(line): i for i, line in enumerate(lines) if line}
    starts = sorted(place[title_key(item.title)] for item in catalogue.catalogue())
    for item in catalogue.catalogue():
        start = place[title_key(item.title)]
        block = "\n".join(lines[start + 1 : next((s for s in starts if s > start), len(lines))])
        byline = re.search(r"(\d+) authors?\n·\n([A-Z][a-z]{2} \d+)(?:, (\d{4}))?(?: \d+)?$", block, re.MULTILINE)
        if byline is None:
            assert (item.author_count, item.published) == (None, None)
            continue
        assert item.author_count == int(byline[1])
        assert f"{item.published:%b} {item.published.day}" == byline[2]
        assert item.published.year == int(byline[3] or 2025)  # without a year: that of the save
        assert item.year == item.published.year or item.has_method
    assert sum(item.published is not None for item in catalogue.catalogue()) == 85


def test_a_day_of_publication_fits_the_arxiv_number():
    for item in catalogue.catalogue():
        if item.arxiv and item.published:
            month = (2000 + int(item.arxiv[:2])) * 12 + int(item.arxiv[2:4])
            assert abs(item.published.year * 12 + item.published.month - month) <= 1, item.slug


# --- cards


def test_where_there_is_a_card_its_words_stand():
    cards = registry.cards()
    carded = [item for item in catalogue.catalogue() if item.slug in cards]
    assert len(carded) >= 8
    for item in carded:
        card = cards[item.slug]
        assert (item.title, item.arxiv, item.year, item.summary) == (card.title, card.arxiv, card.year, card.summary)
        assert (item.sites, item.knobs, item.requires) == (tuple(card.sites), card.knobs, card.requires)
        assert (item.claim_text, item.claim_paper) == (card.claim["text"], card.claim["paper"])
        assert item.has_method
        assert item.author_count in (None, card.authors)
    assert all(not item.has_method and not item.knobs for item in catalogue.catalogue() if item.slug not in cards)


def test_a_method_whose_paper_is_not_in_the_catalogue_is_no_paper_of_the_feed():
    assert "sharpness-aware" in registry.cards()
    assert catalogue.item("sharpness-aware") is None
    assert catalogue.item("meco").arxiv == "2501.01956"


def test_a_card_wins_over_words_that_the_entry_still_has(edited):
    edited(lambda entries: entries["pag"].update(summary="Old words.", title="Old", year=1999))
    assert catalogue.item("pag").summary == registry.cards()["pag"].summary
    assert catalogue.item("pag").year == registry.cards()["pag"].year


def test_an_entry_without_words_or_card_is_named(edited):
    edited(lambda entries: entries["meco"].pop("summary"))
    with pytest.raises(PerturbedError, match=r"'meco' has no summary and no methods/meco\.py"):
        catalogue.catalogue()


# --- the database


def test_an_empty_database_has_87_papers_in_no_time(database):
    catalogue.catalogue.cache_clear()
    registry.cards.cache_clear()
    started = time.process_time()
    assert catalogue.seed(database, NOW) == 87
    assert time.process_time() - started < 0.2
    found = {row["slug"]: row for row in rows(database)}
    assert len(found) == 87
    assert sum(row["has_method"] for row in found.values()) == sum(item.has_method for item in catalogue.catalogue())
    vpt = store.find(database.read(), "vpt")
    assert (vpt.key, vpt.author_count, vpt.published, vpt.year) == ("2206.11795", 9, date(2022, 6, 23), 2022)
    assert vpt.sites == ("data", "objectives", "optim")
    assert {"imitation", "video", "data"} <= set(vpt.tags)
    assert vpt.text == catalogue.item("vpt").summary
    mask = store.find(database.read(), "noise-mask")
    assert mask.arxiv is None
    assert mask.key.startswith("t-")


def test_a_second_seeding_writes_nothing(database):
    catalogue.seed(database, NOW)
    before, written = rows(database), database.read().total_changes
    started = time.process_time()
    assert catalogue.seed(database, NOW + 60) == 0
    assert time.process_time() - started < 0.02
    assert (rows(database), database.read().total_changes) == (before, written)


def test_seeding_anew_changes_nothing_that_is_the_same(database):
    catalogue.seed(database, NOW)
    before = rows(database)
    with database.write() as connection:
        connection.execute("DELETE FROM setting")
    assert catalogue.seed(database, NOW + 60) == 0
    assert rows(database) == before


def test_a_new_version_of_one_entry_changes_one_paper(database, edited):
    edited(lambda entries: None)
    catalogue.seed(database, NOW)
    edited(lambda entries: entries["meco"].update(summary="Other words.", sites=["data"]))
    assert catalogue.seed(database, NOW + 60) == 1
    changed = [row["slug"] for row in rows(database) if row["changed"] > NOW]
    assert changed == ["meco"]
    assert store.find(database.read(), "meco").sites == ("data",)


def test_what_an_import_told_stays(database):
    catalogue.seed(database, NOW)
    told = Paper(
        title=catalogue.item("prox").title.upper(),
        source="hub",
        arxiv="2409.17115",
        abstract="The source's own words.",
        authors=("A. One", "B. Two"),
        listed=date(2024, 9, 26),
        upvotes=64,
    )
    with database.write() as connection:
        assert store.upsert(connection, told, NOW + 1).kind == "merged"
        connection.execute("DELETE FROM setting")
    catalogue.seed(database, NOW + 2)
    prox = store.find(database.read(), "prox")
    assert (prox.abstract, prox.people, prox.listed) == (told.abstract, told.authors, told.listed)
    assert (prox.source_upvotes, prox.author_count) == (64, 2)
    assert prox.text == catalogue.item("prox").summary
    assert len(rows(database)) == 87


@pytest.mark.parametrize("first", ["catalogue", "page"])
def test_a_page_that_gives_titles_only_makes_no_second_paper(database, first):
    def page():
        with database.write() as connection:
            for item in catalogue.catalogue():
                store.upsert(connection, Paper(title=item.title.title(), source="page", author_count=3), NOW)

    steps = [lambda: catalogue.seed(database, NOW), page]
    for step in steps if first == "catalogue" else reversed(steps):
        step()
    assert len(rows(database)) == 87
    assert {row["slug"] for row in rows(database)} == {item.slug for item in catalogue.catalogue()}
    assert store.find(database.read(), "2403.02178").slug == "masked-thought"


def test_reading_the_catalogue_imports_nothing_heavy():
    code = (
        "import sys; from perturbed.feed import catalogue; catalogue.catalogue(); "
        "print([m for m in ('torch', 'numpy', 'scipy', 'matplotlib', 'transformers', 'perturbed.api') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS, check=True)
    assert done.stdout.strip() == "[]"
