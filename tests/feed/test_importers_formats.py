"""The hub's JSON, arXiv's Atom, OAI-PMH and RSS in their recorded shapes, with invented papers; and what is refused."""

import json
from datetime import UTC, date, datetime

import pytest

from perturbed.feed.importers import atom, hub, oai, rss
from perturbed.feed.importers.reading import FormatError, Read, Unread, bounded, day_of, web_address
from perturbed.feed.papers import Paper

NOW = datetime(2025, 11, 17, 12, tzinfo=UTC).timestamp()

# The hub


def daily(**inner):
    paper = {
        "id": "2511.01234",
        "title": "Kettles\n  Dream",
        "summary": "We boil.\nIt sings.",
        "authors": [{"_id": "a", "name": "Ada Kettle", "hidden": False}, {"_id": "b", "name": "Bo Steam"}],
        "publishedAt": "2025-11-10T18:59:59.000Z",
        "submittedOnDailyAt": "2025-11-17T23:30:00.000-02:00",
        "upvotes": 0,
        "githubRepo": "https://github.com/invented/kettle",
        "projectPage": "https://kettle.example/",
        "organization": {"_id": "o", "name": "tealabs", "fullname": "Tea Labs"},
        **inner,
    }
    return {"paper": paper, "title": paper["title"], "publishedAt": "2025-11-12T00:00:00.000Z", "numComments": 2}


def test_daily_papers():
    found = hub.read(json.dumps([daily()]))
    assert found.papers == (
        Paper(
            title="Kettles Dream",
            source="hub",
            arxiv="2511.01234",
            abstract="We boil. It sings.",
            authors=("Ada Kettle", "Bo Steam"),
            author_count=2,
            organisation="Tea Labs",
            published=date(2025, 11, 10),
            listed=date(2025, 11, 18),  # the UTC day of submittedOnDailyAt, not the outer publishedAt
            code_url="https://github.com/invented/kettle",
            project_url="https://kettle.example/",
            upvotes=0,
            comments=2,
        ),
    )


def test_one_paper_in_the_flat_form():
    flat = daily()["paper"] | {"linkedModels": [], "numTotalModels": 0}
    assert hub.read(json.dumps(flat).encode()).papers[0] == hub.read(json.dumps([flat])).papers[0]
    assert hub.read(json.dumps(flat)).papers[0].comments is None


@pytest.mark.parametrize(
    ("name", "value", "read_as"),
    [
        ("upvotes", None, None),
        ("upvotes", True, None),
        ("upvotes", -1, None),
        ("upvotes", 2**40, None),
        ("upvotes", "7", None),
        ("githubRepo", "javascript:alert(1)", None),
        ("projectPage", "data:text/html,<script>", None),
        ("submittedOnDailyAt", None, None),
        ("submittedOnDailyAt", "yesterday", None),
    ],
)
def test_odd_values_are_none(name, value, read_as):
    field = {"githubRepo": "code_url", "projectPage": "project_url", "submittedOnDailyAt": "listed"}.get(name, name)
    assert getattr(hub.read(json.dumps([daily(**{name: value})])).papers[0], field) is read_as


def test_half_surrogates_and_control_characters_do_not_get_in():
    found = hub.read('[{"id": "2511.00001", "title": "A\\ud800 kettle\\u0001", "summary": "x\\u0000y"}]').papers[0]
    assert (found.title, found.abstract) == ("A kettle", "xy")
    found.title.encode()


def test_items_that_are_no_papers_are_reported():
    found = hub.read(json.dumps([7, {"paper": 3}, daily(title="  "), daily(title=" ") | {"title": "Kettles"}, daily()]))
    assert [p.title for p in found.papers] == ["Kettles", "Kettles Dream"]  # the outer one serves where there is one
    assert [(u.line, u.unit) for u in found.unread] == [(1, "entry"), (2, "entry"), (3, "entry")]


@pytest.mark.parametrize(
    "text", ['[{"paper": {"id"', "", "{}", '"x"', "[" * 100_000, "[1e5, 1" + "0" * 5000 + "]", b"\xff[]"]
)
def test_what_is_not_the_hubs_json_is_refused(text):
    with pytest.raises(FormatError):
        hub.read(text)


def test_an_error_of_the_hub_is_repeated():
    with pytest.raises(FormatError, match="Too many kettles"):
        hub.read('{"error": "Too many kettles"}')


# Atom

ENTRY = """<entry>
 <id>http://arxiv.org/abs/{id}</id><updated>2025-11-12T10:00:00Z</updated><published>2025-11-10T23:59:00Z</published>
 <title>Kettles
   Dream</title><summary>  We boil &amp; listen.
   It sings. </summary>
 <author><name>Ada Kettle</name><arxiv:affiliation>Tea Labs</arxiv:affiliation></author>
 <author><name>Bo Steam</name></author>
 <arxiv:doi>10.1/kettle</arxiv:doi><link title="pdf" href="http://arxiv.org/pdf/{id}" rel="related"/>
 <arxiv:primary_category term="cs.LG"/><category term="stat.ML"/><category term="cs.LG"/>
</entry>"""


