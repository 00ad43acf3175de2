"""Evidence in the feed: real ledgers, tampered ones, findings once each, and lists that stay light."""

import dataclasses
import json
import shutil
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from datetime import datetime

import numpy as np
import pytest
from mail_parts import application
from waiting import SECONDS

from perturbed.evidence import ledger
from perturbed.evidence.verdict import VERDICT_VERSION, judge_record
from perturbed.feed import catalogue, evidence, verdicts
from perturbed.feed.database import Database
from perturbed.feed.evidence import Evidence, Unreadable
from perturbed.feed.verdicts import Short

NOW = 1_795_000_000.0
COMMITTED = ledger.package_folder()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the committed ledgers in the package's place."""
    folder = tmp_path / "package"
    shutil.copytree(COMMITTED, folder)
    monkeypatch.setattr(ledger, "package_folder", lambda: folder)
    return folder


@pytest.fixture
def nothing(tmp_path, monkeypatch):
    """No committed evidence at all."""
    folder = tmp_path / "package"
    monkeypatch.setattr(ledger, "package_folder", lambda: folder)
    return folder


@pytest.fixture
def database(tmp_path):
    base = Database(tmp_path / "feed.sqlite")
    catalogue.seed(base, NOW - 100)
    yield base
    base.close()


def record(slug="meco", *, shift=1.0, seeds=8, **changes):
    """A record whose treatment lies ``shift`` above its control."""
    rng = np.random.default_rng(7)
    base = rng.normal(5.0, 0.5, seeds)
    scores = {
        arm: {str(i): float(x + by) for i, (x, by) in enumerate(zip(base, rng.normal(mean, 0.1, seeds), strict=True))}
        for arm, mean in (("control", 0.0), ("method", shift), ("sham", 0.0))
    }
    raw = {
        "schema": 1, "slug": slug, "title": "A <b>title</b>", "scale": "laptop", "registered": True, "metric": "bits",
        "unit": "bits", "transform": "raw", "direction": "higher", "primary": "method", "reference": "control",
        "sham": "sham", "epsilon": 0.5, "alpha": 0.05, "bounds": [0, None], "seeds": list(range(seeds)),
        "scores": scores, "gates": {}, "smoke": {"control": 5.1}, "curves": {}, "started": "2026-11-20T10:00:00+00:00",
    } | changes  # fmt: skip
    return raw | judge_record(raw)


def own(slug="meco", **fields):
    """Append a record to the user's ledger."""
    return ledger.append(ledger.file_of(ledger.user_folder(), slug), record(slug, **fields))


def rewrite(path, change, *, line=-1, seal=False):
    """Edit one line of a ledger; ``seal`` gives it the hash that fits again."""
    lines = path.read_text(encoding="utf-8").splitlines()
    edited = json.loads(lines[line])
    change(edited)
    if seal:
        edited["hash"] = ledger.record_hash(edited)
    lines[line] = ledger.canonical(edited)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def newest(path):
    """The line of the newest record of the laptop scale, which is the one that is shown."""
    scales = [json.loads(line)["scale"] for line in path.read_text(encoding="utf-8").splitlines()]
    return len(scales) - 1 - scales[::-1].index("laptop")


def lift(edited):
    """Make every treatment score a little better."""
    scores = edited["scores"][edited["primary"]]
    scores |= {seed: score + 1.0 for seed, score in scores.items()}


def committed(slug):
    """The registered records of the paper's scale, read without the package's help."""
    lines = (COMMITTED / f"{slug}.jsonl").read_text(encoding="utf-8").splitlines()
    return [one for one in map(json.loads, lines) if one["scale"] == "laptop" and one["registered"]]


def measured():
    return [item.slug for item in catalogue.catalogue() if (COMMITTED / f"{item.slug}.jsonl").exists()]


def findings(database):
    return [dict(row) for row in database.read().execute("SELECT * FROM finding ORDER BY id")]


def verdict_of(database, slug):
    return database.read().execute("SELECT verdict FROM paper WHERE slug = ?", (slug,)).fetchone()[0]


# --- in short


@pytest.mark.parametrize("slug", measured())
def test_lists_show_the_newest_registered_verdict(slug):
    newest, found = committed(slug)[-1], verdicts.summary_of(slug)
    assert (found.verdict, found.hash, found.own) == (newest["verdict"], newest["hash"], False)
    assert newest["primary"].replace("_", " ") in found.sentence
    assert newest["metric"].replace("_", " ") in found.sentence
    assert ET.fromstring(found.spark).tag.endswith("svg")
    assert found.problem is None
    assert found.verdict == ledger.stored_verdict(slug)


