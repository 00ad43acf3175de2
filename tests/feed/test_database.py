"""The file: its rights, its version, its backup, two processes on it, and what is said when it cannot be used."""

import contextlib
import itertools
import os
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading

import pytest
from waiting import SECONDS

from perturbed.feed import database as module
from perturbed.feed import store
from perturbed.feed.database import Database, DatabaseError, default_path
from perturbed.feed.papers import Paper
from perturbed.feed.schema import APPLICATION_ID, STEPS
from perturbed.home import home


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "folder" / "feed.sqlite"


@pytest.fixture
def opened():
    with contextlib.ExitStack() as stack:

        def make(path):
            database = Database(path)
            stack.callback(database.close)
            return database

        yield make


def rights(path):
    return stat.S_IMODE(path.stat().st_mode)


def tables(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return {row[0] for row in connection.execute("SELECT name FROM sqlite_schema")}


def add(database, title="A title"):
    with database.write() as connection:
        return store.upsert(connection, Paper(title=title, source="page"), 1.0)


def count(database):
    return database.read().execute("SELECT count(*) FROM paper").fetchone()[0]


def test_a_new_file_is_the_owners_alone(path, opened):
    before = os.umask(0)  # nothing but the code itself withholds rights
    try:
        database = opened(path)
        add(database)
        files = sorted(p.name for p in path.parent.iterdir())
        assert files == ["feed.sqlite", "feed.sqlite-shm", "feed.sqlite-wal"]
        assert {rights(p) for p in path.parent.iterdir()} == {0o600}
    finally:
        os.umask(before)


def test_a_file_that_others_may_read_is_closed_to_them(path, opened):
    add(opened(path))
    path.chmod(0o644)  # a copy that was put back
    opened(path)
    assert rights(path) == 0o600


def test_opening_a_second_time_drops_no_lock(path, opened):
    """POSIX locks of a process go when it closes *any* handle of the file; another process must still wait."""
    database = opened(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.close()
        holder.execute("PRAGMA journal_mode = DELETE")
        holder.execute("BEGIN EXCLUSIVE")
        module._make(path)
        module._own_alone(path)
        other = run(
            """
            import sqlite3, sys
            try:
                sqlite3.connect(sys.argv[1], timeout=0).execute("BEGIN IMMEDIATE")
                print("took it")
            except sqlite3.OperationalError as e:
                print(e)
            """,
            path,
        )
        assert other.communicate(timeout=SECONDS)[0] == "database is locked\n"


def test_the_default_place_is_the_users_home(opened):
    assert default_path() == home() / "feed.sqlite"
    assert opened(None).path == default_path()


def test_opening_again_changes_nothing(path, opened):
    add(opened(path))
    stamp = path.read_bytes()
    again = opened(path)
    assert count(again) == 1
    assert path.read_bytes() == stamp
    assert not list(path.parent.glob("*.backup"))
    assert again.read().execute("PRAGMA user_version").fetchone()[0] == len(STEPS)
    assert again.read().execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
    assert again.read().execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_a_failed_block_leaves_nothing(path, opened):
    database = opened(path)

    def half():
        with database.write() as connection:
            store.upsert(connection, Paper(title="Half", source="page"), 1.0)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        half()
    assert count(database) == 0
    add(database)
    assert count(database) == 1


def test_an_older_file_is_brought_on_and_a_backup_kept(path, opened, monkeypatch):
    before = os.umask(0)
    try:
        old = opened(path)
        add(old, "From before")
        old.close()
        step = """
            CREATE TABLE later (x);
            INSERT INTO later
                SELECT count(*) FROM paper;  -- a remark; with a semicolon
            DROP TABLE setting;
        """
        monkeypatch.setattr(module, "STEPS", (*STEPS, step))
        new = opened(path)
        assert new.read().execute("SELECT x FROM later").fetchone()[0] == 1
        assert new.read().execute("PRAGMA user_version").fetchone()[0] == len(STEPS) + 1
        backup = path.with_name(f"feed.sqlite.v{len(STEPS)}.backup")
        assert rights(backup) == 0o600
    finally:
        os.umask(before)
    assert "later" not in tables(backup)
    assert "later" in tables(path)
    assert "setting" not in tables(path)
    with contextlib.closing(sqlite3.connect(backup)) as connection:
        assert connection.execute("SELECT title FROM paper").fetchone()[0] == "From before"
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    monkeypatch.setattr(module, "STEPS", STEPS)
    backup_opened = opened(backup)  # the backup is a feed that this version opens
    assert count(backup_opened) == 1


def test_a_step_that_fails_leaves_the_old_version_whole(path, opened, monkeypatch):
    add(opened(path))
    bad = "CREATE TABLE later (x);\nINSERT INTO absent VALUES (1);\n"
    monkeypatch.setattr(module, "STEPS", (*STEPS, bad))
    with pytest.raises(DatabaseError, match="absent"):
        Database(path)
    assert "later" not in tables(path)
    monkeypatch.setattr(module, "STEPS", STEPS)
    assert count(opened(path)) == 1


def test_a_newer_file_is_left_alone(path, opened):
    add(opened(path))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {len(STEPS) + 3}")
    with pytest.raises(DatabaseError, match=rf"newer perturbed \(version {len(STEPS) + 3}.*--database"):
        Database(path)


def test_another_programs_file_is_left_alone(path):
    path.parent.mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE places (url)")
        connection.commit()
    path.chmod(0o644)
    content = path.read_bytes()
    with pytest.raises(DatabaseError, match="another program's"):
        Database(path)
    assert (path.read_bytes(), rights(path)) == (content, 0o644)  # not even its journal or its rights are changed
    assert tables(path) == {"places"}


@pytest.mark.parametrize("content", [b"This is a letter. " * 400, b"SQLite format 3\0" + b"\xff" * 8000])
def test_a_file_that_is_no_database_is_reported_with_the_remedy(path, content):
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    path.chmod(0o644)
    with pytest.raises(
        DatabaseError, match=r"not a usable feed database.*feed export --database.*if not, choose another"
    ) as told:
        Database(path)
    assert "\n" not in str(told.value)
    assert (path.read_bytes(), rights(path)) == (content, 0o644)


def test_an_empty_file_becomes_a_feed(path, opened):
    path.parent.mkdir(parents=True)
    path.touch()
    assert count(opened(path)) == 0


def test_a_place_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "feed.sqlite", tmp_path):
        with pytest.raises(DatabaseError, match=r"cannot be opened .*--database"):
            Database(place)


def run(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def let_go(processes):
    """Let all go on at once, and wait until each has ended well."""
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=SECONDS)
        assert process.returncode == 0


WRITER = """
    import sys
    from pathlib import Path
    from perturbed.feed.database import Database
    from perturbed.feed.papers import Paper
    from perturbed.feed.store import upsert
    database = Database(Path(sys.argv[1]))
    print("open", flush=True)
    sys.stdin.readline()
    for i in range(40):
        with database.write() as connection:
            upsert(connection, Paper(title=f"Paper {i} of {sys.argv[2]}", source="page"), 1.0)
            upsert(connection, Paper(title="Of both", source="page", upvotes=i), 1.0)
"""


def test_two_processes_open_and_write_one_new_file(path, opened):
    path.parent.mkdir(parents=True)
    writers = [run(WRITER, path, name) for name in ("one", "two", "three")]  # all make the tables, or wait for them
    assert [writer.stdout.readline() for writer in writers] == ["open\n"] * 3
    let_go(writers)
    database = opened(path)
    assert count(database) == 3 * 40 + 1
    assert database.read().execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def test_one_that_comes_while_another_makes_the_tables_waits_and_finds_them(path, opened):
    path.parent.mkdir(parents=True)
    failed = []

    def come():
        try:
            Database(path)
        except DatabaseError as e:
            failed.append(e)

    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as first:
        first.execute("PRAGMA journal_mode = WAL")
        first.execute("BEGIN IMMEDIATE")
        second = threading.Thread(target=come)
        second.start()
        second.join(0.3)
        assert second.is_alive()
        for statement in itertools.chain.from_iterable(map(module._statements, STEPS)):
            first.execute(statement)
        for pragma in (f"application_id = {APPLICATION_ID}", f"user_version = {len(STEPS)}"):
            first.execute(f"PRAGMA {pragma}")
        first.execute("COMMIT")
    second.join(SECONDS)
    assert (second.is_alive(), failed) == (False, [])


def test_a_process_killed_in_a_transaction_leaves_the_state_before(path, opened):
    database = opened(path)
    add(database)
    child = run(
        """
        import sys, time
        from pathlib import Path
        from perturbed.feed.database import Database
        from perturbed.feed.papers import Paper
        from perturbed.feed.store import upsert
        database = Database(Path(sys.argv[1]))
        with database.write() as connection:
            for i in range(3000):
                upsert(connection, Paper(title=f"Lost {i}", abstract="x " * 200, source="page"), 1.0)
            print("written", flush=True)
            time.sleep(600)
        """,
        path,
    )
    assert child.stdout.readline() == "written\n"
    child.kill()
    child.communicate(timeout=SECONDS)
    assert count(database) == 1
    add(database, "After")  # nobody holds the lock any more
    assert count(database) == 2
    assert database.read().execute("PRAGMA integrity_check").fetchone()[0] == "ok"


HALF = """
    import sys, time
    from pathlib import Path
    from perturbed.feed import database
    whole = database._statements
    def half(step):
        for statement in whole(step):
            yield statement
            if "DROP TABLE comment" in statement:
                print("half", flush=True)
                time.sleep(600)
    database._statements = half
    database.Database(Path(sys.argv[1]))
"""
WHOLE = """
    import sys
    from pathlib import Path
    from perturbed.feed.database import Database
    sys.stdin.readline()
    Database(Path(sys.argv[1]))
"""


def kept(path):
    """What a file of any version holds that a step touches, and its version."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        told = [connection.execute(f"SELECT * FROM {table}").fetchall() for table in ("comment", "token")]
        addresses = connection.execute("SELECT id, address, state FROM subscriber").fetchall()
        return connection.execute("PRAGMA user_version").fetchone()[0], addresses, *told


def test_a_file_of_the_first_version_is_brought_on_whole_or_not_at_all(path, opened, monkeypatch):
    """One process is killed in the midst of it; then two come at once, while a third goes on with the older tables."""
    with monkeypatch.context() as older:
        older.setattr(module, "STEPS", STEPS[:1])
        old = opened(path)
    paper = add(old).paper
    with old.write() as connection:
        for body in ("one", "two"):
            store.comment(connection, paper, "owner", body, 1.0)
        told = "(7, 'ann@example.org', 'suppressed', 'day', '{}', 0, 0, NULL, 0, 0)"
        connection.execute(f"INSERT INTO subscriber VALUES {told}")
        connection.execute("INSERT INTO token VALUES ('hash', 'unsubscribe', 7, NULL, NULL)")
    before = kept(path)
    child = run(HALF, path)
    assert child.stdout.readline() == "half\n"
    child.kill()
    child.communicate(timeout=SECONDS)
    assert kept(path) == before
    assert before[0] == 1
    both = [run(WHOLE, path), run(WHOLE, path)]
    let_go(both)
    assert kept(path) == (len(STEPS), *before[1:])
    assert kept(path.with_name("feed.sqlite.v1.backup")) == before
    new = opened(path)
    with new.write() as connection:
        assert store.uncomment(connection, paper, "owner", 2)
    with old.write() as connection:  # a server that was not restarted
        assert store.comment(connection, paper, "owner", "three", 2.0) == 3
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    assert [one.body for one in store.comments_of(new.read(), paper)] == ["one", "three"]
    assert new.read().execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def test_each_thread_has_its_own_connection(path, opened):
    database = opened(path)
    seen = []

    def look():
        seen.append(database.read())
        database.close()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join(SECONDS)
    assert seen[0] is not database.read()
    assert database.read() is database.read()


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_file_that_goes_while_in_use_is_noticed_and_not_made_anew(path, opened, how):
    """What is written to a deleted file is lost, and an empty one in its place would hide that."""
    database = opened(path)
    add(database)
    copy = path.with_name("copy")
    with contextlib.closing(sqlite3.connect(path)) as source, contextlib.closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    for file in path.parent.glob("feed.sqlite*"):
        file.unlink()
    if how == "replaced":
        copy.rename(path)
    with pytest.raises(DatabaseError, match=r"moved, removed or replaced .*start it again"):
        add(database, "Lost")
    failed = []

    def elsewhere():
        try:
            database.read()
        except DatabaseError as e:
            failed.append(e)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(SECONDS)
    assert len(failed) == 1
    assert path.exists() is (how == "replaced")
    if how == "replaced":
        assert count(opened(path)) == 1
