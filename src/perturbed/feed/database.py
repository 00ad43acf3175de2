"""The feed's SQLite file: opened with its rights, brought to this version with a backup, and shared by processes."""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from perturbed.errors import PerturbedError
from perturbed.feed.schema import APPLICATION_ID, STEPS
from perturbed.home import home


class DatabaseError(PerturbedError):
    """The feed's database cannot be used; the message says why, where, and what to do."""


def default_path() -> Path:
    """Where the feed's database lies unless another place is chosen."""
    return home() / "feed.sqlite"


class Database:
    """The feed's database.

    Each thread has its own connection. `read` gives one outside any transaction, `write` one inside a transaction
    that other processes wait for (up to ten seconds) and that is undone whole if its block raises. Both look first
    whether the file is still the one that was opened: what is written to one that was deleted is lost.

    Args:
        path: The file; it is made, with mode 0600, where missing, and its folder too.

    Raises:
        DatabaseError: The file is another program's, damaged, of a newer perturbed, or cannot be written.
    """

    def __init__(self, path: Path | None = None):
        self.path = path or default_path()
        self._own = threading.local()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _make(self.path)
            with closing(_connect(self.path)) as connection:
                # Before anything of it is changed, be it only its rights: it may be another program's.
                _check_ours(connection, self.path, _number(connection, "user_version"))
                _own_alone(self.path)
                connection.execute("PRAGMA journal_mode = WAL")
                _migrate(connection, self.path)
            self._file = _identity(self.path)
        except OSError as e:
            raise DatabaseError(f"{self.path}: cannot be opened ({e.strerror}); choose another with --database") from e
        except sqlite3.DatabaseError as e:
            raise DatabaseError(damaged(self.path, e)) from e

    def read(self) -> sqlite3.Connection:
        """This thread's connection, to read with.

        Raises:
            DatabaseError: The file was moved, removed or replaced since this was made.
        """
        if _identity(self.path) != self._file:
            self.close()
            raise DatabaseError(
                f"{self.path}: moved, removed or replaced while in use; put it back, or stop this and start it again"
            )
        if not hasattr(self._own, "connection"):
            self._own.connection = _connect(self.path)
        connection: sqlite3.Connection = self._own.connection
        return connection

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of the block or nothing of it."""
        connection = self.read()
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.commit()
        except BaseException:
            connection.rollback()
            raise

    def close(self) -> None:
        """Close this thread's connection."""
        if hasattr(self._own, "connection"):
            self._own.connection.close()
            del self._own.connection


def setting(connection: sqlite3.Connection, name: str) -> str | None:
    """What was last put under a name, or None."""
    row = connection.execute("SELECT value FROM setting WHERE name = ?", (name,)).fetchone()
    return None if row is None else str(row[0])


def put_setting(connection: sqlite3.Connection, name: str, value: str) -> None:
    """Keep a value under a name; call it inside a transaction."""
    connection.execute("INSERT OR REPLACE INTO setting VALUES (?, ?)", (name, value))


def damaged(path: Path, error: Exception) -> str:
    """What to say of a file that SQLite cannot use."""
    return (
        f"{path}: not a usable feed database ({error}); if it was one, `perturbed feed export --database {path}` saves "
        "what can still be read, then restore a backup or begin anew; if not, choose another with --database"
    )


def _make(path: Path) -> None:
    """Make the file where missing.

    A file that is there is not opened: to close it again would drop the locks that SQLite holds on it elsewhere in this
    process.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)) from None
        if not os.access(path, os.R_OK | os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None


def _own_alone(path: Path) -> None:
    """Only its owner may read it: it holds addresses and tokens."""
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",  # one that is gone is not made anew, empty and for all to read
        uri=True,
        timeout=10,
        isolation_level=None,
        check_same_thread=False,
    )
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    version = _number(connection, "user_version")
    if version == len(STEPS) and _number(connection, "application_id") == APPLICATION_ID:
        return
    connection.execute("BEGIN IMMEDIATE")  # another process may be at it: look again once it is our turn
    try:
        version = _number(connection, "user_version")
        _check_ours(connection, path, version)
        if 0 < version < len(STEPS):
            _back_up(path, version)
        for step in STEPS[version:]:
            for statement in _statements(step):
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(STEPS)}")
    except BaseException:
        connection.rollback()
        raise
    connection.commit()


def _check_ours(connection: sqlite3.Connection, path: Path, version: int) -> None:
    tables = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    if tables and _number(connection, "application_id") != APPLICATION_ID:
        raise DatabaseError(f"{path}: this SQLite file is another program's; choose another with --database")
    if version > len(STEPS):
        raise DatabaseError(
            f"{path}: made by a newer perturbed (version {version} of its tables, here {len(STEPS)}); "
            "use that one, or another file with --database"
        )


def _back_up(path: Path, version: int) -> None:
    copy = path.with_name(f"{path.name}.v{version}.backup")
    os.close(os.open(copy, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600))
    # A reader of its own: the transaction that migrates has changed nothing yet, so this sees the old state whole.
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)


def _statements(script: str) -> Iterator[str]:
    """The statements of a script one by one: ``executescript`` would commit the transaction that they belong to."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _number(connection: sqlite3.Connection, pragma: str) -> int:
    return int(connection.execute(f"PRAGMA {pragma}").fetchone()[0])
