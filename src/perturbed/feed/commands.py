"""The feed on the command line. Every command imports what it needs when it runs."""

from __future__ import annotations

import difflib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from perturbed.errors import PerturbedError

if TYPE_CHECKING:
    from perturbed.feed.database import Database
    from perturbed.feed.importers.harvest import Progress, Report
    from perturbed.feed.meaning import Meaning
    from perturbed.feed.search import Hit

feed = typer.Typer(help="The daily-papers feed: import, search, subscribe, export.", no_args_is_help=True)

EMBEDDED = 500  # papers that a search on the command line embeds at most before it answers

Where = Annotated[Path | None, typer.Option("--database", help="The feed's file; in your data folder by default.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, nothing else.")]
Base = Annotated[str, typer.Option("--public-url", help="What links in mail begin with.")]
LOCAL = "http://127.0.0.1:8000"


def opened(where: Path | None) -> Database:
    """The feed's database with the catalogue and the newest verdicts in it."""
    from perturbed.feed.database import Database

    return filled(Database(where))


def existing(where: Path | None) -> Path | None:
    """The same file, for a command that has no use for a new one.

    Raises:
        PerturbedError: A file was named, and there is none.
    """
    if where is None:
        return None
    try:
        where.stat()
    except (FileNotFoundError, NotADirectoryError) as e:
        raise PerturbedError(
            f"--database {where}: there is no such file{nearest_file(where)} "
            "(`perturbed feed import`, `perturbed feed update` and `perturbed serve` make a new one)"
        ) from e
    except OSError:
        pass  # to open it will say why that is not possible
    return where


def nearest_file(where: Path) -> str:
    """A clause that names the file of its folder which was probably meant, or nothing."""
    with suppress(OSError):
        names = [path.name for path in where.parent.iterdir() if path.is_file()]
        own = [name for name in names if not name.endswith(("-wal", "-shm", ".lock"))]  # what SQLite and runs put there
        for near in difflib.get_close_matches(where.name, sorted(own), n=1):
            return f"; did you mean {where.with_name(near)}?"
    return ""


def filled(database: Database) -> Database:
    """The same database with the catalogue and the newest verdicts in it."""
    import sqlite3

    from perturbed.feed import catalogue, verdicts
    from perturbed.feed.database import DatabaseError, damaged

    try:
        catalogue.seed(database, time.time())
        verdicts.sync(database, time.time())
        database.read().execute("SELECT count(*) FROM paper").fetchone()
    except sqlite3.OperationalError as e:
        raise DatabaseError(f"{database.path}: {e}; make room, or choose another with --database") from e
    except sqlite3.DatabaseError as e:
        raise DatabaseError(damaged(database.path, e)) from e
    return database


def day_of(option: str, text: str | None) -> date | None:
    """A day written YYYY-MM-DD."""
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError as e:
        raise PerturbedError(f"{option} {text}: write a day as YYYY-MM-DD") from e


@feed.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A saved page in plain text, the hub's JSON, Atom, OAI-PMH or RSS.")],
    saved_on: Annotated[str | None, typer.Option("--saved-on", help="Day on which a page was saved.")] = None,
    database: Where = None,
    as_json: Json = False,
) -> None:
    """Import a file, and report everything that was not understood."""
    from perturbed.feed.importers import harvest

    saved = day_of("--saved-on", saved_on)
    store = opened(database)
    with counting() as progress:
        found = harvest.import_file(store, file, saved_on=saved, now=time.time(), progress=progress)
    told(found, as_json)


@feed.command()
def update(
    days: Annotated[int, typer.Option("--days", min=1, help="How many days to look back.")] = 3,
    category: Annotated[list[str] | None, typer.Option("--category", help="Of arXiv: cs.LG; again for more.")] = None,
    source: Annotated[list[str] | None, typer.Option("--source", help="hub, arxiv, oai or rss.")] = None,
    database: Where = None,
    as_json: Json = False,
) -> None:
    """Fetch what is new from the hub and arXiv, going on where it was cut off; for cron."""
    from perturbed.feed.importers import harvest
    from perturbed.feed.importers.http import Client

    store = opened(database)
    chosen: dict[str, Any] = {"categories": category or harvest.CATEGORIES, "sources": source or ("hub", "arxiv")}
    with counting() as progress:
        found = harvest.update(
            store, days=days, **chosen, client=Client(store), now=time.time(), progress=progress
        )  # fmt: skip
    told(found, as_json)
    if found.failed:
        raise PerturbedError(f"{'; '.join(found.failed)} (the rest was imported; the same command goes on from here)")


