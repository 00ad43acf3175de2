"""Search by words: what is found, in which order, how it is shown; and that nothing typed can make it raise."""

import time
from datetime import date

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perturbed.feed import search as searching
from perturbed.feed import store
from perturbed.feed.meaning import keep
from perturbed.feed.papers import SITES, Paper
from perturbed.feed.schema import TOKENIZER
from perturbed.feed.search import Query, Term, fuse, parse, search, similar

PAPERS = {
    "Pruning a network before it learns": "Weights of small size are cut at the start, and the rest is trained.",
    "Noise in the embeddings": "Each training step draws noise and adds it to the embeddings of the words.",
    "A survey of everything": "Pruning is named once here among very many other things, and so is noise.",
    "C++ kernels for attention": "Fast code that reads memory once, written by Zoë Núñez.",
    "Rotating stars": "Photometry of distant suns and their periods.",
}


@pytest.fixture
def connection(database):
    with database.write() as inside:
        for i, (title, abstract) in enumerate(PAPERS.items()):
            store.upsert(
                inside,
                Paper(
                    title=title,
                    abstract=abstract,
                    source="arxiv",
                    arxiv=f"2{i}01.00001",
                    published=date(2020 + i, 1, 5),
                    authors=("Grace Hopper",) if i == 1 else (),
                    categories=("cs.LG",),
                ),
                1.0,
            )
    return database.read()


def titles(found):
    return [hit.entry.title.split()[0] for hit in found.hits]


def enrol(database, key, sites=(), tags=(), verdict=None):
    with database.write() as connection:
        paper = store.find(connection, key).id
        store.enrol(
            connection,
            paper,
            slug=f"slug-{paper}",
            summary="Our own words on it.",
            year=None,
            sites=sites,
            tags=tags,
            has_method=True,
            now=2.0,
        )
        connection.execute("UPDATE paper SET verdict = ? WHERE id = ?", (verdict, paper))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pruning", ["Pruning", "A"]),  # in the title before in passing
        ("PRUNED networks", ["Pruning"]),  # stems, and all words needed
        ("noise embeddings", ["Noise"]),
        ('"noise and adds"', ["Noise"]),
        ('"adds and noise"', []),
        ("embed*", ["Noise"]),
        ("em*", []),  # too short for a beginning: the word "em"
        ("noise -survey", ["Noise"]),
        ('noise -"training step"', ["A"]),
        ("c++", ["C++"]),
        ("nunez", ["C++"]),  # accents and case do not matter
        ("grace hopper", ["Noise"]),
        ("cs.LG stars", ["Rotating"]),
        ("stars year:2024", ["Rotating"]),
        ("stars year:2023", []),
        ("noise year:2021-2022", ["Noise", "A"]),
        ("noise year:2022-2021", ["Noise", "A"]),
        ("noise year:0000-9999", ["Noise", "A"]),
        ("noise year:1066", []),
        ("year:2021-2022", ["A", "Noise"]),  # newest first
        ("year:2020 year:2024", ["Rotating", "Pruning"]),
        ("-noise -stars", ["C++", "Pruning"]),
        ("kernels (memory)", ["C++"]),
        ("title:(", []),
        ("2024", ["Rotating"]),
        ("", []),
        ("   ", []),
        ("++ ?! -", []),
    ],
)
def test_what_is_found(connection, text, expected):
    found = search(connection, text)
    assert titles(found) == expected
    assert (found.total, found.count, found.more, found.reach) == (
        len(expected),
        str(len(expected)),
        False,
        len(expected),
    )


