"""The ledger: what is written is what is read, and what was tampered with or torn is found."""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from perturbed import home
from perturbed.evidence import ledger
from perturbed.evidence.verdict import VERDICT_VERSION, judge_record


def record(slug="hubble", *, seed=0, shift=1.0, **changes):
    rng = np.random.default_rng(seed)
    scores = {arm: {str(i): float(x) for i, x in enumerate(rng.normal(by, 0.5, 8))} for arm, by in
              (("control", 5.0), ("method", 5.0 + 2 * shift), ("sham", 5.0))}  # fmt: skip
    raw = {
        "schema": 1, "slug": slug, "title": "Überraschung ∆", "scale": "laptop", "registered": True, "metric": "bits",
        "transform": "raw", "direction": "higher", "primary": "method", "reference": "control", "sham": "sham",
        "epsilon": 0.5, "alpha": 0.05, "bounds": [0, None], "seeds": list(range(8)), "scores": scores, "gates": {},
        "smoke": {"control": 5.1}, "curves": {},
    } | changes  # fmt: skip
    return raw | judge_record(raw)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The package's folder and the user's, both empty."""
    monkeypatch.setattr(ledger, "package_folder", lambda: tmp_path / "package")
    monkeypatch.setenv("PERTURBED_HOME", str(tmp_path / "home"))
    return tmp_path / "package", tmp_path / "home" / "ledger"


def rewrite(path, number, change):
    """Edit one line's JSON, hash left as it is."""
    lines = path.read_text().splitlines(keepends=True)
    edited = json.loads(lines[number])
    change(edited)
    lines[number] = json.dumps(edited) + "\n"
    path.write_text("".join(lines))


def scale(of, name, factor):
    of[name] *= factor


# --- canonical form


def test_canonical_json_is_one_text_for_one_content():
    a = {"b": [1.0, 0.1], "a": {"ü": None, "x": True}}
    assert ledger.canonical(a) == '{"a":{"x":true,"ü":null},"b":[1.0,0.1]}'
    assert ledger.canonical({"a": {"x": True, "ü": None}, "b": (1.0, 0.1)}) == ledger.canonical(a)
    assert ledger.record_hash(a) == hashlib.sha256(ledger.canonical(a).encode()).hexdigest()
    assert ledger.record_hash(a | {"hash": "anything"}) == ledger.record_hash(a)
    assert ledger.record_hash(a | {"c": 0}) != ledger.record_hash(a)


def test_seeds_as_numbers_hash_like_the_text_that_they_become():
    assert ledger.record_hash({"s": {2: 0.5, 10: 0.25}}) == ledger.record_hash({"s": {"10": 0.25, "2": 0.5}})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), {1, 2}, np.float32(1)])
def test_what_json_has_no_form_for_is_refused(bad):
    with pytest.raises(ledger.LedgerError, match="write what is undefined as null"):
        ledger.canonical({"x": bad})


# --- writing and reading


def test_what_is_appended_is_read_back(tmp_path):
    path = tmp_path / "deep" / "hubble.jsonl"
    first, second = ledger.append(path, record(seed=1)), ledger.append(path, record(seed=2))
    assert ledger.read(path) == [first, second]
    assert {key: first[key] for key in record(seed=1)} == record(seed=1)
    assert first["verdict_version"] == VERDICT_VERSION
    assert first["hash"] == ledger.record_hash(first) != second["hash"]
    assert path.read_text().count("\n") == 2


def test_appending_leaves_earlier_bytes_as_they_were(tmp_path):
    path = tmp_path / "hubble.jsonl"
    ledger.append(path, record(seed=1))
    before = path.read_bytes()
    ledger.append(path, record(seed=2))
    assert path.read_bytes().startswith(before)