def feed(*entries, total=None, start=0):
    counts = "" if total is None else (
        f"<opensearch:totalResults>{total}</opensearch:totalResults><opensearch:startIndex>{start}</opensearch:startIndex>"
    )  # fmt: skip
    return (
        '<?xml version="1.0" encoding="UTF-8"?><feed xmlns="http://www.w3.org/2005/Atom" '
        'xmlns:arxiv="http://arxiv.org/schemas/atom" xmlns:opensearch="http://a9.com/-/spec/opensearch/1.1/">'
        + counts + "\n".join(entries) + "</feed>"
    )  # fmt: skip


def test_atom():
    assert atom.read(feed(ENTRY.format(id="2511.01234v2"))).papers == (
        Paper(
            title="Kettles Dream",
            source="arxiv",
            arxiv="2511.01234",
            abstract="We boil & listen. It sings.",
            authors=("Ada Kettle", "Bo Steam"),
            author_count=2,
            published=date(2025, 11, 10),
            updated=date(2025, 11, 12),
            categories=("cs.LG", "stat.ML"),
            doi="10.1/kettle",
        ),
    )


def test_old_identifiers_keep_their_archive():
    assert atom.read(feed(ENTRY.format(id="hep-ex/0307015v1"))).papers[0].arxiv == "hep-ex/0307015"


@pytest.mark.parametrize(
    ("entries", "total", "start", "more"),
    [(2, 5, 0, "2"), (2, 5, 3, None), (0, 5, 3, "3"), (0, 0, 0, None), (1, None, 0, None)],
)
def test_next_page_of_atom(entries, total, start, more):
    found = atom.read(feed(*[ENTRY.format(id=f"2511.0000{i}v1") for i in range(entries)], total=total, start=start))
    assert (len(found.papers), found.more) == (entries, more)


def test_an_error_as_an_entry_is_an_error():
    entry = (
        "<entry><id>http://arxiv.org/api/errors#start_must_be_non-negative</id><title>Error</title>"
        "<summary>start must be non-negative</summary></entry>"
    )
    with pytest.raises(FormatError, match="start must be non-negative"):
        atom.read(feed(entry))


def test_a_paper_called_error_is_none():
    assert (
        atom.read(feed(ENTRY.format(id="2511.00001v1").replace("Kettles\n   Dream", "Error"))).papers[0].title
        == "Error"
    )


def test_entries_without_title_or_identifier_are_reported():
    bad = ENTRY.format(id="2511.00001v1").replace("Kettles\n   Dream", " ")
    found = atom.read(feed(ENTRY.format(id="somewhere"), bad, ENTRY.format(id="2511.00002v1")))
    assert [(u.line, u.why) for u in found.unread] == [(1, "no arXiv identifier"), (2, "no title")]
    assert [p.arxiv for p in found.papers] == ["2511.00002"]


# OAI-PMH


def records(*inner, token=None, code=None):
    body = f'<error code="{code}">it says so</error>' if code else ""
    if inner:
        end = f'<resumptionToken cursor="0">{token}</resumptionToken>' if token else "<resumptionToken/>"
        body = f"<ListRecords>{''.join(inner)}{end}</ListRecords>"
    return (
        '<?xml version="1.0"?><OAI-PMH xmlns="http://www.openarchives.org/OAI/2.0/">'
        f"<responseDate>2025-11-17T00:00:00Z</responseDate>{body}</OAI-PMH>"
    )


def record(metadata, status=""):
    header = (
        f"<header{status}><identifier>oai:arXiv.org:2511.01234</identifier><datestamp>2025-11-16</datestamp></header>"
    )
    return f"<record>{header}{f'<metadata>{metadata}</metadata>' if metadata else ''}</record>"


PLAIN = """<arXiv xmlns="http://arxiv.org/OAI/arXiv/"><id>{id}</id><created>{created}</created>{updated}
<authors><author><keyname>Kettle</keyname><forenames>Ada</forenames><suffix>Jr</suffix>
<affiliation>Tea Labs</affiliation></author><author><keyname>Steam</keyname></author></authors><title>Kettles
 Dream</title><categories>cs.LG stat.ML</categories><doi>10.1/kettle</doi><abstract> We boil.
 It sings. </abstract></arXiv>"""
