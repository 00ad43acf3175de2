"""The queue of runs with real child processes, real servers beside each other, and real kills."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import json
import math
import os
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
from waiting import SECONDS, until

from perturbed.core.registry import cards, load
from perturbed.errors import PerturbedError
from perturbed.evidence.settings import apply_settings, parse
from perturbed.feed import knobs, sandbox
from perturbed.feed import runs as module
from perturbed.feed.runs import LIMITS, MOST_ATTEMPTS, MOST_WAITING, RunError, Runs, study_command
from perturbed.feed.sandbox import Limits

SLUG = "sharpness-aware"
QUICK = {"smoke": Limits(wall_s=SECONDS, cpu_s=20), "laptop": Limits(wall_s=SECONDS, cpu_s=20)}


@pytest.fixture(autouse=True)
def synced(monkeypatch):
    """The calls of the feed's evidence, which other tests are about."""
    calls = []
    stand_in = types.ModuleType("perturbed.feed.verdicts")
    stand_in.sync = lambda database, now: calls.append(now)
    monkeypatch.setitem(sys.modules, "perturbed.feed.verdicts", stand_in)
    return calls


def python(code: str):
    """A command builder for a child that runs Python code."""
    return lambda run: [sys.executable, "-I", "-S", "-c", textwrap.dedent(code)]


@contextlib.contextmanager
def working(database, code, **options):
    runs = Runs(database, command=python(code), **{"limits": QUICK, **options})
    runs.start()
    try:
        yield runs
    finally:
        runs.stop()


def ended(runs, number, seconds=SECONDS):
    until(lambda: runs.get(number).state not in ("queued", "running"), seconds)
    return runs.get(number)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- what may be asked for


def test_fields_are_those_of_the_cards_with_the_types_of_the_code():
    """Against the interventions themselves, which the feed never imports."""
    checked = 0
    for slug, card in cards().items():
        study = load(slug).study
        assert knobs.primary(slug) == study.primary
        found = knobs.fields(slug)
        assert {f.name: [f.low, f.high] for f in found} == (card.knobs if study.primary else {})
        for field in found:
            owners = [
                type(i) for i in study.arms[study.primary] if field.name in {f.name for f in dataclasses.fields(i)}
            ]
            assert owners, f"{slug}: the card bounds {field.name}, which the arm {study.primary} does not have"
            whole = [isinstance(parse(owner, field.name, f"{field.high:g}"), int) for owner in owners]
            assert field.whole == all(whole), f"{slug}.{field.name}"
            checked += 1
    assert checked > 10


def test_every_field_is_explained_in_the_words_of_its_class():
    """Of the intervention that the primary arm really holds: a study may know two classes with a field ``eps``."""
    for slug in cards():
        study = load(slug).study
        for field in knobs.fields(slug):
            said = [
                " ".join(inspect.getdoc(cls).split())
                for i in study.arms[study.primary]
                for cls in type(i).__mro__
                if field.name in vars(cls).get("__annotations__", {})
            ]
            assert field.about, f"{slug}: the docstring of its class has no line for {field.name}"
            assert any(f" {field.name}: {field.about}" in text for text in said), f"{slug}.{field.name}: {field.about}"
            assert field.about.endswith("."), field.about


def test_a_field_whose_class_says_nothing_has_no_explanation():
    def about(name, told):
        source = f"class A:\n    {told!r}\n    x: int\n"
        return knobs._about(ast.parse(source).body, name)

    told = """What it does.

        Args:
            a: of x: no.
            x: one
                and two.
            y: three.

        Raises:
            z: never.
        """
    assert about("x", told) == "one and two."
    assert about("y", told) == "three."
    assert about("z", told) is None  # of another section
    assert about("x", "x: not of the arguments.") is None
    assert about("x", "Nothing.") is None
    assert knobs._about([], "x") is None