def test_a_record_that_lacks_fields_is_not_written(tmp_path):
    short = record()
    del short["epsilon"], short["gates"]
    with pytest.raises(ledger.LedgerError, match=r"hubble\.jsonl lacks epsilon, gates"):
        ledger.append(tmp_path / "hubble.jsonl", short)
    assert not (tmp_path / "hubble.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: r["scores"]["method"].update({"3": 9.0}),
            "does not match its hash, so a score or another field was edited",
        ),
        (lambda r: r.update(verdict="null"), "does not match its hash"),
        (lambda r: r.update(hash="0" * 64), "does not match its hash"),
        (lambda r: r.update(hash=None), "does not match its hash"),
        (lambda r: r.update(extra=1), "does not match its hash"),
        (
            lambda r: r.update(schema=2),
            "schema 2 is unknown here, where it is 1; read it with the perturbed that wrote it",
        ),
        (lambda r: r.pop("hash"), "lacks hash"),
        (lambda r: r.pop("arms"), "lacks arms"),
    ],
)
def test_an_edited_line_is_named(tmp_path, change, message):
    path = tmp_path / "hubble.jsonl"
    for seed in range(3):
        ledger.append(path, record(seed=seed))
    rewrite(path, 1, change)
    with pytest.raises(ledger.LedgerError, match=rf"hubble\.jsonl, line 2: .*{message}"):
        ledger.read(path)


def test_a_line_that_is_only_formatted_otherwise_still_holds(tmp_path):
    path = tmp_path / "hubble.jsonl"
    stored = ledger.append(path, record())
    rewrite(path, 0, lambda r: None)
    assert " " in path.read_text().replace("Überraschung ∆", "")
    assert ledger.read(path) == [stored]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{oops}\n", "the line is not JSON"),
        ("[1]\n", "not a record"),
        ("\n", "not JSON"),
        ('{"x":NaN}\n', "NaN is not JSON"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path, text, message):
    path = tmp_path / "hubble.jsonl"
    ledger.append(path, record())
    path.write_text(path.read_text() + text)
    with pytest.raises(ledger.LedgerError, match=rf"line 2: .*{message}.*restore it from version control"):
        ledger.read(path)


def test_a_missing_ledger_is_said(tmp_path):
    with pytest.raises(ledger.LedgerError, match=r"none\.jsonl: the ledger cannot be read \(No such file"):
        ledger.read(tmp_path / "none.jsonl")


# --- crashes


@pytest.mark.parametrize("kept", [1, 40, -2])
def test_a_torn_last_line_is_reported_and_the_rest_stands(tmp_path, kept):
    path = tmp_path / "hubble.jsonl"
    first = ledger.append(path, record(seed=1))
    whole = path.read_bytes()
    ledger.append(path, record(seed=2))
    last = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + last[:kept])
    with pytest.warns(ledger.TornLineWarning, match=r"hubble\.jsonl: a crash cut off its last line after \d+ bytes"):
        assert ledger.read(path) == [first]
    with pytest.warns(ledger.TornLineWarning, match="the new record takes its place"):
        third = ledger.append(path, record(seed=3))
    assert ledger.read(path) == [first, third]


def test_only_the_last_line_can_be_torn(tmp_path):
    path = tmp_path / "hubble.jsonl"
    ledger.append(path, record(seed=1))
    path.write_bytes(path.read_bytes()[:50] + b"\n")
    ledger.append(path, record(seed=2))
    with pytest.raises(ledger.LedgerError, match="line 1: the line is not JSON"):
        ledger.read(path)


def test_a_last_line_without_its_newline_is_a_record(tmp_path):
    path = tmp_path / "hubble.jsonl"
    first = ledger.append(path, record(seed=1))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert ledger.read(path) == [first]
    second = ledger.append(path, record(seed=2))
    assert ledger.read(path) == [first, second]


def test_a_full_disk_leaves_the_ledger_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "hubble.jsonl"
    first = ledger.append(path, record(seed=1))
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:100]))
    with pytest.raises(ledger.LedgerError, match=r"could not be written \(only 100 of \d+ bytes fitted\); make room"):
        ledger.append(path, record(seed=2))
    monkeypatch.undo()
    assert ledger.read(path) == [first]


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "hubble.jsonl"
    program = (
        "import json, sys; from pathlib import Path; from perturbed.evidence.ledger import append, read\n"
        "base = json.load(open(sys.argv[2]))\n"
        "for i in range(25):\n"
        "    append(Path(sys.argv[1]), base | {'title': f'{sys.argv[3]} {i}'})\n"
        "    read(Path(sys.argv[1]))\n"
    )
    (tmp_path / "base.json").write_text(json.dumps(record()))
    command = [sys.executable, "-W", "error", "-c", program, str(path), str(tmp_path / "base.json")]
    with ThreadPoolExecutor(3) as pool:
        done = [pool.submit(subprocess.run, [*command, f"writer{k}"], check=True) for k in range(3)]
        for task in done:
            task.result()
    titles = [line["title"] for line in ledger.read(path)]
    assert sorted(titles) == sorted(f"writer{k} {i}" for k in range(3) for i in range(25))