RAW = """<arXivRaw xmlns="http://arxiv.org/OAI/arXivRaw/"><id>2511.01234</id><submitter>Ada</submitter>
<version version="v1"><date>Mon, 10 Nov 2025 23:30:00 -0100</date></version>
<version version="v2"><date>Wed, 12 Nov 2025 10:00:00 GMT</date></version><title>Kettles Dream</title>
<authors>Ada Kettle (Tea (and Steam) Labs), Bo Steam Jr., Sandy Band, Jr and Cleo de la Cruz</authors>
<categories>cs.LG</categories><abstract>We boil.</abstract></arXivRaw>"""


def test_oai_plain():
    told = PLAIN.format(id="2511.01234", created="2025-11-10", updated="<updated>2025-11-12</updated>")
    assert oai.read(records(record(told))).papers == (
        Paper(
            title="Kettles Dream",
            source="oai",
            arxiv="2511.01234",
            abstract="We boil. It sings.",
            authors=("Ada Kettle Jr", "Steam"),
            author_count=2,
            published=date(2025, 11, 10),
            updated=date(2025, 11, 12),
            categories=("cs.LG", "stat.ML"),
            doi="10.1/kettle",
        ),
    )


@pytest.mark.parametrize(
    ("identifier", "created", "published"),
    [
        ("2511.01234", "2025-10-31", date(2025, 10, 31)),  # sent on the last day of a month
        ("2511.01234", "2026-02-01", None),  # not the first version, whatever the field says
        ("hep-ex/9907015", "1999-07-05", date(1999, 7, 5)),
        ("hep-ex/9907015", "2004-07-05", None),
    ],
)
def test_created_is_believed_as_far_as_the_identifier_allows(identifier, created, published):
    told = PLAIN.format(id=identifier, created=created, updated="")
    assert oai.read(records(record(told))).papers[0].published == published


def test_oai_raw_has_the_day_of_the_first_version():
    found = oai.read(records(record(RAW))).papers[0]
    assert (found.published, found.updated) == (date(2025, 11, 11), date(2025, 11, 12))
    assert found.authors == ("Ada Kettle", "Bo Steam Jr.", "Sandy Band Jr", "Cleo de la Cruz")


def test_deleted_records_and_the_token():
    found = oai.read(records(record(RAW), record("", ' status="deleted"'), record("<x/>"), token="abc|1001"))
    assert (len(found.papers), found.skipped, found.more) == (1, 1, "abc|1001")
    assert found.unread[0].line == 3
    assert oai.read(records(record(RAW))).more is None


def test_refusals_of_oai():
    assert oai.read(records(code="noRecordsMatch")).papers == ()
    with pytest.raises(oai.ExpiredToken):
        oai.read(records(code="badResumptionToken"))
    with pytest.raises(FormatError, match=r"badArgument.*it says so") as refused:
        oai.read(records(code="badArgument"))
    assert not isinstance(refused.value, oai.ExpiredToken)


# RSS


def channel(*items):
    return (
        '<rss xmlns:arxiv="http://arxiv.org/schemas/atom" xmlns:dc="http://purl.org/dc/elements/1.1/" version="2.0">'
        f"<channel><title>cs.LG updates</title>{''.join(items)}</channel></rss>"
    )


def item(kind="new"):
    return f"""<item><title>Kettles Dream</title><link>https://arxiv.org/abs/2511.01234</link>
<description>arXiv:2511.01234v1 Announce Type: {kind}
Abstract: We boil. It sings.</description><guid isPermaLink="false">oai:arXiv.org:2511.01234v1</guid>
<category>cs.LG</category><category>cs.CL</category><pubDate>Mon, 17 Nov 2025 00:00:00 -0500</pubDate>
<arxiv:announce_type>{kind}</arxiv:announce_type><dc:rights>x</dc:rights>
<dc:creator>Ada Kettle, Bo Steam</dc:creator></item>"""


def test_rss():
    assert rss.read(channel(item())).papers == (
        Paper(
            title="Kettles Dream",
            source="rss",
            arxiv="2511.01234",
            abstract="We boil. It sings.",
            authors=("Ada Kettle", "Bo Steam"),
            author_count=2,
            listed=date(2025, 11, 17),
            categories=("cs.LG", "cs.CL"),
        ),
    )


def test_a_replacement_is_not_listed_anew():
    found = rss.read(channel(item("replace"), item("cross"), item("replace-cross"))).papers
    assert [p.listed for p in found] == [None, date(2025, 11, 17), None]
    assert [p.updated for p in found] == [date(2025, 11, 17), None, date(2025, 11, 17)]


def test_a_weekend_without_items_is_no_error():
    assert rss.read(channel()).papers == ()


# What XML from outside may not do

BOMB = (
    '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">]>'
)
READERS = {
    atom.read: feed(ENTRY.format(id="2511.00001v1"), ENTRY.format(id="2511.00002v1")),
    oai.read: records(record(RAW), record(RAW)),
    rss.read: channel(item(), item()),
}


