"""Export: JSON with the promised fields, BibTeX that another program reads, and both out of a damaged file."""

import json
import sqlite3
from datetime import date

import bibtexparser
import pytest

from perturbed.feed import store
from perturbed.feed.database import Database, DatabaseError
from perturbed.feed.export import as_bibtex, as_json, bibtex_of, salvage
from perturbed.feed.papers import Paper

PROMISED = ["title", "published", "authors", "comments", "upvotes", "arxiv"]


def add(database, *papers):
    with database.write() as connection:
        return [store.upsert(connection, paper, 1.0).paper for paper in papers]


def test_json_has_the_promised_fields_and_the_rest(database):
    first, _ = add(
        database,
        Paper(
            title="One",
            source="arxiv",
            arxiv="2501.00001",
            authors=("Ada Lovelace", "Émile Borel"),
            published=date(2025, 1, 2),
            listed=date(2025, 1, 3),
            upvotes=0,
            comments=4,
            abstract="Text.",
            categories=("cs.LG",),
            code_url="https://example.org",
        ),
        Paper(title="Two", source="page"),
    )
    with database.write() as connection:
        store.enrol(
            connection,
            first,
            slug="one",
            summary="Ours.",
            year=None,
            sites=("weights", "data"),
            tags=(),
            has_method=True,
            now=1.0,
        )
        store.vote(connection, first, "owner", 1.0)
        store.comment(connection, first, "owner", "Mine.", 1.0)
        connection.execute("UPDATE paper SET verdict = 'null' WHERE id = ?", (first,))
    one, two = json.loads(json.dumps(list(as_json(database.read()))))
    assert list(one)[:6] == PROMISED
    assert [one[name] for name in PROMISED] == ["One", "2025-01-02", 2, 4, 0, "2501.00001"]
    assert [two[name] for name in PROMISED] == ["Two", None, None, None, None, None]
    assert (
        one
        | {
            "slug": "one",
            "year": 2025,
            "sites": ["data", "weights"],
            "verdict": "null",
            "author_names": ["Ada Lovelace", "Émile Borel"],
            "listed": "2025-01-03",
            "votes": 1,
            "notes": ["Mine."],
            "summary": "Ours.",
        }
        == one
    )
    assert two["key"].startswith("t-")


TITLES = [
    "Plain words",
    "Unbalanced { brace",
    "Unbalanced } brace",
    "100% of A & B for $5_000 #1 ~ x^2",
    "Back\\slash at the end\\",
    "Übergröße: ∇-free naïve 学习 🙂",
    "\"Quoted\", and 'so'",
    "@article{not, title = {an entry}}",
    "Über",
]


def plain(tex):
    """What TeX would print of the text: the inverse of the escaping, written from the other side."""
    words = {"textbraceleft": "{", "textbraceright": "}", "textbackslash": "\\"}
    words |= {"textasciitilde": "~", "textasciicircum": "^"}
    out, i = "", 0
    while i < len(tex):
        if tex[i] != "\\":
            out, i = out + tex[i], i + 1
        elif tex[i + 1].isalpha():
            end = tex.index("{}", i)
            out, i = out + words[tex[i + 1 : end]], end + 2
        else:
            out, i = out + tex[i + 1], i + 2
    return out


def test_bibtex_is_read_back_by_bibtexparser(database):
    names = ("Ada Lovelace", "Sanity, Inc.", "Bell and Howell", "J. {Curly}", "Émile Borel & Söhne")
    add(
        database,
        *(
            Paper(
                title=title,
                source="arxiv",
                arxiv=f"2501.{i:05}",
                authors=names,
                published=date(2025, 1, 2),
                doi="10.1/a_b{c}",
                abstract=title,
            )
            for i, title in enumerate(TITLES)
        ),
    )
    library = bibtexparser.parse_string("\n".join(as_bibtex(database.read())))
    assert not library.failed_blocks
    for entry in as_bibtex(database.read()):  # BibTeX itself counts also braces with a backslash before them
        assert entry.count("{") == entry.count("}")
    assert [plain(entry["title"].removeprefix("{").removesuffix("}")) for entry in library.entries] == TITLES
    assert len({entry.key.casefold() for entry in library.entries}) == len(TITLES)
    for i, entry in enumerate(library.entries):
        assert entry.entry_type == "misc"
        assert (entry["year"], entry["eprint"], entry["archiveprefix"]) == ("2025", f"2501.{i:05}", "arXiv")
        assert entry["url"] == f"https://arxiv.org/abs/2501.{i:05}"
        assert entry["doi"] == "10.1/a_b%7Bc%7D"
        assert plain(entry["abstract"]) == TITLES[i]
    parts = bibtexparser.parse_string(
        "\n".join(as_bibtex(database.read())), append_middleware=[bibtexparser.middlewares.SeparateCoAuthors()]
    )
    people = [plain(name.removeprefix("{").removesuffix("}")) for name in parts.entries[0]["author"]]
    assert people == list(names)


def test_bibtex_of_little(database):
    first, _ = add(database, Paper(title="∑ 1", source="page"), Paper(title="∑ 2", source="page", arxiv="2501.00001"))
    library = bibtexparser.parse_string("\n".join(as_bibtex(database.read())))
    assert [(e.key, sorted(f.key for f in e.fields)) for e in library.entries] == [
        ("paper", ["title"]),
        ("paper-2", ["archiveprefix", "eprint", "title", "url"]),
    ]
    assert bibtex_of(database.read(), first) == next(as_bibtex(database.read()))