@pytest.mark.parametrize("use", [lambda path: ledger.append(path, record(seed=2)), ledger.read])
def test_writers_and_readers_wait_for_the_one_who_writes(tmp_path, use):
    path = tmp_path / "hubble.jsonl"
    ledger.append(path, record(seed=1))
    with ThreadPoolExecutor(1) as pool, path.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write('{"half a line')
        other.flush()
        waiting = pool.submit(use, path)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.2)
        other.truncate(other.tell() - len('{"half a line'))
        fcntl.flock(other, fcntl.LOCK_UN)
        waiting.result(timeout=10)
    assert len(ledger.read(path)) >= 1


# --- the two folders


def test_home_is_chosen_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PERTURBED_HOME", str(tmp_path))
    assert home.home() == tmp_path
    assert ledger.user_folder() == tmp_path / "ledger"
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.setenv("PERTURBED_HOME", "~/x")
    assert str(home.home()) == "/somewhere/x"
    monkeypatch.setenv("PERTURBED_HOME", "")
    assert home.home().name == "perturbed"
    assert home.home().is_absolute()


def test_the_package_folder_is_where_the_package_ships_its_ledgers():
    assert ledger.package_folder().parts[-2:] == ("perturbed", "ledger")
    assert ledger.package_folder().is_dir()


@pytest.mark.parametrize("slug", ["../etc/passwd", "A", "a--b", "", "a/b", "a.b"])
def test_a_slug_cannot_leave_the_folder(tmp_path, slug):
    with pytest.raises(ledger.LedgerError, match="is not a slug"):
        ledger.file_of(tmp_path, slug)


def test_latest_takes_the_newest_registered_record_of_the_scale(folders):
    package, user = folders
    assert ledger.latest("hubble") is None
    mine = ledger.append(user / "hubble.jsonl", record(seed=1))
    assert ledger.latest("hubble") == mine
    old = ledger.append(package / "hubble.jsonl", record(seed=2))
    assert ledger.latest("hubble") == old  # the committed evidence goes first
    new = ledger.append(package / "hubble.jsonl", record(seed=3))
    ledger.append(package / "hubble.jsonl", record(seed=4, scale="full"))
    ledger.append(package / "hubble.jsonl", record(seed=5, registered=False))
    assert ledger.latest("hubble") == new
    assert ledger.latest("hubble", scale="full")["scale"] == "full"
    assert ledger.latest("hubble", scale="paper") is None
    assert ledger.latest("another") is None


def test_the_stored_verdict_is_taken_as_it_is_only_under_the_same_rules(folders, monkeypatch):
    package, _ = folders
    assert ledger.stored_verdict("hubble") is None
    # A verdict that the scores do not give, sealed properly: taken unread here, found by recompute and verify.
    ledger.append(package / "hubble.jsonl", record() | {"verdict": "contradicted"})
    assert ledger.stored_verdict("hubble") == "contradicted"
    monkeypatch.setattr(ledger, "VERDICT_VERSION", VERDICT_VERSION + 1)
    assert ledger.stored_verdict("hubble") == "supported"
    monkeypatch.undo()


def test_a_stored_verdict_that_was_edited_is_not_shown(folders):
    package, _ = folders
    ledger.append(package / "hubble.jsonl", record())
    rewrite(package / "hubble.jsonl", 0, lambda r: r.update(verdict="null"))
    with pytest.raises(ledger.LedgerError, match="does not match its hash"):
        ledger.stored_verdict("hubble")


def test_stored_verdicts_need_no_numerical_library(folders):
    package, user = folders
    ledger.append(user / "hubble.jsonl", record())
    program = (
        "import sys; from perturbed.evidence.ledger import stored_verdict; "
        "assert stored_verdict('hubble') == 'supported'; "
        "heavy = {'numpy', 'scipy', 'torch', 'pyarrow', 'perturbed.core'} & set(sys.modules); assert not heavy, heavy"
    )
    committed = ledger.file_of(package, "hubble")
    assert not committed.exists()
    subprocess.run([sys.executable, "-c", program], check=True)