def test_filters_of_the_catalogue(database, connection, monkeypatch):
    enrol(database, "2001.00001", sites=("weights",), verdict="supported")
    enrol(database, "2101.00001", sites=("features", "weights"), verdict="null")
    enrol(database, "2201.00001", tags=("weights",))  # a tag is no site
    for text, expected in {
        "site:weights": ["Noise", "Pruning"],
        "site:weights site:features": ["Noise"],
        "pruning site:weights": ["Pruning"],
        "noise SITE:Weights": ["Noise"],
        "verdict:supported": ["Pruning"],
        "verdict:supported verdict:null": ["Noise", "Pruning"],
        "verdict:any": ["Noise", "Pruning"],
        "verdict:none": ["Rotating", "C++", "A"],
        "verdict:none verdict:null": ["Rotating", "C++", "A", "Noise"],
        "noise verdict:null": ["Noise"],
        "noise verdict:any": ["Noise"],
        "noise verdict:none": ["A"],
        "noise verdict:none verdict:any": ["Noise", "A"],
        "noise verdict:none verdict:null": ["Noise", "A"],
        "noise verdict:none verdict:supported": ["A"],
        "pruning verdict:null": [],
        "supported": [],  # a verdict is no word of the paper
        "pruning -supported": ["Pruning", "A"],
    }.items():
        found = search(connection, text)
        assert (titles(found), found.total) == (expected, len(expected)), text
    monkeypatch.setattr(searching, "RANKED", 1)  # the way of very many matches
    assert titles(search(connection, "noise site:weights")) == ["Noise"]


def test_an_unknown_value_is_named_with_those_there_are(connection):
    found = search(connection, "noise site:wieghts verdict:maybe year:soon")
    assert titles(found) == ["Noise", "A"]
    for piece in ("“wieghts”", ", ".join(SITES), "“maybe”", "any, none, invalid", "inconclusive", "year:2020-2023"):
        assert piece in found.note


def test_words_that_no_paper_has_together(connection):
    found = search(connection, "pruning photometry zebra")
    assert titles(found) in (["Pruning", "Rotating", "A"], ["Rotating", "Pruning", "A"])
    assert "some of them" in found.note
    assert search(connection, "zebra quagga").total == 0


def test_little_words_are_looked_for_only_where_there_are_no_others(connection):
    plain = search(connection, "noise embeddings")
    assert titles(plain) == ["Noise"]
    assert search(connection, "what of the noise in our embeddings") == plain  # the count and what is marked too
    assert "our" in parse("our noise").plain  # the meaning is of the whole sentence
    assert set(titles(search(connection, "is the"))) == {"Pruning"}
    assert titles(search(connection, '"noise and adds"')) == ["Noise"]  # a phrase is as it stands


def test_snippets_show_where_the_words_stand(database, connection):
    hit = search(connection, "noise").hits[0]
    assert "".join(piece for piece, _ in hit.snippet) == PAPERS["Noise in the embeddings"]
    assert [piece for piece, marked in hit.snippet if marked] == ["noise"]
    in_people = search(connection, "hopper").hits[0]
    assert in_people.snippet == [(PAPERS["Noise in the embeddings"], False)]
    enrol(database, "2101.00001")
    assert search(connection, "words embeddings").hits[0].snippet[0] == ("Our own ", False)
    assert [p for p, marked in search(connection, "adds").hits[0].snippet if marked] == ["adds"]  # then the abstract


def test_markup_and_marks_in_a_text_stay_text(database):
    with database.write() as connection:
        store.upsert(
            connection,
            Paper(title="T", abstract="See <script>alert('x')</script> \x02forged\x03 marks.", source="hub"),
            1.0,
        )
    snippet = search(database.read(), "alert").hits[0].snippet
    assert snippet == [("See <script>", False), ("alert", True), ("('x')</script> forged marks.", False)]


def test_snippets_are_cut_as_the_index_is(connection):
    (sql,) = connection.execute("SELECT sql FROM sqlite_schema WHERE name = 'words'").fetchone()
    assert f"tokenize = '{TOKENIZER}'" in sql


def test_a_paper_without_text_has_an_empty_snippet(database):
    with database.write() as connection:
        store.upsert(connection, Paper(title="Bare", source="page"), 1.0)
    assert search(database.read(), "bare").hits[0].snippet == []