def told(report: Report, as_json: bool) -> None:
    """The report of an import."""
    if as_json:
        return show(report.as_json())
    return print("\n".join(report.lines()))


def show(document: Any) -> None:
    """One JSON document on standard output."""
    json.dump(document, sys.stdout, ensure_ascii=False, allow_nan=False)
    print()


@contextmanager
def counting() -> Iterator[Progress]:
    """A line that counts papers, on a terminal."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.fields[what]}: {task.completed:,.0f} papers"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task("", total=None, what="reading")
        yield lambda step: bar.update(line, completed=step.done, what=f"{step.source}, {step.what}")


@feed.command()
def search(
    query: Annotated[str, typer.Argument(help='Words, "phrases", begin*, -word, site:data, verdict:null, year:2023.')],
    limit: Annotated[int, typer.Option("--limit", min=1, max=200, help="How many.")] = 10,
    words: Annotated[bool, typer.Option("--words", help="By words only, not by meaning.")] = False,
    database: Where = None,
    as_json: Json = False,
) -> None:
    """Find papers by words and by meaning."""
    from perturbed.feed import search as searching
    from perturbed.feed.meaning import Meaning

    store = opened(existing(database))
    with closing(Meaning(store, patience=60)) as meaning:
        if not words:
            embed(meaning)
        found = searching.search(store.read(), query, limit=limit, meaning=None if words else meaning)
    if as_json:
        return show(
            {"total": found.total, "more": found.more, "note": found.note, "papers": list(map(hit, found.hits))}
        )
    if found.note:
        print(found.note, file=sys.stderr)
    for one in found.hits:
        print(f"{one.entry.title} ({one.entry.year or 'n.d.'})")
        facts = [one.entry.key, ", ".join(one.entry.sites), one.entry.verdict or ""]
        print("   " + " · ".join(fact for fact in facts if fact))
        print("   " + "".join(piece for piece, _ in one.snippet))
    return print(f"{found.count} found")


def embed(meaning: Meaning) -> None:
    """Make the vectors that are missing, the first `EMBEDDED` of them: the others come while a server is idle."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        line, done = bar.add_task("reading papers for their meaning", total=None), 0
        while done < EMBEDDED and (made := meaning.embed_missing(16)):
            done += made
            bar.update(line, completed=done)


def hit(found: Hit) -> dict[str, Any]:
    """A paper found, as plain values."""
    entry = found.entry
    plain = {name: getattr(entry, name) for name in ("key", "title", "arxiv", "slug", "year", "verdict")}
    snippet = "".join(piece for piece, _ in found.snippet)
    return plain | {"sites": list(entry.sites), "day": entry.day.isoformat() if entry.day else None, "text": snippet}