def test_what_an_entry_is_cited_by(database):
    told = {"title": "On the art of Stars", "authors": ("Émile Borel", "Ada B"), "published": date(2024, 5, 1)}
    add(database, *(Paper(source="arxiv", arxiv=f"2405.0000{i}", **told) for i in range(3)))
    cited = [entry.partition(",")[0] for entry in as_bibtex(database.read())]
    assert cited == ["@misc{borel2024stars", "@misc{borel2024stars-2", "@misc{borel2024stars-3"]


def big(database, n=400):
    add(
        database,
        *(
            Paper(
                title=f"Paper {i}",
                source="arxiv",
                arxiv=f"2501.{i:05}",
                abstract=f"Text of {i}. " * (600 if i % 40 == 0 else 20),
                published=date(2025, 1, 1),
            )
            for i in range(n)
        ),
    )
    database.read().execute("PRAGMA wal_checkpoint(TRUNCATE)")
    pages = database.read().execute("PRAGMA page_count").fetchone()[0]
    size = database.read().execute("PRAGMA page_size").fetchone()[0]
    database.close()
    return pages, size


def leaves(path, size):
    """The pages of the paper table's own rows, found by what they hold."""
    data = path.read_bytes()
    return [
        i for i in range(len(data) // size) if data[i * size] == 13 and b"Text of " in data[i * size : (i + 1) * size]
    ]


@pytest.mark.parametrize("junk", [b"\0", b"\xff", b"junk"])
def test_a_damaged_file_gives_what_can_still_be_read(database, junk):
    _, size = big(database)
    middle = leaves(database.path, size)[3:6]
    with database.path.open("r+b") as file:
        for page in middle:
            file.seek(page * size)
            file.write((junk * size)[:size])
    with pytest.raises(sqlite3.DatabaseError):
        list(as_json(Database(database.path).read()))
    unread: list[int] = []
    connection = salvage(database.path)
    rows = list(as_json(connection, unread))
    assert 300 < len(rows) < 400
    assert 400 - len(rows) <= len(unread) < 100
    numbers = [int(row["title"].split()[1]) for row in rows]
    assert numbers == sorted(set(numbers))
    assert all(row["abstract"].startswith(f"Text of {n}. ") for row, n in zip(rows, numbers, strict=True))
    assert set(range(1, 401)) == {n + 1 for n in numbers} | set(unread)  # nothing is lost without being said
    entries = list(as_bibtex(connection, []))
    assert len(entries) == len(rows)
    connection.close()


def test_a_row_whose_long_abstract_is_lost_keeps_the_rest(database):
    _, size = big(database, 100)
    data = database.path.read_bytes()
    overflow = next(i for i in range(len(data) // size) if data[i * size : (i + 1) * size].count(b"Text of 40. ") > 330)
    with database.path.open("r+b") as file:
        file.seek(overflow * size)
        file.write(b"\xff" * size)
    unread: list[int] = []
    connection = salvage(database.path)
    rows = list(as_json(connection, unread))
    connection.close()
    assert len(rows) == 100
    assert unread == [41]
    assert (rows[40]["title"], rows[40]["arxiv"], rows[40]["abstract"]) == ("Paper 40", "2501.00040", None)


def test_the_last_page_lost(database):
    """Then the largest number has to be had from an index, or export would stop early or go on for ever."""
    _, size = big(database)
    with database.path.open("r+b") as file:
        data = database.path.read_bytes()
        last = next(i for i in leaves(database.path, size) if b"Paper 399" in data[i * size : (i + 1) * size])
        file.seek(last * size)
        file.write(b"\xff" * size)
    unread: list[int] = []
    connection = salvage(database.path)
    assert len(list(as_json(connection, unread))) + len(unread) == 400
    connection.close()
    assert 400 in unread


def test_other_tables_lost_take_no_paper_away(database):
    with database.write() as connection:
        connection.execute("DROP TABLE comment")
    add(database, Paper(title="One", source="page"))
    with pytest.raises(sqlite3.DatabaseError):
        list(as_json(database.read()))
    connection = salvage(database.path)
    assert [(row["title"], row["notes"]) for row in as_json(connection, [])] == [("One", [])]
    connection.close()


def test_salvage_writes_nothing(database):
    big(database, 20)
    before = database.path.read_bytes()
    connection = salvage(database.path)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        connection.execute("DELETE FROM paper")
    connection.close()
    assert database.path.read_bytes() == before


def test_what_cannot_be_salvaged_says_why(tmp_path):
    absent = tmp_path / "absent.sqlite"
    with pytest.raises(DatabaseError, match="absent"):
        salvage(absent)
    assert not absent.exists()
    text = tmp_path / "text.sqlite"
    text.write_text("no database" * 1000)
    with pytest.raises(DatabaseError, match="nothing of it can be read"):
        salvage(text)
    other = tmp_path / "other.sqlite"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE paper (id INTEGER PRIMARY KEY)")
    connection.close()
    with pytest.raises(DatabaseError, match="another program"):
        salvage(other)
