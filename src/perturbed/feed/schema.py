"""The tables of the feed's database, as the steps that made them. A step, once released, is never edited."""

from __future__ import annotations

APPLICATION_ID = 0x70727462  # "prtb", so that another program's SQLite file is not taken for ours
TOKENIZER = "porter unicode61 remove_diacritics 2"  # of the table ``words``

_FIRST = """
CREATE TABLE paper (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used again, so that "newer than" can be asked by id
    key TEXT NOT NULL UNIQUE COLLATE NOCASE,  -- in addresses: arXiv id, else t-<hash of the title>
    arxiv TEXT UNIQUE COLLATE NOCASE,
    title TEXT NOT NULL,
    title_key TEXT NOT NULL,
    slug TEXT UNIQUE COLLATE NOCASE,     -- of the catalogue
    summary TEXT,                        -- our own words, from the card or the catalogue
    abstract TEXT,                       -- the source's
    people TEXT NOT NULL DEFAULT '',     -- author names, one a line
    author_count INTEGER,
    organisation TEXT,
    published TEXT,                      -- ISO days
    updated TEXT,
    listed TEXT,
    year INTEGER,                        -- of publication; the card's where the day is unknown
    tags TEXT NOT NULL DEFAULT '',       -- words: sites, tags of the card, arXiv categories
    doi TEXT,
    code_url TEXT,
    project_url TEXT,
    source TEXT NOT NULL,                -- the best believed source so far
    sources TEXT NOT NULL DEFAULT '',    -- all that have told of it, as words
    ranks TEXT NOT NULL DEFAULT '',      -- how far each field's source is believed: see store
    source_upvotes INTEGER,
    source_comments INTEGER,
    verdict TEXT,                        -- of the newest registered evidence, kept by verdicts.sync
    has_method INTEGER NOT NULL DEFAULT 0,
    first_seen REAL NOT NULL,            -- seconds since 1970, as all times here
    changed REAL NOT NULL,
    first_key TEXT,                      -- it came with: names it in Atom for good, whatever the key becomes
    revised REAL,                        -- when its words or its verdict last changed: counts do not move it
    day TEXT GENERATED ALWAYS AS (coalesce(listed, published)) VIRTUAL
);
CREATE INDEX paper_day ON paper (day DESC, source_upvotes DESC);
CREATE INDEX paper_title ON paper (title_key);
CREATE INDEX paper_year ON paper (year DESC, day DESC, source_upvotes DESC);
CREATE INDEX paper_verdict ON paper (verdict) WHERE verdict IS NOT NULL;

CREATE TABLE alias (                     -- earlier keys, and the addresses of other titles that it was told under
    key TEXT PRIMARY KEY COLLATE NOCASE,
    paper INTEGER NOT NULL REFERENCES paper ON DELETE CASCADE
);
CREATE INDEX alias_paper ON alias (paper);
CREATE TABLE acts_on (
    paper INTEGER NOT NULL REFERENCES paper ON DELETE CASCADE,
    site TEXT NOT NULL,
    PRIMARY KEY (paper, site)
) WITHOUT ROWID;
CREATE INDEX acts_on_site ON acts_on (site, paper);

CREATE VIRTUAL TABLE words USING fts5 (
    title, summary, abstract, people, tags, year, verdict,
    content = 'paper', content_rowid = 'id', tokenize = 'porter unicode61 remove_diacritics 2'
);
CREATE TRIGGER paper_words_in AFTER INSERT ON paper BEGIN
    INSERT INTO words (rowid, title, summary, abstract, people, tags, year, verdict)
    VALUES (new.id, new.title, new.summary, new.abstract, new.people, new.tags, new.year, new.verdict);
END;
CREATE TRIGGER paper_words_out AFTER DELETE ON paper BEGIN
    INSERT INTO words (words, rowid, title, summary, abstract, people, tags, year, verdict)
    VALUES ('delete', old.id, old.title, old.summary, old.abstract, old.people, old.tags, old.year, old.verdict);
END;
CREATE TRIGGER paper_words_again AFTER UPDATE OF title, summary, abstract, people, tags, year, verdict ON paper BEGIN
    INSERT INTO words (words, rowid, title, summary, abstract, people, tags, year, verdict)
    VALUES ('delete', old.id, old.title, old.summary, old.abstract, old.people, old.tags, old.year, old.verdict);
    INSERT INTO words (rowid, title, summary, abstract, people, tags, year, verdict)
    VALUES (new.id, new.title, new.summary, new.abstract, new.people, new.tags, new.year, new.verdict);
END;

CREATE TRIGGER paper_first AFTER INSERT ON paper BEGIN
    UPDATE paper SET first_key = new.key, revised = new.changed WHERE id = new.id;
END;
CREATE TRIGGER paper_revised
AFTER UPDATE OF title, summary, abstract, people, author_count, organisation, published, verdict ON paper BEGIN
    UPDATE paper SET revised = max(new.changed, new.revised) WHERE id = new.id;
END;

CREATE TABLE vector (                    -- the meaning of title and text as the model of that name puts it
    paper INTEGER PRIMARY KEY REFERENCES paper ON DELETE CASCADE,
    model TEXT NOT NULL,
    stale INTEGER NOT NULL DEFAULT 0,    -- its text has changed: to be embedded again
    unit BLOB NOT NULL                   -- float32, length 1
);
CREATE INDEX vector_model ON vector (model);
CREATE INDEX vector_stale ON vector (paper) WHERE stale;
CREATE TRIGGER paper_vector_stale AFTER UPDATE OF title, summary, abstract ON paper BEGIN
    UPDATE vector SET stale = 1 WHERE paper = new.id;
END;
CREATE TABLE sketch (                    -- the signs of a vector's numbers, one bit each, to find near ones quickly
    seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- a new one whenever the vector is: what came after N is new
    paper INTEGER NOT NULL UNIQUE REFERENCES paper ON DELETE CASCADE,
    bits BLOB NOT NULL
);

CREATE TABLE finding (                   -- a verdict that came, or changed: what "new evidence" lists
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    paper INTEGER NOT NULL REFERENCES paper ON DELETE CASCADE,
    record TEXT NOT NULL UNIQUE,         -- hash of the ledger's record
    verdict TEXT NOT NULL,
    at REAL NOT NULL,                    -- when the record was made
    seen REAL NOT NULL DEFAULT ((julianday('now') - 2440587.5) * 86400)  -- and when it came here, perhaps much later
);
CREATE TRIGGER finding_revises AFTER INSERT ON finding BEGIN
    UPDATE paper SET revised = max(revised, new.seen) WHERE id = new.paper;
END;
CREATE INDEX finding_paper ON finding (paper, at);

CREATE TABLE vote (                      -- the owner's own
    paper INTEGER NOT NULL REFERENCES paper ON DELETE CASCADE,
    voter TEXT NOT NULL,
    at REAL NOT NULL,
    PRIMARY KEY (paper, voter)
) WITHOUT ROWID;
CREATE TABLE comment (
    id INTEGER PRIMARY KEY,
    paper INTEGER NOT NULL REFERENCES paper ON DELETE CASCADE,
    author TEXT NOT NULL,
    body TEXT NOT NULL,
    at REAL NOT NULL
);
CREATE INDEX comment_paper ON comment (paper);

CREATE TABLE import (
    id INTEGER PRIMARY KEY,
    source TEXT NOT NULL,                -- what was read: a file's name or a query
    started REAL NOT NULL,
    ended REAL,                          -- null while it runs, or if it was cut off
    report TEXT                          -- JSON of importers.Report
);
CREATE TABLE progress (                  -- where an interrupted harvest goes on
    source TEXT PRIMARY KEY,
    state TEXT NOT NULL                  -- JSON
);
CREATE TABLE fetched (                   -- answers kept for a day, so that nobody is asked twice
    url TEXT PRIMARY KEY,
    at REAL NOT NULL,
    body BLOB NOT NULL
);

CREATE TABLE subscriber (
    id INTEGER PRIMARY KEY,
    address TEXT NOT NULL UNIQUE,        -- normalised
    state TEXT NOT NULL CHECK (state IN ('pending', 'confirmed', 'unsubscribed', 'suppressed')),
    every TEXT NOT NULL CHECK (every IN ('day', 'week')),
    wants TEXT NOT NULL,                 -- JSON: {"query": str|null, "sites": [...], "papers": bool, "evidence": bool}
    created REAL NOT NULL,
    asked REAL NOT NULL,                 -- when the last confirmation was sent
    confirmed REAL,
    papers INTEGER NOT NULL DEFAULT 0,   -- the newest paper and finding at that time: a digest tells of later ones
    findings INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE token (
    hash TEXT PRIMARY KEY,               -- SHA-256 of what was mailed
    purpose TEXT NOT NULL,               -- 'confirm' or 'unsubscribe': one never serves as the other
    subscriber INTEGER NOT NULL REFERENCES subscriber ON DELETE CASCADE,
    wants TEXT,                          -- JSON that a confirmation puts into force; null once it has
    expires REAL
);
CREATE TABLE delivery (
    subscriber INTEGER NOT NULL REFERENCES subscriber ON DELETE CASCADE,
    issue TEXT NOT NULL,                 -- '2025-11-17' or '2025-W47'
    state TEXT NOT NULL CHECK (state IN ('claimed', 'sent', 'refused')),
    at REAL NOT NULL,
    told TEXT NOT NULL DEFAULT '[]',     -- JSON: the keys of its papers, so that none is told twice
    findings INTEGER NOT NULL DEFAULT 0, -- the newest finding when it was made
    PRIMARY KEY (subscriber, issue)
) WITHOUT ROWID;

CREATE TABLE run (
    id INTEGER PRIMARY KEY,
    slug TEXT NOT NULL,
    scale TEXT NOT NULL CHECK (scale IN ('smoke', 'laptop')),
    settings TEXT NOT NULL,              -- JSON {field: number}
    state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'done', 'failed', 'cancelled')),
    asked REAL NOT NULL,
    started REAL,
    ended REAL,
    attempts INTEGER NOT NULL DEFAULT 0,
    cancel INTEGER NOT NULL DEFAULT 0,   -- 1: whoever runs it is to end it
    done INTEGER NOT NULL DEFAULT 0,     -- runs of the study that ended, of how many
    total INTEGER,
    line TEXT,                           -- the last line of progress
    record TEXT,                         -- JSON as `perturbed run --json` gave it
    error TEXT
);
CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""

_REFUSALS = """
ALTER TABLE subscriber ADD COLUMN refused REAL;  -- when a mail server said for good that there is no such address
ALTER TABLE subscriber ADD COLUMN refusal TEXT;  -- and its words
"""

_LASTING_COMMENTS = """
CREATE TABLE comment_again (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used again: an old page's button deletes no later comment
    paper INTEGER NOT NULL REFERENCES paper ON DELETE CASCADE,
    author TEXT NOT NULL,
    body TEXT NOT NULL,
    at REAL NOT NULL
);
INSERT INTO comment_again (id, paper, author, body, at) SELECT id, paper, author, body, at FROM comment;
DROP TABLE comment;
ALTER TABLE comment_again RENAME TO comment;
CREATE INDEX comment_paper ON comment (paper);
"""

STEPS = (_FIRST, _REFUSALS, _LASTING_COMMENTS)