@feed.command()
def export(
    as_json: Annotated[bool, typer.Option("--json", help="A JSON array (the default).")] = False,
    bibtex: Annotated[bool, typer.Option("--bibtex", help="BibTeX.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="A file; standard output by default.")] = None,
    database: Where = None,
) -> None:
    """All papers as JSON or BibTeX; also what can still be read of a damaged database."""
    if as_json and bibtex:
        raise PerturbedError("--json and --bibtex: choose one")
    import sqlite3

    from perturbed.feed import export as exporting
    from perturbed.feed.database import Database, DatabaseError, default_path

    path = existing(database) or default_path()
    unread: list[int] | None = None
    try:
        # Before anything is written to it: a damaged file is to be read, not changed.
        store = Database(path)
        checked = store.read().execute("PRAGMA quick_check(1)").fetchone()[0]
        if checked != "ok":
            raise DatabaseError(f"{path}: damaged ({checked})")
        connection = filled(store).read()
    except (DatabaseError, sqlite3.DatabaseError) as e:
        connection, unread = exporting.salvage(path), []
        print(f"perturbed: warning: {e}; exporting what can be read", file=sys.stderr)
    if bibtex:
        text = "\n".join(exporting.as_bibtex(connection, unread))
    else:
        text = json.dumps(list(exporting.as_json(connection, unread)), ensure_ascii=False, allow_nan=False) + "\n"
    written(text, out)
    if unread:
        print(f"perturbed: warning: {len(unread)} rows could not be read", file=sys.stderr)


def written(text: str, out: Path | None) -> None:
    """To a file, whole or not at all, or to standard output."""
    if out is None:
        sys.stdout.write(text)
        return
    part = out.with_name(out.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(out)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise PerturbedError(f"{out}: cannot be written ({e.strerror}); choose another with --out") from e


@feed.command()
def subscribe(
    address: Annotated[str, typer.Argument(help="Where the digest shall go; it is asked to confirm.")],
    every: Annotated[str, typer.Option("--every", help="day or week.")] = "day",
    topic: Annotated[str | None, typer.Option("--topic", help="Only papers that a search for this finds.")] = None,
    site: Annotated[
        list[str] | None, typer.Option("--site", help="Only papers that act there; again for more.")
    ] = None,
    evidence: Annotated[bool, typer.Option("--evidence-only", help="Only new verdicts.")] = False,
    public_url: Base = LOCAL,
    database: Where = None,
) -> None:
    """Ask an address, by mail, to confirm a subscription."""
    from perturbed.feed import mail, sandbox, subscriptions
    from perturbed.feed.web.settings import linked

    sandbox.keep_to_oneself()  # the environment may hold the password of the mail server
    # What is wrong with the request is said before what is wrong with the server.
    wants = subscriptions.Wants(query=topic, sites=tuple(site or ()), papers=not evidence)
    subscriptions.check_topic(wants)
    subscriptions.normalised(address)
    often, base = span(every), linked(public_url)
    fate = subscriptions.invite(
        opened(existing(database)), address, wants, often, time.time(), to=mail.needed(), base=base
    )
    told = "asked to confirm" if fate == "sent" else fate or "was asked within the last hour; nothing was mailed"
    print(f"{address}: {told}")


@feed.command()
def digest(
    every: Annotated[str, typer.Option("--every", help="day or week.")] = "day",
    on: Annotated[
        str | None, typer.Option("--on", help="A day of the issue; by default of the last whole one (UTC).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write .eml files, send nothing.")] = False,
    out: Annotated[Path, typer.Option("--out", help="Folder of the .eml files.")] = Path("digest"),
    public_url: Base = LOCAL,
    database: Where = None,
) -> None:
    """Mail the digest of a day or week to those who confirmed; for cron. Nobody gets one twice."""
    from perturbed.feed import digest as digests
    from perturbed.feed import mail, sandbox
    from perturbed.feed.web.settings import linked

    sandbox.keep_to_oneself()  # the environment may hold the password of the mail server
    often, base = span(every), linked(public_url)
    day = day_of("--on", on) or datetime.now(UTC).date() - timedelta(days=1 if often == "day" else 7)
    store, now = opened(existing(database)), time.time()
    if dry_run:
        made = digests.preview(store, often, day, now, base=base, folder=out)
        if not made:
            issue = digests.issue_of(often, day)[0]
            print(f"digest {issue}: nothing to send to those who confirmed, or it was sent already", file=sys.stderr)
        for path in made:
            print(path)
        return
    print("\n".join(digests.send(store, often, day, now, to=mail.needed(), base=base).lines()))


def span(every: str) -> Literal["day", "week"]:
    """``day`` or ``week``."""
    if every == "day":
        return "day"
    if every == "week":
        return "week"
    raise PerturbedError(f"--every {every}: it is day or week")


def serve(
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    public_url: Annotated[
        str | None, typer.Option("--public-url", help="https://… under which visitors come, through a proxy.")
    ] = None,
    trusted_proxy: Annotated[
        list[str] | None, typer.Option("--trusted-proxy", help="Whose X-Forwarded-For is believed; again for more.")
    ] = None,
    database: Where = None,
) -> None:
    """Serve the feed's pages until Ctrl-C."""
    from perturbed.feed.database import default_path
    from perturbed.feed.web.serve import new_token
    from perturbed.feed.web.serve import serve as run
    from perturbed.feed.web.settings import Settings

    settings = Settings(
        database=database or default_path(), host=host, port=port, public_url=public_url, owner_token=new_token(),
        trusted_proxies=tuple(trusted_proxy or ()),
    )  # fmt: skip
    run(settings, announce=announcing(settings.public_url))


def announcing(public_url: str | None) -> Callable[[str], None]:
    """Says where the pages are; the owner's address holds a secret and is said once, here."""

    def say(owner: str) -> None:
        print(f"perturbed feed: open {owner}", flush=True)
        print(f"visitors: {public_url}" if public_url else "others on this machine can read; Ctrl-C ends", flush=True)

    return say