@pytest.mark.parametrize("slug", sorted(cards()))
def test_settings_go_to_the_primary_arm_and_nowhere_else(slug, database):
    runs = Runs(database)
    high = {field.name: field.high for field in runs.fields(slug)}
    command = study_command(runs.get(runs.ask(slug, "laptop", high)))
    assert command[:9] == [sys.executable, "-P", "-m", "perturbed", "run", slug, "--scale", "laptop", "--json"]
    assert command[9:11] == ["--workers", "1"]
    assert command[11::2] == ["--set"] * len(high)
    study = load(slug).study
    for setting in command[12::2]:
        changed = apply_settings(study.at("laptop"), [setting])
        assert changed.plan == study.at("laptop").plan
        name, _, value = setting.partition("=")
        arm, _, field = name.partition(".")
        assert arm == study.primary
        values = [getattr(i, field) for i in changed.arms[arm] if hasattr(i, field)]
        assert values
        assert set(values) == {float(value)}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rho": math.nan}, "rho is a number from 0 to 1"),
        ({"rho": math.inf}, "rho is a number from 0 to 1"),
        ({"rho": -0.001}, "rho is a number from 0 to 1"),
        ({"rho": 1.001}, "rho is a number from 0 to 1"),
        ({"rho": 10**400}, "rho is a number from 0 to 1"),
        ({"rho": True}, "rho is a number from 0 to 1"),
        ({"rho": None}, "rho is a number from 0 to 1"),
        ({"rho": [0.1]}, "rho is a number from 0 to 1"),
        ({"rho": "0.1"}, "rho is a number from 0 to 1"),
        ({"rho": "../../etc/passwd"}, "rho is a number from 0 to 1"),
        ({"direction": 0.5}, "'direction' of sharpness-aware cannot be set here"),
        ({"plan.steps": 3}, "'plan.steps' of sharpness-aware cannot be set here"),
        ({"aware.rho": 0.1}, "'aware.rho' of sharpness-aware cannot be set here"),
        ({"rho=0.1 --plan": 0.1}, "cannot be set here"),
        ({"rho": 0.1, "data": 1}, "'data' of sharpness-aware cannot be set here"),
    ],
)
def test_other_settings_are_refused(database, settings, said):
    runs = Runs(database)
    with pytest.raises(PerturbedError, match=said):
        runs.ask(SLUG, "smoke", settings)
    assert runs.recent() == []


def test_a_whole_field_takes_no_fraction(database):
    runs = Runs(database)
    assert runs.get(runs.ask("component-removal", "smoke", {"components": 3.0})).settings == {"components": 3}
    assert "--set removal.components=3" in " ".join(study_command(runs.recent()[0]))
    with pytest.raises(PerturbedError, match=r"components is a whole number from 0 to 8, not '2\.5'"):
        runs.ask("component-removal", "smoke", {"components": 2.5})


@pytest.mark.parametrize("slug", ["", "../methods/sltrain", "sltrain.py", "--json", "no-such-paper", "a" * 500])
def test_only_methods_with_a_card_are_run(database, slug):
    with pytest.raises(PerturbedError, match="no method is called"):
        Runs(database).ask(slug, "smoke", {})


@pytest.mark.parametrize("scale", ["full", "paper", "", "smoke --register"])
def test_only_smoke_and_laptop_are_run(database, scale):
    with pytest.raises(RunError, match="is not run here: it is one of smoke, laptop"):
        Runs(database).ask(SLUG, scale, {})


def test_a_row_that_was_tampered_with_is_checked_again(database, tmp_path):
    runs = Runs(database, limits=QUICK)
    number = runs.ask(SLUG, "smoke", {})
    with database.write() as connection:
        connection.execute("UPDATE run SET settings = ?", (json.dumps({"rho": 7}),))
    runs.start()
    try:
        assert ended(runs, number).error == "it could not be carried out: rho is a number from 0 to 1, not '7'"
    finally:
        runs.stop()


def test_the_queue_is_bounded_and_the_same_question_waits_once(database):
    now = iter(range(100, 200))
    runs = Runs(database, clock=lambda: next(now))
    first = runs.ask(SLUG, "smoke", {"rho": 0.1})
    assert runs.ask(SLUG, "smoke", {"rho": 0.1}) == first
    assert runs.get(first).asked == 100
    others = [runs.ask(SLUG, "smoke", {"rho": n / 100}) for n in range(20, 20 + MOST_WAITING - 1)]
    assert len({first, *others}) == MOST_WAITING == 10
    with pytest.raises(RunError, match="10 runs wait already"):
        runs.ask(SLUG, "laptop", {"rho": 0.1})
    assert runs.ask(SLUG, "smoke", {"rho": 0.1}) == first
    runs.cancel(others[0])
    again = runs.ask(SLUG, "laptop", {"rho": 0.1})
    assert again not in (first, *others)
    assert [r.id for r in runs.recent(2)] == [again, others[-1]]