def test_parse_reads_the_grammar():
    query = parse(
        'Deep "two  words" begin* -not -"not this" site:data verdict:none year:2020 year:2021-2023 deep-ish Deep'
    )
    assert query == Query(
        terms=(Term("Deep", "word"), Term("two words", "phrase"), Term("begin", "prefix"), Term("deep-ish", "word")),
        excluded=(Term("not", "word"), Term("not this", "phrase")),
        sites=("data",),
        verdicts=("none",),
        years=((2020, 2020), (2021, 2023)),
    )
    assert query.plain == "Deep two words begin deep-ish"


def test_long_queries_are_cut_and_say_so(connection):
    found = search(connection, "noise " + "x" * 10_000)
    assert "first 1,000" in found.note
    found = search(connection, " ".join(f"word{i}" for i in range(100)))
    assert "first 24 words" in found.note
    assert search(connection, "noise " * 150).note is None  # one word, said often


AWKWARD = ['"', "'", "*", "(", ")", ":", "-", "^", "+", "NEAR", "AND", "OR", "NOT", "site:", "title:", "{", "}", "\0"]
queries = st.one_of(
    st.text(max_size=60),
    st.text(alphabet=st.characters(), max_size=30),  # surrogates too
    st.lists(st.sampled_from([*AWKWARD, "noise", "year:2021", "verdict:none", " "]), max_size=14).map("".join),
    st.lists(st.sampled_from([*AWKWARD, "noise", "site:data", "²", "\u0301", "\ue000", "\u200d"]), max_size=9).map(
        " ".join
    ),
)


@given(queries)
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_typed_raises(connection, text):
    found = search(connection, text)
    assert found.total >= len(found.hits) >= 0
    assert "".join(piece for hit in found.hits for piece, _ in hit.snippet).isprintable()


@pytest.mark.parametrize(
    "text", ["c++", "title:(", '"x', "NEAR", "*", "a\0b", "\ud800 noise", "noise " * 2000, "((((" * 300]
)
def test_the_known_traps(connection, text):
    search(connection, text)


def test_without_quoting_the_traps_do_raise(connection, monkeypatch):
    monkeypatch.setattr(Term, "match", property(lambda term: term.text))
    with pytest.raises(Exception, match="fts5"):
        search(connection, "c++")


def test_pages_follow_each_other(database):
    with database.write() as connection:
        for i in range(45):
            store.upsert(connection, Paper(title=f"Common number {i}", source="page"), 1.0)
    everything = [h.entry.id for h in search(database.read(), "common", limit=100).hits]
    pages = [[h.entry.id for h in search(database.read(), "common", limit=20, offset=o).hits] for o in (0, 20, 40, 60)]
    assert [paper for page in pages for paper in page] == everything
    assert [len(page) for page in pages] == [20, 20, 5, 0]
    assert search(database.read(), "common", limit=-1, offset=-5).hits == []


def test_when_too_many_match_titles_come_first_and_then_the_newest(database, monkeypatch):
    monkeypatch.setattr(searching, "RANKED", 10)
    with database.write() as connection:
        for i in range(40):
            title = f"About models {i}" if i in (3, 17) else f"Paper {i}"
            store.upsert(
                connection,
                Paper(
                    title=title, abstract="Models " * (5 if i == 1 else 1), source="page", published=date(2024, 1, 1)
                ),
                1.0,
            )
    found = search(database.read(), "models", limit=50)
    assert (found.count, found.more) == ("10+", True)
    assert {hit.entry.title for hit in found.hits[:2]} == {"About models 3", "About models 17"}
    assert [hit.entry.title for hit in found.hits[2:]] == [f"Paper {i}" for i in range(29, 40)]  # not Paper 1
    assert search(database.read(), "models year:2024", limit=50).count == "10+"
    assert search(database.read(), "year:2024", limit=50).count == "10+"


def test_fusing_two_orders_by_hand():
    # 1: 1/61; 2: 1/62 + 1/61; 3: 1/62
    assert fuse([1, 2], [2, 3]) == [2, 1, 3]
    assert fuse([1, 2], [3, 4]) == [1, 3, 2, 4]  # equals keep the order in which they were named
    assert fuse([5, 6], []) == [5, 6]
    assert fuse() == []