@pytest.mark.parametrize("read", READERS, ids=["atom", "oai", "rss"])
@pytest.mark.parametrize(
    "kind",
    [
        BOMB,
        '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE x SYSTEM "https://elsewhere.example/x.dtd">',
        "<!DOCTYPE x>",
    ],
    ids=["billion laughs", "file", "dtd", "doctype"],
)
def test_document_types_and_entities_are_refused(read, kind):
    text = READERS[read]
    text = text.split("?>", 1)[-1].replace("Kettles", "&a;", 1) if "ENTITY" in kind else text.split("?>", 1)[-1]
    with pytest.raises(FormatError, match="document type or entities"):
        read(kind + text)
    with pytest.raises(FormatError, match="document type or entities"):
        read(("\ufeff" + kind + text).encode("utf-16-le"))


@pytest.mark.parametrize("read", READERS, ids=["atom", "oai", "rss"])
def test_truncated_xml_says_where_and_takes_nothing(read):
    text = READERS[read]
    cut = text.rindex("Kettles")
    with pytest.raises(
        FormatError, match=rf"line {text[:cut].count(chr(10)) + 1}, column \d+.*the 1 whole entries before it were not"
    ):
        read(text[:cut].encode())
    for end in range(0, len(text), 97):
        with pytest.raises(FormatError):
            read(text[:end])


@pytest.mark.parametrize("read", READERS, ids=["atom", "oai", "rss"])
@pytest.mark.parametrize("text", ["", "hello", "<html/>", b"\x00\x01", '<?xml version="1.0" encoding="klingon"?><x/>'])
def test_other_documents_are_refused(read, text):
    with pytest.raises(FormatError):
        read(text)


# Shared parts


@pytest.mark.parametrize(
    "text",
    [
        "javascript:alert(1)",
        "https://a b",
        "//x",
        "ftp://x/y",
        "https://user@x/",
        "http://x/<b>",
        'https://x/"',
        None,
        7,
        "https://",
    ],
)
def test_what_may_not_become_a_link(text):
    assert web_address(text) is None


def test_what_may_become_a_link():
    assert web_address(" https://x.example/a?b=c#d ") == "https://x.example/a?b=c#d"


def test_days():
    assert day_of("2025-11-17") == date(2025, 11, 17)
    assert day_of("2025-11-17T23:30:00-02:00") == date(2025, 11, 18)
    assert day_of("soon") is None
    assert day_of(None) is None


def test_what_was_not_understood_is_shown_short_and_clean():
    shown = Unread(3, "x\x1b[31m\n" + "y" * 500, "why")
    assert len(shown.text) == 120
    assert "\x1b" not in str(shown)
    assert str(shown).startswith("line 3: why: x[31m y")


def test_a_day_at_the_edge_of_the_calendar_is_none():
    """One such entry must not end an import, and with it every later update."""
    assert day_of("0001-01-01T00:00:00+14:00") is None
    assert day_of("9999-12-31T23:00:00-14:00") is None
    assert day_of("9999-12-31T23:00:00Z") == date(9999, 12, 31)


def test_what_turns_the_direction_of_writing_does_not_get_in():
    (paper,) = hub.read(json.dumps([daily(title="Nets‮ and ⁦maps⁩", authors=[{"name": "Ann‭ Lee￾"}])])).papers
    assert (paper.title, paper.authors) == ("Nets and maps", ("Ann Lee",))
    (kept,) = hub.read(json.dumps([daily(title="می‌خواهم")])).papers  # what parts letters of a word is a letter's
    assert "‌" in kept.title


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"title": "t" * 1001}, "title of 1,001 characters"),
        ({"abstract": "a" * 50_001}, "abstract of 50,001 characters"),
        ({"authors": ("n" * 301,)}, "author of 301 characters"),
        ({"authors": ("n",) * 10_001}, "10,001 authors"),
        ({"categories": ("c" * 101,)}, "category of 101 characters"),
        ({"code_url": "https://example.org/" + "u" * 2000}, "code_url of 2,020 characters"),
        ({"listed": date(9999, 12, 31)}, "listed on 9999-12-31, of which no paper can be"),
        ({"published": date(1, 1, 1)}, "published on 0001-01-01, of which no paper can be"),
        ({"updated": date(2025, 11, 25)}, "updated on 2025-11-25, of which no paper can be"),
    ],
)
def test_what_no_paper_has_is_reported_and_not_taken(more, why):
    ahead = date(2025, 11, 24)
    good = Paper(title="Good", source="hub", abstract="a" * 50_000, authors=("n" * 300,) * 10_000, listed=ahead)
    bad = Paper(**{"title": "Bad", "source": "hub", **more})
    found = bounded(Read((good, bad)), NOW)
    assert found.papers == (good,)
    assert [(u.line, u.unit, u.why) for u in found.unread] == [(2, "paper", why)]