def test_there_is_no_such_run(database):
    for number in (0, -1, 7, 2**64, 10**30):
        with pytest.raises(RunError, match=f"there is no run {number}"):
            Runs(database).get(number)
        with pytest.raises(RunError, match="there is no run"):
            Runs(database).cancel(number)


# --- from asking to the record


def test_progress_and_record_are_kept(database, synced, tmp_path):
    code = """
        import json, sys, time
        from pathlib import Path
        print("perturbed: collecting the docstrings of installed packages …", file=sys.stderr, flush=True)
        time.sleep(0.6)
        for k in range(1, 4):
            print(f"[{k}/3] aware · seed {k} (0.{k} s)", file=sys.stderr, flush=True)
            while not Path(f"{sys.argv[1]}.{k}").exists():
                time.sleep(0.02)
        print(json.dumps({"slug": "sharpness-aware", "verdict": "null", "title": "<b>"}))
        print("[3/3] not a number of runs [4/x]", file=sys.stderr)
    """
    go = tmp_path / "go"
    runs = Runs(database, command=lambda run: [*python(code)(run), str(go)], limits=QUICK, clock=lambda: 1e9)
    runs.start()
    try:
        number = runs.ask(SLUG, "smoke", {"rho": 0.25})
        until(lambda: (runs.get(number).line or "").startswith("collecting the docstrings"))
        for k in (1, 2):
            until(lambda k=k: runs.get(number).done == k)
            run = runs.get(number)
            assert (run.state, run.total, run.line) == ("running", 3, f"aware · seed {k} (0.{k} s)")
            (tmp_path / f"go.{k}").touch()
        assert runs.ask(SLUG, "smoke", {"rho": 0.25}) == number, "asked again while it runs, it is the same run"
        (tmp_path / "go.3").touch()
        run = ended(runs, number)
    finally:
        runs.stop()
    assert (run.state, run.done, run.total, run.attempts, run.error) == ("done", 3, 3, 1, None)
    assert run.record == {"slug": "sharpness-aware", "verdict": "null", "title": "<b>"}
    assert (run.asked, run.started, run.ended) == (1e9, 1e9, 1e9)
    assert (runs.recent()[0].id, runs.recent()[0].record) == (number, None)
    assert synced == [1e9]
    assert sorted(p.name for p in tmp_path.glob("feed.sqlite*run*")) == ["feed.sqlite.runs.lock"]


@pytest.mark.parametrize(
    ("code", "state", "said"),
    [
        ("print('{}'); raise SystemExit(3)", "done", None),  # a gate failed: a finished run, with its record
        ("print('{}')\nraise SystemExit(2)", "failed", "ended with exit code 2 and no record"),
        (
            "import sys; print('[1/2] control · seed 0', file=sys.stderr); "
            "sys.exit('perturbed: error: no room for checkpoints in /x; free some')",
            "failed",
            "no room for checkpoints in /x; free some",
        ),
        ("print('no record')", "failed", "ended with exit code 0 and no record"),
        ("print('[]')", "failed", "ended with exit code 0 and no record"),
        ("print('{\"a\": NaN}')", "failed", "ended with exit code 0 and no record"),
        ("print('[' * 90000)", "failed", "ended with exit code 0 and no record"),
        ("print('{}'); import os; os.kill(os.getpid(), 9)", "failed", "the system killed it, most often for want of"),
        ("import os; os.kill(os.getpid(), 11)", "failed", "ended by signal 11"),
        ("print('{' + ' ' * 300_000 + '}')", "failed", "it wrote more than 0.1 MB"),
        ("import sys; sys.stderr.write('x' * 10_000 + '<end>'); sys.exit(1)", "failed", "ended with exit code 1"),
    ],
)
def test_every_end_is_told(database, code, state, said):
    limits = {"smoke": dataclasses.replace(QUICK["smoke"], output=100_000)}
    with working(database, code, limits=limits) as runs:
        run = ended(runs, runs.ask(SLUG, "smoke", {}))
    assert run.state == state
    if said is None:
        assert (run.record, run.error) == ({}, None)
    else:
        assert run.error.startswith(said)
        assert len(run.error) <= 4000
        assert run.record is None
        if "<end>" in code:
            assert run.error.endswith("xxx<end>")