def test_what_was_never_measured_has_no_evidence(nothing):
    for slug in ("meco", "no-such-paper", "../../etc/passwd", "Größe", ""):
        assert verdicts.summary_of(slug) is None
        assert evidence.evidence(slug) is None


def test_every_verdict_is_told_with_the_same_things(nothing):
    own("meco", shift=1.0)
    own("vpt", shift=-1.0)
    own("prox", shift=0.0)
    shorts = [verdicts.summary_of(slug) for slug in ("meco", "vpt", "prox")]
    assert [short.verdict for short in shorts] == ["supported", "contradicted", "null"]
    assert all(short.sentence and short.spark and short.own for short in shorts)
    pages = [evidence.evidence(slug) for slug in ("meco", "vpt", "prox")]
    given = [{one.name for one in dataclasses.fields(page) if getattr(page, one.name)} for page in pages]
    # Nothing is shown of one that is not shown of another, but for what was asked of the sham where there is an effect.
    assert all(fields ^ given[0] <= {"specific"} for fields in given)
    assert len({tuple(tile.label for tile in page.tiles) for page in pages}) == 1
    assert all(page.verdict.meaning and page.sentences for page in pages)


def test_the_sentence_says_which_way_the_metric_went(nothing):
    own("meco", shift=-1.0)
    assert "bits lower with method than with control" in verdicts.summary_of("meco").sentence


def test_a_diverged_study_says_so_without_an_effect(nothing):
    scores = record()["scores"]
    scores["method"]["3"] = None
    own(scores=scores)
    found, page = verdicts.summary_of("meco"), evidence.evidence("meco")
    assert (found.verdict, found.spark) == ("diverged", None)
    assert "seed 3" in found.sentence
    assert (page.effect, page.interval) == (None, None)
    assert ET.fromstring(page.figures["scores"]) is not None