# --- recomputation


def test_recomputing_gives_what_is_stored(tmp_path):
    stored = ledger.append(tmp_path / "hubble.jsonl", record())
    fresh = ledger.recompute(stored)
    assert fresh["arms"] == stored["arms"]
    assert fresh["verdict"] == "supported"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: scale(r["arms"]["method"], "effect", 1 + 1e-8), r"arms\.method\.effect is stored as"),
        (lambda r: r["arms"]["sham"]["interval"].reverse(), r"arms\.sham\.interval\[0\]"),
        (lambda r: r["arms"]["sham"].update(p_holm=None), r"arms\.sham\.p_holm is stored as None"),
        (lambda r: r["arms"]["method"].update(n=9), r"arms\.method\.n is stored as 9 and recomputed as 8"),
        (lambda r: r["arms"].pop("sham"), "arms has method, recomputed method, sham"),
        (lambda r: r.update(verdict="null"), "verdict is stored as 'null' and recomputed as 'supported'"),
        (lambda r: r.update(trivial=True), "trivial is stored as True"),
        (lambda r: r.update(specific=None), "specific is stored as None"),
        (lambda r: r["scores"]["method"].update({"0": 0.0}), r"arms\.method\.effect"),
        (lambda r: r["scores"]["method"].pop("0"), "cannot be judged again: .*missing 0"),
    ],
)  # fmt: skip
def test_statistics_that_do_not_follow_from_the_scores_are_found_even_when_sealed(tmp_path, change, message):
    forged = record()
    change(forged)
    path = tmp_path / "hubble.jsonl"
    stored = ledger.append(path, forged)
    assert ledger.read(path) == [stored]  # the hash alone cannot see it
    with pytest.raises(ledger.LedgerError, match=message):
        ledger.recompute(stored)
    found = ledger.verify(tmp_path)
    assert found.records == 0
    assert found.problems[0].startswith(f"{path}, line 1: ")


def test_rounding_is_not_a_disagreement():
    near = record()
    near["arms"]["method"]["effect"] *= 1 + 1e-11
    near["arms"]["sham"]["interval"][0] += 1e-13
    ledger.recompute(near)


def test_an_effect_of_nothing_but_rounding_may_round_otherwise():
    same = {str(i): 5.0 + i for i in range(8)}
    almost = {seed: value + (-1) ** int(seed) * 1e-15 * value for seed, value in same.items()}
    quiet = record(scores={"control": same, "method": almost, "sham": same})
    assert 0 < abs(quiet["arms"]["method"]["effect"]) < 1e-14 or quiet["arms"]["method"]["effect"] == 0
    quiet["arms"]["method"]["effect"] += 1e-15
    ledger.recompute(quiet)


def test_other_rules_are_recomputed_without_comparing():
    older = record() | {"verdict": "null", "verdict_version": 0}
    assert ledger.recompute(older)["verdict"] == "supported"


def test_verify_reports_everything_and_stops_at_nothing(tmp_path):
    for slug in ("alpha", "beta", "gamma"):
        for seed in range(2):
            ledger.append(tmp_path / f"{slug}.jsonl", record(slug, seed=seed))
    assert ledger.verify(tmp_path) == ledger.Verification(records=6, problems=())
    rewrite(tmp_path / "alpha.jsonl", 0, lambda r: r["scores"]["control"].update({"0": 0.0}))
    with (tmp_path / "beta.jsonl").open("a") as file:
        file.write('{"torn')
    (tmp_path / "gamma.jsonl").rename(tmp_path / "delta.jsonl")
    found = ledger.verify(tmp_path)
    assert found.records == 3
    assert len(found.problems) == 4
    assert "alpha.jsonl, line 1: the record does not match its hash" in found.problems[0]
    assert "beta.jsonl: a crash cut off its last line" in found.problems[1]
    assert "delta.jsonl, line 2: this is a record of 'gamma'" in found.problems[3]
    assert ledger.verify(tmp_path / "nowhere") == ledger.Verification(records=0, problems=())