def test_too_much_memory_time_and_processor_time_are_told(database):
    slow = {"smoke": Limits(wall_s=0.5, cpu_s=20), "laptop": Limits(wall_s=SECONDS, cpu_s=1, memory=200 * 2**20)}
    with working(database, "while True: pass", limits=slow, grace=0.2) as runs:
        numbers = [runs.ask(SLUG, scale, {}) for scale in ("smoke", "laptop")]
        assert ended(runs, numbers[0]).error.startswith("it took longer than 0.5 seconds")
        assert ended(runs, numbers[1]).error == "it used more than 1 seconds of processor time"
    hungry = "try: bytearray(2**30)\nexcept MemoryError: raise SystemExit('perturbed: error: MemoryError: (a defect)')"
    with working(database, hungry, limits=slow) as runs:
        told = ended(runs, runs.ask(SLUG, "laptop", {})).error
        assert told.startswith("MemoryError: (a defect) – a run asked for here may use 0.195312 GiB")


def test_a_folder_that_cannot_be_made_is_told(database, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with working(database, "print('{}')") as runs:
        run = ended(runs, runs.ask(SLUG, "smoke", {}))
    assert run.state == "failed"
    assert run.error == "it could not be carried out: [Errno 28] No space left on device"


def test_a_queue_that_cannot_be_written_is_told_and_the_worker_lives_on(database):
    with working(database, "print('{}')") as runs:
        blocker = sqlite3.connect(database.path, isolation_level=None)
        database.read().execute("PRAGMA busy_timeout = 50")
        blocker.execute("BEGIN IMMEDIATE")
        with pytest.raises(RunError, match="the queue of runs cannot be written"):
            runs.ask(SLUG, "smoke", {})
        blocker.rollback()
        number = runs.ask(SLUG, "smoke", {})
        assert ended(runs, number).state == "done"
        with database.write() as connection:
            connection.execute("ALTER TABLE run RENAME TO gone")
        assert "gone" not in until(lambda: runs.trouble)
        assert "no such table: run" in runs.trouble
        with database.write() as connection:
            connection.execute("ALTER TABLE gone RENAME TO run")
        assert ended(runs, runs.ask(SLUG, "smoke", {})).state == "done"
        assert runs.trouble is None


def test_files_are_the_owners_alone(database, tmp_path):
    code = """
        import os, stat
        open("checkpoint", "w").close()
        print('{"folder": %d, "file": %d}' % tuple(stat.S_IMODE(os.stat(p).st_mode) for p in (".", "checkpoint")))
    """
    before = os.umask(0)
    try:
        with working(database, code) as runs:
            run = ended(runs, runs.ask(SLUG, "smoke", {}))
            assert stat.S_IMODE((tmp_path / "feed.sqlite.runs.lock").stat().st_mode) == 0o600
    finally:
        os.umask(before)
    assert run.record == {"folder": 0o700, "file": 0o600}


@pytest.mark.parametrize("possible", [False, True])
def test_network_is_as_the_page_says(database, monkeypatch, possible):
    if possible and subprocess.run(["unshare", "-rn", "true"], capture_output=True, timeout=SECONDS).returncode:
        pytest.skip("this system lets no process be cut off from the network")
    monkeypatch.setattr(sandbox, "network_can_be_cut", lambda: possible)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        code = f"""
            import json, socket
            s = socket.socket(); s.settimeout(60)
            print(json.dumps({{"reached": s.connect_ex(("127.0.0.1", {listener.getsockname()[1]})) == 0}}))
        """
        with working(database, code) as runs:
            run = ended(runs, runs.ask(SLUG, "smoke", {}))
            isolation = runs.isolation()
    assert run.record == {"reached": not possible}
    assert isolation.network_off is possible
    assert isolation.limits == QUICK
    assert ("It is cut off from the network." in isolation.note) is possible
    assert ("only told to stay offline" in isolation.note) is not possible


# --- cancelling, stopping, crashing

GROUP = """
    import os, signal, sys, time
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(600)
    print(f"[1/9] {os.getpid()} {child}", file=sys.stderr, flush=True)
    time.sleep(600)
"""


def pids(runs, number):
    until(lambda: runs.get(number).done == 1)
    return [int(pid) for pid in runs.get(number).line.split()]


def test_cancel_ends_the_whole_group_and_the_next_begins(database):
    with working(database, GROUP) as runs:
        number, waiting = runs.ask(SLUG, "smoke", {}), runs.ask(SLUG, "laptop", {})
        processes = pids(runs, number)
        assert all(alive(pid) for pid in processes)
        runs.cancel(number)
        run = ended(runs, number)
        assert (run.state, run.record, run.error) == ("cancelled", None, None)
        until(lambda: not any(alive(pid) for pid in processes))
        pids(runs, waiting)
        again = runs.ask(SLUG, "smoke", {})
        runs.cancel(again)
        assert (runs.get(again).state, runs.get(again).attempts) == ("cancelled", 0)
        runs.cancel(number)  # it has ended: nothing changes
        assert runs.get(number) == run
        runs.cancel(waiting)
        ended(runs, waiting)


def test_what_ends_well_while_it_is_being_cancelled_is_done(database):
    code = """
        import signal, sys, time
        signal.signal(signal.SIGINT, lambda *_: sys.exit(print("{}")))
        print("[1/9] control · seed 0", file=sys.stderr, flush=True)
        time.sleep(600)
    """
    with working(database, code) as runs:
        number = runs.ask(SLUG, "smoke", {})
        until(lambda: runs.get(number).done == 1)
        runs.cancel(number)
        assert (ended(runs, number).state, runs.get(number).record) == ("done", {})


def test_a_run_that_is_being_cancelled_is_not_the_answer_to_a_new_question(database):
    runs = Runs(database)
    number = runs.ask(SLUG, "smoke", {})
    module._claim(database, 1.0)
    runs.cancel(number)
    assert (runs.get(number).state, runs.get(number).cancel) == ("running", True)
    assert runs.ask(SLUG, "smoke", {}) != number


def test_stop_of_the_server_ends_the_study_and_queues_it_again(database):
    with working(database, GROUP) as runs:
        number = runs.ask(SLUG, "smoke", {})
        processes = pids(runs, number)
    assert not any(alive(pid) for pid in processes)
    run = runs.get(number)
    assert (run.state, run.attempts) == ("queued", 0)
    with working(database, "print('{}')") as runs:
        run = ended(runs, number)
    assert (run.state, run.attempts) == ("done", 1)


SERVER = """
    import sys, time
    from pathlib import Path
    from perturbed.feed.database import Database
    from perturbed.feed.runs import Runs
    from perturbed.feed.sandbox import Limits
    runs = Runs(Database(Path({path!r})), command=lambda run: [sys.executable, "-I", "-S", "-c", {code!r}],
                limits={{"smoke": Limits(wall_s=120, cpu_s=60)}})
    runs.start()
    print("serving", flush=True)
    time.sleep(600)
"""


def is_free(database) -> bool:
    with module._turn(database.path) as ours:
        return ours


@contextlib.contextmanager
def server(database, code):
    """Another server on the same file, as a process that can be killed."""
    source = textwrap.dedent(SERVER.format(path=str(database.path), code=textwrap.dedent(code)))
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"serving\n"
        until(lambda: not is_free(database))
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_study_goes_on_under_the_next_server_after_kill_9(database):
    runs = Runs(database)
    number = runs.ask(SLUG, "smoke", {})
    with server(database, "import os, sys, time; print(f'[1/9] {os.getpid()}', file=sys.stderr, flush=True); "
                          "time.sleep(600)") as process:  # fmt: skip
        (child,) = pids(runs, number)
        process.send_signal(signal.SIGKILL)
        process.wait()
        until(lambda: not alive(child))
    assert runs.get(number).state == "running"
    with working(database, 'print(\'{"went": "on"}\')') as runs:
        run = ended(runs, number)
    assert (run.state, run.attempts, run.record) == ("done", 2, {"went": "on"})


def test_a_study_that_takes_the_server_down_is_given_up(database):
    runs = Runs(database)
    number, other = runs.ask(SLUG, "smoke", {}), runs.ask(SLUG, "smoke", {"rho": 0.5})
    for attempt in range(1, MOST_ATTEMPTS + 1):
        module._recover(database, 1.0)
        assert module._claim(database, 1.0).id == number
        assert (runs.get(number).state, runs.get(number).attempts) == ("running", attempt)
    module._recover(database, 2.0)
    run = runs.get(number)
    assert (run.state, run.ended) == ("failed", 2.0)
    assert run.error.startswith("the server ended 3 times while it ran")
    assert module._claim(database, 3.0).id == other


def test_a_study_cancelled_before_the_crash_does_not_come_back(database):
    runs = Runs(database)
    number = runs.ask(SLUG, "smoke", {})
    module._claim(database, 1.0)
    runs.cancel(number)
    module._recover(database, 2.0)
    assert (runs.get(number).state, runs.get(number).ended) == ("cancelled", 2.0)


def test_two_servers_never_run_two_at_once_and_both_show_progress(database, tmp_path):
    """Each child holds a file that a second could not make."""
    code = f"""
        import json, os, sys, time
        os.close(os.open({str(tmp_path / "alone")!r}, os.O_CREAT | os.O_EXCL))
        print("[1/2] control · seed 0", file=sys.stderr, flush=True)
        time.sleep(0.3)
        os.unlink({str(tmp_path / "alone")!r})
        print(json.dumps({{"parent": os.getppid()}}))
    """
    with server(database, code) as other, working(database, code, limits={"smoke": QUICK["smoke"]}) as runs:
        shown = Runs(database)
        numbers = [runs.ask(SLUG, "smoke", {"rho": n / 10}) for n in range(4)]
        until(lambda: shown.get(numbers[0]).done == 1)
        found = [ended(runs, number) for number in numbers]
        assert [r.state for r in found] == ["done"] * 4, [r.error for r in found]
        assert {r.attempts for r in found} == {1}
        assert {r.record["parent"] for r in found} == {other.pid}, "one server ran them all"
        other.kill()
        other.wait()
        last = ended(runs, runs.ask(SLUG, "smoke", {"rho": 0.9}))  # the other's turn ended with it
        assert last.record == {"parent": os.getpid()}


def test_cancel_reaches_a_run_of_the_other_server(database):
    runs = Runs(database)
    number = runs.ask(SLUG, "smoke", {})
    with server(database, GROUP):
        processes = pids(runs, number)
        runs.cancel(number)
        assert ended(runs, number).state == "cancelled"
        until(lambda: not any(alive(pid) for pid in processes))


# --- a real study


@pytest.mark.timeout(900)
def test_a_real_smoke_run_with_a_setting(database, monkeypatch):
    """The whole way: the command line's own child within the default limits, cut off the network where that is so."""
    monkeypatch.setenv("PERTURBED_SMTP_PASSWORD", "hush")
    runs = Runs(database)
    runs.start()
    try:
        number = runs.ask(SLUG, "smoke", {"rho": 0.25})
        run = ended(runs, number, 5 * SECONDS)
    finally:
        runs.stop()
    assert run.state == "done", run.error
    assert run.done == run.total == 38
    assert run.line.startswith("sham · seed 7 (")
    assert (run.record["slug"], run.record["scale"], run.record["registered"]) == (SLUG, "smoke", False)
    assert "--set aware.rho=0.25" in run.record["command"]
    assert "aware" in run.record["scores"]
    assert LIMITS["smoke"].memory > 4 * max(c["peak_bytes"] for c in run.record["cost"].values())


def test_a_home_that_cannot_be_written_is_told_in_the_words_of_the_command_line(database, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PERTURBED_HOME", str(tmp_path / "file"))
    runs = Runs(database)
    runs.start()
    try:
        run = ended(runs, runs.ask(SLUG, "smoke", {}))
    finally:
        runs.stop()
    assert run.state == "failed"
    assert run.error.startswith(f"cannot write reports to {tmp_path}/file/reports: ")