class Told:
    """A meaning that knows the vector of every query: the same that a paper of that title has."""

    def __init__(self, vectors, note=None):
        self.vectors, self.note = vectors, note

    def of_query(self, text):
        return self.vectors.get(text)

    def nearest(self, connection, unit, k, among=None):
        rows = connection.execute("SELECT paper, unit FROM vector").fetchall()
        cosines = [(row[0], float(np.frombuffer(row[1], "<f4") @ unit)) for row in rows]
        return sorted(((p, c) for p, c in cosines if among is None or p in among), key=lambda pair: -pair[1])[:k]


@pytest.fixture
def axes(database, connection):
    """Each paper has an axis of its own; the queries lie between them."""
    unit = np.eye(8, 384, dtype=np.float32)
    with database.write() as inside:
        for paper in range(1, 6):
            keep(inside, paper, "m", unit[paper])
    return unit


def test_words_and_meaning_are_fused(connection, axes):
    vector = (0.8 * axes[4] + 0.6 * axes[5]).astype(np.float32)
    meaning = Told({"noise": vector})
    found = search(connection, "noise", meaning=meaning)
    assert titles(found) == ["Noise", "C++", "A", "Rotating"]  # by turns: words, meaning, words, meaning
    assert (found.total, found.note) == (4, None)
    assert titles(search(connection, "noise year:2023", meaning=meaning)) == ["C++"]
    assert titles(search(connection, "noise -memory", meaning=meaning)) == ["Noise", "Rotating", "A"]
    assert titles(search(connection, '"noise"', meaning=meaning)) == ["Noise", "A"]  # a phrase is a must
    assert titles(search(connection, "noise site:data", meaning=meaning)) == []


def test_filters_that_many_pass_are_laid_over_the_nearest(connection, axes, monkeypatch):
    monkeypatch.setattr(searching, "FEW", 0)
    meaning = Told({"zebra": (0.8 * axes[4] + 0.6 * axes[5]).astype(np.float32)})
    assert titles(search(connection, "zebra year:2024", meaning=meaning)) == ["Rotating"]


def test_far_papers_are_not_found_by_meaning(connection, axes):
    far = 0.1 * axes[1] + np.sqrt(1 - 0.01) * axes[7]
    assert search(connection, "zebra", meaning=Told({"zebra": far.astype(np.float32)})).total == 0
    behind = 0.9 * axes[1] + 0.3 * axes[2]  # the second is above the floor but far behind the first
    assert titles(search(connection, "zebra", meaning=Told({"zebra": behind.astype(np.float32)}))) == ["Pruning"]


def test_without_the_model_words_and_a_note(connection):
    found = search(connection, "noise", meaning=Told({}, note="Words only."))
    assert titles(found) == ["Noise", "A"]
    assert found.note == "Words only."


def test_more_like_this_by_words(database, connection):
    with database.write() as inside:
        near = store.upsert(
            inside, Paper(title="Periods of suns", abstract="Distant photometry.", source="hub"), 2.0
        ).paper
    stars = store.find(connection, "2401.00001").id
    assert [entry.id for entry in similar(connection, stars, 3)] == [near]
    with database.write() as inside:
        for i in range(4):
            store.upsert(inside, Paper(title=f"Photometry of suns {i}", source="hub"), 2.0)
    assert len(similar(connection, stars, 3)) == 3
    assert similar(connection, 999, 3) == []


def test_a_hundred_searches_are_quick(database):
    words = [f"w{i:03}x" for i in range(400)]
    with database.write() as connection:
        for i in range(1500):
            text = " ".join(words[(i * j * j + j) % (1 + 399 * (j % 3 > 0))] for j in range(60))
            store.upsert(connection, Paper(title=f"Paper {i} {words[i % 400]}", abstract=text, source="page"), 1.0)
    began = time.process_time()
    for i in range(100):
        search(database.read(), f"w000x {words[i]}")
    assert time.process_time() - began < 1.5