def test_lists_never_import_scipy_torch_or_matplotlib():
    code = (
        "import sys; from perturbed.feed import catalogue, verdicts\n"
        "shown = [verdicts.summary_of(item.slug) for item in catalogue.catalogue()]\n"
        "print(sum(one is not None for one in shown) >= 8, "
        "[m for m in ('scipy', 'torch', 'matplotlib', 'transformers', 'perturbed.methods') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS, check=True)
    assert done.stdout.strip() == "True []"


def test_a_list_asked_for_again_reads_no_ledger(monkeypatch):
    slugs = [item.slug for item in catalogue.catalogue()]
    first = [verdicts.summary_of(slug) for slug in slugs]
    monkeypatch.setattr(ledger, "read", None)  # to call it would raise, and the answer would say so
    started = time.process_time()
    assert [verdicts.summary_of(slug) for slug in slugs] == first
    assert time.process_time() - started < 0.03


def test_a_record_of_other_rules_is_judged_anew(nothing):
    path = ledger.file_of(ledger.user_folder(), "meco")
    own(shift=1.0)
    rewrite(path, lambda old: old.update(verdict="contradicted", verdict_version=VERDICT_VERSION + 1), seal=True)
    assert verdicts.summary_of("meco").verdict == "supported"


# --- the whole of it


@pytest.mark.parametrize("slug", measured())
def test_a_page_shows_what_the_record_says(slug):
    newest, page = committed(slug)[-1], evidence.evidence(slug)
    result = newest["arms"][newest["primary"]]
    assert isinstance(page, Evidence)
    assert (page.hash, page.verdict.word) == (newest["hash"], newest["verdict"])
    assert page.effect == pytest.approx(result["effect"], rel=1e-9)
    assert page.interval == pytest.approx(result["interval"], rel=1e-9)
    assert page.p == pytest.approx(result["p"])
    assert page.seeds == tuple(newest["seeds"])
    assert page.claim_paper == newest["claim"]["paper"]
    assert page.command == f"perturbed run {slug} --scale laptop"
    assert {arm.name for arm in page.arms} == set(newest["scores"]) - {"control"}
    assert page.arms[0].name == newest["primary"]
    assert {gate.name.replace(" ", "_") for gate in page.gates} == {name.replace(" ", "_") for name in newest["gates"]}
    assert page.cost is not None
    assert set(page.cost.arms) == set(newest["scores"])
    assert page.versions == newest["versions"]
    assert ("Content hash (SHA-256)", newest["hash"]) in page.origin
    told = json.loads(json.dumps(page.as_json(), allow_nan=False))
    assert told["arms"][0]["verdict"]["word"] == newest["verdict"]
    assert told["figures"] == list(page.figures)


def test_earlier_records_and_other_scales_are_history():
    page = evidence.evidence("lirpa")
    lines = [json.loads(line) for line in (COMMITTED / "lirpa.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = [one["hash"][:12] for one in reversed(lines) if one["hash"] != page.hash]
    assert expected
    assert [past.hash for past in page.history] == expected
    assert [past.verdict.word for past in page.history if past.scale == "laptop"][-1] == committed("lirpa")[0][
        "verdict"
    ]
    assert all(past.started and past.effect and not past.own for past in page.history)


def test_the_users_own_run_stands_beside_committed_evidence_and_not_in_its_place(package, database):
    verdicts.sync(database, NOW)
    before = findings(database)
    mine = own("ul2", shift=5.0)
    assert verdicts.sync(database, NOW + 1) == 0
    assert (verdict_of(database, "ul2"), findings(database)) == ("contradicted", before)
    page = evidence.evidence("ul2")
    assert (page.verdict.word, page.own) == ("contradicted", False)
    assert [(past.hash, past.verdict.word) for past in page.history if past.own] == [(mine["hash"][:12], "supported")]


def test_changed_and_smoke_runs_are_no_evidence(nothing, database):
    own(registered=False)
    own(scale="smoke", seeds=1)
    assert verdicts.summary_of("meco") is None
    assert evidence.evidence("meco") is None
    assert verdicts.sync(database, NOW) == 0
    assert verdict_of(database, "meco") is None
    kept = own()
    own(registered=False, shift=-1.0)
    assert evidence.evidence("meco").hash == kept["hash"]
    assert evidence.evidence("meco").history == ()


# --- ledgers that cannot be believed


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: rewrite(path, lift), "does not match its hash"),
        (lambda path: path.write_text("not json\n" + path.read_text(encoding="utf-8")), "not JSON"),
        (lambda path: rewrite(path, lambda old: old.pop("scores"), line=newest(path), seal=True), "lacks scores"),
        (lambda path: rewrite(path, lambda old: old.update(arms={}), line=newest(path), seal=True), "cannot be used"),
        (
            lambda path: rewrite(path, lambda old: old.update(arms=3, scores=[]), line=newest(path), seal=True),
            "cannot be used",
        ),
        (lambda path: path.write_bytes(b"\xff\xfe\x00 {}\n"), "not JSON"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
    ],
)
def test_a_damaged_ledger_is_told_at_its_paper_and_touches_no_other(package, database, damage, reason):
    path = package / "hubble.jsonl"
    verdicts.sync(database, NOW)
    assert verdict_of(database, "hubble") == "supported"
    damage(path)
    short = verdicts.summary_of("hubble")
    assert (short.verdict, short.spark, short.hash) == ("unreadable", None, None)
    assert short.sentence.startswith("The evidence could not be read: ")
    assert reason in short.problem
    page = evidence.evidence("hubble")
    assert isinstance(page, Unreadable)
    assert reason in page.problem or page.problem.startswith("the record of 'hubble'")
    assert "x" not in page.figures
    assert verdicts.summary_of("pag").verdict == "inconclusive"
    assert isinstance(evidence.evidence("pag"), Evidence)
    assert verdicts.sync(database, NOW + 1) == 0
    assert verdict_of(database, "hubble") is None
    assert verdict_of(database, "pag") == "inconclusive"


def test_a_resealed_score_is_found_when_the_page_recomputes(package):
    path = package / "hubble.jsonl"
    rewrite(path, lift, line=newest(path), seal=True)
    assert committed("hubble")[-1]["hash"] not in path.read_text()
    assert isinstance(verdicts.summary_of("hubble"), Short)
    page = evidence.evidence("hubble")
    assert isinstance(page, Unreadable)
    assert "does not follow from its scores" in page.problem
    assert page.as_json() == {"slug": "hubble", "problem": page.problem}


def test_a_damaged_ledger_of_the_user_leaves_committed_evidence(package):
    own("ul2")
    rewrite(ledger.file_of(ledger.user_folder(), "ul2"), lift)
    assert verdicts.summary_of("ul2").verdict == "contradicted"
    page = evidence.evidence("ul2")
    assert page.verdict.word == "contradicted"
    assert "does not match its hash" in page.notes[0]


def test_an_old_record_that_cannot_be_shown_does_not_hide_the_new_one(nothing):
    path = ledger.file_of(ledger.user_folder(), "meco")
    own(shift=-1.0)
    rewrite(path, lambda old: old.update(arms={}), seal=True)
    kept = own(shift=1.0)
    page = evidence.evidence("meco")
    assert (page.hash, page.history) == (kept["hash"], ())
    assert "left out" in page.notes[0]


def test_a_line_that_a_crash_cut_off_leaves_the_records_before_it(nothing):
    own()
    path = ledger.file_of(ledger.user_folder(), "meco")
    with path.open("a", encoding="utf-8") as file:
        file.write('{"schema":1,"slug":"me')
    with pytest.warns(ledger.TornLineWarning):
        assert verdicts.summary_of("meco").verdict == "supported"


def test_a_ledger_that_was_mended_is_read_again(package):
    path = package / "hubble.jsonl"
    whole = path.read_bytes()
    rewrite(path, lift)
    assert verdicts.summary_of("hubble").verdict == "unreadable"
    path.write_bytes(whole)
    assert verdicts.summary_of("hubble").verdict == "supported"


# --- findings


def test_a_verdict_is_a_finding_when_it_comes_and_when_it_changes(database):
    verdicts.sync(database, NOW)
    found = {row["record"]: row for row in findings(database)}
    for slug in measured():
        before = None
        for one in committed(slug):
            row = found.pop(one["hash"], None)
            assert (row is not None) == (one["verdict"] != before), "the same verdict again is nothing new"
            if row is not None:
                assert row["verdict"] == one["verdict"]
                assert row["at"] == datetime.fromisoformat(one["started"]).timestamp()
                assert row["seen"] == NOW
            before = one["verdict"]
        assert verdict_of(database, slug) == before
    assert not found
    assert len(committed("sltrain")) > 1, "else nothing was left out"
    for item in catalogue.catalogue():
        assert item.slug in measured() or verdict_of(database, item.slug) is None


def test_a_second_sync_writes_nothing_and_reads_no_ledger(database, monkeypatch):
    verdicts.sync(database, NOW)
    before, written = findings(database), database.read().total_changes
    monkeypatch.setattr(ledger, "read", None)
    started = time.process_time()
    assert verdicts.sync(database, NOW + 60) == 0
    assert time.process_time() - started < 0.05
    assert (findings(database), database.read().total_changes) == (before, written)


def test_a_new_record_in_the_users_ledger_is_a_finding_and_the_papers_verdict(nothing, database):
    assert verdicts.sync(database, NOW) == 0
    first = own(shift=1.0)
    assert verdicts.sync(database, NOW + 1) == 1
    assert verdict_of(database, "meco") == "supported"
    second = own(shift=0.0, started="2026-11-21T10:00:00+00:00")
    assert verdicts.sync(database, NOW + 2) == 1
    assert verdict_of(database, "meco") == "null"
    assert [row["record"] for row in findings(database)] == [first["hash"], second["hash"]]
    assert [row["verdict"] for row in findings(database)] == ["supported", "null"]
    changed = database.read().execute("SELECT changed FROM paper WHERE slug = 'meco'").fetchone()[0]
    assert changed == NOW + 2
    assert [past.verdict.word for past in evidence.evidence("meco").history] == ["supported"]


def test_a_new_record_of_the_package_is_a_finding_too(package, database):
    verdicts.sync(database, NOW)
    before = len(findings(database))
    new = ledger.append(package / "pag.jsonl", record("pag", shift=-1.0))
    assert verdicts.sync(database, NOW + 1) == 1
    assert findings(database)[before:][0]["record"] == new["hash"]
    assert verdict_of(database, "pag") == verdicts.summary_of("pag").verdict == "contradicted"


def test_papers_that_are_not_there_yet_are_not_forgotten(tmp_path):
    base = Database(tmp_path / "empty.sqlite")
    assert verdicts.sync(base, NOW) == 0
    catalogue.seed(base, NOW)
    assert verdicts.sync(base, NOW) >= 8
    base.close()


def test_evidence_that_is_gone_takes_its_verdict_along(package, database):
    verdicts.sync(database, NOW)
    (package / "ul2.jsonl").unlink()
    verdicts.sync(database, NOW + 1)
    assert verdict_of(database, "ul2") is None
    assert verdicts.summary_of("ul2") is None


# --- figures


def test_figures_are_whole_svg_files_and_kept_under_the_records_hash(package, monkeypatch):
    page = evidence.evidence("pag")
    assert set(page.figures) == set(page.figure_titles) >= {"scores", "differences"}
    drawn = {name: page.figures[name] for name in page.figures}
    for name, svg in drawn.items():
        root = ET.fromstring(svg)
        assert root.get("width")
        assert page.figure_titles[name] in "".join(root.itertext())
    monkeypatch.setattr(evidence, "_draw", None)
    again = evidence.evidence("pag")
    assert {name: again.figures[name] for name in again.figures} == drawn
    with pytest.raises(KeyError):
        page.figures["../../feed"]


def test_a_figure_of_names_with_markup_is_still_xml(nothing):
    fields = record()
    odd = 'a"b<c>&d'
    fields["scores"][odd] = fields["scores"].pop("sham")
    own(**{name: fields[name] for name in ("scores",)}, sham=odd, curves={odd: {odd: {"0": [[0, 1.0], [5, 0.5]]}}})
    page = evidence.evidence("meco")
    assert set(page.figures) == {"scores", "differences", "curve-0"}
    for svg in page.figures.values():
        assert not list(ET.fromstring(svg).iter("c"))
    assert ET.fromstring(verdicts.summary_of("meco").spark) is not None


def test_arms_that_were_combined_have_their_interaction(nothing):
    control = record()["scores"]["control"]
    scores = {"control": control}
    for arm, by in (("a", 1.0), ("b", 2.0), ("a+b", 2.5)):
        scores[arm] = {seed: score + by + 0.01 * int(seed) for seed, score in control.items()}
    unknown, known = (
        {"effect": None, "interval": None, "p": None},
        {"effect": -0.5, "interval": [-0.6, -0.4], "p": 0.01},
    )
    own(scores=scores, primary="a+b", sham=None, interaction={"a+a": unknown, "a+b": known})
    page = evidence.evidence("meco")
    assert [(one.name, one.effect.startswith("−0.5")) for one in page.interactions] == [("a+a", False), ("a+b", True)]
    assert [title for title in page.figure_titles.values() if "Interaction" in title] == ["Interaction: a+b"]
    drawn = "".join(ET.fromstring(page.figures["interaction-0"]).itertext())
    assert "a+b" in drawn


def test_further_questions_are_told_with_what_came_out(nothing, tmp_path):
    control = record()["scores"]["control"]
    scores = {"control": control, "a": {seed: score + 1 + 0.01 * int(seed) for seed, score in control.items()}}
    asked = {
        "weights": {"a": 1, "control": -1}, "asks": "speed is <b>the same</b>", "metric": "speed", "unit": "m/s",
        "direction": "equal", "epsilon": 0.5, "transform": "raw",
    }  # fmt: skip
    own(scores=scores, primary="a", sham=None, secondary={"speed": scores}, contrasts={"speed": asked})
    (question,) = evidence.evidence("meco").questions
    assert (question.asks, question.weighs) == ("speed is <b>the same</b>", "speed of a − control, in m/s")
    assert (question.claimed, question.verdict.word) == ("equal, ε ±0.5", "contradicted")
    assert question.effect.startswith("+1.0")
    _, client = application(tmp_path)
    page = client.get("/papers/2501.01956").text
    assert "Speed is &lt;b&gt;the same&lt;/b&gt;<small>speed of a − control, in m/s; claimed: equal, ε ±0.5" in page


def test_two_threads_draw_what_one_draws(package, tmp_path, monkeypatch):
    page = evidence.evidence("ul2")
    alone = {name: page.figures[name] for name in page.figures}
    monkeypatch.setenv("PERTURBED_HOME", str(tmp_path / "other"))  # nothing drawn there yet
    drawn, threads = {}, []
    for name in page.figures:
        threads.append(threading.Thread(target=lambda name=name: drawn.update({name: page.figures[name]})))
        threads[-1].start()
    for thread in threads:
        thread.join(timeout=SECONDS)
    assert drawn == alone
    assert list((tmp_path / "other" / "cache" / "feed-figures").glob("*.svg"))


def test_where_nothing_can_be_kept_figures_are_drawn_all_the_same(package, tmp_path, monkeypatch):
    page = evidence.evidence("ul2")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PERTURBED_HOME", str(tmp_path / "file"))
    assert ET.fromstring(page.figures["scores"]) is not None
